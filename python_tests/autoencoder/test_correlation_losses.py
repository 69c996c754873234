import pytest
import torch

from sae_fast.autoencoder.penalties import (
    correlation_losses,
    independence_loss,
    orthogonality_loss,
)

N, F, SPLIT = 40, 90, 70
SILENT = [3, 20, 75]


def make_codes():
    h = torch.randn(N, F, generator=torch.Generator().manual_seed(0)).relu_()
    h[:, SILENT] = torch.tensor([0.0, 2.0, 0.0])
    return h


def of_pairs(h, reduction):
    """Return both losses by the definition, in float64, over the latents that vary."""
    if reduction == "scaled":
        first, second = SPLIT - 2, F - SPLIT - 1
        # More latents than directions in the first group, fewer in the second.
        divisors = first * (first / (N - 1)), second * (first / (N - 1))
        sums = of_pairs(h, "sum")
        return [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
    varies = h.std(0) > 0
    centred = h - h.mean(0)
    unit = centred / torch.linalg.vector_norm(centred, dim=0).where(varies, torch.ones(()))
    squares = (unit.t() @ unit).square()
    pairs = ~torch.eye(F, dtype=torch.bool) & varies & varies[:, None]
    blocks = (slice(0, SPLIT), slice(0, SPLIT)), (slice(0, SPLIT), slice(SPLIT, F))
    return [getattr(squares[block][pairs[block]], reduction)() for block in blocks]


@pytest.mark.parametrize("reduction", ["scaled", "mean", "sum"])
def test_losses_and_gradients_are_those_of_all_pairs(reduction):
    h = make_codes().requires_grad_()
    exact = h.detach().double().requires_grad_()
    losses = correlation_losses(h, SPLIT, reduction=reduction)
    for loss, wanted in zip(losses, of_pairs(exact, reduction), strict=True):
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(loss, h, retain_graph=True)
        (wanted_grad,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        size = wanted_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("reduction", ["scaled", "mean", "sum"])
def test_each_loss_alone_is_the_one_of_both(reduction):
    h = make_codes()
    losses = correlation_losses(h, SPLIT, reduction=reduction)
    assert independence_loss(h, SPLIT, reduction=reduction) == losses.independence
    assert orthogonality_loss(h, SPLIT, reduction=reduction) == losses.orthogonality


def test_independence_is_of_all_latents_by_default():
    h = make_codes()
    assert independence_loss(h) == correlation_losses(h, F).independence


def test_mean_counts_pairs_that_are_not_silent():
    h = make_codes()
    active = SPLIT - 2
    total = independence_loss(h, SPLIT, reduction="sum")
    torch.testing.assert_close(independence_loss(h, SPLIT), total / (active * (active - 1)))


def test_codes_that_are_silent_have_no_loss_and_no_gradient():
    h = torch.ones(5, 8, requires_grad=True)
    losses = correlation_losses(h, 4)
    sum(losses).backward()
    assert losses == (0, 0)
    assert not h.grad.any()


def test_latents_that_vary_together_have_the_largest_loss():
    h = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0, -3.0, 0.5])
    losses = correlation_losses(h, 2)
    torch.testing.assert_close(torch.stack(losses), torch.ones(2))


def test_latents_without_common_activity_are_below_those_with():
    apart = torch.block_diag(*[torch.arange(1.0, 9.0)[:, None]] * 5)
    together = apart.sum(1, keepdim=True) * torch.linspace(1, 2, 5)
    assert independence_loss(apart) < 0.1
    assert independence_loss(together) > 0.9


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be scaled, mean or sum, got 'none'"):
        independence_loss(make_codes(), SPLIT, reduction="none")
