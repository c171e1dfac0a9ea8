"""Commands that show what runs have measured: a report, and effects in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several make one comparison page.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file (default: report.html in the first run).")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as PNG and SVG (needs causalprune[figures]).")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for all numbers as JSON.")] = None,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", help="File for values and differences as CSV.")
    ] = None,
) -> None:
    """Write what runs have measured as one HTML page that opens anywhere, offline; unfinished runs too."""
    from causalprune.reports import REPORT
    from causalprune.reports import report as write

    files = write(runs, output or runs[0] / REPORT, figures=figures, json=as_json, csv=as_csv)
    for file in files:
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def effects(
    run: Annotated[Path, typer.Argument(help="Run folder, or an effects.json.")], as_json: AsJson = False
) -> None:
    """Show effects as a heatmap in the terminal: layers × heads, coloured unless NO_COLOR is set."""
    from causalprune.checkpoints import EFFECTS, load_effects
    from causalprune.cli import tables
    from causalprune.reports import heatmap, measured

    found = load_effects(run / EFFECTS if run.is_dir() else run)
    own = measured(found)[0]
    colour = console.color_system is not None and not console.no_color
    for line in heatmap(own, width=console.width, colour=colour):
        console.print(line, soft_wrap=True)
    console.print(tables.strongest(found))
    document(as_json, **tables.effects(found))
