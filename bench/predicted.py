"""A step of bench/quality.py: the rise that gradients predict for a pruned group of matrices, against the measured one.

The divergence of a model whose weights W become W + ΔW is to second order `½ E[⟨∂ ln p(ŷ)/∂W, ΔW⟩²]`, with labels ŷ drawn
from the model's own predictions (the Fisher information as a quadratic form, without any diagonal approximation). The
criterion `fisher` keeps the diagonal alone, with the gold labels: `½ Σ ΔW_ij² E[x_j²] E[g_i²]` for every token.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from common import data_folder
from torch import Tensor

from causalprune.attribution.uncertainty import spearman
from causalprune.calibration.examples import batches, calibrate, few
from causalprune.checkpoints.embedded import load
from causalprune.core.progress import shown
from causalprune.core.types import Decoder, Example, Layer, Projection
from causalprune.interventions.gradients import output_slopes
from causalprune.interventions.losses import target_logits, targets
from causalprune.pruning.budgets import trial
from causalprune.pruning.grading import DoseResponse, Experiment, dose_response, doses
from causalprune.pruning.methods import Method
from causalprune.pruning.parts import Steps
from causalprune.pruning.walks import Gathered, planned, walk

EXAMPLES, SPARSITY, DRAWS = 48, 0.5, 16


def predicted() -> dict[str, Any]:
    """Prune every layer's attention and MLP alone to three sparsities: divergence measured, and predicted by gradients."""
    decoder = load("embedded")
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=EXAMPLES, data_dir=data_folder())
    plan, gathered = planned(decoder, Method("sparsegpt", SPARSITY), {}, calibration), Gathered()
    changes: dict[str, list[Tensor]] = {}

    def tried(p: Projection, sparsities: Sequence[float]) -> Sequence[Tensor]:
        after = trial(plan, gathered, p, sparsities)  # what graded budgets would try
        changes[p.name] = [weight - p.read() for weight in after]
        return after

    wanted = doses(SPARSITY)
    layers = walk(plan, gathered, Steps(), advance_pruned=False, moments=True)
    with shown("measured") as progress:

        def counted() -> Iterator[Layer]:
            for number, layer in enumerate(layers, 1):
                yield layer
                progress(number, len(decoder.layers))

        measured = dose_response(decoder, counted(), Experiment(plan.few, wanted), tried)
    nats = _predicted(decoder, few(calibration.examples), measured, changes)
    slopes, tokens = output_slopes(decoder, plan.groups), sum(int(batch.real.sum()) for batch in plan.groups)
    targets_seen = sum(example.target_tokens for example in calibration.examples)
    by_name = {p.name: p for p in decoder.projections}

    def diagonal(name: str, change: Tensor) -> float:
        norm = gathered.norms.root_mean_square(by_name[name])
        assert norm is not None
        rise = (change * norm.float() * slopes[name].float()[:, None]).square().sum() / 2
        return float(rise) * tokens / targets_seen

    return {
        "groups": measured.members,
        "sparsities": wanted,
        "draws": DRAWS,
        "measured_nats": measured.nats.tolist(),
        "predicted_nats": nats.tolist(),
        "diagonal_nats": [
            [sum(diagonal(name, changes[name][dose]) for name in members) for dose in range(len(wanted))]
            for members in measured.members
        ],
    }


def _predicted(
    decoder: Decoder, examples: Sequence[Example], response: DoseResponse, changes: Mapping[str, list[Tensor]]
) -> Tensor:
    """Return nats per target token by group and sparsity, from `DRAWS` backward passes for every example."""
    weights = {p.name: p.parameter for p in decoder.projections}  # none is fused in this model
    total, count = torch.zeros_like(response.nats), 0
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.values():
        parameter.requires_grad_()
    with shown("predicted") as progress:
        for done, batch in enumerate(batches(examples, max_batch_tokens=1)):
            own = targets(batch)
            count += len(own.tokens)
            with torch.enable_grad():
                chances = target_logits(decoder, batch, own).log_softmax(-1)
            for draw in range(DRAWS):
                labels = torch.multinomial(chances.detach().exp(), 1, generator=generator)
                loss = chances.gather(1, labels).sum()
                slopes = torch.autograd.grad(loss, list(weights.values()), retain_graph=draw + 1 < DRAWS)
                by_name = dict(zip(weights, slopes, strict=True))
                for row, members in enumerate(response.members):
                    for dose in range(total.shape[1]):
                        rise = sum(float((by_name[name] * changes[name][dose]).sum()) for name in members)
                        total[row, dose] += rise**2 / (2 * DRAWS)
            progress(done + 1, len(examples))
    for parameter in weights.values():
        parameter.requires_grad_(False)
    return total / count


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return rank correlations over all trials, and over the groups at the middle sparsity."""
    own, other, diagonal = (
        torch.tensor(done[f"{key}_nats"]) for key in ("predicted", "measured", "diagonal")
    )
    return {
        "predicted_rank_correlation_diagonal": spearman(diagonal.flatten(), other.flatten()),
        "predicted_rank_correlation_diagonal_50": spearman(diagonal[:, 1], other[:, 1]),
        "predicted_rank_correlation": spearman(own.flatten(), other.flatten()),
        "predicted_rank_correlation_50": spearman(own[:, 1], other[:, 1]),
        "predicted_over_measured_50": float((own[:, 1] / other[:, 1]).median()),
    }
