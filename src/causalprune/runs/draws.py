"""A recipe on several draws of its calibration examples: a run for each, and means over them with their spread.

| file | content |
|---|---|
| `seed-N` | the run folder of a draw, as `causalprune.runs.study` writes it |
| `draws.json` | means over the draws: what `compare` reads |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from causalprune.core import MismatchError, Progress, Stage, quiet
from causalprune.evaluation import DRAWS, RESULTS, averaged, rows_of, write_json
from causalprune.reports import LEDGER
from causalprune.runs.jobs import Coming
from causalprune.runs.plans import Plan
from causalprune.runs.recipe import Recipe
from causalprune.runs.study import run


def draws(recipe: Recipe, seeds: int) -> dict[str, Recipe]:
    """Return the recipe of every draw by the name of its folder; the first is the recipe's own, and seeds count up from it."""
    own = recipe.calibration
    return {
        f"seed-{seed}": replace(recipe, calibration=replace(own, seed=seed))
        for seed in range(own.seed, own.seed + seeds)
    }


def run_draws(
    recipe: Recipe,
    seeds: int,
    folder: Path,
    *,
    data_dir: Path | str | None = None,
    stage: Stage = quiet,
    command: str | None = None,
) -> dict[str, Any]:
    """Carry out a recipe for every draw, or go on where it was stopped; return what `draws.json` holds.

    All draws are measured on the same examples: a row has the mean over draws of what each example gave. Costs as many runs as
    there are draws.

    Raises:
        MismatchError: the folder holds a run on one draw.
    """
    if (folder / LEDGER).exists() or (folder / RESULTS).exists():
        raise MismatchError(f"{folder} holds a run on one draw: choose another folder, or leave out --seeds")
    wanted = draws(recipe, seeds)
    records = [
        run(
            wanted[name],
            folder / name,
            data_dir=data_dir,
            stage=_named(stage, name),
            command=command,
            coming=Coming(draws=tuple(wanted)[number:]),
        )
        for number, name in enumerate(wanted)
    ]
    rows = []
    for same in zip(*map(rows_of, records), strict=True):
        columns = zip(*(results for _, results in same), strict=True)
        rows.append({"label": same[0][0], "results": [asdict(averaged(column)) for column in columns]})
    record = {"recipe": asdict(recipe), "draws": list(draws(recipe, seeds)), "command": command, "rows": rows}
    write_json(folder / DRAWS, record)
    return record


def times(plan: Plan, draws: int) -> Plan:
    """Return the plan of a recipe on several draws from that on one: all work and all that is kept, as often."""
    jobs = tuple(replace(job, count=job.count * draws, tokens=job.tokens * draws) for job in plan.jobs)
    return replace(plan, jobs=jobs, seconds=plan.seconds * draws, disk_bytes=plan.disk_bytes * draws)


def _named(stage: Stage, name: str) -> Stage:
    """Return a stage that says which draw it is about."""

    @contextmanager
    def named(label: str) -> Iterator[Progress]:
        with stage(f"{label} ({name})") as progress:
            yield progress

    return named
