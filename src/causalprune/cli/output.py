"""How a command speaks: tables or one JSON document on stdout, progress on stderr, lines in a log file, or none of these."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from causalprune.core import OptionError, plain

if TYPE_CHECKING:
    from causalprune.core import Progress

console = Console()


def say(text: str, style: str | None = None) -> None:
    """Print lines as they are: a command or a path in them can be pasted."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Voice:
    """What a command says beside its tables, as the options before every command ask for it."""

    silent = False
    file: Path | None = None
    command = ""

    def begin(self, silent: bool = False, file: Path | None = None) -> None:
        """Start anew, as every command does; raises `OptionError` where the log file cannot be written."""
        try:
            if file is not None:
                file.open("a", encoding="utf-8").close()
        except OSError as cause:
            raise OptionError(f"cannot write the log file {file}: {cause.strerror or cause}") from cause
        self.silent, self.file, console.quiet = silent, file, silent
        self.told = set[str]()
        self.log(self.command)

    def log(self, text: str) -> None:
        """Add a line with the time to the log file, if there is one and its disk has room."""
        if self.file is not None:
            with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}\n")

    def tell(self, text: str) -> None:
        """Say on stderr, and in the log, what must be seen."""
        print(text, file=sys.stderr)
        self.log(text)

    @contextlib.contextmanager
    def stage(self, label: str) -> Iterator["Progress"]:
        """Show a stage of work as it is asked for; what `Options.stage` takes."""
        from causalprune.core import shown

        start = time.monotonic()
        with shown(label, quiet=self.silent, log=self.log if self.file else None) as progress:
            yield progress
        self.log(f"{label}: done in {time.monotonic() - start:.0f} s")


voice = Voice()


def _alone(wanted: bool) -> bool:
    """Keep tables and lines off stdout where a JSON document will stand there."""
    console.quiet = console.quiet or wanted
    return wanted


AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document in place of tables and lines.", callback=_alone),
]


def document(as_json: bool, **found: Any) -> None:
    """Print what a command found as JSON, if that is asked for; numbers that are not finite are null."""
    if as_json:
        print(json.dumps(plain(found), indent=1, ensure_ascii=False, allow_nan=False))


def pushed_to(output: Path, repository: str | None) -> str | None:
    """Upload what was saved to a repository, if there is one, and return its address."""
    from causalprune.checkpoints import push, read_manifest, write_card

    if repository is None:
        return None
    write_card(output, read_manifest(output), title=repository)
    with voice.stage(f"pushing to {repository}"):
        place = push(output, repository)
    console.print(f"pushed: {place}")
    return place
