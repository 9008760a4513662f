"""Schedule, parameter groups and frozen parts."""

from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.networks import build_network
from models.recipe import Recipe, load_recipe
from models.stages.train import learning_rate_factor, parameter_groups, set_training_mode

CPU = load_recipe(Path(models.__file__).parent / "recipes" / "cpu.toml")


def test_the_schedule_warms_up_and_decays_to_zero() -> None:
    """Linear to full rate, then (1 - i/n)^power, per iteration."""
    factors = [learning_rate_factor(i, CPU) for i in range(CPU.iterations)]
    peak = factors.index(max(factors))
    assert factors[0] == pytest.approx(1 / (CPU.warm_up_iterations + 1))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    half = CPU.iterations // 2
    assert factors[half] == pytest.approx(0.5**CPU.poly_power)
    assert 0 < factors[-1] < 0.002


@pytest.fixture
def network() -> nn.Module:
    """The context network, without memory."""
    with torch.device("meta"):
        built = build_network("context_fcn_resnet50_16s")
    set_training_mode(built, CPU)
    return built


def test_every_trainable_parameter_is_in_one_group(network: nn.Module) -> None:
    """Frozen parameters are in no group."""
    grouped = [p for group in parameter_groups(network, CPU) for p in group["params"]]
    trainable = {id(p) for p in network.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable)
    assert {id(p) for p in grouped} == trainable


def test_the_head_learns_faster_and_vectors_are_not_decayed(network: nn.Module) -> None:
    """BatchNorm and biases have weight decay 0, kernels the recipe's."""
    names = {id(p): name for name, p in network.named_parameters()}
    for group in parameter_groups(network, CPU):
        for parameter in group["params"]:
            in_head = names[id(parameter)].startswith("classifier.")
            factor = CPU.head_learning_rate_factor if in_head else 1
            assert group["lr"] == pytest.approx(CPU.learning_rate * factor)
            assert group["weight_decay"] == (CPU.weight_decay if parameter.ndim > 1 else 0)


def test_frozen_means_no_gradient_and_no_new_statistics(network: nn.Module) -> None:
    """For the recipe's stages and the backbone's BatchNorms; the head's BatchNorms learn."""
    frozen = tuple(f"backbone.{name}." for name in ("conv1", "bn1", "layer1", "layer2"))
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training is not name.startswith("backbone.")


def test_statistics_shared_by_several_gpus_freeze_alike() -> None:
    """SyncBatchNorm, which replaces BatchNorm under torchrun, freezes in the same way."""
    with torch.device("meta"):
        built = build_network("fcn_resnet50_32s")
        nn.SyncBatchNorm.convert_sync_batchnorm(built)  # type: ignore[no-untyped-call]
    set_training_mode(built, CPU)
    shared = [m for m in built.backbone.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(shared) == 53
    assert not any(module.training for module in shared)


def test_batch_norm_trains_where_the_recipe_says_so() -> None:
    """Except in frozen stages."""
    recipe = Recipe.model_validate({**CPU.model_dump(), "batch_norm": "train"})
    with torch.device("meta"):
        built = build_network("fcn_resnet50_32s")
    set_training_mode(built, recipe)
    assert not built.backbone.get_submodule("layer2.0.bn1").training
    assert built.backbone.get_submodule("layer3.0.bn1").training
