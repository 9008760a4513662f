"""The networks, by their names in recipes and artefacts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from models.networks.densenet import atrous_densenet, densenet_fcn
from models.networks.fcn_resnet50 import (
    atrous_fcn_resnet50_16s,
    context_fcn_resnet50_8s,
    context_fcn_resnet50_16s,
    fcn_resnet50_8s,
    fcn_resnet50_16s,
    fcn_resnet50_32s,
)
from models.networks.segmentation import SegmentationNetwork
from models.networks.vgg16 import atrous_fcn_vgg16_16s, fcn_vgg16_32s
from service.artefact.voc import NUM_CLASSES

NETWORKS: Final[dict[str, Callable[[int], SegmentationNetwork]]] = {
    "fcn_resnet50_32s": fcn_resnet50_32s,
    "fcn_resnet50_16s": fcn_resnet50_16s,
    "fcn_resnet50_8s": fcn_resnet50_8s,
    "atrous_fcn_resnet50_16s": atrous_fcn_resnet50_16s,
    "context_fcn_resnet50_16s": context_fcn_resnet50_16s,
    "context_fcn_resnet50_8s": context_fcn_resnet50_8s,
    "fcn_vgg16_32s": fcn_vgg16_32s,
    "atrous_fcn_vgg16_16s": atrous_fcn_vgg16_16s,
    "densenet_fcn": densenet_fcn,
    "atrous_densenet": atrous_densenet,
}


def build_network(name: str, classes: int = NUM_CLASSES) -> SegmentationNetwork:
    """Return the network called ``name`` for that many classes, freshly initialised.

    Raises:
        ValueError: unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](classes)


__all__ = ["NETWORKS", "SegmentationNetwork", "build_network"]
