"""Results of several models side by side, for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from causalprune.core import EvalResult, OptionError, unknown
from causalprune.evaluation import Row, headline, interval, paired_difference
from causalprune.reports.page import MARKS, bounds, number
from causalprune.reports.summary import UNITS, task_key

COLOURS = {"better": "#2f9e57", "worse": "#d9534f"}
"""Legible on light and on dark ground; a word says the same."""


class Cell(NamedTuple):
    """A value, its interval or that of its difference in brackets, and what the difference shows, empty where there is none."""

    value: str
    interval: str
    verdict: str = ""


@dataclass(frozen=True, repr=False)
class Compared:
    """A table of models and measures: a row for each model, and a cell (None: not measured) for each of `columns`.

    Differences are to the row `against`, in pairs, with 95 % intervals.
    """

    against: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]

    def __repr__(self) -> str:
        lines = [("model", *self.columns)]
        for label, cells in self.rows:
            lines.append((label, *(" ".join(filter(None, cell or "–")) for cell in cells)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*texts, self._caption])

    def _repr_html_(self) -> str:
        head = Markup("").join(Markup("<th>{}</th>").format(name) for name in ("model", *self.columns))
        rows = Markup("").join(
            Markup("<tr><th>{}</th>{}</tr>").format(label, Markup("").join(map(_html, cells)))
            for label, cells in self.rows
        )
        table = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table><p>{}</p>")
        return str(table.format(head, rows, self._caption))

    @property
    def _caption(self) -> str:
        if len(self.rows) == 1:
            return "value [95 % interval]"
        return (
            f"{self.against}: value [95 % interval]; others: value, paired difference to it [95 % interval]"
        )


def compare(
    rows: Mapping[str, Sequence[EvalResult]] | Sequence[Row] = (),
    /,
    *,
    against: str | None = None,
    **named: Sequence[EvalResult],
) -> Compared:
    """Return results of several models as a table: `compare(dense=before, pruned=after)`.

    Names that are no keywords can be those of a dictionary. Differences are to the model called `against`, or to the first.

    Raises:
        MismatchError: results on different examples, or in different settings.
        OptionError: no results are given, or none that is called `against`.
    """
    models = [*(rows.items() if isinstance(rows, Mapping) else rows), *named.items()]
    labels = [label for label, _ in models]
    if not models:
        raise OptionError("nothing to compare: name results, as in compare(dense=before, pruned=after)")
    if against is not None and against not in labels:
        raise unknown("row", against, labels)
    first = 0 if against is None else labels.index(against)
    found = [{task_key(result): result for result in results} for _, results in models]
    columns = {
        key: f"{own.task}, {UNITS.get(own.metric, own.metric)}"
        for results in found
        for key, own in results.items()
    }
    table = tuple(
        (label, tuple(_cell(own.get(key), None if i == first else found[first].get(key)) for key in columns))
        for i, (label, own) in enumerate(zip(labels, found, strict=True))
    )
    return Compared(labels[first], tuple(columns.values()), table)


def _cell(result: EvalResult | None, base: EvalResult | None) -> Cell | None:
    if result is None or not result.values:
        return None
    if base is None or not base.values:
        own = interval(result)
        return Cell(number(own.value), bounds(vars(own)))
    found = paired_difference(result, base)
    change = f"{number(found.difference, sign='+', digits=3)} {bounds(vars(found))}"
    return Cell(number(headline(result)), change, found.verdict)


def _html(cell: Cell | None) -> Markup:
    if cell is None:
        return Markup("<td>–</td>")
    style = f"color:{COLOURS[cell.verdict]}" if cell.verdict in COLOURS else ""
    said = Markup('<br><span style="{}">{}</span>').format(style, MARKS.get(cell.verdict, cell.verdict))
    return Markup("<td>{}<br>{}{}</td>").format(cell.value, cell.interval, said if cell.verdict else "")
