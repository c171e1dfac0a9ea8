"""Reports as files: each appears whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from causalprune.core import OptionError
from causalprune.evaluation import write_json, write_text
from causalprune.reports.evidence import read_run
from causalprune.reports.figures import draw
from causalprune.reports.page import page
from causalprune.reports.summary import summary
from causalprune.reports.tabular import to_csv

REPORT = "report.html"
"""Name of the report in a run folder."""


def report(
    folders: Sequence[Path | str] | Path | str,
    output: Path | str | None = None,
    *,
    figures: Path | str | None = None,
    json: Path | str | None = None,
    csv: Path | str | None = None,
) -> list[Path]:
    """Write the report on one run or several as one HTML file, and what else is asked for; return all files written.

    Without `output`, the file is `report.html` in the (first) run's folder. `figures` is a folder, `json` and `csv` are files.
    Costs seconds; no model is loaded. An older report under the same name is replaced.

    Raises:
        CheckpointError: a folder holds nothing of a run, or a file of it is damaged.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    runs = [Path(folder) for folder in folders]
    output = Path(runs[0] / REPORT if output is None else output)
    if output.is_dir():
        raise OptionError(f"{output} is a folder: name a file, as {output / REPORT}")
    told = summary([read_run(folder) for folder in runs])
    write_text(output, page(told))
    files = [output]
    if json is not None:
        files.append(Path(json))
        write_json(files[-1], told)
    if csv is not None:
        files.append(Path(csv))
        write_text(files[-1], to_csv(told))
    return files + (draw(told, Path(figures)) if figures is not None else [])
