"""``python -m models STAGE``: fetch, train, export, half, quantize, evaluate, verify, manifest.

Stages meet through files: checkpoint.pt, the artefact folder, the JSON reports. ``describe`` needs
none of them.
"""

from __future__ import annotations

import argparse
import sys

from models.checkpoint import CheckpointError
from models.dataset import DatasetError
from models.graphs.network_file import GraphError
from models.prediction import DeviceError
from models.recipe import RecipeError
from models.stages import describe, evaluate, export, fetch, half, manifest, quantize, train, verify
from service.errors import SegmentError

STAGES = {
    "fetch": fetch,
    "train": train,
    "export": export,
    "half": half,
    "quantize": quantize,
    "evaluate": evaluate,
    "verify": verify,
    "manifest": manifest,
    "describe": describe,
}
USER_ERRORS = (
    CheckpointError,
    DatasetError,
    DeviceError,
    GraphError,
    RecipeError,
    SegmentError,
    evaluate.EvaluationError,
    export.ExportError,
    fetch.FetchError,
    manifest.ManifestError,
    train.TrainingError,
    OSError,
)


def main(argv: list[str] | None = None) -> int:
    """Run a stage; return its exit status. Errors a user can mend are one line, not a trace."""
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, module in STAGES.items():
        doc = module.__doc__ or ""
        stage = stages.add_parser(
            name,
            help=doc.partition("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(stage)
    args = parser.parse_args(argv)
    try:
        status: int = STAGES[args.stage].main(args)
        return status
    except USER_ERRORS as exc:
        print(f"{args.stage}: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
