"""Rows of data sets, from a local folder or the Hugging Face hub, as problems with prompt and target.

Prompts and targets of a source are the templates of its task file (`tasks/<source>_cot.yaml`), so
calibration and evaluation cannot drift apart.
"""

import difflib
import functools
import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from causalprune.calibration import ioi
from causalprune.calibration.forms import SUFFIXES, Row, Turn, own_rows, parts_of, read_json_rows, read_text
from causalprune.core import DataError, unknown

Split = Literal["calibration", "evaluation"]

TASK_FILES = Path(__file__).parent.parent / "evaluation" / "tasks"

SHORTEST_LEAK = 80
"""Characters from which a paragraph shared by two splits counts as a leak (headings repeat)."""

C4_DOCUMENTS = 2048
"""Documents streamed from the hub's C4: about a million tokens."""

SYMBOLIC_SEEDS: dict[Split, tuple[int, int]] = {"calibration": (0, 2048), "evaluation": (1_000_000, 1024)}
"""First seed and number of generated problems; problem i is drawn with seed first + i."""


PAIRED = ("counterfactual", "instead")
"""What a row of the user's may have beside prompt and target."""
NEAR = 0.8
"""How alike a key is to one of those (1: the same) that is taken for misspelt."""


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` is the question with its instruction, `target` the worked solution.

    `solution` and `answer` are the parts of the target; `labels` and `choices` the options of a
    multiple-choice question in their original order (else empty). Running text has only a target.
    `before` are the turns of a chat that precede the target where they are more than the prompt alone; `open_turns` after it
    were left out. `counterfactual` is another prompt, `instead` a wrong answer, `where` the place that both come from. A `plain`
    prompt is text that the target continues, without a chat template and without a blank line.
    """

    source: str
    prompt: str
    target: str
    question: str = ""
    solution: str = ""
    answer: str = ""
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    before: tuple[Turn, ...] = ()
    open_turns: int = 0
    counterfactual: str = ""
    instead: str = ""
    where: str = ""
    plain: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns that precede the target."""
        return [{"role": role, "content": text} for role, text in self.before or (("user", self.prompt),)]

    def until(self, turn: int) -> "Problem":
        """Return the problem that this turn of `before` answers."""
        return replace(self, prompt=joined(self.before[:turn]), before=self.before[:turn])

    @property
    def content(self) -> str:
        """SHA-256 of the case-folded question (or text) without its instruction."""
        return content_hash(self.question or self.prompt or self.target)

    @property
    def options(self) -> str:
        """The options, one a line, as `A. text`."""
        return "\n".join(f"{a}. {b}" for a, b in zip(self.labels, self.choices, strict=True))

    @property
    def gold(self) -> int:
        """Position of the right option among `choices`."""
        return self.labels.index(self.answer)


@dataclass(frozen=True)
class Source:
    """Where the rows of a data set are: names on the hub, and a folder below the data folder (else of its own name).

    Files and splits of the hub come as for calibration and for evaluation.
    """

    parse: Callable[[Row], dict[str, Any]]
    hub: tuple[str, str | None]
    files: tuple[str, str] = ("train.jsonl", "test.jsonl")
    splits: tuple[str, str] = ("train", "test")
    folder: str = ""

    def path(self, name: str, split: Split) -> str:
        """Return the file of a split below the data folder."""
        return f"{self.folder or name}/{self.files[split == 'evaluation']}"


def joined(turns: Sequence[Turn]) -> str:
    """Return turns as one text, as they stand where there is no chat template."""
    return "\n\n".join(text for _, text in turns)


def content_hash(text: str) -> str:
    """Return the SHA-256 of `text` without regard to case and white space."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def _gsm8k(row: Row) -> dict[str, Any]:
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no line '#### N'")
    solution = re.sub(r"<<.*?>>", "", solution).strip()
    return {"question": row["question"], "solution": solution, "answer": _number(answer)}


def _gsm_symbolic(row: Row) -> dict[str, Any]:
    return _gsm8k({"question": row["question"], "answer": row["metadata"]["answer_cot"]})


def _number(text: str) -> str:
    """Strip a final answer; a whole number loses its `.0` (gsm_symbolic writes `36.0`)."""
    return re.sub(r"\.0+$", "", text.strip())


def _strategyqa(row: Row) -> dict[str, Any]:
    facts = row["facts"]  # the hub's copy joins them into one string
    solution = facts if isinstance(facts, str) else "\n".join(facts)
    answer = "yes" if row["answer"] else "no"
    return {"question": row["question"], "solution": solution, "answer": answer}


def _arc(row: Row) -> dict[str, Any]:
    choices = row["choices"]
    if isinstance(choices, Mapping):  # the hub's columns instead of our list
        pairs = list(zip(choices["label"], choices["text"], strict=True))
    else:
        pairs = [(c["label"], c["text"]) for c in choices]
    labels, texts = (tuple(column) for column in zip(*pairs, strict=True))
    answer = row["answerKey"]
    solution = f"{answer}. {texts[labels.index(answer)]}"
    fields = {"question": row["question"], "solution": solution, "answer": answer}
    return fields | {"labels": labels, "choices": texts}


def _ioi(row: Row) -> dict[str, Any]:
    return {**row, "plain": True}


def _text(row: Row) -> dict[str, Any]:
    # Excerpts of C4: only the completion is contiguous text.
    return {"target": row["completion"] if "completion" in row else row["text"]}


SOURCES = {
    "gsm8k": Source(_gsm8k, ("openai/gsm8k", "main")),
    "strategyqa": Source(_strategyqa, ("ChilleD/StrategyQA", None), ("train.jsonl", "dev.jsonl")),
    "arc_challenge": Source(_arc, ("allenai/ai2_arc", "ARC-Challenge")),
    "gsm_symbolic": Source(_gsm_symbolic, ("reasoning-gym", "gsm_symbolic")),  # made, not read
    "ioi": Source(_ioi, ("", None)),  # made, not read
    "wikitext2": Source(
        _text, ("Salesforce/wikitext", "wikitext-2-raw-v1"), ("wiki.train.slice.txt", "wiki.test.raw")
    ),
    "c4": Source(
        _text, ("allenai/c4", "en"), ("c4_excerpts.jsonl",) * 2, ("train", "validation"), "c4_sample"
    ),
}
TEXT_SOURCES = ("wikitext2", "c4")
OWN_TEXT = "own"
"""Text that the model itself writes, as a source (`causalprune.evaluation.written`)."""
OWN = "own:"
"""Before the name of a source: its problems, with answers that the model itself writes (`causalprune.runs.traces`)."""


def load_problems(
    name: str,
    split: Split,
    *,
    data_dir: Path | str | None = None,
    with_targets: bool = True,
    with_text: bool = True,
) -> list[Problem]:
    """Return the problems of a source or of a file of the user's (see `forms`), in file order.

    `data_dir` is a folder with a sub-folder per data set; without it rows come from the hub. Running
    text gives one problem per non-blank row. A file may leave out targets (which are empty then) unless `with_targets`, and hold
    running text where targets are asked for and it is `with_text`. DataError where a row is malformed or missing.
    """
    if is_file(name):
        return _own_problems(name, split, with_targets=with_targets, with_text=with_targets and with_text)
    if name not in SOURCES:
        check_path(name)
        raise unknown("task", name, SOURCES)
    source = SOURCES[name]
    if name in TEXT_SOURCES:
        return [
            Problem(name, "", text) for text in load_texts(name, split, data_dir=data_dir) if text.strip()
        ]
    prompt, target = templates(name)
    problems = []
    for where, row in _rows(name, split, data_dir):
        fields = _parsed(source, where, row)
        draft = Problem(name, "", "", **fields)
        values = fields | {"options": draft.options}
        problems.append(Problem(name, prompt.render(values), target.render(values), where=where, **fields))
    return problems


def digest(name: str) -> str | None:
    """Return a SHA-256 of a user's file or folder as it is now; None for a source of ours, which does not change, or where nothing is."""
    path = Path(name).expanduser()
    if not is_file(name) or not path.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(own for own in path.rglob("*") if own.is_file()) if path.is_dir() else [path]:
        found.update(file.read_bytes())
    return found.hexdigest()


def load_texts(name: str, split: Split, *, data_dir: Path | str | None = None) -> list[str]:
    """Return the rows of running text; blank rows of WikiText are the empty string.

    Joined by two newlines they are the text that perplexity is usually reported on.
    """
    source = SOURCES[name]
    return [_parsed(source, where, row)["target"] for where, row in _rows(name, split, data_dir)]


def contents(name: str, split: Split, *, data_dir: Path | str | None = None) -> frozenset[str]:
    """Return the content hashes of a split, for the `exclude` of a calibration."""
    problems = load_problems(name, split, data_dir=data_dir)
    if name in TEXT_SOURCES:
        problems = [p for p in problems if len(p.target) >= SHORTEST_LEAK]
    return frozenset(p.content for p in problems)


def is_file(name: str) -> bool:
    """Tell whether a task or source is the path of a file, or of a folder."""
    return name.endswith(SUFFIXES) or "/" in name


def check_path(name: str) -> None:
    """Raise `DataError` for a name that is not taken for a path, although a file or a folder has it."""
    if not is_file(name) and Path(name).exists():
        raise DataError(
            f"{name} is no data set of ours: a folder is written ./{name}, and a file ends in {', '.join(SUFFIXES)}"
        )


@functools.cache
def templates(name: str) -> tuple[jinja2.Template, jinja2.Template]:
    """Return the templates of prompt and target in the task file of a source."""
    config = yaml.safe_load((TASK_FILES / f"{name}_cot.yaml").read_text(encoding="utf-8"))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    return environment.from_string(config["doc_to_text"]), environment.from_string(config["doc_to_target"])


def _parsed(source: Source, where: str, row: Row) -> dict[str, Any]:
    try:
        return source.parse(row)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise DataError(f"{where}: malformed row ({type(cause).__name__}: {cause})") from cause


def _own_problems(name: str, split: Split, *, with_targets: bool, with_text: bool) -> list[Problem]:
    problems = []
    known = set(PAIRED)
    for where, row in own_rows(Path(name).expanduser(), measured=split == "evaluation"):
        _warn_misspelt(where, row, known)
        before, target, open_turns = parts_of(where, row, with_targets=with_targets)
        if with_targets and not target.strip():
            raise DataError(f"{where}: the target is empty; nothing could be predicted")
        if not with_text and not before:
            raise DataError(
                f"{where}: running text has nothing to answer: measure its loss, {name}_nll, or calibrate on {name} as it is"
            )
        if before and not joined(before).strip():
            raise DataError(f"{where}: the prompt is empty; running text is a row with 'text' alone")
        turns = () if [role for role, _ in before] == ["user"] else tuple(before)
        paired = {key: row[key] for key in PAIRED if row.get(key)}
        if wrong := [key for key, text in paired.items() if turns or not isinstance(text, str)]:
            raise DataError(f"{where}: {wrong[0]!r} is a text, and belongs to a row with a prompt")
        own = Problem(str(Path(name)), joined(before), target, before=turns, open_turns=open_turns)
        problems.append(replace(own, **paired, where=where))
    if not problems:
        raise DataError(f"{name} has no rows")
    for key in PAIRED:
        without = [own for own in problems if not getattr(own, key)]
        if 0 < len(without) < len(problems):
            raise DataError(
                f"{without[0].where}: no {key!r}, which other rows have: give it to all of them or to none"
            )
    return problems


def _warn_misspelt(where: str, row: Row, known: set[str]) -> None:
    """Warn of keys that are nearly one of those that make pairs, once of each: `known` grows."""
    for key in set(map(str, row)) - known:
        known.add(key)
        if near := difflib.get_close_matches(key, PAIRED, n=1, cutoff=NEAR):
            warnings.warn(f"{where}: {key!r} is not read: is {near[0]!r} meant?", stacklevel=2)


def _rows(name: str, split: Split, data_dir: Path | str | None) -> Iterator[tuple[str, Row]]:
    """Yield rows with the place they come from, for error messages."""
    if name == "gsm_symbolic":
        yield from _generated(split)
    elif name == "ioi":
        yield from ioi.rows(SYMBOLIC_SEEDS[split][0])
    elif data_dir is None:
        yield from _hub_rows(name, split)
    elif name == "wikitext2":
        path = Path(data_dir) / SOURCES[name].path(name, split)
        for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
            yield f"{path}:{number}", {"text": line + "\n" if line.strip() else ""}
    else:
        rows = read_json_rows(Path(data_dir) / SOURCES[name].path(name, split))
        if name == "c4":  # one file serves both splits: alternate rows
            rows = itertools.islice(rows, 0 if split == "calibration" else 1, None, 2)
        yield from rows


def _generated(split: Split) -> Iterator[tuple[str, Row]]:
    try:
        import reasoning_gym  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("gsm_symbolic needs the package reasoning-gym: install causalprune[demo]") from cause

    first, size = SYMBOLIC_SEEDS[split]
    for number, row in enumerate(reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=first)):
        yield f"gsm_symbolic seed {first + number}", row


def _hub_rows(name: str, split: Split) -> Iterator[tuple[str, Row]]:
    import datasets  # noqa: PLC0415

    source = SOURCES[name]
    (path, configuration), own = source.hub, source.splits[split == "evaluation"]
    try:
        rows = datasets.load_dataset(path, configuration, split=own, streaming=name == "c4")
        limit = C4_DOCUMENTS if name == "c4" else None
        for number, row in enumerate(itertools.islice(rows, limit)):
            yield f"{path} {split} row {number}", row
    except Exception as cause:  # the hub client raises errors of four libraries
        advice = f"pass --data-dir FOLDER with FOLDER/{source.path(name, split)}"
        raise DataError(f"cannot load {path} from the Hugging Face hub ({cause}); {advice}") from cause
