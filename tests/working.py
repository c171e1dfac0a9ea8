"""What counts as working for a type of model: closing units, gradients, pruning, saving, streaming, shrinking, generating.

Each check returns a number that is to be small, or raises `AssertionError` with what is wrong.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.checkpoints.saving import save
from causalprune.core.anatomy import Layer, Mixer, Projection
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Calibration, Decoder, Effects, Example, Unit
from causalprune.interventions.ablation import gated
from causalprune.interventions.gradients import expansion
from causalprune.interventions.losses import target_nats
from causalprune.interventions.units import NAMES, closing, list_units, sites
from causalprune.models.anatomy import inspect_model
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.shrinking.removal import Shares, Shrinking, shrink
from causalprune.streaming.files import Seen, check_streams, prune_stream

SMALL = 1e-4
SHARED: set[str] = set()
"""Keys and values that layers hand on to others, of the model at hand."""
GROUP = 8
"""Neurons in a unit."""
METHODS = (
    Method("magnitude", 0.5),
    Method("wanda", 0.5),
    Method("sparsegpt", 0.5),
    Method("wanda", 0.5, "2:4"),
    Method("cap", 0.5),
    Method("causal", 0.5, update="obs", budgets="uniform"),
)


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


def closing_is_zeroing(decoder: Decoder) -> float:
    """(a) A closed unit, and rows and columns that it owns set to zero by hand, give the same logits; the largest difference."""
    every, worst = sites(decoder), 0.0
    intact, moved = logits(decoder.model), dict[str, float]()
    for unit, parts in some_units(decoder, 12):
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


def pruned(make: Callable[[], Decoder], method: Method, effects: Effects | None) -> Decoder:
    """(c) Prune a fresh model, and check that the sparsity is the one asked for, and that only prunable tensors differ."""
    decoder = make()
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    result = prune(
        decoder, method, calibration=examples(), effects=effects if "effects" in method.needs else None
    )
    count, zeros = 0, 0
    for p in decoder.projections:
        keep = result.keep[p.name]
        count, zeros = count + keep.numel(), zeros + int((~keep).sum())
        assert not bool(p.read()[~keep].any()), p.name
    slack = len(decoder.projections) + sum(p.shape[0] for p in decoder.projections) * (
        method.criterion == "wanda"
    )
    assert abs(zeros - method.sparsity * count) <= slack / 2, f"{method}: {zeros} of {count}"
    prunable = {p.parameter_name for p in decoder.projections}
    tied = getattr(decoder.model, "all_tied_weights_keys", None) or {}
    for name, p in decoder.model.named_parameters():
        if name not in prunable and tied.get(name) not in prunable:
            assert torch.equal(p, before[name]), f"{name} changed"
    return decoder


def pruning_is_exact(make: Callable[[], Decoder], methods: Sequence[Method] = METHODS) -> float:
    """(c) for every method."""
    effects = effects_of(make(), examples()) if any(layer.mixers for layer in make().layers) else None
    for method in methods:
        if method.criterion == "cap" and effects is None:
            continue
        if method.scope == "2:4" and any(p.shape[1] % 4 for p in make().projections):
            continue
        pruned(make, method, effects)
    return 0.0


def reloads(model: Any, auto: Any, folder: Path) -> float:
    """(d) A pruned folder loads with stock transformers to the same logits."""
    model.save_pretrained(folder / "source")
    decoder = load(str(folder / "source"))
    result = prune(decoder, Method("wanda", 0.5), calibration=examples())
    save(decoder, folder / "out", result)
    again = auto.from_pretrained(folder / "out", dtype=torch.float32).eval()
    error = apart(logits(again), logits(decoder.model))
    assert error <= 1e-6, f"the saved model differs by {error:.1e}"
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in decoder.model.named_parameters()}
    return error


def streams(folder: Path, methods: Sequence[Method] = METHODS) -> float:
    """(e) Streamed and in memory are the same bytes, for every method that streams."""
    data = examples()
    for method in methods:
        if method.criterion == "cap":
            continue
        try:
            check_streams(method)
        except OptionError:
            continue
        decoder = load(str(folder / "source"))
        if method.scope == "2:4" and any(p.shape[1] % 4 for p in decoder.projections):
            continue
        name = f"{method.criterion}-{method.scope}".replace(":", "")
        save(decoder, folder / f"m-{name}", prune(decoder, method, calibration=data))
        prune_stream(folder / "source", folder / f"s-{name}", method, seen=Seen(data))
        own, other = _files(folder / f"m-{name}"), _files(folder / f"s-{name}")
        differ = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
        assert not differ, f"{method.criterion}: {differ}"
    return 0.0


def _files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    found.pop("README.md", None)
    manifest = json.loads(found["causalprune.json"])
    manifest.pop("created")
    manifest["run"] = {k: v for k, v in manifest["run"].items() if k not in ("streamed", "size")}
    return found | {"causalprune.json": manifest}


def shrinks(make: Callable[[], Decoder], auto: Any, folder: Path) -> dict[str, str]:
    """(f) A standard configuration that loads with stock transformers, or why there is none, by kind of unit."""
    found = {}
    for kind, shares in {
        "neurons": Shares(neurons=0.5),
        "kv_groups": Shares(kv_groups=0.5),
        "layers": Shares(layers=0.4),
    }.items():
        try:
            result = shrink(make(), shares, examples(), Shrinking(by="magnitude", update="none"))
        except (ModelError, OptionError) as error:
            found[kind] = str(error)
            continue
        kept = getattr(result.kept, kind)
        if kind != "layers":
            base, place = make(), "heads" if kind == "kv_groups" else "mlp"
            gates = {}
            for site, n in sites(base).items():
                if site.place == place and site.layer in kept:
                    own = torch.zeros(n)
                    own[
                        (
                            kept[site.layer][:, None] * (n // _count(base, site.layer, kind))
                            + torch.arange(n // _count(base, site.layer, kind))
                        ).flatten()
                    ] = 1
                    gates[site] = own.expand(len(TOKENS), -1)
            with gated(base, gates):
                closed = logits(base.model)
            error = apart(logits(result.decoder.model), closed)
            assert error <= SMALL, f"shrunk {kind} is another model than one with closed units: {error:.1e}"
        save(result.decoder, folder / kind, result)
        again = auto.from_pretrained(folder / kind, dtype=torch.float32).eval()
        error = apart(logits(again), logits(result.decoder.model))
        assert error <= 1e-6, f"shrunk {kind}: {error:.1e}"
        found[kind] = "standard"
    return found


def _count(decoder: Decoder, layer: int, kind: str) -> int:
    own = decoder.layers[layer]
    return (
        own.attention.n_kv_heads
        if kind == "kv_groups"
        else next(p.shape[1] for p in own.projections if p.name == f"layers.{layer}.down")
    )


def generates(decoder: Decoder) -> float:
    """(g) Token by token, a cache changes nothing."""
    prompt, found = TOKENS[:1, :7], []
    for cached in (True, False):
        with torch.no_grad():
            out = decoder.model.generate(
                input_ids=prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0, attention_mask=torch.ones_like(prompt),
            )  # fmt: skip
        found.append(torch.stack(out.logits).double())
    error = apart(*found)
    assert error <= 1e-3, f"generation with a cache differs by {error:.1e}"
    return error


def kernels_agree(make: Callable[..., Decoder]) -> float:
    """Effects with eager attention and with sdpa agree; the largest difference in nats per token."""
    data = examples(2)
    try:
        found = [effects_of(make(attn_implementation=name), data).delta_nats() for name in ("eager", "sdpa")]
    except ValueError as error:
        if "does not support" in str(error):
            return 0.0
        raise
    error = float((found[0] - found[1]).abs().max())
    assert error <= SMALL, f"eager and sdpa differ by {error:.1e}"
    return error


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
