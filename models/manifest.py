r"""Write an artefact's ``manifest.json``, last of all: sha256s, provenance and measured accuracy.

python -m models manifest --artifact models/artifacts/context_fcn_resnet50_16s \
        --checkpoint runs/cpu/checkpoint.pt --evaluation evaluation/evaluation.json \
        --parity parity.json --weights-licence "..." --data-licence "..."
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from models.checkpoint import load_network
from models.prediction import NETWORK_FILE, onnx_infer
from service.manifest import Accuracy, FileEntry, Manifest


class ManifestError(Exception):
    """The reports do not vouch for this artefact."""


def make_manifest(
    artifact: Path,
    *,
    recipe: dict[str, Any],
    evaluation: dict[str, Any],
    parity: dict[str, Any],
    licences: dict[str, str],
) -> Manifest:
    """Return the manifest of an artefact folder.

    Raises:
        ManifestError: parity failed, or the evaluation is of another file than the artefact's.
        ContractError: the network carries no contract.
    """
    path = artifact / NETWORK_FILE
    _, contract = onnx_infer(path)
    entry = FileEntry.of(path, contract.precision)
    if not parity["passed"]:
        raise ManifestError("the parity report says that verification failed")
    if evaluation["sha256"] != entry.sha256:
        raise ManifestError(f"the evaluation is of another file than {path}: run evaluate again")
    return Manifest(
        name=contract.name,
        version=contract.version,
        files={NETWORK_FILE: entry},
        recipe=recipe,
        data={key: evaluation[key] for key in ("split", "images")},
        metrics={contract.precision: Accuracy.model_validate(evaluation["metrics"])},
        parity=parity,
        licences=licences,
        created=datetime.datetime.now(datetime.UTC).date(),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluate's JSON")
    parser.add_argument("--parity", type=Path, required=True, help="verify's JSON")
    parser.add_argument("--weights-licence", required=True, help="of the starting weights")
    parser.add_argument("--data-licence", required=True, help="of the training images and masks")


def main(args: argparse.Namespace) -> int:
    """Write the manifest into the artefact folder."""
    _, recipe = load_network(args.checkpoint)
    manifest = make_manifest(
        args.artifact,
        recipe=recipe.model_dump(mode="json"),
        evaluation=json.loads(args.evaluation.read_text(encoding="utf-8")),
        parity=json.loads(args.parity.read_text(encoding="utf-8")),
        licences={
            "code": "Apache-2.0",
            "starting_weights": args.weights_licence,
            "data": args.data_licence,
        },
    )
    print(manifest.write(args.artifact))
    return 0
