"""Effects of very many units: tables beside the JSON, bit for bit, and a ledger that keeps bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import calibration, shared

from causalprune.attribution import estimators, measured
from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.checkpoints import aside, saving
from causalprune.checkpoints.saving import load_effects, save_effects
from causalprune.core.errors import CheckpointError

EXAMPLES = calibration(((14, 5), (13, 9), (9, 1)))


def test_large_tables_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(("heads", "neurons:1"))
    effects = attribute(shared("llama3"), EXAMPLES, question, Estimator("gradient"))
    save_effects(effects, tmp_path / "text.json")
    assert not (tmp_path / "text.values").exists()
    for module in (aside, saving):
        monkeypatch.setattr(module, "LARGE", 100)
    save_effects(effects, tmp_path / "effects.json")
    assert (tmp_path / "effects.json").stat().st_size < (tmp_path / "text.json").stat().st_size / 3
    whole, other = load_effects(tmp_path / "effects.json"), load_effects(tmp_path / "text.json")
    for name in saving.TENSORS:
        own, same = getattr(whole, name), getattr(other, name)
        assert own is same is None or torch.equal(own.nan_to_num(9.0), same.nan_to_num(9.0))
    (tmp_path / "effects.values").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="does not belong to"):
        load_effects(tmp_path / "effects.json")
    (tmp_path / "effects.values").unlink()
    with pytest.raises(CheckpointError, match=r"effects\.values, which belongs to"):
        load_effects(tmp_path / "effects.json")


def test_a_ledger_of_bits_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question, how = Question(("neurons:1",)), Estimator("gradient", max_batch_tokens=16)
    plain = attribute(shared("llama3"), EXAMPLES, question, how, ledger=tmp_path / "plain")
    monkeypatch.setattr(measured, "LARGE", 20)
    attribute(shared("llama3"), EXAMPLES, question, how, ledger=tmp_path / "bits")
    assert (tmp_path / "bits").stat().st_size < (tmp_path / "plain").stat().st_size
    monkeypatch.setattr(estimators.Passes, "predicted_row", pytest.fail)
    for name in ("plain", "bits"):
        again = attribute(shared("llama3"), EXAMPLES, question, how, ledger=tmp_path / name)
        assert again.predicted_nats is not None
        assert plain.predicted_nats is not None
        assert torch.equal(again.predicted_nats, plain.predicted_nats)
    assert replace(plain).fingerprint == again.fingerprint
