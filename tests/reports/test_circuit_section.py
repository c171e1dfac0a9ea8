"""The section of a report on circuits: curve, members, tests in words, overlaps."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from constructed import constructed, problems

import causalprune as cp
from causalprune.circuits import Checks, Circuit, examined, save_circuit
from causalprune.circuits.curves import Value
from causalprune.evaluation.results import write_json
from causalprune.reports.evidence import read_run
from causalprune.reports.summary import summary


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    decoder, scored = constructed("chain"), problems("chain", 16)
    found = cp.circuit(decoder, scored, decide=problems("chain", 16, 1), stage=cp.quiet, rescore=1)
    return examined(found, decoder, scored, Checks(4, tests=True), stage=cp.quiet)


@pytest.mark.thorough
def test_a_circuit_alone_makes_a_report(circuit: Circuit, tmp_path: Path) -> None:
    save_circuit(circuit, tmp_path / "circuit.json")
    (page,) = cp.report(tmp_path)
    text = page.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    for words in (
        "Circuits</a>",
        "2 of 16 units",
        "f by share, with 95 % intervals",
        "sufficiency: ",
        "layer</th>",
        "Members by layer",
    ):
        assert words in text
    assert "What circuits share" not in text
    (run,) = summary([read_run(tmp_path)])["runs"]
    (own,) = run["circuits"]
    assert run["model"] == own["model"] != ""
    assert run["provenance"]["model SHA-256"] == circuit.model_fingerprint
    assert run["provenance"]["seed"] == 0
    assert run["provenance"]["versions"] == circuit.description["versions"]
    assert run["missing"] == []
    for words in ("not recorded", "Verdict", "pruned models", "Where the zeros went", "How far the effects"):
        assert words not in text.partition('<script type="application/json"')[0]
    assert [row[3] for row in own["heads"]].count(True) == 2
    assert own["layers"] == [[0, "1 of 8"], [1, "1 of 8"]]
    assert [point["units"] for point in own["points"]] == [1, 2, 4, 8, 16]
    assert [point["chosen"] for point in own["points"]].count(True) == 1


@pytest.mark.thorough
def test_circuits_in_folders_and_what_they_share(circuit: Circuit, tmp_path: Path) -> None:
    (tmp_path / "<b>one").mkdir()
    odd = replace(circuit, chosen=replace(circuit.chosen, faithfulness=Value(*[float("nan")] * 3)))
    save_circuit(odd, tmp_path / "<b>one" / "circuit.json")
    (tmp_path / "two").mkdir()
    save_circuit(circuit, tmp_path / "two" / "circuit.json")
    both = cp.overlap({"<b>one": circuit, "two": circuit}, constructed("chain"), remove=1, stage=cp.quiet)
    from dataclasses import asdict

    write_json(tmp_path / "overlap.json", {"overlap": asdict(both)})
    (page,) = cp.report(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "<b>one" not in text
    assert "What circuits share" in text
    assert "random, same kinds and, where one has several, layers" in text
    assert text.count("f by share") == 2
    other = replace(circuit, description=circuit.description | {"calibration_fingerprint": "other"})
    save_circuit(other, tmp_path / "two" / "circuit.json")
    (run,) = summary([read_run(tmp_path)])["runs"]
    assert run["provenance"]["calibration SHA-256"]["two"] == "other"
    assert run["provenance"]["model SHA-256"] == circuit.model_fingerprint
    for name in ("<b>one", "two"):
        (tmp_path / name / "circuit.json").unlink()
    assert summary([read_run(tmp_path)])["runs"][0]["model"] == constructed("chain").name
