"""Recipes: a whole comparison in one YAML file, read strictly and planned before anything is loaded."""

import dataclasses
import datetime as dt
import types
import typing
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from causalprune.attribution import Ablation, Estimator, Named, Question
from causalprune.calibration import (
    DATE,
    OWN,
    OWN_TEXT,
    TEXT_SOURCES,
    Chat,
    Reader,
    Thinking,
    Turns,
    split_counts,
    uses_chat,
    with_limit,
)
from causalprune.core import Decoder, MismatchError, OptionError, unknown
from causalprune.evaluation import PIECE, Settings
from causalprune.pruning import N_OF_M, TRAINS, Method, check_dtypes
from causalprune.runs.rows import Cell, Removal, is_removal, label, parse_method, parse_removal, writes_own
from causalprune.shrinking import Budget, Offers, check_budget

OLD = {"sources": "task", "general": "preserve", "tasks": "on"}
OLD_WORD = "{} is an old word, which the next version will not know: it is now {}"
GENERAL = "wikitext2"
"""What old words call general text."""
PRESERVE_SHARE = 0.25
"""Examples of a source to preserve that names no count, as a share of the task's."""
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded: the arguments of `causalprune.models.loading.load`."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    attention: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    date: str = DATE


@dataclass(frozen=True)
class CalibrationSpec:
    """Which examples the methods see: the arguments of `causalprune.calibration.examples.calibrate`, and more.

    A source `own:NAME` is problems of NAME with the model's own answers, `own` text that it writes. `n` is the number of the task's examples, unless
    every source of it says its own as in `gsm8k:32`. Those of `preserve`, which are to keep what the task does not need, come
    on top: a source without a count of its own gives `preserve_share` of the task's number, `own` text of its tokens. Where
    `preserve` is None, what trains or removes parts for good preserves `own` text, and what does neither nothing (`settled`).
    """

    task: tuple[str, ...]
    n: int = 128
    subsets: int = 3
    seed: int = 0
    max_tokens: int = 512
    chat: Chat = "auto"
    preserve: tuple[str, ...] | None = None
    preserve_share: float = PRESERVE_SHARE
    thinking: Thinking = "auto"
    turns: Turns = "last"
    fold_system: bool = False

    def __post_init__(self) -> None:
        if self.preserve == ("none",):
            object.__setattr__(self, "preserve", ())
        if not 0 < self.preserve_share <= 1:
            raise OptionError(
                f"preserve_share must be above 0 and at most 1, not {self.preserve_share:g}: for more, say a count (c4:500)"
            )
        if self.preserve_share != PRESERVE_SHARE and self.preserve == ():
            raise OptionError(
                "preserve_share is a share of what is to be preserved: name a source, or leave it out"
            )
        names = [with_limit(source)[0] for source in (*self.task, *(self.preserve or ()))]
        if len(set(names)) < len(names):
            raise OptionError(f"a source is named twice in {', '.join(names)}: name each once")
        for text in TEXT_SOURCES:
            if f"{OWN}{text}" in names:
                raise OptionError(
                    f"{OWN}{text}: {text} is running text, with nothing to answer: leave out {OWN}"
                )

    def reader(self, tokenizer: Any, room: int | None, data_dir: Path | str | None = None) -> Reader:
        """Return how the examples become tokens for a model with so many positions (None: no limit)."""
        return Reader(
            tokenizer,
            uses_chat(tokenizer, self.chat),
            self.max_tokens,
            self.seed,
            data_dir,
            turns=self.turns,
            fold_system=self.fold_system,
            positions=room,
        )

    def settings(self, data_dir: Path | str | None, **own: Any) -> Settings:
        """Return how problems are measured that are read as these are; `own` are other fields."""
        names = ("seed", "max_tokens", "chat", "thinking", "turns", "fold_system")
        return Settings(data_dir=data_dir, **{name: getattr(self, name) for name in names} | own)

    def settled(self, own: bool) -> "CalibrationSpec":
        """Return what is asked for where nothing is said of what to preserve, with text of its `own` or without."""
        if self.preserve is not None:
            return self
        writes = own and OWN_TEXT not in [with_limit(source)[0] for source in self.task]
        return dataclasses.replace(self, preserve=(OWN_TEXT,) if writes else ())

    def counts(self, tokens: int = 0) -> dict[str, int]:
        """Return the number of examples that is asked of every source, the task's, of so many `tokens`, before those to preserve."""
        alone = all(with_limit(source)[1] for source in self.task)
        own = split_counts(self.task, None if alone else self.n)
        each = max(round(self.preserve_share * sum(own.values())), 1)
        pieces = max(round(self.preserve_share * tokens / min(PIECE, self.max_tokens)), 1)
        asked = map(with_limit, self.preserve or ())
        return own | {name: count or (pieces if name == OWN_TEXT else each) for name, count in asked}


@dataclass(frozen=True)
class AttributionSpec:
    """How effects are measured: the fields of `Question` and `Estimator`, and GiB for cached layer inputs."""

    units: tuple[str, ...] = ("heads",)
    effect: Literal["ce", "kl"] = "ce"
    ablation: Ablation = "zero"
    estimator: Named = "exact"
    budget: float | None = None
    until_certain: bool = False
    draws: int = 1
    seed: int = 0
    cache_gib: float = 1.0

    def __post_init__(self) -> None:
        self.question(), self.method()

    def question(self) -> Question:
        """Return what is measured."""
        return Question(self.units, self.effect, self.ablation)

    def method(self, max_batch_tokens: int = 2048) -> Estimator:
        """Return how it is estimated."""
        return Estimator(
            self.estimator,
            self.budget,
            self.until_certain,
            self.draws,
            seed=self.seed,
            max_batch_tokens=max_batch_tokens,
            cache_gib=self.cache_gib,
        )


@dataclass(frozen=True)
class Shape:
    """Size of the model, for plans made where its configuration cannot be reached; checked when it is loaded."""

    layers: int
    heads: int
    parameters: float


@dataclass(frozen=True)
class Recipe:
    """Dense and every method at every sparsity, on every task.

    A method is written `criterion[:scope][+budgets][+update]`; one with a pattern such as `wanda:2:4` has its own sparsity
    unless it is graded. `shrink[:share][+update]` is a smaller model, at its own share only. `save` keeps the checkpoints of
    all methods, or of those listed, where else the recommended one is kept; `texts` the problems and answers that the report shows.
    `general_text` auto measures it where nothing in `on` does: text that the intact model writes, WikiText-2 where it is at hand.
    `damping` is that of `Method`, `batch_tokens` bounds a forward pass, what is measured, `on`, may carry a count as in `gsm8k_nll:200`.
    `answer`, `max_new_tokens` and `scorers` (as `NAME=module:function`) are about answers, as in `evaluation.Settings`.
    """

    model: ModelSpec
    calibration: CalibrationSpec
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    on: tuple[str, ...]
    seed: int = 0
    batch_tokens: int = 2048
    save: bool | tuple[str, ...] = False
    texts: bool = True
    general_text: Literal["auto", "none"] = "auto"
    attribution: AttributionSpec = field(default=AttributionSpec())
    shape: Shape | None = field(default=None)
    damping: float = Method.damping
    answer: str | None = None
    max_new_tokens: int | None = None
    scorers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in ("methods", "sparsities", "on"):
            values = getattr(self, kind)
            if not values or len(set(values)) < len(values):
                raise OptionError(f"recipe: {kind} must be a list without repetitions, not {list(values)}")
        if phrases := [task for task in self.on if with_limit(task)[0].endswith("_phrases")]:
            raise OptionError(
                f"{phrases[0]} needs a list of phrases, for which a recipe has no place: `causalprune evaluate --phrases` measures it"
            )
        for method in self.save if isinstance(self.save, tuple) else ():
            if method not in self.methods:
                raise unknown("method to save", method, self.methods)
        settled = self.calibration.settled(any(map(writes_own, self.cells().values())))
        object.__setattr__(self, "calibration", settled)

    def saves(self, name: str) -> bool:
        """Tell whether the checkpoint of a row is kept whatever beats it."""
        if isinstance(self.save, bool) or not self.save:
            return bool(self.save) and name != "dense"
        own = dataclasses.replace(self, methods=self.save, save=True)
        return name in own.cells() and name != "dense"

    def check_shape(self, decoder: Decoder) -> None:
        """Raise `MismatchError` where the model that was loaded has another shape than the recipe says.

        And `OptionError` where it cannot lose as many parameters as a method of the recipe removes, or be trained as one trains it.
        """
        layers, heads = len(decoder.layers), max(layer.n_heads for layer in decoder.layers)
        if self.shape is not None and (layers, heads) != (self.shape.layers, self.shape.heads):
            raise MismatchError(
                f"{decoder.name} has {layers} layers of {heads} heads, the recipe says "
                f"{self.shape.layers} of {self.shape.heads}: correct its shape, or remove it"
            )
        for method in self.cells().values():
            if isinstance(method, Removal):
                check_budget(Offers(decoder, Budget(parameters=method.share)))
            update = method.how.update if isinstance(method, Removal) else method and method.resolved_update
            if update in TRAINS:
                check_dtypes(decoder)

    def cells(self) -> dict[str, Cell]:
        """Return every row of the table by its label, dense (None) first."""
        pruned = [
            parse_removal(text, self.seed, self.batch_tokens)
            if is_removal(text)
            else parse_method(text, None if fixed else sparsity, self.seed, self.damping)
            for text in self.methods
            for fixed in [N_OF_M.search(text) and "graded" not in text]
            for sparsity in self.sparsities
        ]
        return {"dense": None, **{label(method): method for method in pruned}}


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a file, or one of those that come with the package, by its name."""
    own = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise OptionError(
            f"recipe {name} does not exist; those that come with causalprune: {', '.join(sorted(own))}"
        )
    if name not in own:
        raise unknown("recipe", name, own)
    return own[name]


def without_limits(recipe: Recipe) -> Recipe:
    """Return the recipe with every task on all of its examples."""
    return dataclasses.replace(recipe, on=tuple(with_limit(task)[0] for task in recipe.on))


def read_recipe(path: Path, *, trust_remote_code: bool = False) -> Recipe:
    """Read a recipe from YAML; unknown keys, wrong types and impossible values are errors that name them.

    With `trust_remote_code` it may run its model's code. Scorers are code too: a recipe that has some is refused unless
    that is so, here or by the recipe itself.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise OptionError(f"cannot read recipe {path}: {cause.strerror}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(cause).split())}") from cause
    recipe: Recipe = _build(Recipe, values, "recipe")
    if trust_remote_code:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, trust_remote_code=True))
    if recipe.scorers and not recipe.model.trust_remote_code:
        raise OptionError(
            f"{path} runs code to score answers ({', '.join(recipe.scorers)}): pass --trust-remote-code, or put "
            "trust_remote_code: true under its model, if you trust it"
        )
    return recipe


def preserving(word: str, share: float) -> dict[str, Any]:
    """Return the words of today for the share of general text that an old `word` asks for, and warn that it is one."""
    new = f"preserve ({GENERAL}), and its examples come on top of the task's now, not in their place"
    warnings.warn(OLD_WORD.format(word, new), FutureWarning, stacklevel=2)
    if not 0 <= share < 1:
        raise OptionError(f"{word}, a share of general text, must be at least 0 and below 1, not {share:g}")
    return {"preserve": (GENERAL,), "preserve_share": share} if share else {"preserve": ()}


def _renamed(values: Mapping[Any, Any], fields: Collection[str], where: str) -> dict[Any, Any]:
    """Return a mapping with the words of today in place of old ones; a bare key `on` reaches us as true (YAML 1.1)."""
    found = {"on" if key is True else key: value for key, value in values.items()}
    for old in [key for key in found if OLD.get(key) in fields]:
        new, value = OLD[old], found.pop(old)
        if new in found:
            raise OptionError(f"{where}: {old} is the old word for {new}: leave one of them out")
        if old == "general":
            found |= preserving(old, _value(float, value, f"{where}: {old}"))
        else:
            warnings.warn(OLD_WORD.format(old, new), FutureWarning, stacklevel=2)
            found[new] = value
    return found


def as_recipe(given: Recipe | Mapping[str, Any] | Path | str) -> Recipe:
    """Return a recipe from what stands for one: itself, its keys as in YAML, its file, or its name."""
    if isinstance(given, Recipe):
        return given
    recipe: Recipe = (
        _build(Recipe, dict(given), "recipe")
        if isinstance(given, Mapping)
        else read_recipe(find_recipe(str(given)))
    )
    return recipe


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise OptionError(f"{where} must be a mapping of keys to values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = _renamed(values, fields, where)
    for key in values:
        if key not in fields:
            raise unknown(f"key in {where}", str(key), fields)
    hints = typing.get_type_hints(kind)
    for name, own in fields.items():
        required = own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise OptionError(f"{where}: {name!r} is missing")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        listed, hints = isinstance(value, list | tuple), typing.get_args(hint)
        if value is None and type(None) in hints:
            return None
        hint = next((h for h in hints if listed and typing.get_origin(h) is tuple), hints[0])
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is Literal:
        return _choice(typing.get_args(hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise OptionError(f"{where} must be a list, not {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    value = (
        value.isoformat() if hint is str and isinstance(value, dt.date) else value
    )  # YAML's own reading of 2026-03-01
    if type(value) is not hint:
        raise OptionError(f"{where} must be {_KINDS[hint]}, not {value!r}")
    return value


def _choice(choices: Sequence[str], value: Any, where: str) -> Any:
    if isinstance(value, bool):  # YAML's own reading of on and off
        value = "on" if value else "off"
    if value not in choices:
        raise unknown(where, str(value), choices)
    return value


_KINDS = {str: "text", int: "a whole number", float: "a number (0.2, not '20 %')", bool: "true or false"}
