"""Relevance is what the published rules say, worked out here without gradients, and leaves nothing behind in a model."""

import math
from dataclasses import replace
from typing import Any

import micro
import pytest
import torch
from families import FAMILIES, SMALL, tiny
from reference import calibration, example, fresh, shared, with_expert_modules
from test_ablation import state
from torch import Tensor, nn
from transformers import Mamba2Config

from causalprune.attribution.estimators import attribute, balanced
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Calibration, Decoder, Example
from causalprune.interventions.losses import target_logits, targets
from causalprune.interventions.lrp import relevance, ruled
from causalprune.interventions.units import list_units
from causalprune.models.anatomy import inspect_model

EXAMPLES = calibration(((12, 5), (9, 3), (11, 2)))
Weights = dict[str, Tensor]


def two_layers() -> Decoder:
    """Return the hand-made model with random weights: quarters give sums of zero, which no rule can share out."""
    decoder = micro.decoder()
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6 + (parameter.ndim == 1)
    return decoder


def linear(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """Share relevance out by contributions `x_i w_ji` (the 0-rule), position by position."""
    z = x @ w.T
    return x * ((r / z) @ w)


def turned(x: Tensor, back: bool = False) -> Tensor:
    """Turn heads of width 2 by their position."""
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * (-1 if back else 1)
    a, b = x[..., 0], x[..., 1]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Layer:
    """One layer forward, and relevance back through it rule by rule."""

    def __init__(self, w: Weights, layer: int, x: Tensor) -> None:
        own = {name.split(f"layers.{layer}.")[-1].removesuffix(".weight"): value for name, value in w.items()}
        self.own, self.x, time = own, x, len(x)
        self.n1 = normed(x, own["input_layernorm"])
        self.q, self.k, self.v = (
            (self.n1 @ own[f"self_attn.{n}_proj"].T).view(time, -1, micro.WIDTH) for n in "qkv"
        )
        group = torch.arange(micro.N_HEADS) // (micro.N_HEADS // micro.N_KV_HEADS)
        self.group, self.rq, self.rk = group, turned(self.q), turned(self.k)[:, group]
        self.scores = torch.einsum("thd,shd->hts", self.rq, self.rk) / math.sqrt(micro.WIDTH)
        masked = self.scores.masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -math.inf)
        self.shares = masked.softmax(-1)
        self.heads = torch.einsum("hts,shd->thd", self.shares, self.v[:, group])
        self.y = self.heads.flatten(1) @ own["self_attn.o_proj"].T
        self.mid = x + self.y
        self.n2 = normed(self.mid, own["post_attention_layernorm"])
        self.gate, self.up = (self.n2 @ own[f"mlp.{n}_proj"].T for n in ("gate", "up"))
        self.inner = self.gate * self.gate.sigmoid() * self.up
        self.z = self.inner @ own["mlp.down_proj"].T
        self.out = self.mid + self.z

    def back(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relevance of the input, of the heads, and of the neurons, each at every position."""
        own = self.own
        neurons = linear(self.inner, own["mlp.down_proj"], r * self.z / self.out)
        half = neurons / 2  # a product gives each factor half; through the non-linearity all of it goes on
        mid = r * self.mid / self.out  # the norm is passed as it is
        mid = mid + linear(self.n2, own["mlp.gate_proj"], half) + linear(self.n2, own["mlp.up_proj"], half)
        heads = linear(self.heads.flatten(1), own["self_attn.o_proj"], mid * self.y / self.mid)
        per_head = heads.view_as(self.heads)
        contributions = torch.einsum("hts,shd->htsd", self.shares, self.v[:, self.group])
        shared = (
            contributions * (per_head / self.heads).permute(1, 0, 2)[:, :, None] / 2
        )  # half to v, half to the shares
        values = shared.sum(1).permute(1, 0, 2)
        attended = shared.sum(-1)
        r_scores = self.scores * (attended - self.shares * attended.sum(-1, keepdim=True))
        products = torch.einsum("thd,shd->htsd", self.rq, self.rk) / math.sqrt(micro.WIDTH)
        each = products * (r_scores / self.scores)[..., None] / 2
        q, k = each.sum(2).permute(1, 0, 2), each.sum(1).permute(1, 0, 2)
        kv = torch.zeros(len(self.x), micro.N_KV_HEADS, micro.WIDTH, dtype=r.dtype)
        r_v, r_k = kv.index_add(1, self.group, values), kv.index_add(1, self.group, k)
        found = mid * self.x / self.mid
        for name, rotated, relevance_, raw in (
            ("q", turned(self.q), q, self.q),
            ("k", turned(self.k), r_k, self.k),
        ):
            unturned = turned(relevance_ / rotated, back=True) * raw
            found = found + linear(self.n1, own[f"self_attn.{name}_proj"], unturned.flatten(1))
        found = found + linear(self.n1, own["self_attn.v_proj"], r_v.flatten(1))
        return found, per_head.sum(-1), neurons


def normed(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + micro.EPSILON).sqrt() * scale


def by_rules(decoder: Decoder, one: Example) -> Tensor:
    """Return the relevance of all heads, then of all neurons, layer by layer."""
    w = {name: p.detach().double() for name, p in decoder.model.named_parameters()}
    x, layers = w["model.embed_tokens.weight"][list(one.tokens)], []
    for number in range(micro.N_LAYERS):
        layers.append(Layer(w, number, x))
        x = layers[-1].out
    last, head = normed(x, w["model.norm.weight"]), w["lm_head.weight"]
    r = torch.zeros_like(x)
    for at in range(one.target_start, len(one.tokens)):
        r[at - 1] += last[at - 1] * (head[one.tokens[at]] - head.mean(0))
    found = []
    for layer in reversed(layers):
        r, heads, neurons = layer.back(r)
        found.append(torch.cat([heads.sum(0), neurons.sum(0)]))
    return torch.cat(found[::-1])


def test_relevance_is_what_the_rules_say() -> None:
    decoder = two_layers()
    examples = micro.CALIBRATION.examples
    units = list(list_units(decoder, ["heads", "neurons:1"]).values())
    for one in examples:
        (batch,) = batches([one], max_batch_tokens=64)
        _, found = relevance(decoder, batch, units)
        expected = by_rules(decoder, one)
        assert float(expected.abs().max()) > 0.05
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_stay_and_nothing_is_left_behind(family: str) -> None:
    decoder = shared(family)
    (batch,) = batches(calibration(((12, 5), (11, 3))).examples, max_batch_tokens=64)
    before, wanted = state(decoder), targets(batch)
    with torch.no_grad():
        intact = target_logits(decoder, batch, wanted)
    decoder.model.requires_grad_(True)
    try:
        with torch.enable_grad(), ruled(decoder):
            inside = target_logits(decoder, batch, wanted)
    finally:
        decoder.model.requires_grad_(False)
    torch.testing.assert_close(inside.detach(), intact, rtol=0, atol=1e-6)
    units = list(list_units(decoder, ["heads", "mlp"]).values())
    _, found = relevance(decoder, batch, units)
    assert bool(found.isfinite().all())
    assert float(found.abs().min(1).values.max()) > 0
    assert state(decoder) == before
    assert all(p.grad is None for p in decoder.model.parameters())


@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen3", "phi3", "mixtral", "gemma2"])
def test_relevance_is_kept_where_no_biases_take_any(family: str) -> None:
    """All that starts at a logit arrives at the embeddings; attention is cut off, as its softmax takes some."""
    decoder = fresh(family)
    for p in decoder.projections:
        if p.role == "o":
            p.write(torch.zeros(p.shape))
    (batch,) = batches([example(9, 8)], max_batch_tokens=64)
    wanted = targets(batch)
    embedding: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedding.append(output.detach().requires_grad_())
        return embedding[0]

    handle = decoder.model.get_input_embeddings().register_forward_hook(leaf)
    with torch.enable_grad(), ruled(decoder):
        logit = target_logits(decoder, batch, wanted)[0, 5]
        (slope,) = torch.autograd.grad(logit, embedding)
    handle.remove()
    kept = float((slope * embedding[0].detach()).sum())
    if (
        family == "mixtral"
    ):  # half of what comes out of the experts goes to the router, whose softmax takes it
        assert abs(kept) < abs(float(logit.detach()))
    else:
        assert kept == pytest.approx(float(logit.detach()), rel=1e-4)


def test_what_takes_the_place_of_a_unit_counts() -> None:
    decoder = shared("llama3")
    zero, mean = (
        attribute(
            decoder, EXAMPLES, Question(("heads",), ablation=own), Estimator("relevance")
        ).predicted_nats
        for own in ("zero", "mean")
    )
    assert zero is not None
    assert mean is not None
    assert not torch.allclose(zero, mean)


def test_a_module_without_a_rule_is_named() -> None:
    decoder = fresh("llama3")
    decoder.model.model.layers[1].self_attn.mixer = nn.Conv1d(4, 4, 3)
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.self_attn\.mixer is a Conv1d, for which relevance has no rule"
    ):
        attribute(decoder, EXAMPLES, Question(), Estimator("relevance"))
    with pytest.raises(ModelError, match="Experts, for which relevance has no rule"):
        relevance(with_expert_modules(), batches(EXAMPLES.examples, max_batch_tokens=1)[0], [])
    model = tiny(Mamba2Config(**SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1))
    mamba = inspect_model(model, None, name="mamba")
    with (
        pytest.raises(ModelError, match=r"layers\.0\.mixer is a Mamba2Mixer, .* to prune the method snip"),
        ruled(mamba),
    ):
        pass
    capped = fresh("gemma2")
    capped.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="caps its attention in a kernel"), ruled(capped):
        pass


def test_relevance_has_no_divergence() -> None:
    with pytest.raises(OptionError, match="needs the effect 'ce'"):
        attribute(shared("llama3"), EXAMPLES, Question(effect="kl"), Estimator("relevance"))


def test_integrated_is_the_gradient_at_five_gates() -> None:
    whole = Estimator("gradient", gates=(0.1, 0.3, 0.5, 0.7, 0.9))
    assert Estimator("integrated") == whole
    one, other = (
        attribute(shared("llama3"), EXAMPLES, Question(), own) for own in (whole, Estimator("integrated"))
    )
    assert one.predicted_nats is not None
    assert other.predicted_nats is not None
    assert torch.equal(one.predicted_nats, other.predicted_nats)
    plain = attribute(shared("llama3"), EXAMPLES, Question(), replace(whole, draws=0))
    assert torch.equal(one.predicted_nats, plain.predicted_nats), "an integral has no second order"


def test_gates_count_alike_for_divergences() -> None:
    """Predicted at one gate each, and put together as circuits do."""
    gates, question = (0.2, 0.9), Question(effect="kl")
    both, *each = (
        attribute(shared("llama3"), EXAMPLES, question, Estimator("gradient", gates=own)).predicted_nats
        for own in (gates, *((gate,) for gate in gates))
    )
    torch.testing.assert_close(both, balanced(torch.stack(each)))
    assert not torch.allclose(both, torch.stack(each).mean(0))


@pytest.mark.parametrize("name", ["altup", "per_layer_input_gate"])
def test_products_that_no_rule_halves_are_refused(name: str) -> None:
    decoder = fresh("llama3")
    setattr(decoder.model.model.layers[1], name, nn.Linear(4, 4))
    with pytest.raises(ModelError, match=rf"layers\.1\.{name} is a Linear, for which relevance has no rule"):
        attribute(decoder, EXAMPLES, Question(), Estimator("relevance"))


@pytest.mark.thorough
def test_resampled_and_counterfactual_slopes_go_towards_the_donor() -> None:
    """Where the donor is the sequence itself nothing is removed; else the slope is that of the step towards it."""
    decoder = shared("llama2")
    one, other = example(10, 6, seed=1), example(10, 6, seed=2)
    same = Calibration(
        (replace(one, counterfactual=one.tokens), replace(other, counterfactual=other.tokens)), (0, 0)
    )
    pair = Calibration(
        (replace(one, counterfactual=other.tokens), replace(other, counterfactual=one.tokens)), (0, 0)
    )
    question = Question(("heads", "mlp"), ablation="counterfactual")
    for how in ("exact", "integrated", "relevance"):
        effects = attribute(decoder, same, question, Estimator(how, draws=0))
        change = effects.change_nats() if effects.predicted_nats is None else effects.predicted_nats
        assert float(change.abs().max()) < 1e-4
        own = attribute(decoder, pair, question, Estimator(how, draws=0))
        resampled = attribute(decoder, pair, replace(question, ablation="resample"), Estimator(how, draws=0))
        key = "masked_nats" if how == "exact" else "predicted_nats"
        torch.testing.assert_close(getattr(own, key), getattr(resampled, key), rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match="needs a counterfactual of every example"):
        attribute(decoder, EXAMPLES, question)
