"""A model of which some layers are on the disk is measured as one that is in memory, bit for bit."""

import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from conftest import Run
from families import FAMILIES
from reference import calibration
from tinydata import tiny_decoder, write_data

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Decoder
from causalprune.interventions import gradients
from causalprune.interventions.gradients import neuron_effects
from causalprune.interventions.losses import target_nats
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

OFFLOADED = ["llama2", "llama3", "gpt2", "gemma2", "mixtral"]
every_family = pytest.mark.parametrize("family", OFFLOADED)
ROOM = 28


def spread(model: Any) -> dict[str, str]:
    """Return a device map: the first layer and what is small in memory, the embedding and other layers on the disk."""
    base = model.base_model_prefix
    places = {}
    for name, module in model.get_submodule(base).named_children():
        if isinstance(module, torch.nn.ModuleList):
            places |= {f"{base}.{name}.{i}": "disk" if i else "cpu" for i in range(len(module))}
        else:
            places[f"{base}.{name}"] = "disk" if "embed_tokens" in name or name == "wte" else "cpu"
    return {**places, "lm_head": "disk" if model.config.tie_word_embeddings else "cpu"}


def both(family: str, folder: Path) -> tuple[Decoder, Decoder]:
    model = FAMILIES[family]()
    model.save_pretrained(folder)
    return load(str(folder)), load(str(folder), device_map=spread(model))


def equal(one: Any, other: Any) -> None:
    for name in ("masked_nats", "intact_nats", "kl_nats", "predicted_nats", "curvature_nats"):
        values = getattr(one, name), getattr(other, name)
        assert (values[0] is None) == (values[1] is None)
        if values[0] is not None:
            torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
    assert one.model_fingerprint == other.model_fingerprint
    assert one.units == other.units


@pytest.mark.thorough
@every_family
def test_exact_effects_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    plain, offloaded = both(family, tmp_path)
    assert offloaded.offloaded
    assert not plain.offloaded
    assert offloaded.fingerprint == plain.fingerprint
    assert [left.parameter_name for left in offloaded.left_out] == [
        left.parameter_name for left in plain.left_out
    ]
    question = Question(("heads", "mlp"), effect="kl")
    how = Estimator(max_batch_tokens=ROOM)
    equal(*(attribute(decoder, calibration(), question, how) for decoder in (plain, offloaded)))


@pytest.mark.thorough
@every_family
@pytest.mark.parametrize("estimator", ["gradient", "adaptive"])
def test_estimates_too(family: str, estimator: str, tmp_path: Path) -> None:
    decoders = both(family, tmp_path)
    how = Estimator("gradient") if estimator == "gradient" else Estimator("adaptive", budget=1.2)
    equal(*(attribute(decoder, calibration(), Question(), how) for decoder in decoders))


@pytest.mark.thorough
def test_means_and_neurons_by_effect(tmp_path: Path) -> None:
    decoders = both("llama2", tmp_path)
    question = Question(("neurons:8:effect",), ablation="mean")
    equal(*(attribute(decoder, calibration(), question) for decoder in decoders))


@pytest.mark.parametrize("recomputed", [True, False])
def test_backward_passes_keep_one_layer(
    recomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, offloaded = both("llama2", tmp_path)
    fetched: list[weakref.ref[Any]] = []
    most = [0]
    own = AlignDevicesHook.pre_forward

    def pre_forward(self: AlignDevicesHook, module: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, module, *args, **kwargs)
        if self.offload and module in [layer.attention.output for layer in offloaded.layers]:
            fetched.append(weakref.ref(module.weight.untyped_storage()))
            most[0] = max(most[0], sum(one() is not None for one in fetched))
        return found

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    if not recomputed:
        monkeypatch.setattr(gradients, "recomputed", nullcontext)
    groups = batches(calibration().examples[:1], max_batch_tokens=64)
    slopes = [neuron_effects(decoder, groups) for decoder in (plain, offloaded)]
    assert all(torch.equal(slopes[0][layer], slopes[1][layer]) for layer in slopes[0])
    assert len(fetched) == (4 if recomputed else 2)
    assert most[0] == (1 if recomputed else 2), "or else the test is blind"


def test_losses_are_equal(tmp_path: Path) -> None:
    plain, offloaded = both("llama3", tmp_path)
    batch = batches(calibration().examples, max_batch_tokens=64)[0]
    assert torch.equal(target_nats(plain, batch), target_nats(offloaded, batch))


def test_pruning_says_how_it_can_be_done(tmp_path: Path) -> None:
    _, offloaded = both("llama2", tmp_path)
    with pytest.raises(ModelError, match="is not all in memory: prune its files, with --stream"):
        prune(offloaded, Method("magnitude", 0.5))


def test_a_map_is_given_as_json_on_the_command_line(run: Run, tmp_path: Path) -> None:
    decoder = tiny_decoder()
    decoder.model.save_pretrained(tmp_path / "model")
    decoder.tokenizer.save_pretrained(tmp_path / "model")
    common = ("-t", "gsm8k", "-n", 3, "--data-dir", write_data(tmp_path / "data"))
    places = json.dumps(spread(decoder.model))
    for name, options in (("plain", ()), ("spread", ("--device-map", places))):
        code, _, err = run("attribute", tmp_path / "model", "-o", tmp_path / name, *common, *options)
        assert code == 0, err
    found = [(tmp_path / name / "effects.json").read_bytes() for name in ("plain", "spread")]
    assert found[0] == found[1]
    code, _, err = run("inspect", tmp_path / "model", "--weights", "--device-map", "{")
    assert code == 2
    assert "is no JSON object" in err


def test_auto_is_a_map(tmp_path: Path) -> None:
    FAMILIES["llama2"]().save_pretrained(tmp_path)
    assert load(str(tmp_path), device_map="auto").fingerprint == load(str(tmp_path)).fingerprint
    with pytest.raises(OptionError, match="no JSON object"):
        load(str(tmp_path), device_map="{1}")
