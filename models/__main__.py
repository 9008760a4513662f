"""``python -m models STAGE``: the offline stages, one command each.

Stages exchange files: checkpoint.pt, the artefact folder, the JSON reports.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from models.errors import StageError
from service.errors import SegmentError

STAGES = {
    "fetch": "download VOC 2012, SBD's masks and ImageNet's ResNet-50",
    "train": "train a network from a recipe",
    "export": "export a checkpoint to ONNX",
    "half": "write an exported network as fp16 for GPUs",
    "quantize": "write an exported network as int8 for CPUs",
    "evaluate": "score a checkpoint, an artefact or a running service",
    "verify": "compare a checkpoint with its exported networks; fail below the gates",
    "manifest": "write the artefact's manifest.json; the last stage",
    "describe": "describe a network's architecture as a table, JSON or a picture",
}
"""What each module in `models.stages` does. Its name is the command."""


def main(argv: list[str] | None = None) -> int:
    """Run a stage; return its exit status. Errors that a user can correct are one line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, help_text in STAGES.items():
        stage = stages.add_parser(
            name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv[:1]:
            # Only this stage is imported: most stages load PyTorch, which takes seconds.
            module = import_module(f"models.stages.{name}")
            stage.description = module.__doc__
            module.add_arguments(stage)
    args = parser.parse_args(argv)
    try:
        status: int = module.main(args)
        return status
    except (StageError, SegmentError, OSError) as exc:
        print(f"{args.stage}: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
