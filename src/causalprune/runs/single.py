"""One model at a time, as the command line asks for it: attribute, stability, prune, evaluate."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from causalprune.attribution import (
    DRAWS,
    Cluster,
    Estimator,
    Pairs,
    Passes,
    Question,
    Trial,
    fill,
    planned,
    stability,
)
from causalprune.attribution import attribute as measure
from causalprune.calibration import Chat, check_subsets, date_of, on_date, with_limit
from causalprune.checkpoints import (
    EFFECTS,
    check_destination,
    check_room,
    load_effects,
    resolve,
    save,
    save_effects,
    warn_unpacked,
)
from causalprune.core import (
    Calibration,
    CheckpointError,
    Decoder,
    Effects,
    EvalResult,
    Ledger,
    OptionError,
    Stage,
    forget,
    git_commit,
    quiet,
    read_rows,
    say,
    size_of,
    versions,
)
from causalprune.evaluation import (
    AND,
    Settings,
    check_tasks,
    digests,
    evaluate,
    kept_rows,
    results_in,
    same_as_before,
    together,
    write_json,
    write_results,
)
from causalprune.models import check_folder, device_of, skeleton, tokenizer_of
from causalprune.pruning import Method, Pruned, begun, cap_units, manifest, prune
from causalprune.runs.cells import load
from causalprune.runs.fitting import check_stored, room_of
from causalprune.runs.jobs import task_jobs
from causalprune.runs.recipe import AttributionSpec, CalibrationSpec, ModelSpec
from causalprune.runs.rows import writes_own
from causalprune.runs.traces import calibrated
from causalprune.streaming import Seen, Streamed, check_streams, prune_stream


@dataclasses.dataclass(frozen=True)
class Options:
    """How work is done: where data lies, tokens per forward pass, whether outputs are replaced, how to report.

    `share` (i, n) does the i-th of n parts of an attribution, in files of its own; a `cluster` does its jobs.
    `cache_gib` is the memory for hidden states of a streaming run.
    """

    data_dir: Path | str | None = None
    batch_tokens: int = 2048
    overwrite: bool = False
    stage: Stage = quiet
    share: tuple[int, int] = (1, 1)
    cluster: Cluster | None = None
    cache_gib: float = 1.0

    def named(self, file: str) -> str:
        """Return the name of a file of this share: `effects.2-of-4.json`."""
        stem, dot, suffix = file.partition(".")
        return file if self.share[1] == 1 else f"{stem}.{self.share[0]}-of-{self.share[1]}{dot}{suffix}"


def prepared(
    spec: ModelSpec,
    wanted: CalibrationSpec | None,
    options: Options,
    begun: str = "",
    check: Callable[[Decoder], None] = lambda _: None,
) -> tuple[Decoder, Calibration]:
    """Load a model, `check` it, and draw its calibration examples, if any are wanted; `begun` says what a stopped run has left."""
    decoder = _loaded(spec, options, begun)
    check(decoder)
    if wanted is None:
        return decoder, Calibration((), ())
    with options.stage("calibration data") as progress:
        return decoder, calibrated(decoder, wanted, options.data_dir, on_progress=progress)


def _loaded(spec: ModelSpec, options: Options, begun: str = "") -> Decoder:
    with options.stage("loading model") as progress:
        say(progress, note=f"going on: {begun}" if begun else "", jobs={})
        return load(spec)


def attribute(
    spec: ModelSpec,
    wanted: CalibrationSpec,
    folder: Path,
    options: Options = Options(),
    attribution: AttributionSpec = AttributionSpec(),
) -> Effects:
    """Measure the units of a model and leave `effects.json` and the ledger in `folder`."""
    if options.cluster is not None and options.share[1] > 1:
        raise OptionError("a cluster does all jobs of a run: leave out --shard, or --executor ray")
    decoder, calibration = prepared(spec, wanted, options)
    check_subsets(len(calibration.examples), wanted.subsets)
    if options.cluster is not None:
        how = attribution.method(options.batch_tokens)
        question = attribution.question()
        make = functools.partial(_passes, spec, calibration, question, how)
        with options.stage("attribution on the cluster") as progress:
            plan = planned(decoder, calibration, question, how)
            gpus = options.cluster.gpus or float(device_of(spec.device).startswith("cuda"))
            cluster = dataclasses.replace(options.cluster, gpus=gpus)
            fill(plan, folder / "attribution.ledger", make, cluster, progress)
    return measured(decoder, calibration, folder, options, attribution)


def _passes(spec: ModelSpec, calibration: Calibration, question: Question, how: Estimator) -> Passes:
    """Build what a worker of a cluster measures with."""
    return Passes(planned(load(spec), calibration, question, how))


def measured(
    decoder: Decoder,
    calibration: Calibration,
    folder: Path,
    options: Options,
    wanted: AttributionSpec = AttributionSpec(),
) -> Effects:
    """Measure the units of a loaded model and leave `effects.json` and the ledger in `folder`."""
    if paired := sum(example.instead is not None for example in calibration.examples):
        warnings.warn(
            f"{paired} examples come with a wrong answer (`instead`), which effects here do not look at: they are of the "
            "target alone, and `causalprune circuit` compares the two",
            stacklevel=2,
        )
    with options.stage("attribution") as progress:
        effects = measure(
            decoder,
            calibration,
            wanted.question(),
            dataclasses.replace(wanted.method(options.batch_tokens), share=options.share),
            ledger=folder / options.named("attribution.ledger"),
            on_progress=progress,
        )
    save_effects(effects, folder / options.named(EFFECTS))
    return effects


def dated(decoder: Decoder, chat: Chat) -> dict[str, str]:
    """Return what ledgers say of the day that prompts carry; nothing where they carry none."""
    day = None if chat == "off" else date_of(decoder.tokenizer)
    return {} if day is None else {"date": day}


def check_stability(
    spec: ModelSpec,
    wanted: CalibrationSpec,
    folder: Path,
    options: Options = Options(),
    attribution: AttributionSpec = AttributionSpec(),
    top: int = Pairs().top,
) -> dict[str, Any]:
    """Measure how far effects can be trusted, and leave `stability.json` and the ledgers in `folder`.

    Each source of `wanted` is a calibration of its own, of `n` problems in each of five draws.
    """
    decoder = _loaded(spec, options)
    with options.stage("calibration data") as progress:
        calibrations = {}
        for source in wanted.task:
            name, count = with_limit(source)
            n = (count or wanted.n) * DRAWS
            own = dataclasses.replace(wanted, task=(name,), n=n, subsets=DRAWS)
            calibrations[source] = calibrated(decoder, own, options.data_dir, on_progress=progress)
            check_subsets(len(calibrations[source].examples), DRAWS)
    found = stability(
        decoder,
        calibrations,
        folder,
        Trial(attribution.question(), Pairs(top, min(wanted.n, Pairs().sequences)), options.batch_tokens),
        stage=options.stage,
    )
    description = {"model": spec.name, "sources": list(wanted.task), "versions": versions()}
    write_json(folder / "stability.json", {**found, "description": description, "git_commit": git_commit()})
    return found


def prune_checkpoint(
    spec: ModelSpec,
    method: Method,
    output: Path,
    wanted: CalibrationSpec,
    effects_path: Path | None = None,
    options: Options = Options(),
) -> Pruned:
    """Prune a model and save it; heads that `cap` needs are measured first where `effects_path` is None.

    The ledger of such a measurement lies beside the output, in `<output>.attribution`; what a stopped run had finished in
    `<output>.pruning`, until the output is there.
    """
    check_destination(output, options.overwrite)
    wanted = wanted.settled(writes_own(method))
    needs, kept_in = method.needs, output.with_name(f"{output.name}.pruning")
    calibration, effects, found = None, None, begun(kept_in)

    def check(decoder: Decoder) -> None:
        warn_unpacked(decoder)
        check_room(output, room_of(decoder, kept_in if method.takes_long else None))

    if method.needs_calibration or ("effects" in needs and effects_path is None):
        decoder, calibration = prepared(spec, wanted, options, found, check)
    else:
        check(decoder := _loaded(spec, options, found))
    if "effects" in needs and effects_path is not None:
        effects = load_effects(effects_path, decoder)
    elif "effects" in needs and calibration is not None:
        check_subsets(len(calibration.examples), wanted.subsets)
        ledger, heads = output.with_name(f"{output.name}.attribution"), AttributionSpec(cap_units(decoder))
        effects = measured(decoder, calibration, ledger, options, heads)
    with options.stage("pruning") as progress:
        pruned = prune(
            decoder,
            method,
            calibration=calibration,
            effects=effects,
            max_batch_tokens=options.batch_tokens,
            kept_in=kept_in,
            on_progress=progress,
        )
    with options.stage("saving"):
        size = dict.fromkeys(("before", "after"), dataclasses.asdict(size_of(decoder)))
        record = {**manifest(pruned, calibration, effects), "size": size}
        save(decoder, output, manifest=record, keep=pruned.keep, effects=effects, overwrite=options.overwrite)
    forget(kept_in)
    return pruned


def prune_streamed(
    spec: ModelSpec,
    method: Method,
    output: Path,
    wanted: CalibrationSpec,
    effects_path: Path | None = None,
    options: Options = Options(),
) -> Streamed:
    """Prune a checkpoint on disk without loading the model; `cap` needs effects that were measured before."""
    check_stored(spec)
    wanted, effects = wanted.settled(own=False), None  # a model in files does not write
    if "effects" in method.needs and effects_path is not None:
        effects = load_effects(effects_path)
    folder, calibration = Path(resolve(spec.name)).expanduser(), None
    check_destination(output, options.overwrite)
    check_folder(folder)
    check_streams(method, effects=effects is not None)
    if method.needs_calibration:
        with options.stage("calibration data"):
            bare = dataclasses.replace(skeleton(folder), tokenizer=tokenizer_of(folder))
            on_date(bare.tokenizer, spec.date)
            calibration = calibrated(bare, wanted, options.data_dir)
    device = torch.device(device_of(spec.device))
    seen = Seen(calibration, options.batch_tokens, options.cache_gib, effects, device)
    with options.stage("pruning") as progress:
        return prune_stream(
            folder, output, method, seen=seen, overwrite=options.overwrite, on_progress=progress
        )


def evaluate_model(
    spec: ModelSpec, tasks: Sequence[str], settings: Settings, output: Path, options: Options = Options()
) -> list[EvalResult]:
    """Measure a model on tasks and write the results to the JSON file `output`.

    Finished tasks are kept in `<output>.ledger` until all are there: when stopped, the same call goes on after the last.
    """
    check_tasks(tasks, settings.scorers)
    if settings.phrases and not any(with_limit(task)[0].endswith("_phrases") for task in tasks):
        raise OptionError("--phrases: no measure looks for them: name one, as --on gsm8k_phrases")
    if output.exists() and not options.overwrite:
        raise CheckpointError(f"{output} exists: choose another name, or pass --overwrite")
    path = output.with_name(f"{output.name}.ledger")
    done = read_rows(path).keys() if path.exists() else ()
    with options.stage("loading model") as progress:
        note = f"going on: {len(done)} of {len(tasks)} tasks done" if done else ""
        jobs = task_jobs(tasks, settings)
        over = [AND.join(group) for group in together(tasks) if set(group) <= set(done)]
        say(progress, note=note, jobs=jobs | dict.fromkeys(over, 0.0))
        decoder = load(spec)
    identity = {
        "model": decoder.fingerprint,
        "settings": settings.identity(),
        **dated(decoder, settings.chat),
        **({"data": data} if (data := digests(tasks, settings.scorers)) else {}),
    }
    unchanged = functools.partial(same_as_before, tasks, settings, decoder)
    with Ledger(path, identity, unchanged=unchanged) as book:
        for group in together([task for task in tasks if task not in book.rows]):
            with options.stage(AND.join(group)) as progress:
                found = evaluate(decoder, group, settings, on_progress=progress)
            for number, task in enumerate(group):
                book.append(task, kept_rows(found if len(group) == 1 else [found[number]]))
        results = [result for task in tasks for result in results_in(book.rows[task])]
    write_results(output, results, {"model": spec.name, "versions": versions(), "git_commit": git_commit()})
    path.unlink()
    return results
