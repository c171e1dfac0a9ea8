"""Files that a model can become, measured one after the other; what is finished is on disk, as are the smaller models."""

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from causalprune.calibration import with_limit
from causalprune.checkpoints import MANIFEST, check_room, free_at, portable, resolve, save
from causalprune.core import (
    Calibration,
    Decoder,
    EvalResult,
    Ledger,
    MismatchError,
    ModelError,
    OptionError,
    forget,
    say,
    size_of,
)
from causalprune.evaluation import (
    Settings,
    evaluate,
    evaluation_contents,
    higher_is_better,
    kept_rows,
    results_in,
)
from causalprune.pruning import TRAINS
from causalprune.runs.cells import load, outlined
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated
from causalprune.shipping import (
    SCRATCH,
    Exporting,
    Importance,
    Limit,
    Point,
    can_keep,
    half,
    importance,
    kept,
    load_importance,
    plans,
    rounded,
    save_importance,
    worse,
)
from causalprune.shrinking import Budget, Offers, Shrinking, check_budget, leftovers, shrink

MIXES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
PLAN, MADE, EXAMPLES = "plan/", "made/", "examples"
"""Keys of a ledger besides those of what was measured."""
EFFECTS = "effects"
"""What the units of the start are worth, which does not depend on a share."""


@dataclass(frozen=True)
class Asked:
    """What is asked for: a limit, the measure that decides, and what is tried.

    `shares` of all parameters go in turn, as long as the one before paid; `update` is how the others make up for them,
    `file` how files are made. Smaller models come from the model, or from a checkpoint of it to `start` from.
    """

    limit: Limit
    on: str
    settings: Settings = field(default_factory=Settings)
    mixes: tuple[str, ...] = MIXES
    shares: tuple[float, ...] = SHARES
    update: str = "distill"
    file: Exporting = field(default_factory=Exporting)
    start: str | None = None


@dataclass(frozen=True)
class Start:
    """The checkpoint that smaller models come from: the model itself, or one of it that was pruned; and the share that it `lacks`."""

    spec: ModelSpec
    lacks: float = 0.0

    def total(self, share: float) -> float:
        """Return the share of the model's parameters that a model without a share of this checkpoint's lacks."""
        return round(1 - (1 - self.lacks) * (1 - share), 4)


@dataclass
class Search:
    """A search under way: `book` holds what is finished, `shares` of all parameters go in turn, `fingerprint` is the whole model's."""

    spec: ModelSpec
    wanted: CalibrationSpec
    output: Path
    asked: Asked
    options: Options
    book: Ledger
    start: Start
    fingerprint: str

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Shares of all parameters that models lack: what the start lacks first, where that is some."""
        own = [self.start.total(share) for share in self.asked.shares]
        return (self.start.lacks, *own) if self.start.lacks else tuple(own)

    @property
    def work(self) -> Path:
        """Folder of what is needed on the way."""
        return self.output / "work"

    @cached_property
    def dense(self) -> EvalResult:
        """The result of the model as it is, on the deciding half."""
        return half(self.result(0.0, ""), 0)

    @cached_property
    def calibration(self) -> Calibration:
        """The examples that calibrate every model, none of them among those that are measured."""
        decoder = self.load(0.0)
        with self.options.stage("calibration data") as progress:
            exclude = evaluation_contents([self.asked.on], self.asked.settings, decoder)
            return calibrated(decoder, self.wanted, self.options.data_dir, exclude, progress)

    def begin(self, decoder: Decoder) -> None:
        """Have a folder of the whole model, and room for what comes of it, said before it is taken."""
        self.work.mkdir(exist_ok=True)
        clear(self.work, whole=not self.book.rows)
        folder = self.folder(0.0)
        if not folder.exists():
            with self.options.stage("saving the whole model"):
                save(decoder, folder)
        with self.options.stage("room on the disk") as progress:
            say(progress, note=room(self))

    def measure(self, share: float, mix: str) -> None:
        """Measure a smaller model in a mix (empty: as it is), if that is not on disk yet."""
        key = f"{share:g}/{mix}"
        if key in self.book.rows:
            return
        name = Point(share, mix or "as it is", 0).name
        with self.options.stage(f"{name}: loading"):
            decoder = self.load(share)
        if mix:
            with self.options.stage(f"{name}: rounding") as progress:
                rounded(decoder, self.types(share)[mix]["types"], self.importance(share, decoder), progress)
        with self.options.stage(f"{name}: {self.asked.on}") as progress:
            found = evaluate(decoder, [self.asked.on], self.asked.settings, on_progress=progress)
        self.book.append(
            key, kept_rows([dataclasses.replace(r, texts=(), prompts=(), golds=()) for r in found])
        )

    def rises(self, points: list[Point]) -> dict[str, float]:
        """Return by how much each measured point is worse than dense, on the deciding half."""
        return {p.name: worse(half(r, 0), self.dense) for p in points if (r := self.known(p))}

    def keeps(self, points: list[Point]) -> dict[str, float]:
        """Return what share of the task each measured point keeps, on the deciding half; 0 where no share can be."""
        return {p.name: kept(half(r, 0), self.dense) for p in points if (r := self.known(p))}

    def known(self, point: Point) -> EvalResult | None:
        """Return what was measured of a point, None where nothing was."""
        key = f"{point.share:g}/{point.mix}"
        return self.result(point.share, point.mix) if key in self.book.rows else None

    def result(self, share: float, mix: str) -> EvalResult:
        """Return what was measured of a model in a mix (empty: as it is)."""
        return results_in(self.book.rows[f"{share:g}/{mix}"])[0]

    def points(self, share: float) -> list[Point]:
        """Return the files of a share; a rise is predicted as what the share costs and what the mix costs, added up."""
        found = []
        for mix, plan in self.types(share).items():
            predicted = None
            if share:
                parts = self.result(share, ""), self.result(0.0, mix)
                predicted = sum(worse(half(part, 0), self.dense) for part in parts)
            found.append(Point(share, mix, plan["bytes"], predicted))
        return found

    def types(self, share: float) -> Any:
        """Return bytes and types by mix, planned once."""
        keys = {mix: f"{PLAN}{share:g}/{mix}" for mix in self.asked.mixes}
        if missing := [mix for mix, key in keys.items() if key not in self.book.rows]:
            with self.options.stage(f"planning files{f' without {share:.0%}' if share else ''}"):
                found = plans(self.folder(share), missing, self.work, self.how(share))
            for mix, plan in found.items():
                self.book.append(keys[mix], asdict(plan))
        return {mix: self.book.rows[key] for mix, key in keys.items()}

    def how(self, share: float) -> Exporting:
        """Return how files of a share are made, which are called as the model is."""
        name = Path(self.spec.name).name.removesuffix(".gguf") + (f" without {share:.0%}" if share else "")
        return dataclasses.replace(self.asked.file, name=name)

    def folder(self, share: float) -> Path:
        """Return the checkpoint of a share; that of the whole model is written where it is none on this disk."""
        own = Path(resolve(self.spec.name)).expanduser()
        if share and share == self.start.lacks:
            return Path(self.start.spec.name)
        if not share and own.is_dir():
            return own
        return self.work / (f"without-{share:g}" if share else "whole")

    def load(self, share: float) -> Decoder:
        """Load the model without a share, or the whole one, which is the intact one here, whatever it was made from."""
        decoder = load(dataclasses.replace(self.spec, name=str(self.folder(share)), revision=None))
        base = {"name": self.spec.name, "fingerprint": self.fingerprint} if share else None
        return dataclasses.replace(decoder, base=base)

    def importance(self, share: float, decoder: Decoder | None) -> Importance:
        """Return the importance matrix of a model that is not rounded yet (None: it is loaded), from the calibration."""
        file = self.work / f"importance-{share:g}.npz"
        if not file.exists():
            decoder, calibration = decoder or self.load(share), self.calibration
            with self.options.stage("importance of inputs") as progress:
                save_importance(importance(decoder, calibration, progress), file)
        return load_importance(file)

    def shrunk(self, share: float) -> None:
        """Make the smaller model of a share, if it is not the start and this search has not made it yet."""
        if share == self.start.lacks:
            return
        folder, key = self.folder(share), f"{MADE}{share:g}"
        if key in self.book.rows and (folder / MANIFEST).exists():
            return
        ledger, stage = self.work / f"{folder.name}.attribution", self.options.stage
        lend(self.work, ledger)
        calibration = self.calibration
        decoder = load(self.start.spec) if self.asked.start else self.load(0.0)
        budget = budget_of(decoder, round(1 - (1 - share) / (1 - self.start.lacks), 4))
        how = Shrinking("effect", self.asked.update, self.wanted.seed, self.options.batch_tokens)
        found = shrink(decoder, budget, calibration, how, ledger=ledger, stage=stage)
        with stage(f"saving without {share:.0%}"):
            save(found.decoder, folder, found, overwrite=True)
        take_back(self.work, ledger)
        if key not in self.book.rows:
            self.book.append(key, True)


def lend(work: Path, ledger: Path) -> None:
    """Give a smaller model that is to be made what the units of the start are worth, where an earlier one has found that."""
    own = leftovers(ledger)["units"]
    if (work / EFFECTS).exists() and not own.exists():
        shutil.copyfile(work / EFFECTS, own)


def take_back(work: Path, ledger: Path) -> None:
    """Keep what units are worth of what a smaller model leaves, and forget the rest."""
    for what, path in leftovers(ledger).items():
        path.replace(work / EFFECTS) if what == "units" else forget(path)


def settle(search: Search) -> None:
    """Raise `MismatchError` where a stopped search was begun with other examples: files may have changed."""
    own, book = {"examples": search.calibration.fingerprint}, search.book
    if book.rows.get(EXAMPLES, own) != own:
        raise MismatchError(
            f"{book.path} was begun with other calibration examples: choose another folder, or delete {search.output}"
        )
    if EXAMPLES not in book.rows:
        book.append(EXAMPLES, own)


def clear(work: Path, *, whole: bool) -> None:
    """Remove what a killed search has left half-made, or the `whole` of an earlier one, which is not this one's."""
    for left in work.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    if not whole:
        return
    for left in (*work.glob("without-*"), work / "whole"):
        if (left / MANIFEST).exists():
            shutil.rmtree(left)
    for left in (*work.glob("importance-*.npz"), work / "whole-q8_0.gguf", work / EFFECTS):
        left.unlink(missing_ok=True)
    for left in work.glob("without-*.attribution.*"):
        forget(left)


def started(spec: ModelSpec, name: str | None) -> Start:
    """Return what smaller models of a model come from: a checkpoint of it, where one is named.

    Raises:
        OptionError: it is no smaller model of this one.
    """
    if name is None:
        return Start(spec)
    folder = Path(resolve(name)).expanduser()
    if not folder.is_dir():
        raise OptionError(f"--from takes a folder of a checkpoint, and {name!r} is none")
    own = dataclasses.replace(spec, name=str(folder), revision=None)
    bare = [outlined(one) for one in (spec, own)]
    whole, left = (size_of(one).parameters for one in bare)
    shapes = [one.model.get_input_embeddings().weight.shape for one in bare]
    if shapes[0] != shapes[1] or left > whole:
        raise OptionError(
            f"{name} (embeddings {list(shapes[1])}, {left:,} parameters) is no pruned or smaller {spec.name} ({list(shapes[0])}, "
            f"{whole:,}): name one for --from"
        )
    return Start(own, round(1 - left / whole, 4))


def budget_of(decoder: Decoder, share: float) -> Budget:
    """Return what goes for a share of the parameters: units without some of which llama.cpp may run the architecture."""
    own = decoder.model.config.get_text_config(decoder=True).model_type
    return Budget(parameters=share, kinds=tuple(kind for kind in Budget.kinds if portable(own, kind)))


def possible(spec: ModelSpec, shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of all parameters that a model can lose, with a warning for every other."""
    bare, found = outlined(spec), list[float]()
    for share in shares:
        try:
            check_budget(Offers(bare, budget_of(bare, share)))
        except (ModelError, OptionError) as error:
            warnings.warn(f"no file without {share:.0%} of the parameters is tried: {error}", stacklevel=2)
        else:
            found.append(share)
    return tuple(found)


def room(search: Search) -> str:
    """Return what room the models on the way still take, and what there is.

    Raises:
        CheckpointError: it is too little.
    """
    size = sum(path.stat().st_size for path in search.folder(0.0).glob("*.safetensors"))
    missing = [share for share in search.shares if not search.folder(share).exists()]
    whole = 4 * size_of(outlined(search.spec)).parameters  # in float32, as which training is kept
    needs = size * (sum(1 - share for share in missing) + 2) + (
        2 * whole if missing and search.asked.update in TRAINS else 0
    )
    check_room(search.output, needs)
    free = free_at(search.output)
    return f"up to {needs / 1e9:.1f} GB for smaller models and files, {free / 1e9:.1f} GB free"


def check_measure(on: str) -> None:
    """Raise `OptionError` for a measure that cannot decide between files."""
    if with_limit(on)[0] == "own_kl":
        raise OptionError(
            "own_kl needs the intact embedding, which files round: let own_ppl, answers or a loss decide"
        )


def check_halves(result: EvalResult, limit: Limit) -> None:
    """Raise `OptionError` where a measure has too few problems for one half to decide and the other to be reported, or no share can be kept."""
    if len(set(result.examples)) < 2:
        raise OptionError(
            f"{result.task} has one problem, and one half decides while the other is reported: measure more"
        )
    if limit.kind == "keep" and not (can_keep(result) and can_keep(half(result, 0))):
        if not higher_is_better(result) or min(result.values) < 0:
            raise OptionError(
                f"a share to keep is of a likelihood or of scores from 0 up, and {result.task} ({result.metric}) is neither: "
                "name a limit on --size or --speed, or take another measure (--on)"
            )
        raise OptionError(
            f"the model as it is solves none of the {len(half(result, 0).values)} problems of {result.task} that decide, so that "
            "no share of them can be kept: take another measure (--on), or more problems"
        )
