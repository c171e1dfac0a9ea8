"""What notebooks show: well-formed, small, escaped, and with the numbers that were measured."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reference import problems
from reporting import ATTACK, made_effects, made_result
from tinydata import tiny_decoder

from causalprune.core.errors import MismatchError, OptionError
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import headline, paired_difference
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.reports.compared import compare
from causalprune.reports.pictures import STRONGEST

KNOWN = {"p", "svg", "path", "g", "text", "table", "thead", "tbody", "tr", "th", "td", "br", "span"}


class Page(HTMLParser):
    """Reads a piece of HTML: elements in their order, texts, and whether all of it is nested as it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        assert {name for name, _ in self.elements} <= KNOWN

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def html(record: object) -> str:
    found = record._repr_html_()  # type: ignore[attr-defined]
    assert isinstance(found, str)
    return found


def squares(page: Page) -> int:
    return sum((own["d"] or "").count("M") for tag, own in page.elements if tag == "path")


def results(loss: float) -> list[EvalResult]:
    return [
        made_result("own_nll", "nats_per_token", loss),
        made_result("gsm8k_cot", "accuracy", loss),
    ]


def test_every_head_is_a_square_of_a_heatmap() -> None:
    effects = made_effects(30, 9, others=("mlp",))
    page = Page(html(effects))
    assert squares(page) == 30 * 9 + 30
    assert {own["fill"] for tag, own in page.elements if tag == "path"} == {"#2a7fc9", "#d9542b"}
    best = effects.units[int(effects.of("head").paired_delta_nats().argmax())]
    said = next(text for text in page.texts if text.startswith("matter most"))
    assert said.count("layer") == STRONGEST
    assert said.startswith(f"matter most: layer {best.layer} head {best.index}: +")


def test_heatmaps_stay_small_and_leave_out_what_is_unknown() -> None:
    assert len(html(made_effects(30, 9))) < 12_000
    assert len(html(made_effects(80, 64))) < 100_000
    effects = made_effects(2, 4)
    masked = effects.masked_nats.clone()
    masked[3] = math.nan
    assert squares(Page(html(replace(effects, masked_nats=masked)))) == 7
    masked[:] = math.nan
    assert Page(html(replace(effects, masked_nats=masked))).texts == ["head: nothing measured"]


def test_zeros_are_shown_by_layer_and_matrix() -> None:
    assert prune(tiny_decoder(), Method("magnitude", 0.5))._repr_html_() is None, "all have the same"
    page = Page(html(prune(tiny_decoder(), Method("magnitude", 0.5, "global"))))
    assert squares(page) == 2 * 7
    assert {"q", "k", "v", "o", "gate", "up", "down"} <= set(page.texts)


def test_a_comparison_has_value_difference_and_verdict() -> None:
    before, after = results(0.1), results(0.8)
    found = compare(dense=before, pruned=after)
    change = paired_difference(after[0], before[0])
    for said in (repr(found), " ".join(Page(html(found)).texts)):
        assert f"{headline(before[0]):.4g}" in said
        assert f"{headline(after[0]):.4g}" in said
        assert f"{change.difference:+.3g}" in said
        assert "worse" in said
        assert "own_nll, nats per token" in said
    assert "pruned: value" in repr(compare({"dense": before, "pruned": after}, against="pruned"))


def test_what_cannot_be_compared_is_refused() -> None:
    other = replace(results(0.1)[0], examples=tuple(map(str, range(40))))
    with pytest.raises(MismatchError, match="different examples"):
        compare(dense=results(0.1), pruned=[other])
    with pytest.raises(OptionError, match="did you mean 'dense'"):
        compare(against="dens", dense=results(0.1))
    with pytest.raises(OptionError, match="nothing to compare"):
        compare()


def test_a_measure_that_only_one_has_leaves_a_gap() -> None:
    found = compare(dense=results(0.1), pruned=results(0.2)[:1])
    assert repr(found).splitlines()[2].endswith("–")
    assert "–" in Page(html(found)).texts


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_shown(value: float) -> None:
    spoiled = [replace(r, values=(value, *r.values[1:])) for r in results(0.1)]
    assert "undefined" in repr(compare(dense=results(0.1), pruned=spoiled))
    assert "no interval" in html(spoiled[0])


def test_no_text_becomes_markup() -> None:
    hostile = [replace(results(0.1)[0], task=ATTACK, description={"model": ATTACK})]
    for record in (hostile[0], compare({ATTACK: hostile})):
        page = Page(html(record))
        assert any(ATTACK in text for text in page.texts)
        assert "<script" not in html(record)


def test_records_without_a_picture_have_none() -> None:
    assert tiny_decoder()._repr_html_() is None
    assert problems()._repr_html_() is None
