"""Records say what they are in a few words, whatever they hold."""

import micro
import pytest
from reference import problems
from reporting import made_effects, made_result
from tinydata import tiny_decoder

from causalprune.core.memory import Masks
from causalprune.core.showing import Shown
from causalprune.evaluation.results import Comparison, Tried, headline
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.shrinking.removal import Shares, shrink
from causalprune.shrinking.worth import Shrinking


def records() -> dict[str, object]:
    decoder = tiny_decoder()
    pruned = prune(decoder, Method("wanda", 0.5), calibration=problems())
    shrunk = shrink(decoder, Shares(neurons=0.3), problems(), by="magnitude", update="none")
    layer = decoder.layers[0]
    return {
        "decoder": decoder,
        "layer": layer,
        "attention": layer.attention,
        "projection": layer.projections[0],
        "calibration": problems(40),
        "example": problems().examples[0],
        "effects": made_effects(30, 9, others=("mlp",)),
        "result": made_result("own_nll", "nats_per_token", 0.1, n=4000),
        "method": pruned.method,
        "pruned": pruned,
        "shrunk": shrunk,
        "shrinking": Shrinking(),
        "tried": Tried(0.3, (("own_nll", Comparison(0.1, 0.0, 0.2, 40, "worse")),), holds=False),
    }


def test_no_record_is_a_wall() -> None:
    for name, record in records().items():
        said = repr(record)
        assert said.count("\n") < 3, name
        assert len(said) < 500, (name, said)
        assert type(record).__name__ in said
        assert "tensor(" not in said


def test_a_decoder_names_its_size() -> None:
    decoder = micro.decoder()
    total = sum(p.numel() for p in decoder.model.parameters())
    said = repr(decoder)
    assert f"micro: 2 layers of 4 heads, {total:,} parameters" in said
    assert f"{sum(p.size for p in decoder.projections):,} of them prunable; float32 on cpu" in said


def test_calibration_counts_by_source() -> None:
    assert "5 × hand; 3 subsets, 25 tokens, 14 of them targets" in repr(micro.CALIBRATION)


@pytest.mark.parametrize("metric", ["accuracy", "nats_per_token", "perplexity"])
def test_a_result_shows_its_headline(metric: str) -> None:
    result = made_result("own", metric, 0.1)
    assert f"own: {headline(result):.4g} {metric.replace('_', ' ')} on 40 examples" in repr(result)


def test_masks_count_what_does_not_stay() -> None:
    decoder, masks = micro.decoder(), Masks()
    for p in decoder.projections:
        masks.add(p.name, p.read().abs() > 0.3)
    for p, row in zip(decoder.projections, masks.counted(), strict=True):
        assert row == {"name": p.name, "weights": p.size, "zeros": int((~masks[p.name]).sum())}


def test_other_records_show_their_fields_in_short() -> None:
    projection = micro.decoder().layers[0].projections[0]
    assert isinstance(projection, Shown)
    assert "parameter=float32[8, 4]" in repr(projection)
