"""Accuracy against CPU time, for our artefacts and Google Coral's DeepLabv3, in one run.

    python -m tests.benchmarks.front --data VOCdevkit --artifact DIR --coral FILE.tflite

Measures each artefact in each of its CPU precisions and at each working size, with the service's
data path, and each peer at the size of its file. Prints the table, and writes ``front.json`` and
``front.png`` into ``--out``. Accuracy does not depend on the machine's load: it is stored in
``accuracy.json``, so rerun the command to resume. With ``--accuracy-only`` the times can be
measured later, on a quiet machine. All times are measured again in each run, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.dataset import Sample, read_split
from models.metrics import ConfusionMatrix
from service.artefact import preprocessing
from service.artefact.contract import SHAPE_MULTIPLE, ModelContract, Precision
from service.artefact.files import sha256_of
from service.artefact.manifest import load_manifest
from service.artefact.preprocessing import Geometry, preprocess
from service.images import decoding
from service.images.decoding import DecodedPhoto, decode
from service.inference import session, upsampling
from service.inference.session import Model, load_model
from service.inference.upsampling import upsample
from service.settings import DEFAULT_MODEL
from service.system import available_cores
from tests.benchmarks.bench import environment
from tests.benchmarks.components import MAX_PIXELS
from tests.benchmarks.front_points import Candidate, Point, Role, draw, table

Bytes = npt.NDArray[np.uint8]
"""A photo ``(H, W, 3)`` in RGB, or a mask ``(H, W)`` of class ids."""

SIZES: Final = (256, 384, 512, 640)
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "int8")
TIMED_PHOTOS: Final = 8
ROUNDS: Final = 7

PACKAGES: Final = (
    *("onnxruntime", "ai-edge-litert", "numpy", "pillow", "simplejpeg", "cykooz-resizer"),
)
"""Packages that the masks depend on, besides the networks and `DATA_PATH`."""

DATA_PATH: Final = (decoding, preprocessing, session, upsampling)

CORAL_PADDING: Final = (128, 128, 128)
"""The zero point of the file's input quantisation."""


@dataclass(frozen=True, slots=True)
class Side(Candidate):
    """A loaded candidate. ``label`` maps a photo to ``(H, W) uint8`` class ids, on all cores."""

    label: Callable[[DecodedPhoto], Bytes]


def at_size(contract: ModelContract, size: int) -> ModelContract:
    """The contract with another working size; its listed shapes are scaled and rounded up.

    Raises pydantic's ``ValidationError`` for a size that a contract does not allow.
    """
    shapes = {
        tuple(_scaled(side, size, contract.working_size) for side in shape)
        for shape in contract.shapes
    }
    ascending = sorted(shapes, key=lambda shape: (math.prod(shape), shape))
    changes = {"working_size": size, "shapes": ascending}
    return ModelContract.model_validate({**contract.model_dump(), **changes})


def _scaled(side: int, size: int, working_size: int) -> int:
    return -(-side * size // (working_size * SHAPE_MULTIPLE)) * SHAPE_MULTIPLE


def artefact_sides(folder: Path, sizes: Iterable[int]) -> Iterator[Side]:
    """Our sides: an artefact in each CPU precision and at each size, without the service's queue.

    Raises `ArtefactError` if the folder cannot be served.
    """
    role: Role = "default" if folder.resolve() == DEFAULT_MODEL.resolve() else "artefact"
    manifest = load_manifest(folder)
    by_precision = {entry.precision: entry.sha256 for entry in manifest.files.values()}
    for precision in PRECISIONS:
        if precision not in by_precision:
            continue
        # An int8 network reads weights from the fp32 file.
        files = tuple(dict.fromkeys((by_precision[precision], by_precision["fp32"])))
        model = load_model(folder, "cpu", precision=precision)
        for size in sizes:
            sized = replace(model, contract=at_size(model.contract, size))
            label = partial(label_as_served, sized)
            yield Side(folder.name, precision, size, role, files, label)


def label_as_served(model: Model, photo: DecodedPhoto) -> Bytes:
    """The service's data path from decoded photo to mask: see `service.segmenter`."""
    contract = model.contract
    geometry = Geometry.plan(photo.size, contract.working_size, contract.shapes)
    image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
    return upsample(model.run(image[None])[0], geometry).mask


def coral_side(path: Path) -> Side:
    """A DeepLabv3 from Google Coral's model zoo in TensorFlow Lite's runtime, on all cores.

    Input ``(1, side, side, 3) uint8`` RGB, output ``(1, side, side)`` class ids.
    """
    # Only the benchmarks' environment has it.
    from ai_edge_litert import interpreter as litert

    interpreter = litert.Interpreter(str(path), num_threads=available_cores())
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def infer(image: Bytes) -> Bytes:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        ids: Bytes = interpreter.get_tensor(target["index"])[0].astype(np.uint8)
        return ids

    size = int(source["shape"][1])
    label = partial(label_as_coral, infer, size)
    return Side(path.stem, "int8", size, "peer", (sha256_of(path),), label)


def label_as_coral(infer: Callable[[Bytes], Bytes], size: int, photo: DecodedPhoto) -> Bytes:
    """Resize the longest side to ``size``, pad with mid-grey, infer, and resize the ids back.

    ``infer``: ``(size, size, 3) uint8`` RGB to ``(size, size) uint8`` class ids. The photo is
    resized by the same code as ours, the ids by nearest neighbour.
    """
    geometry = Geometry.plan(photo.size, size, [(size, size)])
    ids = infer(preprocess(photo.pixels, geometry, CORAL_PADDING, photo.box))
    height, width = geometry.resized
    back = Image.fromarray(ids[:height, :width]).resize(photo.size[::-1], Image.Resampling.NEAREST)
    return np.asarray(back)


def cache_key(candidate: Candidate, names: Sequence[str], code: str) -> str:
    """A hash of everything that a candidate's accuracy depends on.

    ``names``: the photos' names; ``code``: the hash of the data path, see `code_digest`.
    """
    parts = (candidate.files, candidate.precision, candidate.size, names, code)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def code_digest() -> str:
    """A hash of the source of both data paths and of the versions of the packages they call."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    here = (at_size, label_as_served, coral_side, label_as_coral)
    sources = [inspect.getsource(one) for one in (*DATA_PATH, *here)]
    return hashlib.sha256("\n".join((*versions, *sources)).encode()).hexdigest()


def count(side: Side, samples: Iterable[Sample]) -> npt.NDArray[np.int64]:
    """The confusion matrix over photos at native resolution, ``(21, 21) int64``.

    Raises `DatasetError` or `ImageError` if a photo or a mask is missing or wrong.
    """
    matrix = ConfusionMatrix()
    for sample in samples:
        photo = decode(sample.image_path.read_bytes(), MAX_PIXELS, side.size)
        matrix.update(np.asarray(sample.load_mask()), side.label(photo))
    return matrix.counts


def count_all(
    sides: Iterable[Side], samples: Sequence[Sample], cache: Path
) -> list[ConfusionMatrix]:
    """The confusion matrix of every side, from ``cache``, or counted and stored there."""
    names, code = [sample.name for sample in samples], code_digest()
    stored: dict[str, Any] = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    matrices = []
    for side in sides:
        key = cache_key(side, names, code)
        if key not in stored:
            counts = count(side, samples).tolist()
            stored[key] = {**about(side), "images": len(samples), "counts": counts}
            write_json(cache, stored)
        matrix = ConfusionMatrix(np.array(stored[key]["counts"], dtype=np.int64))
        found = f"mIoU {matrix.mean_iou():.4f}"
        print(f"{side.network} {side.precision} {side.size}: {found}", flush=True)
        matrices.append(matrix)
    return matrices


def about(candidate: Candidate) -> dict[str, Any]:
    """The fields of a candidate, without figures."""
    return {field.name: getattr(candidate, field.name) for field in fields(Candidate)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def time_all(
    sides: Sequence[Side], photos: Sequence[DecodedPhoto], rounds: int = ROUNDS
) -> list[tuple[float, ...]]:
    """Milliseconds per photo for each side and round; sides alternate, photos run one at a time."""
    for side in sides:  # the first run of a shape allocates memory
        for photo in photos:
            side.label(photo)
    figures: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, figures, strict=True):
            # Not measured: meanwhile the previous side's threads stop spinning.
            side.label(photos[-1])
            started = time.perf_counter()
            for photo in photos:
                side.label(photo)
            found.append((time.perf_counter() - started) * 1000 / len(photos))
    return [tuple(found) for found in figures]


def evenly(samples: Sequence[Sample], wanted: int) -> list[DecodedPhoto]:
    """At most ``wanted`` decoded photos, evenly spaced over the list."""
    chosen = samples[:: max(1, len(samples) // wanted)][:wanted]
    return [decode(sample.image_path.read_bytes(), MAX_PIXELS) for sample in chosen]


def main() -> int:
    """Count accuracy, measure times, print and write the results."""
    given = _parser().parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    samples = read_split(given.data, given.split)[: given.images]
    sides = [side for folder in given.artifact for side in artefact_sides(folder, given.sizes)]
    sides += [coral_side(path) for path in given.coral]
    matrices = count_all(sides, samples, given.out / "accuracy.json")
    if given.accuracy_only:
        return 0

    machine = environment(PACKAGES)
    machine |= {"split": given.split, "images": len(samples), "rounds": ROUNDS}
    photos = evenly(samples, TIMED_PHOTOS)
    points = [
        Point(**about(side), miou=m.mean_iou(), pixel_accuracy=m.pixel_accuracy(), rounds_ms=found)
        for side, m, found in zip(sides, matrices, time_all(sides, photos), strict=True)
    ]
    write_json(
        given.out / "front.json",
        {
            "environment": machine,
            "timed": len(photos),
            "points": [asdict(point) for point in points],
        },
    )
    title = f"{len(samples)} photos of {given.split}; {machine['cores']} cores of {machine['cpu']}"
    draw(points, title, given.out / "front.png")
    print(f"\n{table(points)}\n\nwritten to {given.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks.front",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="VOCdevkit", help="or its VOC2012 folder"
    )
    several: dict[str, Any] = {"type": Path, "nargs": "+", "action": "extend"}
    parser.add_argument("--artifact", **several, required=True, metavar="DIR", help="artefacts")
    parser.add_argument("--coral", **several, default=[], metavar="FILE.tflite", help="peers")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=SIZES,
        help="working sizes: pixels of the longest side",
    )
    parser.add_argument("--split", default="val", help="VOC split (default val)")
    parser.add_argument("--images", type=int, help="use only the first IMAGES photos of the split")
    parser.add_argument("--accuracy-only", action="store_true", help="measure no times")
    parser.add_argument("--out", type=Path, default=Path("runs/front"), help="output folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
