"""What counts as working for a type of model: closing units, gradients, pruning, saving, streaming, shrinking, generating.

Each check returns a number that is to be small, or raises `AssertionError` with what is wrong.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.anatomy import Layer, Mixer, Projection
from causalprune.core.errors import OptionError
from causalprune.core.types import Calibration, Decoder, Effects, Example, Unit
from causalprune.interventions.ablation import gated
from causalprune.interventions.gradients import expansion
from causalprune.interventions.losses import target_nats
from causalprune.interventions.units import NAMES, closing, list_units, sites
from causalprune.models.anatomy import inspect_model

SMALL = 1e-4
SHARED: set[str] = set()
"""Keys and values that layers hand on to others, of the model at hand."""
GROUP = 8
"""Neurons in a unit."""


def examples(n: int = 3, length: int = 13) -> Calibration:
    """Return random token sequences of several lengths."""
    rows = [
        torch.randint(3, 80, (length - i % 2,), generator=torch.Generator().manual_seed(i)).tolist()
        for i in range(n)
    ]
    return Calibration(
        tuple(Example(tuple(row), 5, "random", str(i)) for i, row in enumerate(rows)), (0,) * n
    )


TOKENS = torch.randint(3, 80, (2, 13), generator=torch.Generator().manual_seed(9))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found.double()


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference as a share of the range."""
    return float((one - other).abs().max() / (other.max() - other.min()))


def kinds(decoder: Decoder) -> list[str]:
    """Return the names of the kinds of units that a model has."""
    found = []
    for name in NAMES:
        try:
            list_units(decoder, [f"neurons:{GROUP}" if name == "neurons" else name])
        except OptionError:
            continue
        found.append(f"neurons:{GROUP}" if name == "neurons" else name)
    return found


def closing_is_zeroing(decoder: Decoder, most: int = 12) -> float:
    """(a) A closed unit, and rows and columns that it owns set to zero by hand, give the same logits; the largest difference."""
    every, worst = sites(decoder), 0.0
    intact, moved = logits(decoder.model), dict[str, float]()
    for unit, parts in some_units(decoder, most):
        gates = {s: g.expand(len(TOKENS), -1) for s, g in closing([parts], every).items()}
        with gated(decoder, gates):
            closed = logits(decoder.model)
        with owned_zero(decoder, unit):
            zeroed = logits(decoder.model)
        assert bool(closed.isfinite().all()), unit
        worst = max(worst, apart(closed, zeroed))
        assert worst <= SMALL, f"{unit}: {apart(closed, zeroed):.1e}"
        moved[unit.kind] = max(moved.get(unit.kind, 0.0), apart(closed, intact))
    assert min(moved.values()) > SMALL, f"nothing happens: {moved}"
    return worst


def some_units(decoder: Decoder, most: int) -> list[tuple[Unit, Any]]:
    """Return units of every kind with their parts, at most so many of a kind, from the first layer to the last."""
    found = []
    for name in kinds(decoder):
        own = [*list_units(decoder, [name]).items()]
        found += own[:: -(-len(own) // most)]
    return found


@contextmanager
def owned_zero(decoder: Decoder, unit: Unit) -> Iterator[None]:
    """Set the rows and columns that a unit owns to zero for a while."""
    before, stack = [(p, p.read().clone()) for p in decoder.layers[unit.layer].projections], ExitStack()
    try:
        for p, weight in before:
            owned, bias = _owned(decoder, unit, p), getattr(p.module, "down_proj_bias", None)
            if owned is not None and bias is not None and p.role == "down":
                stack.callback(bias[p.expert].copy_, bias[p.expert].clone())
                bias[p.expert] = 0
            if owned is not None:
                changed = weight.clone()
                changed[owned] = 0
                p.write(changed)
        yield
    finally:
        stack.close()
        for p, weight in before:
            p.write(weight)


def _owned(decoder: Decoder, unit: Unit, p: Projection) -> Any:
    """Return which entries of a matrix a unit owns, written down a second time; None for none."""
    everything, mlp, other = (slice(None), slice(None)), p.role in ("gate", "up", "down"), ".mixer." in p.name
    whole = {
        "layer": True,
        "mlp": mlp,
        "attention": not mlp and not other,
        "expert": f".experts.{unit.index}." in p.name,
    }
    if unit.kind in whole:
        return everything if whole[unit.kind] and (p.role in ("o", "down") or not elsewhere(p)) else None
    size = GROUP if unit.kind == "neurons" else _share(decoder.layers[unit.layer], unit, p)
    if not size or (
        unit.kind == "neurons" and (not mlp or p.name.count(".") != 2 or mlp_coupled(decoder, p))
    ):
        return None
    own = slice(unit.index * size, (unit.index + 1) * size)
    return (slice(None), own) if p.role in ("o", "down") else (own, slice(None))


def _share(layer: Layer, unit: Unit, p: Projection) -> int:
    """Return how many rows (columns of `o`) of a matrix a unit of a mixer owns, 0 where it shares them."""
    other, mixer = ".mixer." in p.name, layer.mixer("mixers" if unit.kind == "mixer" else "heads")
    if p.role in ("gate", "up", "down") or not p.blocks or mixer is None or other != (unit.kind == "mixer"):
        return 0
    units = mixer.n_kv_heads if unit.kind == "kv_group" else mixer.n_heads
    if p.blocks % units or (p.role != "o" and coupled(mixer, p)):
        return 0
    return p.shape[p.role == "o"] // units


def mlp_coupled(decoder: Decoder, p: Projection) -> bool:
    """Tell whether rows of an MLP have a say in what others send: a norm over all, or a cut by their spread."""
    if p.role == "down":
        return False
    layer = decoder.layers[p.layer]
    module = layer.module.get_submodule(p.parameter_name.removeprefix(f"{layer.name}.").split(".")[0])
    normed = any("norm" in name for name, _ in module.named_parameters())
    return normed or bool(getattr(module, "activation_sparsity", 0))


def coupled(mixer: Mixer, p: Projection) -> bool:
    """Tell whether a norm goes over the rows of several heads, or keys and values go to other layers too."""
    own = mixer.module
    if hasattr(own, "groupnorm") or (
        p.role == "v" and hasattr(own, "x_proj" if mixer.place == "mixers" else "dt_proj")
    ):
        return True
    norms = [(n, w) for n, w in mixer.module.named_parameters() if "norm" in n and n.endswith("weight")]
    own_norms = [
        w for n, w in norms if "_a_" not in n and "indexer" not in n
    ]  # not of latents that all heads share
    per_unit = p.shape[0] // p.blocks
    return any(w.numel() > max(per_unit, mixer.head_dim, 1) for w in own_norms) or elsewhere(p)


def elsewhere(p: Projection) -> bool:
    """Tell whether what a matrix computes goes to other layers too."""
    return p.role in ("k", "v") and p.parameter_name in SHARED


def rows_reach_their_units(decoder: Decoder) -> float:
    """Rows that a unit owns change what it sends, and nothing of what others of its mixer send; returns how many were tried."""
    tried = 0
    for layer in decoder.layers:
        for mixer in layer.mixers:
            prefix = f"layers.{layer.index}.{'' if mixer.place == 'heads' else 'mixer.'}"
            own = [
                p for p in layer.projections if p.name == prefix + p.role and p.blocks > 1 and p.role != "o"
            ]
            intact = _sent(decoder, mixer)
            for p in own:
                if p.role in ("gate", "up", "down") or coupled(mixer, p):
                    continue
                for block in {0, p.blocks - 1}:
                    before, size = p.read().clone(), p.shape[0] // p.blocks
                    after = before.clone()
                    after[block * size : (block + 1) * size] *= -1.5
                    p.write(after)
                    moved = (_sent(decoder, mixer) - intact).abs().amax((0, 2)) > 1e-6
                    p.write(before)
                    each = mixer.n_heads // p.blocks
                    owners = set(range(block * each, (block + 1) * each))
                    assert set(moved.nonzero().flatten().tolist()) == owners, (
                        f"{p.name}, block {block}: {moved.tolist()}"
                    )
                    tried += 1
    return float(tried)


def _sent(decoder: Decoder, mixer: Mixer) -> Tensor:
    """Return what a mixer sends to its output projection, `[token head width]`."""
    seen: list[Tensor] = []
    handle = mixer.output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(decoder.model)
    handle.remove()
    return seen[0].reshape(-1, mixer.n_heads, mixer.head_dim)


def gradient_is_slope(decoder: Decoder) -> float:
    """(b) The gradient at open gates is the finite difference of the loss; the largest difference in nats."""
    every, units = sites(decoder), some_units(decoder, 2)
    (batch, *_) = batches(examples(2).examples, max_batch_tokens=64)
    _, first, _ = expansion(
        decoder, batch, [parts for _, parts in units], torch.zeros(0, int(batch.is_target[:, 1:].sum()))
    )
    worst, count = 0.0, len(batch.tokens)

    def loss(parts: Any, gate: float) -> Tensor:
        gates = {s: torch.ones(count, every[s]).index_fill(1, at, gate) for s, at in parts.items()}
        with gated(decoder, gates):
            return target_nats(decoder, batch).double()

    for (unit, parts), slope in zip(units, first, strict=True):
        here, errors = loss(parts, 1), list[Tensor]()
        for step in (
            3e-3,
            1e-2,
            1e-3,
        ):  # until the loss is near enough to a line, and tokens keep their experts on one side
            ahead, behind = (loss(parts, 1 + own) for own in (step, -step))
            for finite in ((behind - ahead) / (2 * step), (here - ahead) / step, (behind - here) / step):
                errors.append((finite - slope.double()).abs() / (1 + finite.abs()))
            if float(torch.stack(errors).amin(0).max()) <= 1e-2:
                break
        worst = max(worst, float(torch.stack(errors).amin(0).max()))
        assert worst <= 1e-2, f"{unit}: the gradient is {slope.tolist()}, off by {worst:.1e}"
    return worst


def effects_of(decoder: Decoder, data: Calibration) -> Effects:
    """Return the effects of all heads of all mixers."""
    names = tuple(dict.fromkeys(mixer.place for layer in decoder.layers for mixer in layer.mixers))
    return attribute(decoder, data, Question(names), Estimator(max_batch_tokens=64))


def exact_is_naive(decoder: Decoder) -> float:
    """The effects that are measured from inputs in a cache are those of whole passes; the largest difference in nats."""
    data, names = examples(2), kinds(decoder)
    found = attribute(decoder, data, Question(tuple(names)), Estimator(max_batch_tokens=64))
    worst = 0.0
    wanted = {unit for unit, _ in some_units(decoder, 12)}
    for i, unit in enumerate(found.units):
        if unit not in wanted or found.masked_nats[i].isnan().any():
            continue
        with owned_zero(decoder, unit):
            own = torch.cat(
                [target_nats(decoder, batch) for batch in batches(data.examples, max_batch_tokens=1)]
            )
        worst = max(worst, float((found.masked_nats[i] - own).abs().max()))
        assert worst <= 1e-3, f"{unit}: {found.masked_nats[i].tolist()} instead of {own.tolist()}"
    return worst


def inspected(model: Any) -> Decoder:
    """Return what the library makes of a model."""
    decoder = inspect_model(model, None, name="tiny")
    SHARED.clear()
    for layer in decoder.layers:
        if any(getattr(mixer.module, "store_full_length_kv", False) for mixer in layer.mixers):
            SHARED.update(p.parameter_name for p in layer.projections)
    return decoder


def fresh(model: Any) -> Callable[[], Decoder]:
    """Return a maker of copies of a model."""
    return lambda: inspected(copy.deepcopy(model))
