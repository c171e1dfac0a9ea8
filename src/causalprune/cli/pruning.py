"""Commands that make and check pruned checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from causalprune.cli import options as opt
from causalprune.cli.options import app, console
from causalprune.core import OptionError

if TYPE_CHECKING:
    from causalprune.runs import ModelSpec


@app.command()
@opt.of_model
def prune(
    spec: "ModelSpec",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned checkpoint.")],
    method: opt.MethodOrOwn = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Share of the prunable weights set to zero (default 0.2, or the pattern's own)."),
    ] = None,
    damping: opt.Damping = 0.01,
    effects: Annotated[
        Path | None,
        typer.Option(
            help="effects.json that `attribute` wrote; for --method cap, which else measures all heads first (long)."
        ),
    ] = None,
    task: opt.Task = ["gsm8k"],  # noqa: B006
    n: opt.N = 128,
    subsets: opt.Subsets = 3,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    objective: opt.Objective = "task",
    general: opt.General = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
    overwrite: opt.Overwrite = False,
    stream: opt.Stream = False,
    cache_gib: opt.HiddenGib = 1.0,
) -> None:
    """Prune a model and save it as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    With `cap` and no `--effects`, the heads are measured first. A stopped run goes on where it was.
    """
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.runs import CalibrationSpec, Options, parse_method, prune_checkpoint, prune_streamed

    share = opt.general_share(objective, general)
    calibration = CalibrationSpec(tuple(task), n, subsets, seed, max_tokens, chat, share)
    named = method or ("causal" if effects is None else "cap")
    wanted = parse_method(named, _sparsity(sparsity), seed, damping)
    if effects is not None and "effects" not in wanted.needs:
        raise OptionError(f"--effects are for cap, and {wanted.criterion} does not use them: leave them out")
    options = Options(data_dir, batch_tokens, overwrite, shown, cache_gib=cache_gib)
    if stream:
        done = prune_streamed(spec, wanted, output, calibration, effects, options)
        achieved = tables.sparsity(done.weights, done.zeros, done.unrouted)
    else:
        pruned = prune_checkpoint(spec, wanted, output, calibration, effects, options)
        counts = [(keep.numel(), int((~keep).sum())) for keep in pruned.keep.values()]
        weights, zeros = (sum(column) for column in zip(*counts, strict=True))
        achieved = tables.sparsity(weights, zeros, pruned.unrouted)
    console.print(achieved, highlight=False)
    console.print(f"saved: {output}")


@app.command()
@opt.of_model
def sweep(
    spec: "ModelSpec",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Run folder; a stopped sweep goes on there.")
    ],
    on: Annotated[
        list[str], typer.Option(help="Tasks that must hold, as gsm8k_nll:100 or strategyqa; repeatable.")
    ],
    keep: Annotated[
        float, typer.Option(help="Share of dense's accuracy or likelihood per token to keep.")
    ] = 0.95,
    certain: Annotated[
        bool, typer.Option("--certain", help="The far end of the 95 % interval must keep it too.")
    ] = False,
    method: opt.MethodName = "causal",
    task: opt.Task = ["gsm8k"],  # noqa: B006
    n: opt.N = 48,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    objective: opt.Objective = "task",
    general: opt.General = None,
    damping: opt.Damping = 0.01,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
) -> None:
    """Find the highest sparsity, in steps of 5 %, that keeps a share of the task: at most five prunings.

    Supposes that more sparsity is never better. The table shows every sparsity that was tried, with intervals.
    """
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.runs import CalibrationSpec, Recipe, candidates
    from causalprune.runs import sweep as swept

    share = opt.general_share(objective, general)
    recipe = Recipe(
        spec,
        CalibrationSpec(tuple(task), n, seed=seed, max_tokens=max_tokens, chat=chat, general=share),
        methods=(method,),
        sparsities=candidates(method),
        tasks=tuple(on),
        seed=seed,
        batch_tokens=batch_tokens,
        damping=damping,
    )
    tried = swept(recipe, keep, output, certain=certain, data_dir=data_dir, stage=shown)
    console.print(tables.swept(tried))
    best = max((one.sparsity for one in tried if one.holds), default=None)
    found = (
        "no sparsity keeps it"
        if best is None
        else f"--method {method} --sparsity {best:g}, with the same other options, keeps it"
    )
    console.print(f"{found}; all results: {output / 'results.json'}")


@app.command()
@opt.of_model
def shrink(
    spec: "ModelSpec",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the smaller checkpoint.")],
    parameters: opt.FewerParameters = None,
    neurons: opt.FewerNeurons = 0.0,
    kv_groups: opt.FewerGroups = 0.0,
    experts: opt.FewerExperts = 0.0,
    layers: opt.FewerLayers = 0.0,
    by: opt.By = "effect",
    update: opt.Update = "refit",
    task: opt.Task = ["gsm8k"],  # noqa: B006
    n: opt.N = 48,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    objective: opt.Objective = "task",
    general: opt.General = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
    overwrite: opt.Overwrite = False,
) -> None:
    """Remove units for good: a smaller and faster model that every runtime loads, chosen by effect on the task."""
    from dataclasses import asdict

    from causalprune.checkpoints import check_destination
    from causalprune.core import shown
    from causalprune.runs import CalibrationSpec, Options, prepared
    from causalprune.shrinking import Shares, Shrinking, ledgers, save_shrunk, shares_for
    from causalprune.shrinking import shrink as smaller

    if parameters is not None and any((neurons, kv_groups, experts, layers)):
        raise OptionError("--parameters chooses the share of neurons itself: leave the other shares out")
    shares = None if parameters is not None else Shares(neurons, kv_groups, experts, layers)
    check_destination(output, overwrite)
    share = opt.general_share(objective, general)
    wanted = CalibrationSpec(tuple(task), n, 1, seed, max_tokens, chat, share)
    decoder, calibration = prepared(spec, wanted, Options(data_dir, batch_tokens, stage=shown))
    shares = shares or shares_for(decoder, parameters or 0.0)
    shrunk = smaller(
        decoder,
        shares,
        calibration,
        Shrinking(by, update, seed, batch_tokens),
        ledger=(ledger := output.with_name(f"{output.name}.attribution")),
        stage=shown,
    )
    how = {"by": by, "seed": seed, "shares": asdict(shares)}
    save_shrunk(shrunk, output, calibration, how, overwrite=overwrite)
    for path in ledgers(ledger).values():
        path.unlink(missing_ok=True)
    before, after = shrunk.parameters_before, shrunk.parameters_after
    if unknown := shrunk.unrouted:
        text = f"{len(unknown)} experts, put before others, got no token that tells their worth"
        console.print(f"{text}: {', '.join(unknown[:5])}")
    console.print(f"{before:,} parameters before, {after:,} after ({1 - after / before:.1%} fewer): {output}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint written by causalprune, or made from one.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The pruned checkpoint that FOLDER was made from (fine-tuned, merged)."),
    ] = None,
) -> None:
    """Recount the zeros of a checkpoint and compare its files with the manifest; exit code 1 if zeros were lost, not for a file that changed."""
    from causalprune.checkpoints import verify as check
    from causalprune.cli import tables

    report = check(folder, against=against)
    print(tables.verification(report))
    if not report.sparsity_holds:
        raise typer.Exit(1)


@app.command()
def reapply(
    pruned: Annotated[Path, typer.Argument(help="A checkpoint written by causalprune: where the zeros are.")],
    model: Annotated[Path, typer.Argument(help="The same model after fine-tuning or merging, as a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint with its zeros.")],
    overwrite: opt.Overwrite = False,
) -> None:
    """Set what is zero in PRUNED to zero in MODEL again, after adapters were merged or zeros were lost in training."""
    from causalprune.checkpoints import reapply as restore

    restored = restore(pruned, model, output, overwrite=overwrite)
    console.print(f"{restored:,} weights set back to zero", highlight=False)
    console.print(f"saved: {output}")


def _sparsity(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"sparsity must be a number between 0 and 1 such as 0.2, not {text!r}") from None
