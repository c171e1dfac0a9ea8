"""Stage 3 of the method, and the baselines: score, budget, keep, write. The only writer of weights."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.ablation import LayerInputs, capture, run_layer
from causalprune.allocation import find_threshold, keep_above, keep_matrix, keep_rows, prune_counts, spread
from causalprune.anatomy import fingerprint
from causalprune.calibration import batches
from causalprune.criteria import CRITERIA, SCOPES, Evidence, Scope
from causalprune.errors import MismatchError, ModelError, OptionError, unknown
from causalprune.importance import head_importance, weight_factor
from causalprune.statistics import InputNorms, observed
from causalprune.types import Batch, Calibration, Decoder, Effects, Layer, Progress, Projection, silent
from causalprune.uncertainty import scores

Factors = Mapping[str, Float[Tensor, "_ _"]]  # each broadcasts to its own [out in]
ProjectionScore = Callable[[Projection], Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Method:
    """A criterion, a scope and a sparsity: everything that names a way to prune.

    `sparsity` is the fraction of the pool's weights set to zero, between 0 and 1.
    """

    criterion: str
    sparsity: float
    scope: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise unknown("method", self.criterion, CRITERIA)
        if self.scope is not None and self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if not 0 < self.sparsity < 1:
            raise OptionError(f"sparsity must be between 0 and 1 (both excluded), not {self.sparsity}")

    @property
    def resolved_scope(self) -> Scope:
        """The scope asked for, or the criterion's own."""
        own = CRITERIA[self.criterion].scope
        return next((scope for scope in SCOPES if scope == self.scope), own)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a pruning run kept, and what it has to say.

    `keep[name]` is True where a weight stays. `unrouted` names experts' matrices that no calibration
    token reached: their input norms are unknown, so they were scored by magnitude alone.
    """

    method: Method
    keep: dict[str, Bool[Tensor, "out in"]]
    unrouted: tuple[str, ...]


def prune(
    decoder: Decoder,
    method: Method,
    *,
    calibration: Calibration | None = None,
    effects: Effects | None = None,
    max_batch_tokens: int = 2048,
    on_progress: Progress = silent,
) -> Pruned:
    """Set the least important weights of the decoder to exactly zero, in place.

    Criteria that look at inputs go layer by layer, with inputs from already pruned layers; under scope
    `global` all scores must exist before the first weight goes, so there the inputs are the intact model's.
    Costs about two forward passes over the calibration tokens for such criteria, none for the others.

    Raises:
        OptionError: calibration or effects are missing for a criterion that needs them.
        MismatchError: the effects were measured on another model.
        ModelError: a weight or an input is not finite; for a weight, the model is as it was.
    """
    needs = CRITERIA[method.criterion].needs
    if needs == "inputs" and calibration is None:
        raise OptionError(f"method {method.criterion!r} needs calibration data")
    factors = _factors(decoder, effects) if needs == "effects" else {}
    _check_finite(decoder)
    groups: list[Batch] = []
    if needs == "inputs" and calibration is not None:
        unpadded = any(isinstance(layer.experts, nn.ModuleList) for layer in decoder.layers)
        groups = batches(calibration.examples, max_batch_tokens=1 if unpadded else max_batch_tokens)
    norms = InputNorms()
    walk = partial(_walk, decoder, groups, norms, on_progress=on_progress)
    score = partial(_score, method=method, norms=norms, factors=factors)
    if method.resolved_scope == "global":
        keep = _keep_global(decoder, method.sparsity, walk, score)
    else:
        keep = _keep_layerwise(decoder, method, walk, score)
    unrouted = [p.name for p in decoder.projections if groups and not norms.tokens.get(p.name)]
    return Pruned(method, keep, tuple(unrouted))


def _check_finite(decoder: Decoder) -> None:
    for p in decoder.projections:
        if not bool(torch.isfinite(p.read()).all()):
            raise ModelError(
                f"{p.parameter_name} ({p.name}) has weights that are not finite: load an intact copy"
            )


def _keep_global(
    decoder: Decoder, sparsity: float, walk: Callable[..., Iterator[Layer]], score: ProjectionScore
) -> dict[str, Tensor]:
    for _ in walk(advance_pruned=False):
        pass
    pool = decoder.projections
    count = prune_counts([sum(p.size for p in pool)], sparsity)[0]
    threshold = find_threshold(lambda: map(score, pool), count)
    keep = {}
    for projection in pool:
        keep[projection.name], threshold = keep_above(score(projection), threshold)
        _write(projection, keep[projection.name])
    return keep


def _keep_layerwise(
    decoder: Decoder, method: Method, walk: Callable[..., Iterator[Layer]], score: ProjectionScore
) -> dict[str, Tensor]:
    pool = decoder.projections
    counts = dict(
        zip([p.name for p in pool], prune_counts([p.size for p in pool], method.sparsity), strict=True)
    )
    keep = {}
    for layer in walk(advance_pruned=True):
        for projection in layer.projections:
            count = counts[projection.name]
            if method.resolved_scope == "matrix":
                keep[projection.name] = keep_matrix(score(projection), count)
            else:
                keep[projection.name] = keep_rows(score(projection), spread(count, projection.shape[0]))
            _write(projection, keep[projection.name])
    return keep


def _walk(
    decoder: Decoder,
    groups: Sequence[Batch],
    norms: InputNorms,
    *,
    advance_pruned: bool,
    on_progress: Progress,
) -> Iterator[Layer]:
    """Yield layer after layer, its input statistics gathered in `norms`.

    With `advance_pruned` each layer runs once more after the caller has pruned it, so that the next layer
    sees the inputs it will have; otherwise the outputs of the first run go on.
    """
    inputs = [capture(decoder, batch.tokens, stop=0) for batch in groups]
    for layer in decoder.layers:
        outputs = []
        for batch, own in zip(groups, inputs, strict=True):
            with observed(layer, batch.real, norms.see):
                outputs.append(run_layer(decoder, batch.tokens, layer.index, own))
        yield layer
        if advance_pruned:
            runs = zip(groups, inputs, strict=True)
            outputs = [run_layer(decoder, batch.tokens, layer.index, own) for batch, own in runs]
        inputs = [
            LayerInputs({layer.index + 1: hidden}, own.as_tuple)
            for hidden, own in zip(outputs, inputs, strict=True)
        ]
        on_progress(layer.index + 1, len(decoder.layers))


def _score(
    projection: Projection, *, method: Method, norms: InputNorms, factors: Factors
) -> Float[Tensor, "out in"]:
    weight = projection.read()
    norm = norms.root_mean_square(projection)
    evidence = Evidence(
        input_norm=weight.new_ones(weight.shape[1]) if norm is None else norm,
        factor=factors.get(projection.name),
        seed=zlib.crc32(f"{method.seed}:{projection.name}".encode()),
    )
    score = CRITERIA[method.criterion].score(weight, evidence)
    if not bool(torch.isfinite(score).all()):
        raise ModelError(
            f"{projection.parameter_name} ({projection.name}) has inputs or factors that are not finite"
        )
    return score


def _factors(decoder: Decoder, effects: Effects | None) -> Factors:
    if effects is None:
        raise OptionError("method 'cap' needs effects: measure them first (`causalprune attribute`)")
    if effects.model_fingerprint != fingerprint(decoder.model):
        raise MismatchError(f"the effects were measured on another model or revision than {decoder.name}")
    heads = effects.of("head")
    if len(heads.units) != sum(layer.attention.n_heads for layer in decoder.layers):
        raise OptionError(
            f"method 'cap' needs the effects of all heads, and these hold {len(heads.units)}: measure with --units heads"
        )
    importance = head_importance(scores(heads)).float()
    layers = torch.tensor([unit.layer for unit in heads.units])
    factors = {}
    for layer in decoder.layers:
        own = importance[layers == layer.index]
        for p in layer.projections:
            shape = layer.attention.n_kv_heads, layer.attention.head_dim
            factors[p.name] = weight_factor(own, p.role, n_kv_heads=shape[0], head_dim=shape[1])
            factors[p.name] = factors[p.name].to(p.parameter.device)
    return factors


def _write(projection: Projection, keep: Bool[Tensor, "out in"]) -> None:
    weight = projection.read()
    projection.write(torch.where(keep, weight, torch.zeros_like(weight)))
