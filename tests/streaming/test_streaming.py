"""A streamed checkpoint is the one pruned in memory, byte for byte; what is damaged or strange is refused."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tinydata import tiny_decoder

from causalprune.checkpoints import saving as checkpoint
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CausalPruneError, CheckpointError, MismatchError, ModelError, OptionError
from causalprune.core.types import Effects
from causalprune.interventions.units import list_units
from causalprune.models import folders, shards
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.streaming import files
from causalprune.streaming.files import Seen, prune_stream

every_family = pytest.mark.parametrize("family", FAMILIES)
CAP = Method("cap", 0.5)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    model = FAMILIES[family]().to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def effects_of(source: Path) -> Effects:
    decoder = load(str(source))
    units = list_units(decoder, ["heads"])
    nats = torch.rand(len(units), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, dtype=torch.long)
    return Effects(tuple(units), nats, torch.zeros(2).double(), ones, 0 * ones, decoder.fingerprint, "none")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [f for f in folder.glob("*.safetensors") if f.name != checkpoint.KEEP]
    return {name: t for file in files for name, t in load_file(file).items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bytes: zeros have signs."""
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def check_same(source: Path, method: Method, where: Path, effects: Effects | None = None) -> None:
    decoder = load(str(source))
    kept = prune(decoder, method, effects=effects)
    checkpoint.save(decoder, where / "memory", kept, effects=effects)
    done = prune_stream(source, where / "stream", method, seen=Seen(effects=effects))
    own, other = tensors(where / "stream"), tensors(where / "memory")
    assert own.keys() == other.keys() == tensors(source).keys()
    assert all(same(own[name], other[name]) for name in own)
    assert {f.name for f in (where / "stream").glob("*")} >= {f.name for f in source.glob("*")}
    keeps = [checkpoint.load_keep(where / name) for name in ("stream", "memory")]
    assert keeps[0].keys() == keeps[1].keys()
    assert all(torch.equal(keeps[0][name], keeps[1][name]) for name in keeps[0])
    manifests = [checkpoint.read_manifest(where / name) for name in ("stream", "memory")]
    assert manifests[0]["sparsity"] == manifests[1]["sparsity"]
    assert manifests[0]["base"]["fingerprint"] == manifests[1]["base"]["fingerprint"]
    assert (done.weights, done.zeros) == tuple(manifests[1]["sparsity"][key] for key in ("weights", "zeros"))
    assert verify(where / "stream").ok


@every_family
def test_a_global_threshold_is_that_in_memory(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source", torch.bfloat16)
    check_same(source, CAP, tmp_path, effects_of(source))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.thorough), torch.bfloat16]
)
@pytest.mark.parametrize("family", ["llama3", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("method", ["cap:global", "magnitude:global", "magnitude:row", "random:matrix"])
def test_streaming_is_pruning_in_memory(family: str, dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source", dtype, shard="20KB" if family != "gpt2" else "5GB")
    criterion, _, scope = method.partition(":")
    effects = effects_of(source) if criterion == "cap" else None
    check_same(source, Method(criterion, 0.37, scope), tmp_path, effects)


@pytest.mark.thorough
def test_patterns_and_ties(tmp_path: Path) -> None:
    source = saved("llama3", tmp_path / "source", torch.bfloat16)
    for file in source.glob("*.safetensors"):
        rounded = {name: (t * 16).round() / 16 for name, t in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})
    check_same(source, Method("magnitude", 0.5, "2:4"), tmp_path / "pattern")
    check_same(source, Method("magnitude", 0.5, "global"), tmp_path / "ties")


@pytest.mark.thorough
def test_memory_is_that_of_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("olmoe", tmp_path / "source")
    sizes = []
    own = shards.Entry.read

    def read(entry: shards.Entry) -> torch.Tensor:
        sizes.append(entry.stop - entry.start)
        return own(entry)

    monkeypatch.setattr(shards.Entry, "read", read)
    prune_stream(source, tmp_path / "out", Method("magnitude", 0.5, "global"))
    largest = max(p.size for p in load(str(source)).projections) * 4
    assert max(sizes) <= largest


def test_files_that_belong_to_a_model_are_copied_and_others_left(tmp_path: Path) -> None:
    source = saved("llama3", tmp_path / "source")
    for name in ("tokenizer.json", "LICENSE", "pytorch_model.bin", "README.md", ".hidden"):
        (source / name).write_text(name)
    with pytest.warns(UserWarning, match=r"neither read nor copied: pytorch_model\.bin"):
        prune_stream(source, tmp_path / "out", Method("magnitude", 0.5))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "README.base.md").read_text() == "README.md"
    assert not any((tmp_path / "out" / name).exists() for name in ("pytorch_model.bin", ".hidden"))
    assert "set to zero by causalprune" in (tmp_path / "out" / "README.md").read_text()
    assert checkpoint.read_manifest(tmp_path / "out")["run"]["streamed"]


def first(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


def truncate(source: Path) -> None:
    os.truncate(first(source), first(source).stat().st_size - 1)


def cut_header(source: Path) -> None:
    os.truncate(first(source), 20)


def lose(source: Path) -> None:
    first(source).unlink()


def flip(source: Path) -> None:
    data = bytearray(first(source).read_bytes())
    data[9] ^= 1
    first(source).write_bytes(data)


def rename_in_index(source: Path, name: str) -> None:
    index = source / folders.INDEX
    record = json.loads(index.read_text())
    record["weight_map"] = dict.fromkeys(record["weight_map"], name)
    index.write_text(json.dumps(record))


def escape(source: Path) -> None:
    shutil.copy(first(source), source.parent / "other.safetensors")
    rename_in_index(source, "../other.safetensors")


def swap(source: Path) -> None:
    rename_in_index(source, first(source).name)


def garble_index(source: Path) -> None:
    (source / folders.INDEX).write_text('{"weight_map": 3}')


def link(source: Path) -> None:
    shutil.move(first(source), source.parent / "elsewhere.safetensors")
    first_name = min(json.loads((source / folders.INDEX).read_text())["weight_map"].values())
    (source / first_name).symlink_to(source.parent / "elsewhere.safetensors")


def lose_index(source: Path) -> None:
    (source / folders.INDEX).unlink()


def only_pickles(source: Path) -> None:
    for file in (*source.glob("*.safetensors"), source / folders.INDEX):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def not_finite(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        values = load_file(file)
        for name in values:
            if "q_proj" in name:
                values[name][0, 0] = torch.nan
        save_file(values, file, metadata={"format": "pt"})


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return what changes the header of the first file, and leaves the tensors where they are."""

    def damage(source: Path) -> None:
        file = min(source.glob("*.safetensors"))
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        own = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(own)) + own + data[8 + length :])

    return damage


def of_tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [own for name, own in header.items() if name != "__metadata__"]
    return sorted(rows, key=lambda own: own["data_offsets"])


def negative(header: dict[str, Any]) -> None:
    of_tensors(header)[0]["shape"][0] *= -1


def larger(header: dict[str, Any]) -> None:
    of_tensors(header)[0]["shape"][0] += 1


def apart(header: dict[str, Any]) -> None:
    header.pop(next(name for name, own in header.items() if own is of_tensors(header)[1]))


def twice(source: Path) -> None:
    file = min(source.glob("*.safetensors"))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    own = header[:-1] + b',"__metadata__":{"format":"pt"},"__metadata__":{"format":"pt"}}'
    file.write_bytes(struct.pack("<Q", len(own)) + own + data[8 + length :])


HEADERS = {
    "negative": (rewritten(negative), "shape and offsets must be whole numbers"),
    "larger": (rewritten(larger), r"bytes for shape \["),
    "apart": (rewritten(apart), "begins at byte .* instead of"),
    "twice": (twice, "a name appears twice"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    source = saved("llama3", tmp_path / "source")
    damage, complaint = HEADERS[name]
    damage(source)
    with pytest.raises(CheckpointError, match=complaint):
        prune_stream(source, tmp_path / "out", Method("magnitude", 0.5, "global"))
    assert not (tmp_path / "out").exists()


DAMAGES = {
    truncate: "header speaks of|ends inside",
    cut_header: "cut short",
    lose: "is missing",
    flip: "damaged header",
    escape: r"names \['\.\./other",
    swap: "says that",
    garble_index: "index.json is damaged",
    link: "outside the model",
    lose_index: "no model.safetensors.index.json",
    only_pickles: "is a pickle",
    not_finite: "not finite",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_refused_before_anything_is_written(
    damage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama3", tmp_path / "source", torch.bfloat16)
    DAMAGES[damage]  # the table and the parameters are one
    damage(source)  # type: ignore[operator]
    monkeypatch.setattr(folders, "ShardWriter", None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((CheckpointError, ModelError), match=DAMAGES[damage]):
        prune_stream(source, tmp_path / "out", Method("magnitude", 0.5, "global"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_of_the_hub_is_read_through_its_links(shared: bool, tmp_path: Path) -> None:
    """Those of all models share files where huggingface_hub 2.4 writes them: a link leads to another."""
    source = saved("llama3", tmp_path / "models--org--name" / "snapshots" / "abc")
    blobs, common = tmp_path / "models--org--name" / "blobs", tmp_path / "blobs" / "ab"
    blobs.mkdir()
    common.mkdir(parents=True)
    for file in [*source.iterdir()]:
        target = blobs / f"etag-of-{file.name}"
        shutil.move(file, common / f"hash-of-{file.name}" if shared else target)
        if shared:
            target.symlink_to(common / f"hash-of-{file.name}")
        file.symlink_to(target)
    prune_stream(source, tmp_path / "out", Method("magnitude", 0.5))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert verify(tmp_path / "out").ok
    decoder = load(str(source))
    assert decoder.source is not None
    assert not decoder.source.reshaped


def test_what_cannot_be_streamed_is_said(tmp_path: Path) -> None:
    source, out = saved("llama3", tmp_path / "source"), tmp_path / "out"
    other = effects_of(saved("llama2", tmp_path / "other"))
    for method in (Method("wanda", 0.5, "global"), Method("wanda", 0.5, budgets="graded")):
        with pytest.raises(OptionError, match="leave out --stream"):
            prune_stream(source, out, method)
    with pytest.raises(OptionError, match="needs calibration data"):
        prune_stream(source, out, Method("wanda", 0.5))
    with pytest.raises(OptionError, match="needs effects"):
        prune_stream(source, out, CAP)
    with pytest.raises(MismatchError, match="another model"):
        prune_stream(source, out, CAP, seen=Seen(effects=other))
    with pytest.raises(CheckpointError, match="not a folder"):
        prune_stream(tmp_path / "none", out, Method("magnitude", 0.5))
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        prune_stream(source, out, Method("magnitude", 0.5))
    assert not any(out.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama3", tmp_path / "source")
    real, written = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CausalPruneError, match="No space left"):
        prune_stream(source, tmp_path / "out", Method("magnitude", 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="are needed"):
        prune_stream(source, tmp_path / "out", Method("magnitude", 0.5))


def test_what_a_stopped_run_has_left_needs_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, kept = tiny_decoder(), tmp_path / "out.pruning"
    copy = sum(p.size * p.parameter.element_size() for p in decoder.projections)
    masks, monkey = sum(p.size for p in decoder.projections) // 8, monkeypatch.setattr
    monkey(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000 + masks + copy))
    kept.mkdir()
    (kept / "layer-0").write_bytes(bytes(copy - 1))
    with pytest.raises(CheckpointError, match="are needed"):
        files._check_room(tmp_path, decoder, 1000, kept, copies=2, hidden=0)
    (kept / "layer-0").write_bytes(bytes(copy))
    files._check_room(tmp_path, decoder, 1000, kept, copies=2, hidden=0)
    with pytest.raises(CheckpointError, match="are needed"):
        files._check_room(tmp_path, decoder, 1000, kept, copies=2, hidden=1)


def test_a_checkpoint_is_pruned_from_file_to_file(run: Run, tmp_path: Path) -> None:
    model = saved("llama3", tmp_path / "source")
    arguments = ("--method", "magnitude:global", "--sparsity", "0.5")
    code, out, err = run("prune", model, "-o", tmp_path / "out", *arguments, "--stream", "--device", "cpu")
    assert code == 0, err
    assert "(50.0000%)" in out
    assert run("verify", tmp_path / "out")[0] == 0
    code, _, err = run("prune", model, "-o", tmp_path / "two", *arguments, "--stream", "--dtype", "float16")
    assert code == 2
    assert "keeps the dtype" in err
    assert not (tmp_path / "two").exists()
