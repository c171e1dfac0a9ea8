"""Records that every other module speaks in, and the legend of axis names.

Axes in shape annotations:

| name | meaning |
|---|---|
| `out`, `in` | output and input features of a projection; weights are always `[out in]` |
| `unit` | maskable parts of the model (heads, MLP blocks, experts, …), in layer-major order |
| `part` | the finest parts that a gate can close at one place: heads, neurons or experts |
| `sequence` | calibration or evaluation examples |
| `batch` | sequences that share one forward pass |
| `time` | token positions |
| `target` | predicted target tokens of a batch, flattened in (sequence, position) order |
| `model`, `vocab` | width of the residual stream, size of the vocabulary |
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.core.anatomy import Layer, LeftOut, Projection
from causalprune.core.showing import Shown
from causalprune.core.source import Source

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in units proportional to time."""


@runtime_checkable
class Remarked(Protocol):
    """A `Progress` that also shows a remark on what was found so far."""

    def __call__(self, done: int, total: int) -> None:
        """Take note of the work done and the work in all."""

    def remark(self, text: str) -> None:
        """Show this text beside the progress, in place of the one before."""


Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens a stage of work by name, for as long as it lasts, and hands out the callback to report to."""


def silent(done: int, total: int) -> None:
    """Report nothing, in place of a bar (a `Progress`)."""


@contextmanager
def quiet(name: str) -> Iterator[Progress]:
    """Report no stage, in place of a bar for each (a `Stage`)."""
    yield silent


@dataclass(frozen=True, eq=False, repr=False)
class Decoder(Shown):
    """A loaded causal language model, its tokenizer, and everything in it that can be pruned.

    `name` and `revision` are as the user gave them; `fingerprint` is the SHA-256 of configuration
    and weights as they were loaded, by which side files recognise their model. `base` is what a checkpoint of ours says of
    the model that it was made from: `name` and `fingerprint`, None where that is not known. `source` is None for a model that
    was built in memory.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    layers: tuple[Layer, ...]
    left_out: tuple[LeftOut, ...]
    fingerprint: str
    base: Mapping[str, Any] | None = None
    source: Source | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The pool: all prunable matrices, layer by layer."""
        return tuple(p for layer in self.layers for p in layer.projections)

    @property
    def device(self) -> torch.device:
        """Device that takes the token ids."""
        embedding = self.model.get_input_embeddings()
        if embedding.weight.is_meta and hasattr(embedding, "_hf_hook"):  # accelerate fetches it when it runs
            return torch.device(embedding._hf_hook.execution_device)  # noqa: SLF001
        device: torch.device = embedding.weight.device
        return device

    @property
    def offloaded(self) -> bool:
        """Whether some prunable weights are elsewhere than in memory, and fetched when their module runs."""
        return any(p.parameter.is_meta for p in self.projections)


UnitKind = Literal["head", "mixer", "kv_group", "attention", "mlp", "neurons", "expert", "layer"]
Effect = Literal["ce", "kl"]
"""Rise of the cross-entropy of the target tokens, or KL divergence from the intact model's predictions there."""


@dataclass(frozen=True)
class Unit:
    """A part of the model that an intervention can remove: by default attention head `index` of layer `layer`.

    A `mixer` is a head (or a group of channels) of a linear attention, state space or convolution. A `kv_group` is the query heads
    that share a key-value head, `neurons` a group of MLP neurons, a
    `layer` its attention and its MLP (or experts) together.
    """

    layer: int
    index: int
    kind: UnitKind = "head"


@dataclass(frozen=True, repr=False)
class Example(Shown):
    """One tokenised problem: the target is `tokens[target_start:]`, the prompt what precedes it.

    `source` names the data set, `content` is the SHA-256 of the normalised prompt text, by which
    calibration and evaluation are kept apart. Where not all tokens from `target_start` on are targets, `mask` says
    of every token whether it is. `counterfactual` are as many tokens, whose activations can take the place of what is
    removed; `instead` is the same prompt with a wrong answer, which the target is compared with.
    """

    tokens: tuple[int, ...]
    target_start: int
    source: str
    content: str
    mask: tuple[bool, ...] | None = None
    counterfactual: tuple[int, ...] | None = None
    instead: "Example | None" = None

    @property
    def is_target(self) -> tuple[bool, ...]:
        """Whether each token is predicted."""
        return self.mask or tuple(i >= self.target_start for i in range(len(self.tokens)))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What results on this example depend on."""
        also = (self.counterfactual, self.instead and self.instead.identity)
        return (self.tokens, self.mask or self.target_start, *(also if any(also) else ()))

    @property
    def target_tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.target_start if self.mask is None else sum(self.mask)


@dataclass(frozen=True, repr=False)
class Calibration(Shown):
    """Examples cut into disjoint subsets, and what is needed to say where they came from.

    `subset[i]` is the subset of example i, in `0 … n_subsets - 1`. `description` holds sources,
    seed, template, limits and skipped examples, and goes into every manifest as it is.
    """

    examples: tuple[Example, ...]
    subset: tuple[int, ...]
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def n_subsets(self) -> int:
        """Number of disjoint subsets K."""
        return max(self.subset) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, targets and subsets: what the results depend on."""
        rows = [(*e.identity, k) for e, k in zip(self.examples, self.subset, strict=True)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Batch(Shown):
    """Sequences padded on the right; causal attention keeps the padding out of every target.

    `is_target` is True on tokens that are predicted, never on the first of a sequence or on padding. `indices` are the
    positions of the sequences in their calibration or evaluation set. `counterfactual` is there where all of them have one;
    `others` are the same sequences with other targets, where these are compared with (`Behaviour.compared`).
    """

    tokens: Int[Tensor, "batch time"]
    lengths: Int[Tensor, "batch"]
    is_target: Bool[Tensor, "batch time"]
    indices: tuple[int, ...]
    counterfactual: Int[Tensor, "batch time"] | None = None
    others: Int[Tensor, "batch time"] | None = None

    @property
    def real(self) -> Bool[Tensor, "batch time"]:
        """False on padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Shown):
    """What removing each unit did to each calibration sequence: the values that all scores come from.

    All values are nats summed over the target tokens of a sequence; `tokens` counts those. A masked value
    is NaN where it was not measured: an estimator that left out the cell, or an expert that no token of the
    calibration reached. `kl_nats` (effect `kl` only) is the divergence from the intact model.
    `predicted_nats` is the change that an estimator predicts for every cell, measured or not, and
    `curvature_nats` the part of it per token that is of second order: the scale of the prediction's error.
    """

    units: tuple[Unit, ...]
    masked_nats: Float[Tensor, "unit sequence"]
    intact_nats: Float[Tensor, "sequence"]
    tokens: Int[Tensor, "sequence"]
    subset: Int[Tensor, "sequence"]
    model_fingerprint: str
    calibration_fingerprint: str
    description: dict[str, Any] = field(default_factory=dict)
    effect: Effect = "ce"
    kl_nats: Float[Tensor, "unit sequence"] | None = None
    predicted_nats: Float[Tensor, "unit sequence"] | None = None
    curvature_nats: Float[Tensor, "unit"] | None = None

    @property
    def estimator(self) -> str | None:
        """Name of the estimator, where the description has it."""
        name: str | None = self.description.get("estimator", {}).get("name")
        return name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the effect of every unit."""
        named = zip(self.units, self.delta_nats().tolist(), strict=True)
        return hashlib.sha256(repr([(vars(unit), delta) for unit, delta in named]).encode()).hexdigest()

    def change_nats(self) -> Float[Tensor, "unit sequence"]:
        """Return what removing the unit changed, by this record's effect; NaN where not measured."""
        return self.masked_nats - self.intact_nats if self.kl_nats is None else self.kl_nats

    def delta_nats(self) -> Float[Tensor, "unit"]:
        """Return Δ per unit in nats per target token: median over subsets masked − mean intact.

        Method §1: `Δ(h_l) = median_k L_k(masked) − mean_k L_k(intact)`, where `L_k` is the mean loss
        per target token of subset k. Negative values are kept: masking the unit helped. For the effect
        `kl`, `L_k` is the divergence, which is zero for the intact model. NaN for what was not measured.
        """
        subsets = [self.subset == k for k in range(int(self.subset.max()) + 1)]
        tokens = torch.stack([self.tokens[s].sum() for s in subsets])
        loss = self.masked_nats if self.kl_nats is None else self.kl_nats
        zero = self.intact_nats if self.kl_nats is None else torch.zeros_like(self.intact_nats)
        masked = torch.stack([loss[:, s].sum(1) for s in subsets], 1) / tokens
        intact = torch.stack([zero[s].sum() for s in subsets]) / tokens
        return masked.quantile(0.5, dim=1) - intact.mean()

    def paired_delta_nats(self) -> Float[Tensor, "unit"]:
        """Return the change per target token over all sequences: where the sign can be read.

        `delta_nats` compares a median with a mean over subsets that differ in difficulty, which adds
        the same offset (median − mean of the intact losses, about) to every unit.
        """
        return self.change_nats().sum(1) / self.tokens.sum()

    def of(self, *kinds: UnitKind) -> "Effects":
        """Return the effects of the units of these kinds alone."""
        chosen = [i for i, unit in enumerate(self.units) if unit.kind in kinds]
        tensors = {
            name: values[chosen]
            for name in ("masked_nats", "kl_nats", "predicted_nats", "curvature_nats")
            if (values := getattr(self, name)) is not None
        }
        return replace(self, units=tuple(self.units[i] for i in chosen), **tensors)


@dataclass(frozen=True, repr=False)
class EvalResult(Shown):
    """Per-example outcome of one task on one model, and how to sum it up.

    The headline value is `Σ values / Σ weights`, through `exp` for `metric == "perplexity"`:
    0/1 outcomes with unit weights give an accuracy, nats with token counts a loss or a perplexity. Other metrics are the
    names of a user's scorers; the description says whether `higher_is_better`.
    `examples` holds content hashes, so that two results can be paired; `texts` the generated answers or the
    chosen options, `prompts` and `golds` the problems and their right answers. These three are empty where a
    task has none, and the last two where another result on the same examples holds them.
    """

    task: str
    metric: str
    values: tuple[float, ...]
    weights: tuple[float, ...]
    examples: tuple[str, ...]
    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    golds: tuple[str, ...] = ()
    seconds: float = 0.0
    description: dict[str, Any] = field(default_factory=dict)
