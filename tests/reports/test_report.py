"""The report says what the results say, whatever a run lacks, and takes no text for markup."""

import csv
import html.parser
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from reporting import ATTACK, HOSTILE, made_effects, write_run

from causalprune.checkpoints.saving import save_effects
from causalprune.core.errors import CheckpointError, OptionError
from causalprune.core.ledger import Ledger
from causalprune.evaluation.results import interval, load_rows, paired_difference, read_json, write_json
from causalprune.reports.evidence import by_head, by_matrix, read_run
from causalprune.reports.figures import _figures
from causalprune.reports.page import embedded, finite, number
from causalprune.reports.summary import summary
from causalprune.reports.writing import report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


class Tags(html.parser.HTMLParser):
    """Counts tags and their attributes as a browser would see them, and keeps the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.links: list[str] = []
        self.shown = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._inside = tag
        for name, value in attrs:
            self.attributes[name] += 1
            if name in ("src", "href"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.shown += data


def page_of(run: Path, output: Path) -> str:
    report([run], output)
    return output.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    start = page.index('id="data">') + len('id="data">')
    told: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return told


def test_values_and_differences_are_those_of_the_results(folder: Path) -> None:
    told = summary([read_run(folder)])["runs"][0]
    rows = dict(load_rows(folder))
    models = {model["label"]: model for model in told["models"]}
    assert list(models) == list(rows)
    for label, results in rows.items():
        for own, dense, wanda in zip(results, rows["dense"], rows["wanda-row-0.5"], strict=True):
            cell = models[label]["cells"][f"{own.task} · {own.metric}"]
            found = interval(own)
            assert (cell["value"], cell["low"], cell["high"]) == (found.value, found.low, found.high)
            if label != "dense":
                difference = paired_difference(own, dense)
                assert cell["dense"]["verdict"] == difference.verdict
                assert cell["dense"]["low"] == difference.low
            if label in ("cap-global-0.5", "magnitude-matrix-0.5"):
                assert cell["wanda"]["high"] == paired_difference(own, wanda).high
    assert all(cell["wanda"] is None for cell in models["wanda-row-0.2"]["cells"].values())


@pytest.mark.thorough
def test_the_recommended_model_is_the_sparsest_that_holds(tmp_path: Path) -> None:
    def unharmed(label: str, result: Any) -> Any:
        from dataclasses import replace

        from reporting import made_result

        same = made_result(result.task, result.metric, 0.0)
        return replace(result, values=same.values) if label.startswith("wanda") else result

    held = summary([read_run(write_run(tmp_path / "held", change=unharmed))])["runs"][0]["recommended"]
    assert (held["label"], held["holds"]) == ("wanda-row-0.5", True)
    none = summary([read_run(write_run(tmp_path / "none", n=400))])["runs"][0]["recommended"]
    assert not none["holds"]
    assert "Every pruned model is worse" in none["headline"]


def test_the_page_fetches_nothing_and_holds_its_data(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder, tmp_path / "report.html")
    tags = Tags(page)
    assert all(link.startswith("#") for link in tags.links)
    assert tags.tags["script"] == 3
    assert not {"link", "iframe", "object", "img"} & tags.tags.keys()
    assert "default-src &#39;none&#39;" in page
    assert data_of(page)["runs"][0]["models"] == finite(summary([read_run(folder)])["runs"][0]["models"])
    for word in ("▲ better", "▼ worse", "no difference shown", "wanda-row-0.5", "What is 0 + 0?", "2.00 GiB"):
        assert word in tags.shown


def test_size_and_speed_stand_beside_what_was_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", methods=("wanda-row", "shrink"), sparsities=(0.2,))
    told = summary([read_run(folder)])["runs"][0]
    assert [(m["method"], m["share"], m["removed"]) for m in told["models"]] == [
        ("dense", 0.0, 0.0),
        ("wanda-row", 0.2, 0.0),
        ("shrink", 0.2, 0.2),
    ]
    assert list(told["zeros"]) == ["wanda-row-0.2"], "a smaller model has no zeros to show"
    shown = Tags(page_of(folder, tmp_path / "report.html")).shown
    for word in (
        "1,000 parameters in 0.004 MB, the dense model's speed",
        "800 parameters in 0.0032 MB, reading 1.20 times, writing 1.25 times as fast",
        "20 % fewer parameters",
        "a clock, on paper",
    ):
        assert word in shown


def test_better_is_about_dense_and_wanda_has_other_words(folder: Path, tmp_path: Path) -> None:
    told = summary([read_run(folder)])["runs"][0]
    page = page_of(folder, tmp_path / "report.html")
    cells = [cell for model in told["models"] for cell in model["cells"].values()]
    for verdict, mark, word in (
        ("better", "▲ better", "ahead of Wanda"),
        ("worse", "▼ worse", "behind Wanda"),
    ):
        dense, wanda = (
            sum((c[k] or {}).get("verdict") == verdict for c in cells) for k in ("dense", "wanda")
        )
        chosen = next(m for m in told["models"] if m["label"] == told["recommended"]["label"])
        listed = sum(cell["dense"]["verdict"] == verdict for cell in chosen["cells"].values())
        assert page.count(f">{mark}</span>") == dense + listed + 1
        assert page.count(f'soft">{word}') == wanda


@pytest.mark.parametrize(
    "case",
    [case if n < 4 else pytest.param(case, marks=pytest.mark.thorough) for n, case in enumerate(HOSTILE)],
)
def test_no_text_becomes_markup(case: str, folder: Path, tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", **HOSTILE[case]), tmp_path / "report.html")
    tags, calm = Tags(page), Tags(page_of(folder, tmp_path / "calm.html"))
    assert set(tags.tags) <= set(calm.tags)
    assert set(tags.attributes) <= set(calm.attributes)
    assert tags.tags["script"] == 3
    data_of(page)
    if case == "texts":
        assert "owned" in tags.shown


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("numbers", "are not finite"),
        ("nothing", "No examples were measured"),
        ("single", "no interval"),
        ("subset", "one subset"),
        ("unfinished", "1 of 7 models are measured on all tasks"),
    ],
)
def test_what_is_missing_or_broken_is_said(case: str, said: str, tmp_path: Path) -> None:
    told = summary([read_run(write_run(tmp_path / "run", **HOSTILE[case]))])["runs"][0]
    assert any(said in sentence for sentence in told["missing"])


def test_json_in_the_page_has_no_way_out() -> None:
    text = embedded({"a": f"{ATTACK}<!--", "b": [float("nan"), float("inf"), 1.5]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": f"{ATTACK}<!--", "b": [None, None, 1.5]}


def test_a_run_that_has_only_ledgers(tmp_path: Path) -> None:
    from dataclasses import asdict

    from reporting import made_result

    with Ledger(tmp_path / "run" / "results.ledger", {"seed": 0}) as book:
        dense, pruned = (made_result("own/test.jsonl_nll", "nats_per_token", loss) for loss in (0.0, 0.5))
        book.append("dense/own/test.jsonl_nll:5", [asdict(dense)])
        book.append("wanda+refit-2:4-0.5/pruned", {"seconds": 1.0, "weights": 8, "zeros": 4, "sparsity": 0.5})
        book.append("wanda+refit-2:4-0.5/own/test.jsonl_nll:5", [asdict(pruned)])
    with (tmp_path / "run" / "results.ledger").open("a") as file:
        file.write('{"crc":"0000')  # the row that was being written
    told = summary([read_run(tmp_path / "run")])["runs"][0]
    model = told["models"][1]
    assert (model["method"], model["criterion"], model["scope"]) == ("wanda+refit-2:4", "wanda", "2:4")
    assert model["cells"]["own/test.jsonl_nll · nats_per_token"]["dense"]["verdict"] == "worse"
    assert any("no results.json" in sentence for sentence in told["missing"])
    assert not any("Wanda was not run" in sentence for sentence in told["missing"])
    assert page_of(tmp_path / "run", tmp_path / "report.html")


def test_a_run_without_models_shows_effects_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_effects(made_effects(2, 3), tmp_path / "run" / "effects.json")
    page = page_of(tmp_path / "run", tmp_path / "report.html")
    assert "What each part does for the task" in page
    assert not any(words in page for words in ("<h2>Verdict", "<h2>Examples", "<h2>Where the"))
    (own,) = summary([read_run(tmp_path / "run")])["runs"]
    assert (own["missing"], own["provenance"]["calibration SHA-256"]) == ([], "c" * 64)
    with Ledger(tmp_path / "run" / "results.ledger", {"seed": 0}) as book:
        book.append("attribution", 1.0)  # of a run that was stopped then
    page = page_of(tmp_path / "run", tmp_path / "report.html")
    assert "Nothing can be recommended yet" in page
    assert "No model was evaluated here" in page


def test_a_correction_alone_has_a_model_and_where_it_comes_from(tmp_path: Path) -> None:
    of = {"fingerprint": "f" * 64, "sources": {"gsm8k": 8}}
    point: dict[str, Any] = {
        "count": 1,
        "share": 0.1,
        "benefit": {"value": 1.0, "low": 0.5, "high": 1.5},
        "harm": {},
    }
    own = {"behaviour": "loops", "sentences": [], "chosen": point, "curve": [point], "contrast": {"seed": 3}}
    rows = [{"label": label, "criterion": label, "results": []} for label in ("dense", "corrected")]
    record = {"correction": own | {"model_fingerprint": "m" * 64}, "rows": rows, "texts": [], "minutes": 1.0}
    write_json(tmp_path / "correction.json", record)
    assert summary([read_run(tmp_path)])["runs"][0]["model"] == "unknown model"
    base = {"base": {"name": "maker/model"}, "files": {}, "sparsity": {"projections": []}}
    write_json(tmp_path / "causalprune.json", base | {"format": 1, "run": {"calibration": of}})
    (told,) = summary([read_run(tmp_path)])["runs"]
    assert told["model"] == "maker/model"
    assert told["provenance"]["calibration SHA-256"] == "f" * 64
    assert (told["provenance"]["seed"], told["provenance"]["model SHA-256"]) == (3, "m" * 64)
    page = page_of(tmp_path, tmp_path / "report.html")
    assert "1 correction</span><span>calibrated on 8 × gsm8k" in page
    assert "<h2>Verdict" not in page


def test_a_study_of_stability_alone_makes_a_page(tmp_path: Path) -> None:
    about = {"model": "maker/model", "versions": {"causalprune": "1"}}
    found = {"within": {"own": {"split_half": 0.5}}, "description": about, "git_commit": "abc"}
    write_json(tmp_path / "stability.json", found)
    (told,) = summary([read_run(tmp_path)])["runs"]
    assert (told["model"], told["provenance"]["commit"]) == ("maker/model", "abc")
    page = page_of(tmp_path, tmp_path / "report.html")
    assert "Independent draws of problems" in page
    assert "No effects, so nothing to trust" not in page


def test_nothing_and_damage_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="nothing to report"):
        report([tmp_path / "empty"], tmp_path / "report.html")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "circuit.ledger").write_text("")
    with pytest.raises(
        CheckpointError, match=r"circuit.ledger has not finished: give the same command again"
    ):
        read_run(tmp_path / "begun")
    with pytest.raises(OptionError, match="is a folder"):
        report([folder], tmp_path)
    (tmp_path / "empty" / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        report([tmp_path / "empty"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.thorough
def test_estimates_stand_beside_exact_values(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    save_effects(made_effects(3, 4, estimated=True), run / "effects.json")
    (run / "reference").mkdir()
    save_effects(made_effects(3, 4), run / "reference" / "effects.json")
    found = read_run(run).effects
    assert [(own.name, own.exact) for own in found] == [
        ("adaptive", False),
        ("adaptive, measured units", True),
        ("reference", True),
    ]
    one, other = ([unit["delta"] for unit in own.units] for own in found[1:])
    known = [i for i, value in enumerate(one) if not math.isnan(value)]
    assert known == list(range(6))
    assert [one[i] for i in known] == pytest.approx([other[i] for i in known])
    assert "Exact against estimate" in page_of(run, tmp_path / "report.html")


def test_several_runs_make_one_page(folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", methods=("wanda-row", "sparsegpt-matrix"))
    report([folder, other], tmp_path / "both.html")
    told = data_of((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert [run["name"] for run in told["runs"]] == ["run", "other"]
    assert {row["run"] for row in told["comparison"]} == {"run", "other"}
    alike = write_run(tmp_path / "deeper" / "run")
    assert len({run["name"] for run in summary([read_run(folder), read_run(alike)])["runs"]}) == 2


@pytest.mark.thorough
def test_machines_get_json_csv_and_figures(run: Run, folder: Path, tmp_path: Path) -> None:
    files = (
        "--json",
        tmp_path / "all.json",
        "--csv",
        tmp_path / "all.csv",
        "--figures",
        tmp_path / "figures",
    )
    code, out, err = run("report", folder, "-o", tmp_path / "report.html", *files)
    assert code == 0, err
    assert out.count("written: ") == 3 + 8
    told = read_json(tmp_path / "all.json")["runs"][0]
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert len(rows) == sum(len(model["cells"]) for model in told["models"]) == 21
    assert float(rows[-1]["value"]) == told["models"][-1]["cells"]["wikitext2_ppl · perplexity"]["value"]
    assert rows[-1]["verdict to wanda"] == "worse"
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert {name.partition(".")[0] for name in first} == {"scores", "heads", "zeros", "doses"}
    assert run("report", folder, *files)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == first
    assert (folder / "report.html").exists()


def test_heads_are_drawn_in_the_unit_of_their_effects() -> None:
    from matplotlib.figure import Figure

    own = {"unit": "logits per token", "units": [{"kind": "head", "layer": 0, "index": 0, "delta": 0.5}]}
    nothing = {"models": [], "tasks": [], "zeros": {}, "doses": {}, "circuits": []}
    ((_, _, paint),) = _figures(nothing | {"effects": [own]})
    paint(figure := Figure())
    assert [ax.get_ylabel() for ax in figure.axes] == ["layer", "Δ, logits per token"]


def test_a_csv_cell_is_no_formula(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tasks={"=1+1": "accuracy"}, n=3)
    report([run], tmp_path / "report.html", csv=tmp_path / "all.csv")
    assert ",'=1+1," in (tmp_path / "all.csv").read_text()


def test_zeros_are_counted_by_matrix_and_by_head() -> None:
    import torch

    rows = [
        {"name": f"layers.1.experts.{e}.up", "weights": 10, "zeros": 3 + e, "expert": e} for e in range(2)
    ]
    assert by_matrix([*rows, {"name": "layers.0.q", "weights": 4, "zeros": 1}]) == [
        [1, "up", 20, 7],
        [0, "q", 4, 1],
    ]
    q = torch.ones(4, 3, dtype=torch.bool)
    q[0] = False  # half of head 0's rows
    o = torch.ones(3, 4, dtype=torch.bool)
    o[:, 2:] = False  # all of head 1's columns
    assert by_head([("layers.0.q", q), ("layers.0.o", o), ("layers.0.up", o)], [2]) == [[0.25, 0.5]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (-0.5, "−0.5"),
        (8453.2, "8453"),
        (123456.0, "123,456"),
        (float("nan"), "not a number"),
        (float("-inf"), "−∞"),
        (None, "not a number"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text
