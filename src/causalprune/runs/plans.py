"""What a recipe will do, before any weights are loaded: jobs, tokens, memory, time and disk.

Numbers are estimates, and say so: tokens from the length of texts, time from the speed of a matrix
product on the device of the recipe.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalprune.attribution import DEFAULT_BUDGET, Estimator
from causalprune.calibration import (
    OWN,
    OWN_TEXT,
    TEXT_SOURCES,
    Problem,
    Skipped,
    enough,
    load_problems,
    load_texts,
    with_limit,
)
from causalprune.checkpoints import EMBEDDED, check_destination, resolve
from causalprune.core import CausalPruneError, OptionError
from causalprune.evaluation import (
    AND,
    CONTINUATION,
    OPENING,
    OWN_TASKS,
    TOKENS,
    Settings,
    check_tasks,
    evaluation_contents,
    goes_on,
    load_scorers,
    output_type,
    source_of,
    together,
)
from causalprune.models import (
    auto_dtype,
    cached_dtype,
    check_options,
    device_of,
    open_checkpoint,
    read_shape,
)
from causalprune.pruning import Method
from causalprune.runs.general import with_general_text
from causalprune.runs.recipe import ModelSpec, Recipe, Shape
from causalprune.runs.rows import Removal

CHARACTERS_PER_TOKEN = 3.5
EFFICIENCY = 0.5
"""Share of a matrix product's speed that a forward pass reaches."""
ANSWER_TOKENS = 160
"""Tokens of a generated answer; each costs a pass over the weights, shared by its batch."""
THINKING_TOKENS = 1500
"""Tokens of an answer after thoughts."""
WRITING = 8
"""Times that a token of a text costs more to write than to read: few pieces are written at once."""
OPTIONS = 4
"""Times that a multiple-choice question is read, once per option."""
TRAINING_BYTES = {"distill": 0.5, "adam": 8.5}
"""What training takes for every weight, beside the model: what its rule remembers, and the gradients of a layer."""
PROBE_SECONDS = 0.3
ABSENT_GPU_FLOPS = 300e12
"""Assumed of a GPU that is not here: the dense bfloat16 rate of an A100 (NVIDIA's data sheet: 312e12)."""


@dataclass(frozen=True)
class Job:
    """One stage: `tokens` is what goes through (the equivalent of) the whole model."""

    name: str
    count: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A recipe in numbers, all estimated."""

    recipe: Recipe
    shape: Shape
    jobs: tuple[Job, ...]
    seconds: float
    memory_bytes: float
    disk_bytes: float
    folder: Path


def plan(recipe: Recipe, folder: Path, *, data_dir: Path | str | None = None) -> Plan:
    """Check all that can be checked without weights, and return what the run will cost.

    Raises:
        CausalPruneError: names, data, model configuration or output folder are not in order.
    """
    scorers = load_scorers(recipe.scorers)
    check_tasks(recipe.on, scorers)
    recipe = with_general_text(recipe, folder, data_dir)
    check_loading(recipe.model)
    if not folder.exists():
        check_destination(folder)
    shape = recipe.shape or _read_shape(recipe.model)
    settings = Settings(data_dir=data_dir, seed=recipe.seed, scorers=scorers)
    calibration, counts = _calibration(recipe, settings)
    jobs = []
    cells = recipe.cells()
    methods = [method for method in cells.values() if isinstance(method, Method)]
    removals = [method for method in cells.values() if isinstance(method, Removal)]
    if any("effects" in m.needs for m in methods):
        units = shape.layers * shape.heads
        jobs.append(Job("attribution", units, int(calibration * attribution_passes(recipe, shape))))
    passes = [
        m.passes(shape.layers, sum(counts.values()), calibration) for m in methods if m.needs_calibration
    ]
    if passes:
        jobs.append(Job("pruning on calibration data", len(passes), int(calibration * sum(passes))))
    if removals:
        passes = [_removal_passes(removal, shape, calibration) for removal in removals]
        jobs.append(Job("making smaller models", len(passes), int(calibration * sum(passes))))
    answer = answer_tokens(recipe.calibration.thinking, recipe.max_new_tokens)
    for group in together(recipe.on):
        tokens = len(cells) * task_tokens(group[0], scorers, answer, data_dir)
        jobs.append(Job(AND.join(group), len(cells), tokens))
    if own := _written_tokens(recipe, counts):
        jobs.append(Job("text of its own, written once", 1, WRITING * own))
    flops = 2 * shape.parameters * sum(job.tokens for job in jobs)
    size = size_bytes(recipe.model, shape.parameters)
    updates = [m.resolved_update for m in methods] + [removal.how.update for removal in removals]
    saved = sum(map(recipe.saves, cells))
    kept = saved + min(len(cells) - 1 - saved, 2)  # the best, and the one measured now
    return Plan(
        recipe=recipe,
        shape=shape,
        jobs=tuple(jobs),
        seconds=flops / _flops_per_second(recipe.model),
        memory_bytes=memory_bytes(shape, size, updates, recipe.batch_tokens),
        disk_bytes=kept * size * 1.07,
        folder=folder,
    )


def check_loading(spec: ModelSpec) -> None:
    """Raise `OptionError` for a type or a device that cannot be; a GPU may be where a plan is carried out."""
    device = device_of(spec.device)
    check_options(spec.dtype, "meta" if device.startswith("cuda") else device, spec.attention)


def size_bytes(spec: ModelSpec, parameters: float) -> float:
    """Return the bytes that so many parameters take, as they are loaded."""
    return parameters * dtype_of(spec).itemsize


def memory_bytes(shape: Shape, size: float, updates: Iterable[str], batch_tokens: int) -> float:
    """Return the memory that pruning a model of this size takes at most, with the largest of the updates."""
    training = max((TRAINING_BYTES.get(update, 0.0) for update in updates), default=0.0)
    return 1.2 * size + training * shape.parameters + batch_tokens * shape.layers * 16384


def _removal_passes(removal: Removal, shape: Shape, calibration: int) -> float:
    """Return how many whole passes over the calibration data a smaller model costs."""
    update = Method("magnitude", removal.share, update=removal.how.update)
    return _prediction_passes(Estimator("gradient")) + update.passes(shape.layers, 1, calibration)


def _prediction_passes(how: Estimator) -> float:
    return float(len(how.gates) * (1 + 2 * (1 + how.draws)))


def attribution_passes(recipe: Recipe, shape: Shape) -> float:
    """Return how many whole passes over the calibration data the effects of all heads cost."""
    how, heads = recipe.attribution.method(), shape.layers * shape.heads
    if how.name == "exact":
        return heads * (shape.layers + 1) / 2 / shape.layers
    if len(how.gates) > 1 and recipe.attribution.effect == "ce":  # as `attribution.planned` has it
        how = replace(how, draws=0)
    prediction = _prediction_passes(how)
    return prediction if how.name == "gradient" else max(prediction, heads / (how.budget or DEFAULT_BUDGET))


def _read_shape(spec: ModelSpec) -> Shape:
    layers, heads, parameters = read_shape(
        resolve(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    return Shape(layers, heads, float(parameters))


def _calibration(recipe: Recipe, settings: Settings) -> tuple[int, dict[str, int]]:
    """Return the tokens of the calibration, and the examples of each source; raises `DataError` where too few are not measured."""
    wanted, measured = recipe.calibration, evaluation_contents(recipe.on, settings, None)
    task, tokens = {with_limit(source)[0] for source in wanted.task}, dict[str, int]()
    for source in (counts := wanted.counts()):
        counts[source] = count = wanted.counts(sum(tokens[name] for name in tokens if name in task))[source]
        if source in (OWN_TEXT, *TEXT_SOURCES):
            tokens[source] = count * wanted.max_tokens
            continue
        problems = load_problems(source.removeprefix(OWN), "calibration", data_dir=settings.data_dir)
        also = Counter(measured[p.content] for p in problems if p.content in measured)
        out = Skipped(excluded=also.total(), also_in=also)
        lengths = _lengths([p for p in problems if p.content not in measured])
        enough(source, count, len(lengths), out)
        tokens[source] = int(sum(lengths) / len(lengths) * min(count, len(lengths)))
    return sum(tokens.values()), counts


def _written_tokens(recipe: Recipe, counts: Mapping[str, int]) -> int:
    """Return the tokens of all texts that the model writes, to be measured and to calibrate on so many of each source."""
    named = dict(map(with_limit, recipe.on))
    measured = {named[task] or TOKENS for task in OWN_TASKS if task in named}
    return sum(measured) + counts.get(OWN_TEXT, 0) * recipe.calibration.max_tokens


def answer_tokens(thinking: str, most: int | None) -> int:
    """Return how long an answer will be, at `most` if there is a limit."""
    own = THINKING_TOKENS if thinking == "on" else ANSWER_TOKENS
    return min(own, most or own)


def task_tokens(task: str, scorers: Iterable[str], answer: int, data_dir: Path | str | None) -> int:
    """Return what goes through the model for a task, with answers of so many tokens.

    Raises:
        OptionError: the task has data of its own, which are not known before it runs.
    """
    name, limit = with_limit(task)
    source, kind = source_of(name, scorers), output_type(name, scorers)
    if source == OWN_TEXT:
        return limit or TOKENS
    if source is None:
        raise OptionError(f"task {name}: a task file with data of its own cannot be planned")
    if source in TEXT_SOURCES and kind == "generate_until":
        return (limit or len(load_texts(source, "evaluation", data_dir=data_dir))) * (OPENING + CONTINUATION)
    if source in TEXT_SOURCES:
        characters = sum(map(len, load_texts(source, "evaluation", data_dir=data_dir)))
        return min(int(characters / CHARACTERS_PER_TOKEN), limit or characters)
    told = kind != "generate_until"
    lengths = _lengths(load_problems(source, "evaluation", data_dir=data_dir, with_targets=told))
    problems = min(len(lengths), limit or len(lengths))
    tokens = sum(lengths) / len(lengths) * problems
    if kind == "generate_until":
        tokens += (CONTINUATION if goes_on(name, scorers) else answer) * problems
    if kind == "multiple_choice":
        tokens *= OPTIONS
    return int(tokens)


def _lengths(problems: Iterable[Problem]) -> list[float]:
    return [(len(p.prompt) + len(p.target)) / CHARACTERS_PER_TOKEN for p in problems]


def priced(spec: ModelSpec, tokens: float) -> float:
    """Return the seconds that so many tokens through a model take, from its configuration and what this machine multiplies."""
    return 2 * _read_shape(spec).parameters * tokens / _flops_per_second(spec)


def dtype_of(spec: ModelSpec) -> torch.dtype:
    """Return the type that a model is loaded in, as far as its configuration tells."""
    folder = Path(spec.name).expanduser()
    if spec.dtype == "auto" and folder.is_dir():
        with contextlib.suppress(CausalPruneError, OSError, ValueError):  # as of code that is not trusted
            return auto_dtype(folder, open_checkpoint(folder))
    held = folder.is_dir() and not (folder / "config.json").is_file()  # nothing but a GGUF file
    unpacked = spec.name == EMBEDDED or spec.name.endswith(".gguf") or held
    if spec.dtype == "auto" and not unpacked:
        with contextlib.suppress(ValueError, OSError):  # no name of the Hub, or nothing that can be read
            return cached_dtype(spec.name, spec.revision) or torch.bfloat16
    return getattr(torch, ("float32" if unpacked else "bfloat16") if spec.dtype == "auto" else spec.dtype)  # type: ignore[no-any-return]


def _flops_per_second(spec: ModelSpec) -> float:
    """Time a matrix product on the device asked for, or on the CPU if that is not here."""
    device = torch.device(device_of(spec.device))
    if device.type == "cuda" and not torch.cuda.is_available():
        return ABSENT_GPU_FLOPS * EFFICIENCY
    dtype = dtype_of(spec)
    left = torch.ones(1024, 1024, device=device, dtype=dtype)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        float((left @ left)[0, 0])
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - start) * EFFICIENCY
