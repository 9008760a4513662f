"""Checkpoints and starting weights, read without running code from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import StageError
from models.networks import SegmentationNetwork, build_network
from models.recipe import Recipe
from service.artefact.files import write_atomically
from service.artefact.labels import VOC_LABELS, LabelSet

# ImageNet's classification layer (of a ResNet, a DenseNet, VGG16): torchvision's files have it, an
# FCN does not.
UNUSED_LAYERS = frozenset({"fc", "classifier", "classifier.6"})
# torchvision's DenseNet files have older key names than its modules.
OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
BACKBONE, HEAD = "backbone.", "classifier."
"""Prefixes of a network's keys."""
# Files older than PyTorch 0.4.1 lack these counters, which only cumulative averaging reads.
OPTIONAL_SUFFIX = "num_batches_tracked"


class CheckpointError(StageError):
    """A weights file cannot be read or does not fit; the message names the difference."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write plain data and tensors. A kill at any moment leaves the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written; the old one remains.
    """
    try:
        with write_atomically(path) as file:
            torch.save(state, file)
    # torch.save hides the cause in a RuntimeError about its own position.
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(f"{path}: cannot be written: {exc.__context__ or exc}") from exc


def rounded_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state with the convolutions' weights as fp16, the rest unchanged.

    A run publishes these weights: the export takes half the space and is exactly the network that
    was scored.
    """
    return {
        key: value.half() if value.ndim == 4 else value
        for key, value in network.state_dict().items()
    }


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU; see `save_checkpoint`.

    Raises:
        CheckpointError: the file is missing or is not a checkpoint of plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: no such file") from exc
    except Exception as exc:  # torch.load has no error class of its own
        raise CheckpointError(f"{path}: not a checkpoint: {exc}") from exc
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: contains a {type(state).__name__}, not a mapping")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torchvision-layout ``.pth``, ``.npz`` or ``.safetensors`` file.

    Raises:
        CheckpointError: the file cannot be read, or not without unpickling objects.
    """
    if path.suffix in (".pth", ".pt"):
        state = load_checkpoint(path)
        if "model" in state:
            trained = state["model"].items()
            return {k.removeprefix(BACKBONE): v for k, v in trained if k.startswith(BACKBONE)}
        return {k: v for k, v in state.items() if isinstance(v, Tensor)}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        if path.suffix == ".safetensors":
            return load_file(path)
    except Exception as exc:  # each reader has its own errors
        raise CheckpointError(f"{path}: cannot be read: {exc}") from exc
    raise CheckpointError(f"{path}: expected .pth, .npz or .safetensors")


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load starting weights into a backbone; every key and shape must fit.

    From a checkpoint of an earlier run, its backbone is loaded.

    Raises:
        CheckpointError: lists each key that is missing, unknown or has another shape.
    """
    wanted = backbone.state_dict()
    weights = {}
    for name, tensor in read_weights(path).items():
        key = OLD_DENSENET_KEY.sub(r"\1\2.", name)
        if key.rpartition(".")[0] not in UNUSED_LAYERS:
            # A fully connected layer is a convolution with a kernel as large as its input.
            dense = tensor.ndim == 2 and key in wanted and tensor.numel() == wanted[key].numel()
            weights[key] = tensor.reshape(wanted[key].shape) if dense else tensor
    problems = [
        f"missing: {key}"
        for key in wanted
        if key not in weights and not key.endswith(OPTIONAL_SUFFIX)
    ]
    problems += [f"unknown: {key}" for key in weights if key not in wanted]
    problems += [
        f"shape {tuple(weights[key].shape)}, expected {tuple(wanted[key].shape)}: {key}"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{path}: {len(problems)} keys do not fit", *problems]))
    backbone.load_state_dict(weights, strict=False)


def load_start(network: SegmentationNetwork, path: Path) -> int:
    """Load starting weights into a new network: the backbone, and the head's tensors that fit.

    Only a checkpoint has a head. Its tensors are loaded where name and shape match.

    Returns:
        The number of tensors loaded into the head.

    Raises:
        CheckpointError: the backbone's keys or shapes do not fit.
    """
    load_backbone(network.backbone, path)
    trained = load_checkpoint(path).get("model", {}) if path.suffix in (".pth", ".pt") else {}
    wanted = network.state_dict()
    head = {
        key: value
        for key, value in trained.items()
        if key.startswith(HEAD) and key in wanted and wanted[key].shape == value.shape
    }
    network.load_state_dict(head, strict=False)
    return len(head)


def labels_of(state: dict[str, Any]) -> LabelSet:
    """Return a checkpoint's label set; a checkpoint without one has VOC's.

    Raises:
        ValueError: the label set is invalid.
    """
    return LabelSet.model_validate(state["labels"]) if "labels" in state else VOC_LABELS


class Trained(NamedTuple):
    """The part of a checkpoint that later stages need."""

    network: SegmentationNetwork
    """In eval mode, with its averaged weights."""
    recipe: Recipe
    labels: LabelSet


def load_network(path: Path) -> Trained:
    """Return a trained network with its recipe and its label set.

    Raises:
        CheckpointError: the file is not a checkpoint of a training run.
    """
    state = load_checkpoint(path)
    try:
        recipe = Recipe.model_validate(state["recipe"])
        labels = labels_of(state)
        network = build_network(recipe.network, len(labels))
        network.load_state_dict(state["model"])
    except (KeyError, RuntimeError, ValueError) as exc:
        raise CheckpointError(f"{path}: not a checkpoint of a training run: {exc}") from exc
    return Trained(network.eval(), recipe, labels)
