"""What was written is compared value by value, and found again under the name that it has."""

import json
from pathlib import Path

import pytest
import torch
from reference import problems
from safetensors import SafetensorError
from safetensors.torch import load_file
from sources import edit, fp8, llama, write

import causalprune as cp
from causalprune.checkpoints.placing import complete
from causalprune.checkpoints.verification import verify
from causalprune.checkpoints.writing import _alike
from causalprune.core.errors import CheckpointError, ModelError
from causalprune.pruning.methods import Method
from causalprune.shrinking.removal import Shares, shrink
from causalprune.streaming.files import prune_stream


def test_zeros_are_counted_in_the_dtype_of_files_that_a_configuration_calls_narrower(tmp_path: Path) -> None:
    model = llama().float()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-9
    write(tmp_path / "source", model)
    edit(tmp_path / "source" / "config.json", lambda own: own | {"dtype": "float16"})
    for dtype in ("float32", "auto"):
        decoder = cp.load(str(tmp_path / "source"), dtype=dtype)
        cp.save(decoder, tmp_path / dtype, cp.prune(decoder, Method("magnitude", 0.5)))
        assert verify(tmp_path / dtype).ok


def test_values_are_compared_one_by_one_in_either_dtype() -> None:
    """Half of a float16 matrix was changed in bfloat16 and rounded, the other half has the bits of the file."""
    file = torch.tensor([0.1, 1e-6, -0.3, 7e-7]).half()
    memory = file.bfloat16()
    memory[1] *= 1.01
    written = torch.where(torch.tensor([True, False, True, True]), file, memory.half())
    assert _alike(written, memory)
    assert not _alike(torch.where(torch.arange(4) == 2, -written, written), memory)


def test_layers_that_were_to_go_are_not_said_to_be_lost(tmp_path: Path) -> None:
    write(tmp_path / "source", llama())
    smaller = shrink(
        cp.load(str(tmp_path / "source")), Shares(layers=0.5), problems(), update="none", stage=cp.quiet
    )
    cp.save(smaller.decoder, tmp_path / "out", smaller)  # a warning would be an error


def test_one_file_of_another_name_has_an_index(tmp_path: Path) -> None:
    fp8(tmp_path / "source")
    one = tmp_path / "source" / "model-00001-of-00001.safetensors"
    (tmp_path / "source" / "model.safetensors").rename(one)
    where = dict.fromkeys(load_file(one), one.name)
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="packed"):
        prune_stream(tmp_path / "source", tmp_path / "out", Method("magnitude", 0.5))
    assert verify(tmp_path / "out").ok


def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "model", llama())
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": "32"'))
    with pytest.raises(ModelError, match="cannot be loaded"):
        cp.load(str(tmp_path / "model"))


def test_only_errors_of_writing_are_said_to_be_of_the_disk(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with complete(tmp_path / "out"):
            raise error

    for other in (torch.OutOfMemoryError("CUDA out of memory"), ValueError("some"), ModelError("some")):
        with pytest.raises(type(other), match=f"^{other}$"):
            fail(other)
    for own in (
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ):
        with pytest.raises(CheckpointError, match=r"cannot save to .*out: .* GB free there"):
            fail(own)
    assert not any(tmp_path.iterdir())
