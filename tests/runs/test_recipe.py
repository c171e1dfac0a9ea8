from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tinydata import tiny_decoder, write_data

from causalprune.core.errors import OptionError
from causalprune.runs.plans import plan
from causalprune.runs.recipe import (
    RECIPES,
    CalibrationSpec,
    as_recipe,
    find_recipe,
    read_recipe,
    without_limits,
)
from causalprune.runs.rows import label, parse_method

MINIMAL: dict[str, Any] = {
    "model": {"name": "some/model"},
    "calibration": {"task": ["gsm8k"]},
    "methods": ["magnitude", "magnitude:global", "cap"],
    "sparsities": [0.2, 0.5],
    "on": ["gsm8k_nll:200", "strategyqa"],
}


def written(folder: Path, values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_cells_are_dense_and_every_method_at_every_sparsity(tmp_path: Path) -> None:
    cells = read_recipe(written(tmp_path, MINIMAL)).cells()
    assert list(cells) == [
        "dense",
        "magnitude-matrix-0.2",
        "magnitude-matrix-0.5",
        "magnitude-global-0.2",
        "magnitude-global-0.5",
        "cap-global-0.2",
        "cap-global-0.5",
    ]


def test_without_limits_drops_only_limits(tmp_path: Path) -> None:
    found = without_limits(read_recipe(written(tmp_path, MINIMAL)))
    assert found.on == ("gsm8k_nll", "strategyqa")
    assert without_limits(replace(found, on=("my:task.yaml",))).on == ("my:task.yaml",)


def test_label_names_the_scope_that_is_used() -> None:
    assert label(parse_method("wanda", 0.5)) == "wanda-row-0.5"
    assert label(parse_method("wanda:2:4+refit")) == "wanda+refit-2:4-0.5"
    assert parse_method("cap").sparsity == 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metods": ["cap"]}, "did you mean 'methods'"),
        ({"model": {"nam": "x"}}, "did you mean 'name'"),
        ({"model": {}}, "'name' is missing"),
        ({"model": "x"}, "model must be a mapping"),
        ({"methods": ["cpa"]}, "did you mean 'cap'"),
        ({"methods": ["cap:glob"]}, "scope"),
        ({"methods": ["shrink:1.2"]}, "shrink"),
        ({"methods": []}, "methods must be a list without repetitions"),
        ({"methods": ["cap", "cap"]}, "methods must be a list without repetitions"),
        ({"methods": "cap"}, "methods must be a list"),
        ({"sparsities": [0]}, "sparsity must be between 0 and 1"),
        ({"sparsities": [1.0]}, "sparsity must be between 0 and 1"),
        ({"sparsities": [-0.1]}, "sparsity must be between 0 and 1"),
        ({"sparsities": [float("nan")]}, "sparsity must be between 0 and 1"),
        ({"sparsities": ["20 %"]}, "0.2, not '20 %'"),
        ({"sparsities": [True]}, "must be a number"),
        ({"calibration": {"task": ["gsm8k"], "chat": "of"}}, "did you mean 'off'"),
        ({"seed": "zero"}, "seed must be a whole number"),
        ({"save": 1}, "save must be true or false"),
        ({"save": None}, "save must be true or false"),
        ({"methods": ["wanda"], "save": ["wnda"]}, "did you mean 'wanda'"),
    ],
)
def test_bad_recipe_is_one_clear_error(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_recipe(written(tmp_path, {**MINIMAL, **change}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


OLD = """
model: {name: some/model}
calibration: {sources: [gsm8k], general: 0.5}
methods: [wanda]
sparsities: [0.5]
tasks: [gsm8k_nll:200]
"""
NEW = """
model: {name: some/model}
calibration: {task: [gsm8k], preserve: [wikitext2], preserve_share: 0.5}
methods: [wanda]
sparsities: [0.5]
on: [gsm8k_nll:200]
"""


def test_old_words_mean_the_new_ones_and_each_is_named(tmp_path: Path) -> None:
    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    new = read_recipe(tmp_path / "new")  # warns of nothing; `on` needs no quotes
    assert new.on == ("gsm8k_nll:200",)
    with pytest.warns(FutureWarning, match="is an old word") as seen:
        assert read_recipe(tmp_path / "old") == new
    said = sorted(str(one.message) for one in seen)
    assert [words.split(" ", 1)[0] for words in said] == ["general", "sources", "tasks"]
    assert [words.rpartition("it is now ")[2].split(" ")[0] for words in said] == ["preserve", "task", "on"]


@pytest.mark.filterwarnings("ignore:.* is an old word")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ["gsm8k"]}, "tasks is the old word for on"),
        ({"calibration": {"task": ["gsm8k"], "sources": ["gsm8k"]}}, "sources is the old word for task"),
        ({"calibration": {"task": ["gsm8k"], "general": 0.1, "preserve": ["c4"]}}, "general is the old word"),
        ({"calibration": {"task": ["gsm8k"], "general": "much"}}, "general must be a number"),
        ({"calibration": {"task": ["gsm8k"], "general": 1.0}}, "at least 0 and below 1"),
        ({"model": {"name": "x", "tasks": []}}, "unknown key in recipe: model 'tasks'"),
    ],
)
def test_old_words_beside_new_ones_or_elsewhere(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_recipe(written(tmp_path, {**MINIMAL, **change}))


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list", "", "\x00"])
def test_not_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OptionError):
        read_recipe(path)


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'demo'"):
        find_recipe("dmo")
    with pytest.raises(OptionError, match="does not exist"):
        find_recipe("nowhere/recipe.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_come_with_the_package_can_be_read(path: Path) -> None:
    assert read_recipe(find_recipe(path.stem)).cells()


@pytest.mark.thorough
def test_a_plan_counts_what_the_estimator_costs(tmp_path: Path) -> None:
    data, model = write_data(tmp_path / "data"), tmp_path / "model"
    tiny_decoder().model.save_pretrained(model)
    fixed = {"model": {"name": str(model)}, "calibration": {"task": ["gsm8k"], "n": 6}, "methods": ["cap"]}
    tokens = {}
    for name, spec in (
        ("exact", {}),
        ("gradient", {"estimator": "gradient"}),
        ("adaptive", {"estimator": "adaptive", "budget": 1.5}),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({**fixed, "sparsities": [0.2], "on": ["gsm8k_nll:3"], "attribution": spec})
        )
        (job,) = [
            j for j in plan(read_recipe(path), tmp_path / name, data_dir=data).jobs if j.name == "attribution"
        ]
        tokens[name] = job.tokens
    whole = tokens["exact"] / 6  # 8 heads, of which each pass sees three quarters of the model
    assert tokens["gradient"] == pytest.approx(5 * whole, rel=0.01)
    assert tokens["adaptive"] == pytest.approx(8 / 1.5 * whole, rel=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "dtype", "each"),
    [
        ("embedded", "auto", 4),
        ("x.gguf", "auto", 4),
        ("folder", "auto", 4),
        ("embedded", "bfloat16", 2),
        ("org/x", "auto", 2),
    ],
)
def test_a_plan_knows_what_is_unpacked_to_float32(tmp_path: Path, name: str, dtype: str, each: int) -> None:
    if name == "folder":
        name = str(tmp_path / "held")
        Path(name).mkdir()
        (Path(name) / "x.gguf").write_bytes(b"")
    path, data = tmp_path / "recipe.yaml", write_data(tmp_path / "data")
    own = {"model": {"name": name, "dtype": dtype}, "methods": ["wanda"], "sparsities": [0.2], "save": True}
    shape = {"layers": 30, "heads": 9, "parameters": 1e8}
    calibration = {"task": ["gsm8k"], "n": 6}
    values = {**own, "on": ["gsm8k_nll:3"], "shape": shape, "calibration": calibration}
    path.write_text(yaml.safe_dump(values))
    found = plan(read_recipe(path), tmp_path / "run", data_dir=data)
    assert found.disk_bytes == pytest.approx(each * 1e8, rel=0.1)


@pytest.mark.parametrize(
    ("method", "each"), [("causal", 0.5), ("wanda+distill", 0.5), ("shrink+adam", 8.5), ("wanda", 0)]
)
def test_a_plan_counts_what_training_takes(tmp_path: Path, method: str, each: float) -> None:
    data = write_data(tmp_path / "data")
    own = {"model": {"name": "org/x"}, "sparsities": [0.2], "on": ["gsm8k_nll:3"]}
    own |= {
        "shape": {"layers": 30, "heads": 9, "parameters": 1e8},
        "calibration": {"task": ["gsm8k"], "n": 6},
    }
    found, bare = (
        plan(as_recipe({**own, "methods": [name]}), tmp_path / "run", data_dir=data).memory_bytes
        for name in (method, "magnitude")
    )
    assert found - bare == pytest.approx(each * 1e8)


def test_what_makes_a_smaller_model_is_no_method_of_zeros() -> None:
    with pytest.raises(OptionError, match=r"shrink:0.2 makes a smaller model: `causalprune shrink`"):
        parse_method("shrink:0.2")


def test_what_is_measured_is_read_as_what_calibrates() -> None:
    wanted = CalibrationSpec(
        ("gsm8k",), seed=3, max_tokens=99, chat=False, thinking="on", turns="all", fold_system=True
    )
    found = wanted.settings(None, answer="text")
    names = ("seed", "max_tokens", "chat", "thinking", "turns", "fold_system")
    assert [getattr(found, name) for name in names] == [3, 99, False, "on", "all", True]
    assert found.answer == "text"
