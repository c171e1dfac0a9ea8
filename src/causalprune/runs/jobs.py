"""What is to come of a command, stage by stage, with what each costs: for the time left to show."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from causalprune.calibration import with_limit
from causalprune.core import Calibration, CausalPruneError, Decoder
from causalprune.evaluation import AND, Settings, together
from causalprune.pruning import Method
from causalprune.runs.plans import answer_tokens, attribution_passes, task_tokens
from causalprune.runs.recipe import Recipe, Shape
from causalprune.runs.rows import Removal
from causalprune.shrinking import Budget, shrink_jobs


@dataclass(frozen=True)
class Coming:
    """What may follow: so many more sparsities, and the same work for these draws, the first of which is at work.

    `again`: the best checkpoint is made again at the end if an earlier command has let go of it.
    """

    further: int = 0
    draws: tuple[str, ...] = ()
    again: bool = False


def task_jobs(tasks: Sequence[str], settings: Settings) -> dict[str, float]:
    """Return what tasks cost in tokens, those together that take one pass; one where that is not known before they run."""
    answer, found = answer_tokens(settings.thinking, settings.max_new_tokens), dict[str, float]()
    for group in together(tasks):
        name, limit = with_limit(group[0])
        limited = f"{name}:{limit or settings.limit}" if limit or settings.limit else name
        try:
            tokens = task_tokens(limited, settings.scorers, answer, settings.data_dir)
        except CausalPruneError:
            tokens = 1
        found[AND.join(group)] = float(max(tokens, 1))
    return found


def run_jobs(
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration,
    settings: Settings,
    done: Set[str],
    coming: Coming,
) -> dict[str, float]:
    """Return the stages of a run in their order, with what they cost in tokens: nothing where they are `done`."""
    tasks, cells, found = task_jobs(recipe.on, settings), list(recipe.cells().items()), dict[str, float]()
    tokens = float(calibration.description["tokens"])
    if any(isinstance(method, Method) and "effects" in method.needs for _, method in cells):
        shape = Shape(len(decoder.layers), max(layer.n_heads for layer in decoder.layers), 0.0)
        found["attribution"] = tokens * attribution_passes(recipe, shape)
    cells += [(f"{number} more", cells[-1][1]) for number in range(1, coming.further + 1)]
    for name, method in cells:
        over = [AND.join(g) for g in together(recipe.on) if {f"{name}/{task}" for task in g} <= done]
        left = {job: cost for job, cost in tasks.items() if job not in over}
        making = dict[str, float]()
        if isinstance(method, Removal):
            making = shrink_jobs(decoder, Budget(parameters=method.share), calibration, method.how)
        elif method is not None:
            making = {"pruning": method.passes(len(decoder.layers), len(calibration.examples), int(tokens))}
        found |= {f"{name}: {what}": (1 + passes * tokens) * bool(left) for what, passes in making.items()}
        found |= {f"{name}: {task}": left.get(task, 0.0) for task in tasks}
    if not coming.draws:
        return found
    whole = {job: max(cost, 1.0) for job, cost in found.items()}
    later = {f"{job} ({draw})": cost for draw in coming.draws[1:] for job, cost in whole.items()}
    return {f"{job} ({coming.draws[0]})": cost for job, cost in found.items()} | later
