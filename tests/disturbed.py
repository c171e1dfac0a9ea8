"""Command lines in child processes that are disturbed: killed, interrupted, without room, without permission.

    python tests/disturbed.py FOLDER --kills 50 --seed 0

prints what came of it as JSON. Children are forked from a process that has imported everything and a disturbance
comes after the work has begun, so that a run takes a fraction of a second and every moment of it is tried.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import families
import torch
from tinydata import byte_tokenizer, write_jsonl
from transformers import LlamaConfig

from causalprune.cli.app import main
from causalprune.core import resuming

torch.set_num_threads(1)  # tiny matrices
resuming.EVERY = resuming.RARELY = 0.0  # as it may be at any moment of a long run
PROBLEMS = 12
TIMELESS = {"created"}
"""Entries of a manifest that differ between two runs of the same command."""
NOBODY = 65534


@dataclass(frozen=True)
class Stage:
    """A command, and the function of the package whose call begins the part of it that is disturbed."""

    command: str
    begins: str
    options: tuple[str, ...]

    def arguments(self, model: Path, output: Path, problems: Path) -> list[str]:
        """Return the command line that writes `output`."""
        given = [self.command, str(model), "-o", str(output), *self.options]
        return [*given, "-t", str(problems), "-n", str(PROBLEMS)]


WANDA = ("--method", "wanda", "--sparsity", "0.5", "--batch-tokens", "64")
STAGES = {
    "attribution": Stage("attribute", "runs.single.measure", ("--batch-tokens", "64")),
    "pruning": Stage("prune", "runs.single.prune", WANDA),
    "saving": Stage("prune", "runs.single.save", WANDA),
    "streaming": Stage(
        "prune", "runs.single.prune_stream", ("--stream", "--method", "magnitude:global", "--sparsity", "0.5")
    ),
    "streaming by layers": Stage("prune", "runs.single.prune_stream", (*WANDA, "--stream")),
}


FROM_FILES = "fitting from files"
KILLED = {
    **STAGES,
    "fitting": Stage(
        "prune",
        "runs.single.prune",
        ("--method", "causal", "--sparsity", "0.5", "--batch-tokens", "256"),
    ),
    FROM_FILES: Stage(
        "prune",
        "runs.single.prune_stream",
        ("--method", "causal", "--sparsity", "0.5", "--batch-tokens", "256", "--stream"),
    ),
}
"""What is killed: of fitting a fault is no end, but a warning that nothing is kept."""


@dataclass(frozen=True)
class Killed:
    """What came of a run that was killed `after_seconds` of its work, and then started again."""

    stage: str
    after_seconds: float
    rows: int
    complete: bool
    lost: list[str]


class Child:
    """A command line in a process of its own, which says when its work begins."""

    def __init__(
        self, arguments: list[str], begins: str, log: Path, first: Callable[[], object] = lambda: None
    ) -> None:
        self._began, began = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._began)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(out, 1)
            os.dup2(out, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell puts aside
            _announce(begins, began)
            code = 99
            try:
                first()
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(began)

    def wait(self, seconds: float | None = None) -> tuple[bool, float]:
        """Wait until the work begins and `seconds` more (None: to the end); return whether it ended, and its seconds."""
        os.read(self._began, 1)  # nothing, where the command ended before
        start = time.perf_counter()
        ended = bool(select.select([self._began], [], [], seconds)[0])  # closed when the process ends
        return ended, time.perf_counter() - start

    def end(self, signal_number: int | None = None) -> int:
        """Send a signal if one is given, and return the exit code, negative for a signal."""
        if signal_number is not None:
            os.kill(self.pid, signal_number)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._began)
        return code


def _announce(begins: str, pipe: int) -> None:
    """Let a function of the package write to a pipe when it is called."""
    module_name, name = begins.rsplit(".", 1)
    module = importlib.import_module(f"causalprune.{module_name}")
    own = getattr(module, name)

    def announced(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, b"x")
        return own(*args, **kwargs)

    setattr(module, name, announced)


class Place:
    """A folder with a small model and some problems, and what the commands make of them undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.problems = folder, folder / "model", folder / "problems.jsonl"
        self.log = folder / "log.txt"
        self.log.touch()
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
        tiny = families.tiny(config)
        tiny.save_pretrained(self.model, max_shard_size="500KB")
        byte_tokenizer().save_pretrained(self.model)
        rows = [{"prompt": f"Problem {i}: 3 + {i}", "target": f" The sum is {3 + i}."} for i in range(16)]
        write_jsonl(self.problems, rows)
        self.calm: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        for name, stage in KILLED.items():  # here, so that children find all modules imported
            self._warm_up(stage.arguments(self.model, folder / f"{name}-warm", self.problems))

    def _warm_up(self, arguments: list[str]) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                main(arguments)
        except SystemExit as end:
            if end.code:
                raise SystemExit(f"{arguments}: {said.getvalue()}") from end

    def start(self, stage: str, output: Path, first: Callable[[], object] = lambda: None) -> Child:
        """Begin the command of a stage."""
        own = KILLED[stage]
        return Child(own.arguments(self.model, output, self.problems), own.begins, self.log, first)

    def undisturbed(self, stage: str) -> dict[str, Any]:
        """Return the files of a run to the end, and take note of the time that its work takes."""
        if stage not in self.calm:
            output = self.folder / f"{stage}-calm"
            child = self.start(stage, output)
            _, self.seconds[stage] = child.wait()
            if code := child.end():
                raise SystemExit(f"{stage} ended with {code}: {self.log.read_text()}")
            self.calm[stage] = files(output)
        return self.calm[stage]

    def killed(self, stage: str, dice: random.Random) -> Killed | None:
        """Kill a run at a random moment of its work and start it again; return None where it ended before."""
        calm, output = self.undisturbed(stage), self.folder / f"{stage}-killed"
        child = self.start(stage, output)
        after = dice.random() * self.seconds[stage]
        ended, seconds = child.wait(after)
        child.end(None if ended else signal.SIGKILL)
        if ended:  # the machine is less busy than it was
            self.seconds[stage] = min(seconds, self.seconds[stage])
        there, lost, rows = files(output), [], 0
        complete = there == calm
        if (
            stage == "attribution"
        ):  # the folder of a run holds what is finished, and no effects before the end
            rows = len(intact_lines(there.get("attribution.ledger", b"")))
            if "effects.json" in there and there["effects.json"] != calm["effects.json"]:
                lost.append("effects.json was partial")
        elif there and not complete:
            lost.append("the output was partial")
        if not complete:
            again = self.start(stage, output)
            again.wait()
            if code := again.end():
                lost.append(f"the second run ended with {code}: {self.log.read_text()[-300:]}")
        after_all = files(output)
        lost += [f"{name} differs" for name in calm if after_all.get(name) != calm[name]]
        before = intact_lines(there.get("attribution.ledger", b""))
        if intact_lines(after_all.get("attribution.ledger", b""))[: len(before)] != before:
            lost.append("finished jobs were done again")
        for leftover in self.folder.glob(f"{stage}-killed*"):
            shutil.rmtree(leftover)
        return None if ended else Killed(stage, after, rows, complete, lost)


def files(folder: Path) -> dict[str, Any]:
    """Return the content of every file of an output, a manifest without what no two runs share."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        if ".partial-" not in path.name:
            found[path.name] = path.read_bytes()
            if path.name == "causalprune.json":
                found[path.name] = {
                    k: v for k, v in json.loads(found[path.name]).items() if k not in TIMELESS
                }
            if path.name == "README.md":  # a card's title is the name of its folder
                found[path.name] = found[path.name].replace(folder.name.encode(), b"NAME")
    return found


def intact_lines(ledger: bytes) -> list[bytes]:
    """Return the complete lines of a ledger."""
    return [line for line in ledger.splitlines(keepends=True) if line.endswith(b"\n")]


def kills(place: Place, count: int, seed: int, stages: Sequence[str]) -> Iterator[Killed]:
    """Kill and resume `count` runs, the stages in turn."""
    dice, done = random.Random(seed), 0
    while done < count:
        found = place.killed(stages[done % len(stages)], dice)
        if found is not None:
            done += 1
            yield found


def limited() -> None:
    """Let no file grow beyond some kilobytes: writing fails, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def unprivileged() -> None:
    """Become nobody, to whom permissions apply."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def faults(place: Place) -> dict[str, dict[str, Any]]:
    """Interrupt every stage, let it run out of room and out of permission; return exit code, words and what is left."""
    found: dict[str, dict[str, Any]] = {}
    forbidden = place.folder / "forbidden"
    forbidden.mkdir()
    forbidden.chmod(0o555)
    place.folder.chmod(0o777)
    for path in (place.log, *place.model.iterdir()):
        path.chmod(0o666)
    for stage in STAGES:
        place.undisturbed(stage)
        output = place.folder / f"{stage}-stopped"
        for share in (0.5, 0.2, 0.05, 0.0):  # earlier where the run was faster than the calm one
            child = place.start(stage, output)
            ended, _ = child.wait(place.seconds[stage] * share)
            if code := child.end(None if ended else signal.SIGINT):
                break
            shutil.rmtree(output)
        found[f"{stage} interrupted"] = _outcome(place, stage, code, output)
        for name, first, where in (
            ("without room", limited, place.folder / f"{stage}-full"),
            ("without permission", unprivileged, forbidden / "deep" / stage),
        ):
            child = place.start(stage, where, first)
            child.wait()
            found[f"{stage} {name}"] = _outcome(place, stage, child.end(), where)
    return found


def _outcome(place: Place, stage: str, code: int, output: Path) -> dict[str, Any]:
    """Return what a fault left, and whether the same command, undisturbed, gives what it should afterwards."""
    left = sorted(path.name for path in output.parent.glob(f"{output.name}*"))
    found = {"code": code, "said": place.log.read_text(), "left": left, "files": sorted(files(output))}
    if files(output) != place.calm[stage]:  # else the fault came too late
        again = place.start(stage, output)
        again.wait()
        again.end()
    return {**found, "resumed": files(output) == place.calm[stage]}


def run() -> None:
    """Carry out what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=list(KILLED), choices=list(KILLED))
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    place = Place(given.folder)
    record: dict[str, Any] = {
        "kills": [asdict(one) for one in kills(place, given.kills, given.seed, given.stages)]
    }
    record |= {"faults": faults(place) if given.faults else {}, "seconds": place.seconds}
    print(json.dumps(record))  # noqa: T201


if __name__ == "__main__":
    run()
