"""The training loss."""

import pytest
import torch

from models.losses import upsampled_cross_entropy


def test_void_is_ignored() -> None:
    """Only the labelled quarter counts, and it is right."""
    logits = torch.zeros(1, 21, 2, 2)
    logits[:, 8] = 30
    target = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    target[:, :4, :4] = 8
    assert upsampled_cross_entropy(logits, target).item() == pytest.approx(0, abs=1e-6)


def test_uniform_logits_cost_log_21() -> None:
    """The mean is over pixels, not over cells."""
    loss = upsampled_cross_entropy(torch.zeros(2, 21, 2, 2), torch.ones(2, 32, 32).byte())
    assert loss.item() == pytest.approx(3.0445, abs=1e-3)


def test_all_void_is_zero_and_has_a_gradient() -> None:
    """A crop of nothing but void must not poison the weights with NaN."""
    logits = torch.randn(1, 21, 2, 2, requires_grad=True)
    loss = upsampled_cross_entropy(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum().item() == 0
