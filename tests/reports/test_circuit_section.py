"""The section of a report on circuits: curve, members, tests in words, overlaps."""

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from constructed import constructed, problems

import causalprune as cp
from causalprune.circuits import Checks, Circuit, examined, save_circuit
from causalprune.circuits.curves import Value
from causalprune.evaluation.results import write_json
from causalprune.reports.circuits import _told
from causalprune.reports.drawings import beyond, drawn_curve
from causalprune.reports.evidence import Evidence, read_run
from causalprune.reports.page import page
from causalprune.reports.summary import summary


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    decoder, scored = constructed("chain"), problems("chain", 16)
    found = cp.circuit(decoder, scored, decide=problems("chain", 16, 1), stage=cp.quiet, rescore=1)
    return examined(found, decoder, scored, Checks(4, tests=True), stage=cp.quiet)


@pytest.mark.thorough
def test_a_circuit_alone_makes_a_report(circuit: Circuit, tmp_path: Path) -> None:
    save_circuit(circuit, tmp_path / "circuit.json")
    (made,) = cp.report(tmp_path)
    text = made.read_text(encoding="utf-8")
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
    write_json(tmp_path / "overlap.json", {"overlap": asdict(both)})
    (made,) = cp.report(tmp_path)
    text = made.read_text(encoding="utf-8")
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


def test_circuits_of_this_folder_have_its_name_and_overlaps_are_found_below(
    circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mine"
    (place / "both").mkdir(parents=True)
    save_circuit(circuit, place / "circuit.json")
    both = cp.overlap({"a": circuit, "b": circuit}, constructed("chain"), remove=1, stage=cp.quiet)
    none_like_it = asdict(replace(both, random=((None, None), both.random[1])))
    write_json(place / "both" / "overlap.json", {"overlap": none_like_it})
    monkeypatch.chdir(place)
    made, *figures = cp.report(".", figures="figs")
    text = made.read_text(encoding="utf-8")
    assert "<h3>mine: 2 of 16 units</h3>" in text
    assert text.count("<h3>What circuits share</h3>") == 1
    assert text.count("<td>no other set</td>") == 2
    assert [path.name for path in figures] == ["circuit.png", "circuit.svg"]
    (place / "circuit.json").unlink()
    with pytest.warns(UserWarning, match="no figures in figs"):
        assert len(cp.report(".", figures="figs")) == 1


def test_values_beyond_the_axis_are_marked(circuit: Circuit) -> None:
    def told(*values: float) -> dict[str, Any]:
        f = [{"value": value, "low": value - 0.1, "high": value + 0.1} for value in values]
        ends = enumerate(f, start=1)
        return {"points": [{"share": i / len(f), "faithfulness": own, "chosen": i == 1} for i, own in ends]}

    def drawn(own: dict[str, Any], pattern: str) -> list[str]:
        return re.findall(pattern, drawn_curve(own))

    own = told(-8.0, 4.0, 0.5, 1.0)
    assert beyond(own)
    assert len(drawn(own, 'class="beyond"')) == 2
    assert len(drawn(own, "<circle")) == 2
    assert drawn(own, 'text-anchor="end">([^<]*)') == ["0", "1", "-2", "3"]
    # from −8 to 4 it is within the axis from the middle of the way to 11/12 of it
    assert drawn(own, r"M([\d.]+) [\d.]+L([\d.]+)")[0] == ("212.5", "260.4")
    own = told(0.2, 0.5, 1.0)
    assert not beyond(own)
    assert not drawn(own, 'class="beyond"')
    assert len(drawn(own, "<circle")) == 3
    assert beyond(told(0.2, 2.95))
    note = "an arrow is a point beyond it"
    save = replace(circuit, chosen=replace(circuit.chosen, faithfulness=Value(-8.0, -9.0, -7.0)))
    for found, there in ((save, True), (circuit, False)):
        assert (
            note in page(summary([Evidence(Path("x"), {}, (), (), {}, {}, None, (_told("x", found),))]))
        ) is there
