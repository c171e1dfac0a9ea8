"""Recipes: a whole comparison in one YAML file, read strictly and planned before anything is loaded."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from causalprune.attribution import Estimator, Question
from causalprune.calibration import OWN, TEXT_SOURCES, Chat, split_counts, with_limit
from causalprune.core import Decoder, MismatchError, OptionError, unknown
from causalprune.pruning import BUDGETS, N_OF_M, Method, pattern_sparsity
from causalprune.shrinking import Shrinking, shares_for

DEFAULT_SPARSITY = 0.2
GENERAL = "wikitext2"
"""Where general text comes from."""
RECIPES = Path(__file__).parent / "recipes"
SHRINK = "shrink"
"""The method of a recipe that removes parts for good."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded: the arguments of `causalprune.models.loading.load`."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class CalibrationSpec:
    """Which examples the methods see: the arguments of `causalprune.calibration.examples.calibrate`, and more.

    A source `own:NAME` is problems of NAME with the model's own answers; `general` is the share of the examples that
    are general text instead, to protect what the task does not need. `n` is the number of all examples, unless every
    source says its own as in `gsm8k:32`.
    """

    sources: tuple[str, ...]
    n: int = 128
    subsets: int = 3
    seed: int = 0
    max_tokens: int = 512
    chat: Chat = "auto"
    general: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.general < 1:
            raise OptionError(
                f"the share of general text must be at least 0 and below 1, not {self.general:g}"
            )
        names = [with_limit(source)[0] for source in self.sources]
        for text in TEXT_SOURCES:
            if f"{OWN}{text}" in names:
                raise OptionError(
                    f"{OWN}{text}: {text} is running text, with nothing to answer: leave out {OWN}"
                )
        if self.general and GENERAL in names:
            raise OptionError(f"{GENERAL} is general text itself: leave out the share of general text")

    def counts(self) -> dict[str, int]:
        """Return the number of examples of every source, that of general text among them."""
        own = [with_limit(source)[1] or 0 for source in self.sources]
        if 0 in own:
            n, text = self.n, max(round(self.general * self.n), int(self.general > 0))
        else:
            text = max(round(sum(own) / (1 - self.general)) - sum(own), int(self.general > 0))
            n = sum(own) + text
        return split_counts((*self.sources, f"{GENERAL}:{text}") if text else self.sources, n)


@dataclass(frozen=True)
class AttributionSpec:
    """How effects are measured: the fields of `Question` and `Estimator`, and GiB for cached layer inputs."""

    units: tuple[str, ...] = ("heads",)
    effect: Literal["ce", "kl"] = "ce"
    ablation: Literal["zero", "mean", "resample"] = "zero"
    estimator: Literal["exact", "gradient", "adaptive"] = "exact"
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
class Removal:
    """A smaller model among the methods of a recipe: this share of all parameters goes, taken from MLP neurons by effect."""

    share: float
    how: Shrinking

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(
                f"the share of all parameters that shrink removes is between 0 and 1, not {self.share:g}"
            )


Cell: TypeAlias = Method | Removal | None
"""How a row of a run is made; None for the dense model."""


@dataclass(frozen=True)
class Recipe:
    """Dense and every method at every sparsity, on every task.

    A method is written `criterion[:scope][+budgets][+update]`; one with a pattern such as `wanda:2:4` has its own sparsity
    unless it is graded. `shrink[:share][+update]` is a smaller model, at its own share only. `save` keeps all pruned
    checkpoints, where else the recommended one is kept; `texts` the problems and answers that the report shows.
    `damping` is that of `Method`, `batch_tokens` bounds a forward pass, `tasks` may carry a limit as in `gsm8k_nll:200`.
    """

    model: ModelSpec
    calibration: CalibrationSpec
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    tasks: tuple[str, ...]
    seed: int = 0
    batch_tokens: int = 2048
    save: bool = False
    texts: bool = True
    attribution: AttributionSpec = field(default=AttributionSpec())
    shape: Shape | None = field(default=None)
    damping: float = Method.damping

    def __post_init__(self) -> None:
        for kind in ("methods", "sparsities", "tasks"):
            values = getattr(self, kind)
            if not values or len(set(values)) < len(values):
                raise OptionError(f"recipe: {kind} must be a list without repetitions, not {list(values)}")
        self.cells()

    def check_shape(self, decoder: Decoder) -> None:
        """Raise `MismatchError` where the model that was loaded has another shape than the recipe says.

        And `OptionError` where it cannot lose as many parameters as a method of the recipe removes.
        """
        layers, heads = len(decoder.layers), decoder.layers[0].attention.n_heads
        if self.shape is not None and (layers, heads) != (self.shape.layers, self.shape.heads):
            raise MismatchError(
                f"{decoder.name} has {layers} layers of {heads} heads, the recipe says "
                f"{self.shape.layers} of {self.shape.heads}: correct its shape, or remove it"
            )
        for method in self.cells().values():
            if isinstance(method, Removal):
                shares_for(decoder, method.share)

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


def label(method: Method | Removal) -> str:
    """Return the name of a pruned model in files and tables: `wanda-row-0.5`, `wanda+refit-2:4-0.5`, `shrink-0.2`."""
    if isinstance(method, Removal):
        update = "" if method.how.update == Shrinking.update else f"+{method.how.update}"
        return f"{SHRINK}{update}-{method.share:g}"
    words = "".join(f"+{word}" for word in (method.budgets, method.update) if word)
    return f"{method.criterion}{words}-{method.resolved_scope}-{method.sparsity:g}"


def parse_method(
    text: str, sparsity: float | None = None, seed: int = 0, damping: float = Method.damping
) -> Method:
    """Return the method that `criterion[:scope][+budgets][+update]` names.

    As `wanda`, `wanda:2:4`, `cap:global+refit`, `wanda+graded+refit` or `causal:2:4+graded`. Without `sparsity`, a pattern's own or
    `DEFAULT_SPARSITY` is taken.
    """
    if is_removal(text):
        raise OptionError(
            f"{text} makes a smaller model: `causalprune shrink`, or a method of a recipe for `causalprune run`"
        )
    name, *words = text.split("+")
    criterion, _, scope = name.partition(":")
    if sparsity is None:
        sparsity = pattern_sparsity(scope) or DEFAULT_SPARSITY
    budgets = [word for word in words if word in BUDGETS]
    updates = [word for word in words if word not in BUDGETS]
    if len(budgets) > 1 or len(updates) > 1:
        raise OptionError(
            f"the method {text!r} has two words for the same: one of {BUDGETS} and one update are allowed"
        )
    update, own = (words[0] if words else None for words in (updates, budgets))
    return Method(criterion, sparsity, scope or None, seed, update, own, damping)


def is_removal(text: str) -> bool:
    """Tell whether a method makes a smaller model in place of zeros."""
    return text.partition("+")[0].partition(":")[0] == SHRINK


def parse_removal(text: str, seed: int = 0, batch_tokens: int = 2048) -> Removal:
    """Return the smaller model that `shrink[:share][+update]` names, as `shrink:0.2` or `shrink:0.1+distill`."""
    name, plus, update = text.partition("+")
    try:
        share = float(name.partition(":")[2] or DEFAULT_SPARSITY)
    except ValueError:
        raise OptionError(f"{text}: shrink takes a share of all parameters, as in shrink:0.2") from None
    how = Shrinking(update=update if plus else Shrinking.update, seed=seed, max_batch_tokens=batch_tokens)
    return Removal(share, how)


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
    return dataclasses.replace(recipe, tasks=tuple(with_limit(task)[0] for task in recipe.tasks))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; unknown keys, wrong types and impossible values are errors that name them."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise OptionError(f"cannot read recipe {path}: {cause.strerror}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(cause).split())}") from cause
    recipe: Recipe = _build(Recipe, values, "recipe")
    return recipe


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise OptionError(f"{where} must be a mapping of keys to values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
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
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise unknown(where, str(value), typing.get_args(hint))
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise OptionError(f"{where} must be a list, not {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise OptionError(f"{where} must be {_KINDS[hint]}, not {value!r}")
    return value


_KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number (0.2, not '20 %')",
    bool: "true or false",
}
