"""Layer-wise relevance as gradient times input, with another backward pass (AttnLRP, arXiv 2402.05602).

| part | what goes back |
|---|---|
| norm | its divisor is a constant (Prop. 3.4) |
| element-wise non-linearity, soft caps and sigmoids of gates among them | output / input in place of the derivative (Eq. 9) |
| product of two activations | half to each (Eq. 7, Prop. 3.2, 3.3): half before a gated MLP's down projection, a quarter at the outputs of q and k, half at v, half at both factors of a gate or of an expert's weight in the mixture |
| softmax, linear maps | the gradient (Prop. 3.1, Eq. 8) |
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from causalprune.core import Batch, Decoder, Layer, Mixer, ModelError, Projection
from causalprune.interventions.ablation import gated, recomputed
from causalprune.interventions.gradients import by_unit, gates_at
from causalprune.interventions.losses import (
    Targets,
    by_row,
    lost,
    other_targets,
    target_logits,
    targets,
)
from causalprune.interventions.units import Parts, Site

SQUASHING = (torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid, functional.tanh, functional.sigmoid)
"""Element-wise functions that models call outside of modules: soft caps, and gates of attention and experts."""
LINEAR = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity)
LINEAR_NAMES = re.compile(r"^Conv1D$|Rotary|Router$")
UNRULED = re.compile(r"Mamba|DeltaNet|Lightning|Recurrent|ShortConv|LinearAttention|Rwkv")
UNRULED_NAMES = ("per_layer_input_gate", "altup")
"""Modules of Gemma 3n and 4 whose outputs are multiplied with what no rule halves."""
FITS = 0.02
"""How far a norm may be from the linear map that its rule supposes, as a share of its largest output: bfloat16 rounds."""


def relevance(
    decoder: Decoder,
    batch: Batch,
    units: Sequence[Parts],
    *,
    instead: Mapping[Site, Tensor] | None = None,
    gate: float | Mapping[Site, Tensor] = 1.0,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "unit batch"]]:
    """Return the loss in nats, and the relevance of every unit for the target tokens' logits less the mean logit.

    Relevance is in logits, summed over the targets of a sequence. One forward and one backward pass; `gate`, `instead` and
    the batch's `others` as in `gradients.expansion`: what a unit is relevant for is its difference to what takes its place.
    """
    gates, wanted, others = gates_at(decoder, batch, units, gate), targets(batch), other_targets(batch)
    with torch.enable_grad(), ruled(decoder), gated(decoder, gates, instead), recomputed(decoder):
        logits = target_logits(decoder, batch, wanted)
        seen = prominence(logits, wanted)
        if others is not None:
            seen = seen - prominence(logits, others)
        loss = by_row(lost(logits.detach(), wanted, others), wanted)
        found = by_unit(by_row(seen, wanted), gates, units, keep=False)
    return loss.cpu(), found


def prominence(logits: Float[Tensor, "target vocab"], wanted: Targets) -> Float[Tensor, "target"]:
    """Return the logit of each target token less the mean over the vocabulary: what relevance starts from."""
    own = logits.gather(-1, wanted.tokens.to(logits.device)[:, None])[:, 0]
    return own.float() - logits.float().mean(-1)


@contextmanager
def ruled(decoder: Decoder) -> Iterator[None]:
    """Let backward passes in the block distribute relevance; values of forward passes are the same bits.

    Raises:
        ModelError: a module has no rule; it is named.
    """
    products = [own for layer in decoder.layers for own in _products(layer)]  # names mixers that have no rule
    with ExitStack() as stack:
        for name, module in decoder.model.named_modules():
            hook = _rule_of(name, module)
            if hook is not None:
                stack.callback(module.register_forward_hook(hook).remove)
        for module, rule in products:
            stack.callback(rule(module).remove)
        stack.enter_context(_Squashed())
        yield


def carried(value: Tensor, linear: Tensor) -> Tensor:
    """Return a value whose gradient is that of another."""
    return value.detach() + (linear - linear.detach())


def _shared(x: Tensor, share: float | Tensor) -> Tensor:
    """Return the same values, of whose gradient a share goes back."""
    return carried(x, x * share) if x.requires_grad else x


def _element_wise(value: Tensor, x: Tensor) -> Tensor:
    """Return the value of a non-linearity, through which output / input goes back."""
    ratio = torch.where(x == 0, torch.zeros_like(x), value / x).detach()
    return carried(value, x * ratio)


class _Squashed(TorchFunctionMode):
    """Applies the rule of non-linearities to functions that are no modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SQUASHING and args and args[0].requires_grad:
            return _element_wise(output, args[0])
        return output


def check_ruled(decoder: Decoder) -> None:
    """Raise `ModelError` for a model with a module that has no rule; it is named."""
    with ruled(decoder):
        pass


def _rule_of(name: str, module: nn.Module) -> Any:
    """Return the hook of a module of its kind, None where gradients go back as they are."""
    kind = type(module).__name__
    if UNRULED.search(kind) or name.endswith(UNRULED_NAMES):
        raise _no_rule(name, module)
    if any(True for _ in module.children()):
        return None
    if "norm" in kind.lower():
        return _norm_hook(name)
    own = any(True for _ in module.parameters())
    home = type(module).__module__
    if not own and (home == nn.ReLU.__module__ or home.startswith("transformers.activations")):
        return _activation_hook
    if isinstance(module, LINEAR) or LINEAR_NAMES.search(kind):
        return None
    raise _no_rule(name, module)


def _no_rule(name: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"{name or 'the model'} is a {type(module).__name__}, for which relevance has no rule: take the estimator gradient, or to "
        "prune the method snip"
    )


def _activation_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _element_wise(output, args[0]) if output.requires_grad else output


def _norm_hook(name: str) -> Any:
    known: dict[str, tuple[Tensor, Tensor, bool]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        if len(args) != 1:
            raise _no_rule(name, module)
        x, first = args[0], not known
        if first:
            known["own"] = _probed(module, x)
        scale, bias, centred = known["own"]
        linear = scale * (x - x.mean(-1, keepdim=True) if centred else x)
        own, rest = linear.detach().float(), (output.detach() - bias).float()
        divisor = (own * rest).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-30)
        if first and bool(((own * divisor - rest).abs().amax() > FITS * rest.abs().amax()).any()):
            raise _no_rule(name, module)
        return carried(output, linear * divisor.to(linear.dtype))

    return hook


def _probed(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the weight of a norm up to a factor, its bias, and whether it takes the mean away: from what it makes of three inputs."""
    width = x.shape[-1]
    probe = x.new_ones(width)
    probe[1::2] = -1
    if width % 2:  # the mean is to be 0
        probe[-2:] = x.new_tensor([1.0, -2.0])
    with torch.no_grad():
        up, down, flat = (module.forward(own) for own in (probe, -probe, torch.ones_like(probe)))
    bias, scale = (up + down) / 2, (up - down) / 2 / probe
    flatness = (flat - bias).abs().amax()
    return scale, bias, bool(flatness < 1e-3 * scale.abs().amax())


def _products(layer: Layer) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the modules of a layer before or after which a product of two activations is, with what hooks its shares."""
    for mixer in layer.mixers:
        if mixer.place != "heads" or any(p.role in ("q_a", "kv_a") for p in layer.projections):
            inside = (name for name, own in layer.module.named_modules() if own is mixer.module)
            raise _no_rule(".".join([layer.name, *inside]), mixer.module)
        yield from _of_attention(layer, mixer)
    parts: dict[str, dict[str, Projection]] = {}
    for p in layer.projections:
        parts.setdefault(p.name.rpartition(".")[0], {})[p.role] = p
    for own in parts.values():
        down = own.get("down")
        if down is not None and "gate" in own and down.module is not layer.experts:
            yield down.module, _before(0.5)
    if layer.experts is not None:
        default = getattr(type(layer.experts), "_apply_gate", None)
        if isinstance(layer.experts, nn.ModuleList) or getattr(default, "__name__", "") not in KNOWN_GATES:
            raise _no_rule(f"{layer.name}, {type(layer.experts).__name__}", layer.experts)
        gate = any(p.role == "gate" and p.module is layer.experts for p in layer.projections)
        yield layer.experts, _before_experts(0.25 if gate else 0.5)
    for name, module in layer.module.named_modules():
        if name.endswith("shared_expert_gate"):
            yield module, _after(0.5)
            yield next(p.module for p in layer.projections if p.name.endswith("shared.down")), _after(0.5)


KNOWN_GATES = ("_default_apply_gate",)
"""How transformers joins the two halves of what experts make of their inputs; a model's own way has no rule."""


def _of_attention(layer: Layer, attention: Mixer) -> Iterator[tuple[nn.Module, Any]]:
    """Yield what makes q, k and v, and what makes gates of the heads' outputs."""
    rows = dict[nn.Module, dict[str, Projection]]()
    config = getattr(attention.module, "config", None)
    if getattr(attention.module, "attn_logit_softcapping", None) and (
        getattr(config, "_attn_implementation", "eager") != "eager"
    ):
        raise ModelError(
            f"{layer.name} caps its attention in a kernel, where relevance cannot follow: pass --attention eager"
        )
    for p in layer.projections:
        if p.role in ("q", "k", "v"):
            rows.setdefault(p.module, {})[p.role] = p
    gates = [m for name, m in attention.module.named_children() if re.search(r"gate|^g_proj", name)]
    shares: dict[nn.Module, Tensor] = {}
    for module, own in rows.items():
        one: Any = next(iter(own.values()))
        share = torch.full((one.parameter.shape[-1 if one.transposed else -2],), torch.nan)
        for role, p in own.items():
            share[slice(None) if p.rows is None else p.rows] = 0.5 if role == "v" else 0.25
        shares[module] = share
    gated_rows = any(bool(share.isnan().any()) for share in shares.values())  # rows of no role make a gate
    for module, share in shares.items():
        yield module, _after(torch.where(share.isnan(), 1.0, share) * (0.5 if gates or gated_rows else 1.0))
    for module in gates:
        yield module, _after(0.5)


def _before(share: float) -> Any:
    """Return what hooks a module so that a share of the gradient leaves its input."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _shared(args[0], share), *args[1:]

    return lambda module: module.register_forward_pre_hook(hook)


def _before_experts(share: float) -> Any:
    """Return what hooks experts: half to the weights of the mixture, a share to the hidden states."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, chosen, weights = args
        return _shared(hidden, share), chosen, _shared(weights, 0.5)

    return lambda module: module.register_forward_pre_hook(hook)


def _after(share: float | Tensor) -> Any:
    """Return what hooks a module so that a share of the gradient at its output goes back, of each row its own."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _shared(output, share.to(output) if isinstance(share, Tensor) else share)

    return lambda module: module.register_forward_hook(hook)
