r"""Write an exported network as fp16 for GPUs: half the memory traffic, and tensor cores.

    python -m models half --artifact models/artifacts/context_fcn_resnet50_8s

Writes ``network.fp16.onnx`` beside ``network.onnx``, in seconds and without photos. The file has
the float network's operators, which all have CUDA kernels in ONNX Runtime, and no weights: while it
loads the graph, ONNX Runtime reads the float file's weights, multiplies them by BatchNorm's factor
in fp32 and rounds the product to fp16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.graphs.fp16 import halve
from models.graphs.network_file import NETWORK_FILES, save_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, required=True, help="folder of network.onnx")


def main(args: argparse.Namespace) -> int:
    """Write the fp16 network into the artefact folder."""
    save_network(halve(args.artifact / NETWORK_FILES["fp32"]), args.artifact, "fp16")
    return 0
