"""The report in a real browser: quiet, offline, readable, accessible, and deaf to what it is told to execute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import browser, opened
from reporting import HOSTILE, made_effects, write_run

from causalprune.checkpoints.saving import save_effects
from causalprune.reports.evidence import read_run
from causalprune.reports.summary import summary
from causalprune.reports.writing import report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as own:
        yield own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run") / "run", layers=6, heads=5)
    (run / "gradient").mkdir()
    save_effects(made_effects(6, 5, estimated=True), run / "gradient" / "effects.json")
    report([run], run / "report.html")
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_quiet_offline_and_inside_its_window(chromium: Any, folder: Path, scheme: str, width: int) -> None:
    with opened(chromium, folder / "report.html", width=width, scheme=scheme) as seen:
        assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
        seen.page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert seen.overflow == 0
        assert seen.serious() == []


def test_hover_shows_the_values_of_the_json(chromium: Any, folder: Path) -> None:
    told = summary([read_run(folder)])["runs"][0]
    units = {(u["kind"], u["layer"], u["index"]): u for u in told["effects"][0]["units"]}
    share = told["heads"]["wanda-row-0.5"]
    with opened(chromium, folder / "report.html") as seen:
        seen.page.select_option('select[data-choose="heads"]', "wanda-row-0.5")
        for layer, head in ((0, 0), (2, 3), (5, 4)):
            own, shown = units["head", layer, head], seen.hover("head", layer, head)
            wanted = [
                f"layer {layer}, head {head}",
                f"Δ {text(own['delta'])} [{text(own['low'])}, {text(own['high'])}]",
                f"I {text(own['importance'])}",
                f"pruned {text(100 * share[layer][head])} % of its weights",
            ]
            assert not [line for line in wanted if line not in shown]
        shown = seen.hover("block", 1, 1)
        assert f"Δ {text(units['mlp', 1, 0]['delta'])} " in shown
        assert seen.errors == []


def text(value: float) -> str:
    """Write a number as the page's script does."""
    return f"{float(f'{value:.4g}'):.12g}".replace("-", "−")


def test_switches_redraw(chromium: Any, folder: Path) -> None:
    with opened(chromium, folder / "report.html") as seen:
        exact = seen.hover("head", 5, 1)
        seen.page.select_option('select[data-choose="view"]', "1")
        assert seen.hover("head", 5, 1) != exact
        seen.page.check('input[name="shown-0"][value="dense"]')
        values = seen.page.evaluate("document.querySelector('[data-plot=scores] .js-plotly-plot').data[0].y")
        first = summary([read_run(folder)])["runs"][0]["models"][1]["cells"]["gsm8k_cot · accuracy"]
        assert values[0] == pytest.approx(first["dense"]["difference"])
        seen.page.select_option('select[data-choose="zeros"]', "0.2")
        names = seen.page.locator("[data-plot=zeros] figcaption").all_inner_texts()
        assert len(names) == 3
        assert all("-0.2" in name for name in names)
        seen.page.emulate_media(color_scheme="dark")
        seen.page.wait_for_timeout(500)
        assert seen.errors == []


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_runs_execute_nothing(chromium: Any, tmp_path: Path, case: str) -> None:
    run = write_run(tmp_path / "run", **HOSTILE[case])
    report([run], tmp_path / "report.html")
    with opened(chromium, tmp_path / "report.html", width=400) as seen:
        assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
        assert seen.page.title().endswith(" · causalprune")  # what the attack would change
        assert seen.page.evaluate("document.scripts.length") == 3


def test_several_runs_on_one_page(chromium: Any, folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", methods=("wanda-row", "sparsegpt+distill-matrix"))
    report([folder, other], tmp_path / "both.html")
    with opened(chromium, tmp_path / "both.html", width=400) as seen:
        assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
        assert seen.serious() == []
