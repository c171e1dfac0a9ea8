"""A count above what there is takes all and says so, alike for what measures and what calibrates."""

from pathlib import Path

import pytest
from tinydata import tiny_decoder, write_jsonl

from causalprune.core.errors import DataError
from causalprune.core.types import Decoder
from causalprune.evaluation.measures import evaluate


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ("gsm8k_nll:9", "gsm8k, to measure: 9 examples asked for, 6 taken: all that it holds"),
        ("strategyqa:9", "strategyqa: 9 examples asked for, 6 taken: all that it holds"),
        ("wikitext2_ppl:90000", r"wikitext2_ppl: 90000 tokens asked for, \d+ taken: all that it holds"),
    ],
)
def test_a_count_above_what_there_is_takes_all_and_says_so(
    decoder: Decoder, data: Path, measure: str, said: str
) -> None:
    with pytest.warns(UserWarning, match=said):
        (capped,) = evaluate(decoder, [measure], data_dir=data, window=64)
    (whole,) = evaluate(decoder, [measure.partition(":")[0]], data_dir=data, window=64)
    assert capped.values == whole.values


def test_what_measures_is_short_for_the_same_reasons_as_what_calibrates(
    decoder: Decoder, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{i}", "target": "a" * (400 if i < 2 else 10)} for i in range(10)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match=r"10 examples asked for, 8 of 10 usable \(2 too long\)"):
        evaluate(decoder, [f"{path}_nll:10"], max_tokens=100)
    assert len(evaluate(decoder, [f"{path}_nll:8"], max_tokens=100)[0].values) == 8
