"""Optimal Brain Surgeon on one matrix: against plain least squares, and where the answer is known."""

import pytest
import torch
from torch import Tensor

from causalprune.core.errors import ModelError
from causalprune.pruning import obs
from causalprune.pruning.allocation import keep_matrix, keep_n_of_m, keep_rows
from causalprune.pruning.obs import inverse_factor, refit, sparsegpt, sparsegpt_stack


def random_case(seed: int = 0, out: int = 6, into: int = 24, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Return a weight `[out in]` and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(into, into, generator=generator) / into**0.5
    inputs = torch.randn(tokens, into, generator=generator) @ (mixing + 0.3 * torch.eye(into))
    return torch.randn(out, into, generator=generator), inputs.T @ inputs


def best(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Return the minimiser of `(w − ŵ) H (w − ŵ)ᵀ` over each row's kept weights, by a linear solve in float64."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    wide = hessian.double()
    for row, (own, stays) in enumerate(zip(weight.double(), keep, strict=True)):
        found[row, stays] = torch.linalg.solve(wide[stays][:, stays], (wide @ own)[stays])
    return found.float()


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """Return the squared error of the outputs."""
    difference = (weight - pruned).double()
    return float(((difference @ hessian.double()) * difference).sum())


def half(score: Tensor, start: int = 0) -> Tensor:
    return keep_matrix(score, score.numel() // 2)


def fixed(keep: Tensor) -> object:
    return lambda score, start: keep[:, start : start + score.shape[1]]


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, hessian = random_case()
    upper = inverse_factor(hessian, 0.01, "w")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(24), rtol=1e-3, atol=1e-3)


def test_too_few_tokens_are_an_error_that_names_a_damping_that_would_do() -> None:
    hessian = torch.ones(8, 8) + torch.diag(torch.tensor([1.0] * 7 + [-0.5]))
    with pytest.raises(ModelError, match=r"layers\.3\.w.*--damping (\S+) ") as caught:
        inverse_factor(hessian, 0.0, "layers.3.w")
    inverse_factor(hessian, float(str(caught.value).partition("--damping ")[2].split()[0]), "layers.3.w")


def test_second_moments_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(ModelError, match="not finite"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, "w")


def test_inputs_that_were_never_there_stay_apart() -> None:
    weight, hessian = random_case()
    hessian[:, 5] = hessian[5] = 0
    pruned, keep = sparsegpt(weight, inverse_factor(hessian, 0.01, "w"), half)
    assert torch.isfinite(pruned).all()
    without = [j for j in range(24) if j != 5]
    again, same = sparsegpt(
        weight[:, without],
        inverse_factor(hessian[without][:, without], 0.01 * 23 / 24, "w"),
        fixed(keep[:, without]),  # type: ignore[arg-type]
    )
    assert torch.equal(same, keep[:, without])
    torch.testing.assert_close(pruned[:, without], again)


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_with_uncorrelated_inputs_it_is_magnitude(scale: float) -> None:
    weight, _ = random_case()
    pruned, keep = sparsegpt(weight, inverse_factor(scale * torch.eye(24), 0.01, "w"), half)
    assert torch.equal(keep, half(weight.abs()))
    assert torch.equal(pruned, weight * keep)


def test_one_column_gone_is_made_up_for_exactly() -> None:
    weight, hessian = random_case()
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, 0] = False
    pruned, _ = sparsegpt(weight, inverse_factor(hessian, 0.0, "w"), fixed(keep))  # type: ignore[arg-type]
    torch.testing.assert_close(pruned, best(weight, keep, hessian), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_refit_is_least_squares_on_what_is_kept_wherever_it_starts(
    damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "SETTLED", 0.0)
    weight, hessian = random_case()
    keep = half(weight.abs())
    damped = hessian + damping * hessian.diagonal().median() * torch.eye(24)
    for start in (None, weight + 0.3 * torch.randn(weight.shape)):
        found = refit(weight, keep, hessian, damping=damping, start=start)
        torch.testing.assert_close(found, best(weight, keep, damped), rtol=1e-3, atol=1e-3)
        assert torch.equal(found != 0, keep)


def test_refit_ends_where_next_to_nothing_is_left() -> None:
    for seed in range(5):
        weight, hessian = random_case(seed)
        keep = half(weight.abs())
        damped = hessian + 0.3 * hessian.diagonal().median() * torch.eye(24)
        least = error(weight, best(weight, keep, damped), damped)
        for start in (None, sparsegpt(weight, inverse_factor(hessian, 0.01, "w"), half)[0]):
            found = refit(weight, keep, hessian, damping=0.3, start=start)
            assert error(weight, found, damped) <= 1.01 * least


def test_each_update_leaves_less_error_than_the_one_before() -> None:
    for seed in range(5):
        weight, hessian = random_case(seed)
        column_wise, keep = sparsegpt(weight, inverse_factor(hessian, 0.01, "w"), half)
        fitted = refit(weight, keep, hessian, damping=0.01)
        errors = [error(weight, w, hessian) for w in (fitted, column_wise, weight * keep)]
        assert errors[0] < errors[1] < errors[2]


def test_blocks_of_columns_do_not_change_the_result_for_fixed_masks() -> None:
    weight, hessian = random_case(out=5, into=300, tokens=900)
    keep, upper = half(weight.abs()), inverse_factor(hessian, 0.01, "w")
    whole, _ = sparsegpt(weight, upper, fixed(keep), group=300)  # type: ignore[arg-type]
    for group in (1, 4, 128):
        torch.testing.assert_close(sparsegpt(weight, upper, fixed(keep), group=group)[0], whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_patterns_hold_in_every_group(n: int, m: int) -> None:
    weight, hessian = random_case()
    pruned, keep = sparsegpt(
        weight, inverse_factor(hessian, 0.01, "w"), lambda score, at: keep_n_of_m(score, n, m), group=m
    )
    assert (keep.view(-1, m).sum(1) == n).all()
    assert torch.equal(pruned != 0, keep)


def test_groups_are_chosen_by_updated_weights() -> None:
    weight, hessian = random_case()
    upper, seen = inverse_factor(hessian, 0.01, "w"), []

    def choose(score: Tensor, start: int) -> Tensor:
        seen.append(score.clone())
        return keep_rows(score, torch.full((len(score),), score.shape[1] // 2))

    _, keep = sparsegpt(weight, upper, choose, group=8)
    open_end = torch.cat([keep[:, :8], torch.ones_like(keep[:, 8:])], 1)
    updated, _ = sparsegpt(weight, upper, fixed(open_end), group=8)  # type: ignore[arg-type]
    torch.testing.assert_close(seen[1], (updated[:, 8:16] / upper.diagonal()[8:16]).square())
    assert not torch.allclose(seen[1], (weight[:, 8:16] / upper.diagonal()[8:16]).square())


@pytest.mark.parametrize("group", [obs.BLOCK, 4])
def test_matrices_together_are_matrices_alone(group: int) -> None:
    cases = [random_case(seed, out=24, into=160, tokens=400) for seed in range(5)]
    uppers = [inverse_factor(hessian, 0.01, "w") for _, hessian in cases]
    rows = [torch.rand(24, generator=torch.Generator().manual_seed(seed)) + 0.1 for seed in range(5)]
    weights = torch.stack([weight for weight, _ in cases])
    found, keep = sparsegpt_stack(
        weights, torch.stack(uppers), [half] * 5, group=group, rows=torch.stack(rows)
    )
    for own, stays, weight, upper, row in zip(found, keep, weights, uppers, rows, strict=True):
        alone, same = sparsegpt(weight, upper, half, group=group, rows=row)
        assert torch.equal(stays, same)
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)
