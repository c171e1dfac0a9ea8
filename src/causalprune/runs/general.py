"""General text that a run measures though nobody named it: what the model writes, and WikiText-2 where it is at hand."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalprune.calibration import SOURCES
from causalprune.core import Ledger, MismatchError, read_rows
from causalprune.evaluation import OWN_TASKS, TOKENS, on_general_text
from causalprune.reports import LEDGER
from causalprune.runs.recipe import Recipe

NOTE = "general_text"
"""Row of a ledger that holds what was added to the tasks of a run when it was begun."""
PRESERVED = "preserved"
"""Row of a ledger that holds what a run preserves beside its task."""
TEXT, TEXT_TOKENS = "wikitext2", 40_000


def with_general_text(recipe: Recipe, folder: Path, data_dir: Path | str | None) -> Recipe:
    """Return the recipe with tasks on general text, unless it names one itself, or wants none.

    A folder that was begun with some goes on with those of them that can be had; one in which models were measured by a
    release that added none, with none.

    Raises:
        MismatchError: the folder was begun with other text to preserve.
    """
    check_preserved(recipe, folder)
    if recipe.general_text == "none" or any(map(on_general_text, recipe.on)):
        return recipe
    rows = read_rows(folder / LEDGER) if (folder / LEDGER).exists() else {}
    added = [f"{task}:{TOKENS}" for task in OWN_TASKS]
    added += [f"{TEXT}_ppl:{TEXT_TOKENS}"] if _at_hand(data_dir) else []
    if was := rows.get(NOTE):
        added = [task for task in added if task in was]
    elif NOTE not in rows and _begun(rows):
        added = []
    return dataclasses.replace(recipe, on=(*recipe.on, *added))


def check_preserved(recipe: Recipe, folder: Path) -> None:
    """Raise `MismatchError` where a run would go on with other examples, as a method that preserves some was added to it."""
    rows = read_rows(folder / LEDGER) if (folder / LEDGER).exists() else {}
    was, now = rows.get(PRESERVED), [*(recipe.calibration.preserve or ())]
    if was is not None and was != now:
        raise MismatchError(
            f"{folder} was begun with {', '.join(was) or 'nothing'} to preserve, and would go on with {', '.join(now) or 'nothing'}: what "
            f"trains or removes parts preserves text of the model's own. Say `preserve: [{', '.join(was) or 'none'}]` under "
            "`calibration` to go on, or choose another folder"
        )


def note_preserved(book: Ledger, recipe: Recipe) -> None:
    """Keep what a run that is only beginning preserves."""
    if PRESERVED not in book.rows and not _begun(book.rows):
        book.append(PRESERVED, [*(recipe.calibration.preserve or ())])


def note_general_text(book: Ledger, added: list[str]) -> None:
    """Keep what was added to the tasks of a run that is only beginning."""
    if NOTE not in book.rows and not _begun(book.rows):
        book.append(NOTE, [*added])


def _begun(rows: Mapping[str, Any]) -> bool:
    """Tell whether a ledger holds anything of a model."""
    return any("/" in key for key in rows)


def _at_hand(data_dir: Path | str | None) -> bool:
    """Tell whether the text is in the data folder; a token is at least a byte."""
    if data_dir is None:
        return False
    path = Path(data_dir) / SOURCES[TEXT].path(TEXT, "evaluation")
    return path.is_file() and path.stat().st_size >= TEXT_TOKENS
