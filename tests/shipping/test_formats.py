"""What is said of zeros in quantised files is what was measured."""

import json
import re

import pytest
from conftest import REPOSITORY

from causalprune.reports import QUANTISED_ZEROS

CARD = (REPOSITORY / "src/causalprune/checkpoints/card_zeros.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("said", [QUANTISED_ZEROS, CARD], ids=["prune", "card"])
def test_formats_keep_and_lose_zeros_as_measured(said: str) -> None:
    record = json.loads((REPOSITORY / "bench/results/fit.json").read_text(encoding="utf-8"))
    formats = record["raw"]["zeros"]["formats"]
    found = re.search(r"([\w, ]+) keep\s+them; ([\w, ]+) lose nearly all", said.replace("\n", " "))
    assert found is not None
    kept, lost = (re.findall(r"\b[A-Z]+\d\w*", part) for part in found.groups())
    assert len(kept) > 3
    assert all(formats[name]["zeros_kept"] == 1 for name in kept)
    assert len(lost) > 2
    assert all(formats[name]["zeros_kept"] < 0.05 for name in lost)
