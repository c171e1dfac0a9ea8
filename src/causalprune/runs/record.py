"""What came of a run, as a dictionary that shows itself: its verdict, and the table of its models."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from causalprune.evaluation import rows_of
from causalprune.reports import compare, paragraph, verdict


class Record(dict[str, Any]):
    """What `results.json` in the `folder` of a run holds."""

    def __init__(self, record: Mapping[str, Any], folder: Path) -> None:
        super().__init__(record)
        self.folder = folder

    @cached_property
    def verdict(self) -> str:
        """Which model the run recommends, in a sentence."""
        return verdict(self).headline

    def __repr__(self) -> str:
        models, on = len(self["rows"]), len(self["rows"][0]["results"]) if self["rows"] else 0
        return f"Record({self.folder}: {models} models × {on} measures)\n{self.verdict}"

    def _repr_html_(self) -> str:
        return f"{paragraph(self.verdict)}{compare(rows_of(self))._repr_html_()}"
