r"""Write an exported network as fp16 for GPUs: half the memory traffic, and tensor cores.

    python -m models half --artifact models/artifacts/context_fcn_resnet50_8s

Writes ``network.fp16.onnx`` beside ``network.onnx``, in seconds and without photos. It has the
float network's operators, for each of which ONNX Runtime has a CUDA kernel, and no weights: ONNX
Runtime reads the float file's, multiplies them by BatchNorm's factor in fp32 and rounds the
product to fp16, all while it loads the graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.graphs.fp16 import halve
from models.graphs.network_file import FILES, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, required=True, help="folder of network.onnx")


def main(args: argparse.Namespace) -> int:
    """Write the fp16 network into the artefact folder."""
    save(halve(args.artifact / FILES["fp32"]), args.artifact, "fp16")
    return 0
