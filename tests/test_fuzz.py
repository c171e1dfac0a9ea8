"""Whatever is in a file, it is read or refused with one of our errors: never another exception, never a hang.

`make fuzz` tries 10,000 cases of each kind; the default is a few.
"""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from causalprune.calibration.data import load_problems
from causalprune.checkpoints.saving import read_manifest
from causalprune.core.errors import CausalPruneError
from causalprune.models.folders import INDEX, open_checkpoint
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import Recipe, read_recipe
from causalprune.streaming.files import prune_stream

CASES = int(os.environ.get("CAUSALPRUNE_FUZZ", "100"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = [
    "model",
    "name",
    "calibration",
    "sources",
    "task",
    "general",
    "methods",
    "wanda",
    "cap:global+refit",
    "wanda:2:4",
    "sparsities",
]
WORDS += [
    "tasks",
    "on",
    "gsm8k_nll:200",
    "seed",
    "attribution",
    "units",
    "heads",
    "effect",
    "kl",
    "shape",
    "layers",
    "n",
]
WORDS += [
    "weight_map",
    "dtype",
    "F32",
    "data_offsets",
    "__metadata__",
    "a",
    "model.safetensors",
    "../x.safetensors",
]
numbers = st.one_of(
    st.integers(-3, 200), st.integers(), st.floats(), st.sampled_from([0.2, 0.5, 2**63, -(2**70)])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(WORDS), st.text(max_size=8))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=5),
    ),
    max_leaves=12,
)

GOOD = {
    "model": {"name": "embedded"},
    "calibration": {"task": ["gsm8k"]},
    "methods": ["wanda"],
    "sparsities": [0.2],
    "on": ["gsm8k_nll:200"],
}


def read_or_refused(read: object, *arguments: object) -> object:
    try:
        return read(*arguments)  # type: ignore[operator]
    except CausalPruneError:
        return None


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.* is an old word")
@fuzzed
@given(
    changes=st.dictionaries(st.sampled_from([*GOOD, "seed", "attribution", "shape", "save", "other"]), trees)
)
def test_recipes(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes), encoding="utf-8")
    found = read_or_refused(read_recipe, path)
    assert found is None or isinstance(found, Recipe)


@pytest.mark.filterwarnings("ignore:.* is an old word")
@fuzzed
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
    )
)
def test_recipes_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    read_or_refused(read_recipe, path)


rows = st.one_of(trees, st.fixed_dictionaries({"prompt": trees, "target": trees}))


@pytest.mark.thorough
@fuzzed
@given(
    lines=st.lists(
        st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=40)), max_size=4
    )
)
def test_own_problems(lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\n".join(lines))
    read_or_refused(load_problems, str(path), "calibration")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "model.safetensors"
    save_file(
        {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"format": "pt"}
    )
    return path.read_bytes()


def opened(folder: Path) -> None:
    """Read all tensors of a checkpoint, as far as its headers allow it."""
    for entry in open_checkpoint(folder).entries.values():
        assert entry.read().shape == entry.shape


edits = st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4)


@fuzzed
@given(changes=edits, cut=st.integers(0, 40))
def test_damaged_tensors(changes: list[tuple[int, bytes]], cut: int, valid: bytes, tmp_path: Path) -> None:
    data = bytearray(valid)
    for at, new in changes:
        data[at : at + len(new)] = new
    (tmp_path / "model.safetensors").write_bytes(bytes(data[: len(data) - cut]))
    read_or_refused(opened, tmp_path)


@pytest.mark.thorough
@fuzzed
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), trees), data=st.binary(max_size=60)
)
def test_headers(header: dict[str, object], data: bytes, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    read_or_refused(opened, tmp_path)


@pytest.mark.thorough
@fuzzed
@given(index=st.one_of(trees, st.fixed_dictionaries({"weight_map": trees})))
def test_indices(index: object, valid: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(valid)
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    read_or_refused(opened, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama2"]().save_pretrained(folder, max_shard_size="40KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.thorough
@fuzzed
@given(which=st.integers(0, 9), changes=edits, cut=st.sampled_from([0, 0, 1, 50]))
def test_damaged_models_are_pruned_whole_or_not_at_all(
    which: int, changes: list[tuple[int, bytes]], cut: int, model: dict[str, bytes], tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    source.mkdir()
    for name, content in model.items():
        (source / name).write_bytes(content)
    name = sorted(n for n in model if "safetensors" in n)[which % sum("safetensors" in n for n in model)]
    data = bytearray(model[name])
    for at, new in changes:
        data[at * 11 : at * 11 + len(new)] = new  # headers and weights
    (source / name).write_bytes(bytes(data[: len(data) - cut]))
    try:
        done = prune_stream(source, out, Method("magnitude", 0.5, "global"))
    except CausalPruneError:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    else:
        sparsity = read_manifest(out)["sparsity"]
        assert sparsity["zeros"] == done.zeros >= sparsity["weights"] // 2
        assert len(open_checkpoint(out).entries) == len(open_checkpoint(source).entries)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
