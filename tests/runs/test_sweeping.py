"""The sweep finds the border between sparsities that keep the task and those that do not, in few runs."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from configs import tiny_config
from families import tiny
from tinydata import byte_tokenizer, write_model

from causalprune.checkpoints.saving import load_effects
from causalprune.core.errors import OptionError
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import Tried, headline, load_rows, paired_difference
from causalprune.models.anatomy import inspect_model
from causalprune.runs import sweeping
from causalprune.runs.recipe import AttributionSpec, CalibrationSpec, ModelSpec, Recipe
from causalprune.runs.sweeping import candidates, sweep, worst_difference

RECIPE = Recipe(
    ModelSpec("nowhere"),
    CalibrationSpec(("gsm8k",)),
    ("wanda",),
    tuple(round(0.05 * step, 2) for step in range(1, 20)),
    ("gsm8k_nll",),
)


def result(loss: float, metric: Any = "nats_per_token") -> EvalResult:
    return EvalResult("gsm8k_nll", metric, (loss, loss + 0.2), (1.0, 1.0), ("a", "b"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Let a model lose 0.1 nats for every 10 % of its weights; return the sparsities of every run."""
    found: list[tuple[float, ...]] = []

    def run(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
        if not options["coming"].again:
            found.append(recipe.sparsities)
        losses = {"dense": 1.0, **{f"wanda-row-{s:g}": 1.0 + s for s in recipe.sparsities}}
        rows = [
            {"label": k, "sparsity": v - 1, "results": [dataclasses.asdict(result(v)) for _ in recipe.on]}
            for k, v in losses.items()
        ]
        return {"rows": rows}

    monkeypatch.setattr(sweeping, "run", run)
    return found


@pytest.mark.parametrize(("keep", "best"), [(0.8, 0.2), (0.9, 0.1), (0.5, 0.65), (0.96, None), (0.38, 0.95)])
def test_the_border_is_found(
    runs: list[tuple[float, ...]], keep: float, best: float | None, tmp_path: Path
) -> None:
    tried = sweep(RECIPE, keep, tmp_path)
    assert max((one.sparsity for one in tried if one.holds), default=None) == best
    above = [one.sparsity for one in tried if not one.holds]
    assert not above or min(above) == pytest.approx((best or 0.0) + 0.05)
    assert len(runs) <= 5
    assert all(set(a) < set(b) for a, b in itertools.pairwise(runs)), "each run adds to the last"


def test_what_is_left_of_a_result() -> None:
    assert worst_difference(result(1.0), 0.9) == pytest.approx(0.10536, abs=1e-5)  # −ln 0.9
    accuracy = EvalResult("t", "accuracy", (1.0, 0.0), (1.0, 1.0), ("a", "b"))
    assert worst_difference(accuracy, 0.9) == pytest.approx(-0.05)
    text = result(1.0, "perplexity")
    worse = EvalResult(
        "t", "perplexity", tuple(v + 0.10536 for v in text.values), text.weights, text.examples
    )
    assert headline(worse) - headline(text) == pytest.approx(worst_difference(text, 0.9), rel=1e-4)


@pytest.mark.parametrize("n", [50, 150, 800])
def test_a_share_that_is_kept_exactly_holds(n: int) -> None:
    def solved(count: int) -> EvalResult:
        values = (1.0,) * count + (0.0,) * (n - count)
        return EvalResult("t_answers", "accuracy", values, (1.0,) * n, tuple(map(str, range(n))))

    dense = solved(n * 2 // 5)
    assert sweeping._tried(0.5, [solved(n * 36 // 100)], [dense], 0.9, certain=False).holds
    assert not sweeping._tried(0.5, [solved(n * 36 // 100 - 1)], [dense], 0.9, certain=False).holds


def test_certain_wants_the_far_end_of_the_interval(
    runs: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def uncertain(a: EvalResult, b: EvalResult) -> Any:
        found = paired_difference(a, b)
        return dataclasses.replace(found, low=found.difference - 0.1, high=found.difference + 0.1)

    monkeypatch.setattr(sweeping, "paired_difference", uncertain)
    plain, sure = (sweep(RECIPE, 0.8, tmp_path, certain=certain) for certain in (False, True))
    assert max(one.sparsity for one in plain if one.holds) == 0.2
    assert max(one.sparsity for one in sure if one.holds) == 0.1


def test_impossible_sweeps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="share to keep"):
        sweep(RECIPE, 1.0, tmp_path)
    with pytest.raises(OptionError, match="one method"):
        sweep(dataclasses.replace(RECIPE, methods=("wanda", "magnitude")), 0.9, tmp_path)
    with pytest.raises(OptionError, match=r"shrink:0\.2 makes no zeros"):
        sweep(dataclasses.replace(RECIPE, methods=("shrink:0.2",)), 0.9, tmp_path)
    with pytest.raises(OptionError, match=r"wanda:2:4 has one sparsity, 0\.5, .*add \+graded"):
        sweep(dataclasses.replace(RECIPE, methods=("wanda:2:4",)), 0.9, tmp_path)


def test_a_pattern_with_dense_matrices_is_sought_below_its_own_sparsity() -> None:
    assert candidates("causal:2:4+graded")[-1] == 0.45
    assert candidates("wanda:global")[-1] == 0.95
    recipe = dataclasses.replace(
        RECIPE, methods=("wanda:1:4+graded",), sparsities=candidates("wanda:1:4+graded")
    )
    assert len(recipe.cells()) == 15


@pytest.mark.thorough
def test_the_checkpoint_of_the_highest_sparsity_that_holds_is_kept(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sweeping, "worst_difference", lambda dense, keep: 1e-3
    )  # little: some sparsities fail
    wanted = dataclasses.replace(
        RECIPE,
        model=ModelSpec(str(model)),
        calibration=CalibrationSpec(("gsm8k",), n=6),
        on=("gsm8k_nll:4",),
    )
    tried = sweep(wanted, 0.9, tmp_path / "run", data_dir=data)
    best = max((one.sparsity for one in tried if one.holds), default=None)
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ([] if best is None else [f"wanda-row-{best:g}"])
    assert any(not one.holds for one in tried)


def test_another_share_to_keep_leaves_the_checkpoint_of_its_own_answer(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holds(sparsity: float, results: Any, dense: Any, keep: float, certain: bool) -> Tried:
        return Tried(sparsity, (), sparsity <= 1 - keep)

    monkeypatch.setattr(sweeping, "_tried", holds)
    wanted = dataclasses.replace(
        RECIPE,
        model=ModelSpec(str(model)),
        calibration=CalibrationSpec(("gsm8k",), n=6),
        sparsities=(0.3, 0.5, 0.7),
        on=("gsm8k_nll:4",),
        general_text="none",
    )
    for keep, best in ((0.4, 0.5), (0.6, 0.3), (0.4, 0.5)):
        sweep(wanted, keep, tmp_path, data_dir=data)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"wanda-row-{best:g}"]
    assert [label for label, _ in load_rows(tmp_path)] == ["dense", "wanda-row-0.5", "wanda-row-0.7"]
    assert "## Results" in (tmp_path / "checkpoints" / "wanda-row-0.5" / "README.md").read_text()


def test_cap_takes_the_heads_of_all_mixers_where_none_are_named(data: Path, tmp_path: Path) -> None:
    config = tiny_config("bamba")
    config.vocab_size, config.max_position_embeddings = 258, 1024
    decoder = inspect_model(tiny(config), byte_tokenizer(), name="hybrid")
    wanted = dataclasses.replace(
        RECIPE,
        model=ModelSpec(str(write_model(tmp_path / "hybrid", decoder))),
        calibration=CalibrationSpec(("gsm8k",), n=3),
        methods=("cap",),
        sparsities=(0.5,),
        on=("gsm8k_nll:2",),
        general_text="none",
        attribution=AttributionSpec(estimator="gradient"),
    )
    sweep(wanted, 0.1, tmp_path / "run", data_dir=data)
    kinds = {unit.kind for unit in load_effects(tmp_path / "run" / "effects.json").units}
    assert kinds == {"head", "mixer"}
    named = dataclasses.replace(wanted, attribution=AttributionSpec(("mlp",)))
    with pytest.raises(OptionError, match="add heads, mixers to `units`"):
        sweep(named, 0.1, tmp_path / "other", data_dir=data)
