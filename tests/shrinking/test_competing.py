"""One budget for every kind of units: met, by what costs least, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import configs
import pytest
import torch
import working
from conftest import Run
from families import FAMILIES
from reference import problems
from tinydata import tiny_decoder, write_jsonl, write_model

from causalprune.calibration.examples import batches, few
from causalprune.core.errors import MismatchError, OptionError
from causalprune.core.sizes import size_of
from causalprune.core.types import Decoder, quiet, silent
from causalprune.interventions.ablation import last_hidden
from causalprune.models.anatomy import inspect_model
from causalprune.shrinking import competing, removal
from causalprune.shrinking.competing import Budget, Offers, competed, harm
from causalprune.shrinking.removal import shrink
from causalprune.shrinking.structure import Kept, parameters_of, smaller
from causalprune.shrinking.worth import Kind, Shrinking, worths_of


def decoder_of(name: str) -> Decoder:
    return inspect_model(FAMILIES[name](), None, name=name)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "mixtral"])
def test_parameters_are_counted_without_making_the_model(name: str) -> None:
    decoder = decoder_of(name)
    offers = Offers(decoder, Budget(parameters=0.2))
    for kind, n in offers.sizes.items():
        left = {kind: max(n // 2, 2 if kind == "experts" else 1)}
        assert offers.possible(left)
        kept = offers.kept(left)
        made = smaller(decoder, kept)
        assert parameters_of(decoder, kept) == sum(p.numel() for p in made.model.parameters())


@pytest.mark.parametrize("name", ["llama3", "qwen2", "mixtral"])
def test_a_share_of_all_parameters_goes(name: str) -> None:
    found = shrink(decoder_of(name), 0.2, problems(), update="none", stage=quiet)
    step = 1 / 12  # an expert of a layer, or a neuron
    assert 1 - found.parameters_after / found.parameters_before == pytest.approx(0.2, abs=step)
    record = found.record()["shrink"]
    assert record["budget"] == {"parameters": 0.2}
    assert record["shares"].keys() >= {"layers"}
    assert [row["divergence"] > 0 for row in record["tried"]] == [True] * len(record["tried"])


def test_a_budget_of_bytes_is_never_exceeded() -> None:
    decoder = decoder_of("llama3")
    whole = size_of(decoder)
    for share in (0.95, 0.8, 0.7):
        found = shrink(
            decoder_of("llama3"), Budget(memory=share * whole.bytes), problems(), update="none", stage=quiet
        )
        assert share * 0.9 * whole.bytes < size_of(found.decoder).bytes <= share * whole.bytes


def test_what_costs_less_goes() -> None:
    """A layer that does nothing goes before neurons that do something, and the other way round."""
    for idle in (True, False):
        decoder = decoder_of("llama3")
        layer = decoder.layers[1]
        for p in layer.projections:
            if p.role in ("o", "down"):
                p.write(p.read() * (0.0 if idle else 30.0))
        whole = Offers(decoder, Budget(parameters=0.5))
        share = 1 - whole.parameters({"layers": 2}) / whole.parameters({})  # as much as a layer has
        offers = Offers(decoder, Budget(parameters=share))
        worths = worths_of(decoder, list(offers.sizes), problems(), Shrinking(), silent, None)
        left, tried = competed(
            Offers(decoder, offers.budget, tuple(offers.sizes), worths), problems(), silent
        )
        assert ("layers" in left) == idle
        assert min(row["divergence"] for row in tried) == next(
            row["divergence"] for row in tried if row["left"] == left
        )


def test_divergence_is_that_of_whole_predictions() -> None:
    decoder = decoder_of("llama3")
    groups = batches(few(problems().examples), max_batch_tokens=64)
    intact = [last_hidden(decoder, batch) for batch in groups]
    kept = Kept(neurons={i: torch.arange(20) for i in range(3)})
    small, total, tokens = smaller(decoder, kept), 0.0, 0
    for batch in groups:
        with torch.inference_mode():
            own, whole = (
                model(batch.tokens).logits.log_softmax(-1) for model in (small.model, decoder.model)
            )
        rows, at = batch.is_target.nonzero(as_tuple=True)
        p, q = whole[rows, at - 1], own[rows, at - 1]
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(rows)
    ones = torch.ones(len(few(problems().examples)))
    assert harm(small, groups, intact, ones) == pytest.approx(total / tokens, rel=1e-4)


def test_time_is_measured_once_and_what_is_left_is_predicted_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose time is 4 ms, 2 of them the MLPs', and all of it in 3 layers."""
    calls = []

    def timed(decoder: Decoder, parts: dict[str, Any]) -> dict[str, float]:
        calls.append(parts)
        gone = {kind: 1 - share for kind, (share, _) in parts.items()}
        return {
            "whole": 4e-3,
            "neurons": 4e-3 - 2e-3 * gone["neurons"],
            "kv_groups": 4e-3,
            "layers": 4e-3 * (1 - gone["layers"]),
        }

    monkeypatch.setattr(competing, "token_seconds", timed)
    offers = Offers(decoder_of("llama3"), Budget(latency=0.75))
    n = offers.sizes["neurons"]
    assert offers.cost({}) == pytest.approx(4e-3)
    assert offers.cost({"neurons": n // 2}) == pytest.approx(3e-3)
    assert offers.cost({"layers": 1}) == pytest.approx(4e-3 / 3)
    assert offers.filled({}) == {"neurons": n // 2}
    assert calls


def test_times_are_kept_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = Offers(tiny_decoder(), Budget(latency=0.9)).cost({})
    (kept,) = (tmp_path / "causalprune" / "times").iterdir()
    assert json.loads(kept.read_text())["seconds"].keys() >= {"whole", "neurons", "layers"}
    assert Offers(tiny_decoder(), Budget(latency=0.9)).cost({}) == seconds
    kept.write_text(json.dumps({"parts": {"neurons": 0.1}, "seconds": {}}))  # of another half
    assert Offers(tiny_decoder(), Budget(latency=0.9)).cost({}) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", "much"), "a size is a number and its unit"),
        (("--memory", "1kb"), "cannot be so small"),
        (("--parameters", "0.2", "--memory", "1MB"), "leave the other shares out, and other budgets"),
        (("--parameters", "0.2", "--layers", "0.5"), "leave the other shares out, and other budgets"),
        (("--latency", "1.5"), "latency must be a share between 0 and 1, not 1.5"),
        (("--parameters", "0.99"), "cannot be so small"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(
    run: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    model = tmp_path / "model"
    write_model(model, tiny_decoder())
    task = write_jsonl(
        tmp_path / "own.jsonl", [{"prompt": f"{i}?", "target": f"It is {2 * i}."} for i in range(8)]
    )
    code, _, err = run(
        "shrink", model, "-t", task, "-n", 6, "--preserve", "none", *words, "-o", tmp_path / "small"
    )
    assert code == 2, err
    assert said in err.splitlines()[-1]


def test_a_budget_is_one_thing() -> None:
    with pytest.raises(OptionError, match="one of parameters, memory and latency"):
        Budget(parameters=0.1, memory=1e6)


def test_groups_of_heads_stay_where_runtimes_work_out_their_width() -> None:
    assert "kv_groups" in Offers(decoder_of("llama3"), Budget(parameters=0.2)).sizes
    assert (
        "does not state the width of a head"
        in Offers(decoder_of("qwen2"), Budget(parameters=0.2)).over["kv_groups"]
    )


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("gemma3", "layers", "treats layers of a gemma3_text by their numbers"),
        ("gemma2", "kv_groups", "fewer KV groups"),
    ],
)
def test_only_kinds_that_are_named_go_and_a_file_that_llama_cpp_refuses_is_said(
    name: str, kind: Kind, said: str
) -> None:
    budget = Budget(parameters=0.1, kinds=("neurons", kind))
    assert Offers(decoder_of(name), budget).sizes.keys() == {"neurons", kind}
    with pytest.warns(UserWarning, match=rf"llama\.cpp .*{said}.*--neurons"):
        removal._warn_of_files(decoder_of(name), budget.kinds)


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("name", ["gemma4_text", "deepseek_v3", "bitnet", "gpt2", "qwen2_moe", "qwen3_next"])
def test_kinds_that_an_architecture_cannot_lose_are_left_out(name: str) -> None:
    """By their shapes alone, or when the first candidate is made: what is left competes on."""
    decoder = working.inspected(configs.build(configs.tiny_config(name)))
    found = shrink(decoder, 0.25, working.examples(), update="none", stage=quiet)
    assert found.parameters_after < found.parameters_before


def test_bytes_are_kept_where_layers_differ() -> None:
    decoder = decoder_of("qwen3_moe")
    worth = {layer: torch.tensor([float(layer)]) for layer in range(len(decoder.layers))}
    offers = Offers(decoder, Budget(parameters=0.2), ("layers",), {"layers": worth})
    for left in offers.options("layers"):
        made = smaller(decoder, offers.kept({"layers": left}))
        assert offers.parameters({"layers": left}) == sum(p.numel() for p in made.model.parameters())


def test_a_budget_of_less_than_a_step_is_refused() -> None:
    for budget in (Budget(parameters=1e-4), Budget(memory=1e12)):
        with pytest.raises(OptionError, match="nothing of llama3 would go"):
            shrink(decoder_of("llama3"), budget, problems(), stage=quiet)


def test_layers_do_not_compete_where_nobody_knows_their_worth() -> None:
    found = shrink(decoder_of("llama3"), 0.1, problems(), by="activation", update="none", stage=quiet)
    assert "layers" not in {kind for row in found.options["tried"] for kind in row["left"]}


def test_what_was_decided_is_not_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shrink(decoder_of("llama3"), 0.2, problems(), update="refit", ledger=tmp_path / "l", stage=quiet)
    monkeypatch.setattr(removal, "competed", None)
    again = shrink(decoder_of("llama3"), 0.2, problems(), update="refit", ledger=tmp_path / "l", stage=quiet)
    assert again.record() == first.record()
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="with other options"):
        shrink(decoder_of("llama3"), 0.3, problems(), update="refit", ledger=tmp_path / "l", stage=quiet)


def test_damaged_times_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Offers(tiny_decoder(), Budget(latency=0.9)).cost({}) > 0
    (kept,) = (tmp_path / "causalprune" / "times").iterdir()
    kept.write_text(kept.read_text()[:20])
    assert Offers(tiny_decoder(), Budget(latency=0.9)).cost({}) > 0
