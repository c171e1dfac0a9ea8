"""The last update: kept weights of all layers together follow the intact model's predictions.

A step is a walk. Forward, every layer's input is kept; then backwards a layer at a time: its gradients are made, its weights
move by them, and the gradients are forgotten. So beside the model there is one layer's gradient, and what a rule remembers.
The zeros are the mask.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalprune.calibration import batches
from causalprune.core import (
    Batch,
    Decoder,
    Example,
    Layer,
    ModelError,
    OptionError,
    Progress,
    Projection,
    State,
    silent,
)
from causalprune.interventions import (
    Hold,
    LayerInputs,
    Pieces,
    Slopes,
    as_they_are,
    differentiable,
    divergence_slope,
    entered_at,
    entering,
    last_hidden,
    on_cpu,
    parts_of,
    run_layer,
    target_logits,
    targets,
)
from causalprune.pruning.rules import RULES, Rule, stored

TOKENS, FEWEST, MOST = 54_000, 2, 3
"""Training goes through all examples until it has seen so many tokens, between so few and so many times. More brought little (docs/log.md)."""
RATE = 1e-3
"""Largest step, in root mean squares of a matrix's kept weights, which differ tenfold among models."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises; then it falls along half a cosine to zero."""
BATCH_TOKENS = 1024
"""Tokens of a batch, at most."""
AT_ONCE = 1
"""Batches whose gradients a step adds up: few, as a few dozen problems have to give some dozens of steps."""
WAY_OUT = "begin again in another output with --dtype float32 (not from files), or with +refit"
CHUNK = 256
"""Positions whose logits exist at once: bounds the memory that large vocabularies take."""

Lesson: TypeAlias = tuple[Batch, LayerInputs]
"""A batch, and the `last_hidden` of the intact model for it: what training follows."""


def lessons(
    decoder: Decoder,
    examples: Sequence[Example],
    max_batch_tokens: int,
    state: State | None = None,
    on_progress: Progress = silent,
    hold: Hold | None = None,
) -> list[Lesson]:
    """Return what training will follow, from a model that is still intact, or from the `state` of a stopped run.

    With a `hold` for inputs of layers, each layer sees all batches before the next one runs; progress counts layers then.

    Raises:
        OptionError: the model's weights are of a type that cannot be trained.
    """
    check_dtypes(decoder)  # before anything that takes time
    steps, state = batches_of(examples, max_batch_tokens), state or State()
    known = state.values.pop("lessons", {"hidden": [], "as_tuple": False})
    after, device = len(decoder.layers), decoder.projections[-1].device
    keep, found = hold or as_they_are, list[LayerInputs]()
    for own in known["hidden"]:
        found.append(
            keep(LayerInputs({after: own.to(device, copy=True)}, known["as_tuple"]))
        )  # out of the file
    if hold is not None and len(found) < len(steps):
        found = _seen_together(decoder, steps, hold, on_progress)
        state.flush(lessons=as_kept(found, after, len(steps)))
    on_progress(len(found), len(steps))
    for batch in steps[len(found) :]:
        found.append(last_hidden(decoder, batch))
        if state.due() or len(found) == len(steps):
            state.flush(lessons=as_kept(found, after, len(steps)))
        on_progress(len(found), len(steps))
    return list(zip(steps, found, strict=True))


def batches_of(examples: Sequence[Example], max_batch_tokens: int) -> list[Batch]:
    """Return the batches that training follows."""
    return batches(examples, max_batch_tokens=min(BATCH_TOKENS, max_batch_tokens))


def as_kept(sent: Sequence[LayerInputs], after: int, batches: int) -> dict[str, Any]:
    """Return what the state of a run has of `lessons`: what the last layer sent on for batches, of so many."""
    return {"hidden": on_cpu(sent, after), "as_tuple": sent[0].as_tuple, "batches": batches}


def _seen_together(
    decoder: Decoder, steps: Sequence[Batch], hold: Hold, on_progress: Progress
) -> list[LayerInputs]:
    """Return what the last layer sends on for every batch; each layer sees all batches before the next one runs."""
    found = list(entering(decoder, steps, hold))
    for layer in decoder.layers:
        for number, batch in enumerate(steps):
            own = found[number]
            output = run_layer(decoder, batch.tokens, layer.index, own)
            found[number] = hold(LayerInputs({layer.index + 1: output}, own.as_tuple))
        on_progress(layer.index + 1, len(decoder.layers))
    return found


def epochs(tokens: int) -> int:
    """Return how often training goes through examples that have so many tokens."""
    return min(MOST, max(FEWEST, math.ceil(TOKENS / max(tokens, 1))))


def rounds(followed: Sequence[Lesson]) -> int:
    """Return how often training goes through these lessons."""
    return epochs(sum(int(batch.lengths.sum()) for batch, _ in followed))


Around: TypeAlias = Callable[[int], AbstractContextManager[Callable[[Layer], None]]]
"""What is open while a step, counted from 1, is made: gives who hears of a layer that has moved."""


@dataclass(frozen=True)
class Training:
    """How weights move: by which rule, with what randomness; and where inputs of layers are held.

    What is `around` a step keeps the weights itself; else values of these names are `outdated` once a step is kept.
    """

    rule: Rule = RULES["distill"]
    seed: int = 0
    hold: Hold = as_they_are
    around: Around | None = None
    outdated: Sequence[str] = ()


def distill(
    decoder: Decoder,
    followed: Sequence[Lesson],
    *,
    how: Training,
    on_step: Progress,
    state: State | None = None,
) -> int:
    """Train the weights of all projections that are not zero, in place, to predict every token as the intact model did.

    Minimises the mean divergence KL(intact ‖ pruned) over all positions, prompts included, `rounds` times over
    the batches that are `followed`. What is zero stays zero. Goes on from the `state` of a stopped run, step by step. Beside
    the model it holds one layer's gradients, what the rule remembers, and as many activations as fit; each epoch costs
    about three forward passes, four where activations do not fit. Returns the steps that there are in all.

    Raises:
        ModelError: a slope is not finite; later layers may have moved, what is kept of earlier steps stays.
    """
    state = state or State()
    run, around = _Run(decoder, how), how.around
    if trained := state.values.pop("trained", None):
        run.put_back(trained["weights"])
        return int(trained["steps"])
    first, last, generator = 0, rounds(followed), torch.Generator().manual_seed(how.seed)
    own: dict[str, Any] = {"steps": 0, "batches": math.ceil(len(followed) / AT_ONCE)}
    if begun := state.values.pop("training", None):
        first, last, own["steps"] = begun["epoch"], begun["epochs"], begun["steps"]
        generator.set_state(begun["generator"])
        run.put_back(begun["weights"])
        run.scales, run.known = begun["scales"], begun["known"]
    each: int = own["batches"]
    total = last * each
    on_step(first * each + own["steps"], total)
    with differentiable(decoder, run.parameters):
        for epoch in range(first, last):
            own |= {"epoch": epoch, "epochs": last, "scales": run.scales, "generator": generator.get_state()}
            order = torch.randperm(len(followed), generator=generator).tolist()
            while own["steps"] < each:
                done, at = epoch * each + own["steps"], own["steps"] * AT_ONCE
                now = [followed[number] for number in order[at : at + AT_ONCE]]
                with (around or _nothing)(done + 1) as moved:
                    run.step(now, done + 1, RATE * _rate(done / total, total), moved)
                own["steps"] += 1
                if around is not None or state.due():
                    weights = run.weights() if around is None else None
                    state.flush(training={**own, "weights": weights, "known": run.known})
                    state.drop(how.outdated)
                on_step(done + 1, total)
            own["steps"] = 0
    state.flush(trained={"weights": run.weights() if around is None else None, "steps": total})
    state.drop([*how.outdated, "training"])
    return total


@contextmanager
def _nothing(number: int) -> Iterator[Callable[[Layer], None]]:
    """Open nothing (an `Around`): the model is in memory."""
    yield _unheard


def _unheard(layer: Layer) -> None:
    """Let a layer move without a word."""


@dataclass(eq=False)
class _Run:
    """The weights that move, and what is remembered of the steps before."""

    decoder: Decoder
    how: Training
    scales: dict[str, float] = field(default_factory=dict)
    known: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What the rule remembers of every matrix."""

    def __post_init__(self) -> None:
        pool = self.decoder.projections
        self.parameters = list(dict.fromkeys(p.parameter for p in pool))
        self.first: dict[nn.Parameter, int] = {}
        """The first layer that uses a parameter: where it moves, as gradients of later uses are there by then."""
        for p in reversed(pool):
            self.first[p.parameter] = min(p.layer, self.first.get(p.parameter, p.layer))

    def weights(self) -> list[Tensor]:
        return [parameter.data for parameter in self.parameters]

    def put_back(self, weights: Sequence[Tensor] | None) -> None:
        for parameter, own in zip(self.parameters, weights or self.weights(), strict=True):
            parameter.data.copy_(own)

    def step(
        self, lessons: Sequence[Lesson], number: int, rate: float, moved: Callable[[Layer], None]
    ) -> None:
        """Move all weights by the gradients of some batches together; `number` counts from 1."""
        waiting: dict[nn.Parameter, Tensor] = {}
        pieces = Pieces(self.decoder, [batch for batch, _ in lessons], hold=self.how.hold)
        count = sum(len(targets(replace(batch, is_target=batch.real)).tokens) for batch, _ in lessons)
        slopes: Slopes = [
            _last_slope(self.decoder, lesson, last, count)
            for lesson, last in zip(lessons, pieces.last, strict=True)
        ]
        for layer in reversed(self.decoder.layers):
            own = [parameter for parameter in layer.module.parameters() if parameter in self.first]
            if not all(bool(slope.isfinite().all()) for slope in slopes):
                raise ModelError(
                    f"training step {number}: slopes at the output of {layer.name} are not finite: {WAY_OUT}"
                )
            slopes, gradients = pieces.back(layer.index, own, slopes)
            for parameter, gradient in zip(own, gradients, strict=True):
                if gradient is not None:  # None: an expert that no token reached
                    waiting[parameter] = waiting.pop(parameter, 0) + gradient
            del gradients
            due = {parameter for parameter in own if self.first[parameter] == layer.index}
            for p in layer.projections:
                if p.parameter in due & waiting.keys():
                    self._move(p, waiting[p.parameter], number, rate)
            for parameter in due:
                waiting.pop(parameter, None)
            moved(layer)

    def _move(self, p: Projection, gradient: Tensor, number: int, rate: float) -> None:
        weight = p.read()
        keep = torch.ne(weight, 0, out=torch.empty_like(weight, dtype=torch.float32))
        slope = replace(p, parameter=nn.Parameter(gradient, requires_grad=False)).read().float().mul_(keep)
        if p.expert is not None and not bool(slope.any()):  # no token reached it
            return
        if p.name not in self.scales:
            self.scales[p.name] = _root_mean_square(weight, keep)
        known = {name: own.to(p.device) for name, own in self.known.get(p.name, {}).items()}
        move = self.how.rule(known, slope, keep, number)
        if not bool(move.sum().isfinite()):  # a sum hides no number that is none
            raise ModelError(f"training step {number}: slopes at {p.name} are not finite: {WAY_OUT}")
        self.known[p.name] = known
        draw = zlib.crc32(repr((self.how.seed, number, p.name)).encode())
        moved = torch.add(weight, move, alpha=-rate * self.scales[p.name], out=move)
        p.write(stored(moved, keep, weight.dtype, draw))


def check_dtypes(decoder: Decoder) -> None:
    """Raise `OptionError` where weights are of a type too narrow for gradients."""
    for p in decoder.projections:
        check_dtype(p.parameter_name, p.parameter.dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise `OptionError` where what has this name is of a type too narrow for gradients."""
    if dtype == torch.float16:
        raise OptionError(
            f"{name} is float16, in which gradients of training become zero: load it in memory with --dtype bfloat16 or "
            "float32, or choose another update, such as refit"
        )


def _root_mean_square(weight: Tensor, keep: Float[Tensor, "out in"]) -> float:
    return math.sqrt(float(weight.float().square().sum()) / max(float(keep.count_nonzero()), 1.0))


def _rate(part: float, total: int) -> float:
    """Return the share of the largest rate when a part of the steps is done."""
    return min(1.0, (part + 1 / total) / WARM_UP) * (1 + math.cos(math.pi * part)) / 2


def _last_slope(
    decoder: Decoder, lesson: Lesson, last: LayerInputs, count: int
) -> Float[Tensor, "*stream batch time model"]:
    """Return the slope of the divergence summed over all positions of a batch, over `count`, at the last layer's output.

    Some positions at a time.
    """
    (batch, intact), after = lesson, len(decoder.layers)
    wanted = targets(replace(batch, is_target=batch.real))
    leaf = last.hidden[after].detach().requires_grad_()
    (sent,) = intact.hidden.values()  # by a model that may have had more layers, and more devices
    intact = LayerInputs({after: sent.to(leaf.device)}, intact.as_tuple)
    for part, _ in parts_of(wanted, CHUNK):
        with torch.no_grad(), entered_at(decoder, after, intact):
            teacher = target_logits(decoder, batch, part)
        with torch.enable_grad(), entered_at(decoder, after, LayerInputs({after: leaf}, intact.as_tuple)):
            logits = target_logits(decoder, batch, part)
        logits.backward(divergence_slope(teacher, logits.detach(), 1 / count), inputs=[leaf])
    assert leaf.grad is not None
    return leaf.grad
