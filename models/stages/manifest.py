r"""Write an artefact's ``manifest.json``: sha256s, provenance and measured accuracy.

python -m models manifest --artifact models/artifacts/context_fcn_resnet50_8s \
        --checkpoint runs/cpu/checkpoint.pt --parity parity.json \
        --evaluation fp32/evaluation.json fp16/evaluation.json int8/evaluation.json \
        --weights-licence "..." --data-licence "..."
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.checkpoint import load_network
from models.errors import StageError
from models.graphs.network_file import NETWORK_FILES
from models.prediction import onnx_infer
from service.artefact.contract import Precision
from service.artefact.manifest import Accuracy, FileEntry, Manifest


class ManifestError(StageError):
    """The reports do not cover this artefact."""


def make_manifest(
    artefact: Path,
    *,
    recipe: dict[str, Any],
    evaluations: Sequence[dict[str, Any]],
    parity: dict[str, Any],
    licences: dict[str, str],
) -> Manifest:
    """Return the manifest of an artefact folder and all its networks.

    Raises:
        ManifestError: verification failed, or a network file has no evaluation.
        ContractError: a network has no contract.
    """
    if not parity["passed"]:
        raise ManifestError("the parity report says that verification failed")
    by_sha256 = {evaluation["sha256"]: evaluation for evaluation in evaluations}
    files: dict[str, FileEntry] = {}
    metrics: dict[Precision, Accuracy] = {}
    for precision, name in NETWORK_FILES.items():
        path = artefact / name
        if not path.exists() and precision != "fp32":
            continue
        _, contract = onnx_infer(path)
        entry = FileEntry.of(path, precision)
        if entry.sha256 not in by_sha256:
            raise ManifestError(f"no evaluation covers {path}: run evaluate again")
        if precision not in parity["set"]["pixel_agreement"]:
            raise ManifestError(f"the parity report does not cover {path.name}: run verify again")
        files[path.name] = entry
        metrics[precision] = Accuracy.model_validate(by_sha256[entry.sha256]["metrics"])
    if any(evaluation.get("protocol") != "service" for evaluation in evaluations):
        raise ManifestError("an evaluation uses another protocol than the service's")
    sets = {(evaluation["split"], evaluation["images"]) for evaluation in evaluations}
    if len(sets) != 1:
        raise ManifestError("the evaluations cover different sets of images")
    split, images = sets.pop()
    return Manifest(
        name=contract.name,
        version=contract.version,
        files=files,
        recipe=recipe,
        data={"split": split, "images": images},
        metrics=metrics,
        parity=parity,
        licences=licences,
        created=datetime.datetime.now(datetime.UTC).date(),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", required=True, help="evaluate's JSON for each network"
    )
    parser.add_argument("--parity", type=Path, required=True, help="verify's JSON")
    parser.add_argument("--weights-licence", required=True, help="licence of the starting weights")
    parser.add_argument(
        "--data-licence", required=True, help="licence of the training images and masks"
    )


def main(args: argparse.Namespace) -> int:
    """Write the manifest into the artefact folder."""
    recipe = load_network(args.checkpoint).recipe
    manifest = make_manifest(
        args.artifact,
        recipe=recipe.model_dump(mode="json"),
        evaluations=[json.loads(path.read_text(encoding="utf-8")) for path in args.evaluation],
        parity=json.loads(args.parity.read_text(encoding="utf-8")),
        licences={
            "code": "Apache-2.0",
            "starting_weights": args.weights_licence,
            "data": args.data_licence,
        },
    )
    print(manifest.write(args.artifact))
    return 0
