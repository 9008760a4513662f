"""The networks, by the name that recipes and artefacts use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from models.networks.fcn_resnet50 import (
    FcnResNet50,
    atrous_fcn_resnet50_16s,
    context_fcn_resnet50_16s,
    fcn_resnet50_32s,
)

NETWORKS: Final[dict[str, Callable[[], FcnResNet50]]] = {
    "fcn_resnet50_32s": fcn_resnet50_32s,
    "atrous_fcn_resnet50_16s": atrous_fcn_resnet50_16s,
    "context_fcn_resnet50_16s": context_fcn_resnet50_16s,
}


def build_network(name: str) -> FcnResNet50:
    """Return the network called ``name``, freshly initialised.

    Raises:
        ValueError: no network has that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name]()


__all__ = ["NETWORKS", "FcnResNet50", "build_network"]
