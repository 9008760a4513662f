"""The training loss."""

import pytest
import torch
import torch.nn.functional as F

from models.losses import cross_entropy, interpolate

RNG = torch.Generator().manual_seed(0)


def test_interpolate_is_a_part_of_the_full_upsampling() -> None:
    """The same values as F.interpolate at the chosen pixels."""
    logits = torch.randn(2, 21, 5, 7, generator=RNG)
    full = F.interpolate(logits, size=(80, 112), mode="bilinear", align_corners=False)
    rows, columns = torch.tensor([0.0, 3, 40, 79]), torch.tensor([0.0, 8, 9, 111])
    part = interpolate(logits, rows, columns, (80, 112))
    torch.testing.assert_close(part, full[:, :, rows.long()][..., columns.long()])


def test_the_phases_together_are_the_loss_over_every_pixel() -> None:
    """Sixteen phases cover each pixel once: their mean is the full cross-entropy."""
    logits = torch.randn(2, 21, 4, 4, generator=RNG)
    target = torch.randint(0, 21, (2, 64, 64), generator=RNG).byte()
    phases = [cross_entropy(logits, target, phase).item() for phase in range(16)]
    full = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    assert len({round(loss, 6) for loss in phases}) == 16
    assert sum(phases) / 16 == pytest.approx(F.cross_entropy(full, target.long()).item())


def test_void_is_ignored() -> None:
    """Only the labelled quarter counts, and it is correct."""
    logits = torch.zeros(1, 21, 2, 2)
    logits[:, 8] = 30
    target = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    target[:, :4, :4] = 8
    assert cross_entropy(logits, target, 0).item() == pytest.approx(0, abs=1e-6)


def test_uniform_logits_cost_log_21() -> None:
    """The mean is over pixels, not over cells."""
    loss = cross_entropy(torch.zeros(2, 21, 2, 2), torch.ones(2, 32, 32).byte(), 5)
    assert loss.item() == pytest.approx(3.0445, abs=1e-3)


def test_all_void_is_zero_and_has_a_gradient() -> None:
    """A crop of void only must not turn the weights into NaN."""
    logits = torch.randn(1, 21, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum().item() == 0
