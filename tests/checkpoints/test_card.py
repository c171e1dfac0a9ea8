"""Model cards: valid metadata, origin and licence carried over, results as a run measured them, the truth about zeros."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from reporting import ATTACK, made_result
from tinydata import tiny_decoder, write_data

from causalprune.checkpoints.card import CARD, card_text, source_metadata, write_card
from causalprune.checkpoints.embedded import DESCRIPTION
from causalprune.checkpoints.saving import read_manifest, save
from causalprune.core.types import Decoder
from causalprune.evaluation.results import headline, load_rows
from causalprune.runs import study as running
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe

SOURCE = (
    "---\nlicense: other\nlicense_name: own-terms\nlicense_link: LICENSE\nlanguage: en\n---\n\n# A model\n"
)


@pytest.fixture
def decoder() -> Decoder:
    found = tiny_decoder()
    for p in found.projections:
        p.write(torch.where(p.read().abs() > 0.1, p.read(), 0.0))
    return found


def saved(decoder: Decoder, folder: Path, **run: Any) -> ModelCard:
    save(decoder, folder, manifest=run)
    return ModelCard.load(folder / CARD)


def test_every_checkpoint_has_a_card_that_says_what_zeros_do_not_do(decoder: Decoder, tmp_path: Path) -> None:
    card = saved(decoder, tmp_path / "pruned", method={"criterion": "wanda", "sparsity": 0.5, "scope": "row"})
    text = " ".join(card.text.split())
    assert "neither smaller nor faster" in text
    assert "causalprune shrink" in text
    assert "# pruned" in card.text
    assert f"{read_manifest(tmp_path / 'pruned')['sparsity']['zeros']:,}" in text
    assert "names no licence" in text
    assert card.data.license is None
    assert card.data.base_model is None  # a local folder has no name on the Hub
    assert set(card.data.tags) == {"causalprune", "pruned", "sparse", "wanda"}


def test_a_smaller_model_is_not_called_sparse(decoder: Decoder, tmp_path: Path) -> None:
    shrunk = {"parameters_before": 200, "parameters_after": 150, "by": "effect"}
    card = saved(decoder, tmp_path / "small", shrink=shrunk)
    assert "25.0% of its parameters removed" in card.text
    assert "neither smaller" not in card.text
    assert "sparse" not in card.data.tags


@pytest.mark.parametrize(
    ("architecture", "kinds", "said"),
    [
        (
            "llama",
            ("neurons", "kv_groups"),
            "(llama) without some neurons and KV groups compute the same in llama.cpp",
        ),
        (
            "granite",
            ("neurons", "kv_groups"),
            "In llama.cpp granite without some KV groups was not found to run",
        ),
        ("bloom", ("layers",), "(bloom) without some layers compute the same"),
        ("a_new_one", ("layers",), "a_new_one without some layers was not found to run"),
        (None, ("layers",), "Try it in the runtime that you want"),
    ],
)
def test_a_smaller_model_says_where_its_like_was_tried(
    architecture: str | None, kinds: tuple[str, ...], said: str, decoder: Decoder, tmp_path: Path
) -> None:
    shrunk = {"parameters_before": 200, "parameters_after": 150, "kept": {kind: {} for kind in kinds}}
    shrunk |= {"model_type": architecture} if architecture else {}
    assert said in " ".join(saved(decoder, tmp_path / "small", shrink=shrunk).text.split())


def test_licence_and_origin_are_carried_over(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(SOURCE)
    found = source_metadata({"name": str(tmp_path), "revision": None})
    assert found == {
        "license": "other",
        "license_name": "own-terms",
        "license_link": "LICENSE",
        "language": "en",
        "base_model": None,
    }
    (tmp_path / CARD).write_text(DESCRIPTION)
    origin = source_metadata({"name": str(tmp_path), "revision": None})
    assert (origin["base_model"], origin["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert source_metadata({"name": "maker/model", "revision": None})["base_model"] == "maker/model"


@pytest.mark.parametrize("text", ["no metadata", "---\n: [\n---\n", "---\n- a list\n---\n", ""])
def test_a_source_without_a_usable_card(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    assert not any(source_metadata({"name": str(tmp_path), "revision": None}).values())


def test_a_run_writes_its_results_into_the_cards(tmp_path: Path) -> None:
    own = tiny_decoder()
    own.model.save_pretrained(tmp_path / "model")
    own.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / CARD).write_text(SOURCE)
    recipe = Recipe(
        ModelSpec(str(tmp_path / "model")),
        CalibrationSpec(("gsm8k",), n=3, subsets=3),
        methods=("wanda",),
        sparsities=(0.5,),
        on=("gsm8k_nll:4", "strategyqa"),
        save=True,
        general_text="none",
    )
    running.run(recipe, tmp_path / "run", data_dir=write_data(tmp_path / "data"))
    card = ModelCard.load(tmp_path / "run" / "checkpoints" / "wanda-row-0.5" / CARD)
    rows = dict(load_rows(tmp_path / "run"))["wanda-row-0.5"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {(r.task, r.metric): pytest.approx(headline(r)) for r in rows}
    assert (card.data.license, card.data.license_name, card.data.model_name) == (
        "other",
        "own-terms",
        "wanda-row-0.5",
    )
    assert "## Results" in card.text


def test_hostile_names_and_broken_values_stay_valid_yaml(tmp_path: Path, decoder: Decoder) -> None:
    save(decoder, tmp_path / "out", manifest={"method": {"criterion": "wanda"}})
    task = f"a|b\n---\n{ATTACK}"
    good = [made_result(task, "accuracy", loss, n=5) for loss in (0.0, 0.5)]
    nan = [made_result("nan", "nats_per_token", loss, n=3) for loss in (0.0, float("nan"))]
    for pair in (good, nan):
        rows = [("dense", pair[:1]), ("pruned", pair[1:])]
        write_card(tmp_path / "out", read_manifest(tmp_path / "out"), rows)
        card = ModelCard.load(tmp_path / "out" / CARD)
        values = card.data.eval_results or []
        assert len(values) == (pair is good)
        assert "<script>" not in card.text
    text = card_text("x", read_manifest(tmp_path / "out"), {"license": "mit"}, [])
    assert ModelCard(text).data.license == "mit"
