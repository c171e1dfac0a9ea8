"""The command that shows what data look like to a model."""

from typing import Annotated

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document


@app.command()
@grouped
def data(
    model: opt.ModelOptions,
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", help="A file or a data set; repeat to see which rows are in several."),
    ],
    reading: opt.ReadingOptions,
    row: Annotated[int, typer.Option(help="The row of each that is shown as the model sees it.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Show data as a model sees them: one row with its target marked, token counts, and which rows are left out and why.

    Reads only tokenizer and configuration of the model.
    """
    from causalprune.cli import tables
    from causalprune.runs import look

    found = look(model.spec(), reading.spec(task), row, reading.data_dir)
    for own in found:
        console.print(tables.marked(own, row), soft_wrap=True)
    console.print(tables.looked(found))
    document(as_json, row=row, sources=[{**vars(own), "skipped": own.skipped.described()} for own in found])
