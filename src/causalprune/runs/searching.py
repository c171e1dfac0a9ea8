"""Files that a model can become, measured one after the other; what is finished is on disk, as are the smaller models."""

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from causalprune.checkpoints import MANIFEST, resolve, save
from causalprune.core import (
    Calibration,
    CheckpointError,
    Decoder,
    EvalResult,
    Ledger,
    ModelError,
    OptionError,
    forget,
)
from causalprune.evaluation import Settings, evaluate, evaluation_contents, kept_rows, results_in
from causalprune.runs.cells import load, outlined
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated
from causalprune.shipping import (
    Exporting,
    Importance,
    Limit,
    Point,
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
SHARES = (0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Asked:
    """What is asked for: a limit, the measure that decides, and what is tried.

    `shares` of all parameters go in turn, as long as the one before paid; `update` is how the others make up for them,
    `file` how files are made.
    """

    limit: Limit
    on: str
    settings: Settings = field(default_factory=Settings)
    mixes: tuple[str, ...] = MIXES
    shares: tuple[float, ...] = SHARES
    update: str = "distill"
    file: Exporting = field(default_factory=Exporting)


@dataclass
class Search:
    """A search under way: `book` holds what is finished."""

    spec: ModelSpec
    wanted: CalibrationSpec
    output: Path
    asked: Asked
    options: Options
    book: Ledger

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
        """Return what share of the task each measured point keeps, on the deciding half."""
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
            if mix in self.asked.mixes:
                predicted = None
                if share:
                    parts = self.result(share, ""), self.result(0.0, mix)
                    predicted = sum(worse(half(part, 0), self.dense) for part in parts)
                found.append(Point(share, mix, plan["bytes"], predicted))
        return found

    def types(self, share: float) -> Any:
        """Return bytes and types by mix, planned once."""
        key = f"plan/{share:g}"
        if key not in self.book.rows:
            with self.options.stage(f"planning files{f' without {share:.0%}' if share else ''}"):
                found = plans(self.folder(share), self.asked.mixes, self.work, self.asked.file)
            self.book.append(key, {mix: asdict(plan) for mix, plan in found.items()})
        return self.book.rows[key]

    def folder(self, share: float) -> Path:
        """Return the checkpoint of a share; that of the whole model is written where it is none on this disk."""
        own = Path(resolve(self.spec.name)).expanduser()
        if not share and own.is_dir():
            return own
        return self.work / (f"without-{share:g}" if share else "whole")

    def load(self, share: float) -> Decoder:
        """Load the model without a share, or the whole one."""
        folder = self.folder(share)
        if not share and not folder.exists():
            decoder = load(self.spec)
            save(decoder, folder)
            return decoder
        return load(dataclasses.replace(self.spec, name=str(folder), revision=None))

    def importance(self, share: float, decoder: Decoder | None) -> Importance:
        """Return the importance matrix of a model that is not rounded yet (None: it is loaded), from the calibration."""
        file = self.work / f"importance-{share:g}.npz"
        if not file.exists():
            decoder, calibration = decoder or self.load(share), self.calibration
            with self.options.stage("importance of inputs") as progress:
                save_importance(importance(decoder, calibration, progress), file)
        return load_importance(file)

    def shrunk(self, share: float) -> None:
        """Make the smaller model of a share, if it is not there yet."""
        folder = self.folder(share)
        if (folder / MANIFEST).exists():
            return
        ledger, stage, calibration = (
            self.work / f"{folder.name}.attribution",
            self.options.stage,
            self.calibration,
        )
        decoder = self.load(0.0)
        how = Shrinking(update=self.asked.update, max_batch_tokens=self.options.batch_tokens)
        found = shrink(decoder, share, calibration, how, ledger=ledger, stage=stage)
        with stage(f"saving without {share:.0%}"):
            save(found.decoder, folder, found, overwrite=True)
        for path in leftovers(ledger).values():
            forget(path)


def possible(spec: ModelSpec, shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of all parameters that a model can lose, with a warning for every other."""
    bare, found = outlined(spec), list[float]()
    for share in shares:
        try:
            check_budget(Offers(bare, Budget(parameters=share)))
        except (ModelError, OptionError) as error:
            warnings.warn(f"no file without {share:.0%} of the parameters is tried: {error}", stacklevel=2)
        else:
            found.append(share)
    return tuple(found)


def check_room(search: Search) -> None:
    """Raise `CheckpointError` where the disk has no room for the models on the way."""
    own = Path(resolve(search.spec.name)).expanduser()
    size = sum(path.stat().st_size for path in own.glob("*.safetensors")) if own.is_dir() else 0
    needs, free = size * (len(search.asked.shares) + 2), shutil.disk_usage(search.output).free
    if needs > free:
        raise CheckpointError(
            f"{search.output} has {free / 1e9:.1f} GB of room, and smaller models and files take up to {needs / 1e9:.1f} GB"
        )


def check_reach(search: Search, points: list[Point]) -> None:
    """Raise `OptionError`, before anything is made smaller, for a size that even the embeddings do not fit into."""
    least = min(points, key=lambda p: p.bytes)
    if search.asked.limit.kind == "size":
        most = max(search.asked.shares, default=0.0)
        floor = least.bytes * (1 - 1.5 * most)
        if search.asked.limit.value < floor:
            raise OptionError(
                f"no file of {search.spec.name} is of {search.asked.limit}: the whole model as {least.mix} has "
                f"{least.bytes / 1e6:.1f} MB, and without {most:.0%} of its parameters about {floor / 1e6:.0f} MB at least"
            )
