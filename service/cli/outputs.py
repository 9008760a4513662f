"""The outputs of ``fcn-segment predict``: their places, and which of them exist already."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.artefact.files import write_atomically
from service.artefact.labels import VOC_LABELS, LabelSet
from service.errors import SettingsError
from service.schemas import Segmentation, SegmentedClass

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)
"""What is taken for a photo in a folder; files that are named themselves may have any name."""

VOC_MASKS: Final = Path("SegmentationClass")
VOC_LIST: Final = Path("ImageSets") / "Segmentation" / "pred.txt"
COCO_NAME: Final = "annotations.json"
COCO_PART_NAME: Final = "annotations.jsonl.part"


def find_photos(inputs: Iterable[Path], out: Path | None = None) -> dict[Path, Path]:
    """The photos that arguments name, each with its place below what was named, each once.

    Photos in a folder keep their place below it; what lies in ``out`` is not taken for a photo.
    """
    places: dict[Path, Path] = {}
    seen: set[Path] = set()
    for named in inputs:
        for photo, place in _photos(named, out):
            if photo.resolve() not in seen:
                seen.add(photo.resolve())
                places[photo] = place
    return places


def plan_outputs(inputs: Iterable[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """Where the answer of each photo goes: ``{photo: output}``, sorted by what was named first.

    Photos in a folder keep their place below it, stems are kept. Photos that would share an
    output keep their suffix too (``a.jpg.png``), and past that get a number (``a-2.jpg.png``).
    What already lies in ``out`` is not taken for a photo. Raises `SettingsError` if an output
    would overwrite a photo.
    """
    places = find_photos(inputs, out)
    photos = {photo.resolve() for photo in places}
    wanted = [place.with_suffix(suffix) for place in places.values()]
    outputs: dict[Path, Path] = {}
    taken: set[Path] = set()
    for (photo, place), short in zip(places.items(), wanted, strict=True):
        target = short if wanted.count(short) == 1 else place.with_name(place.name + suffix)
        number = 2
        while target in taken:
            target = place.with_name(f"{place.stem}-{number}{place.suffix}{suffix}")
            number += 1
        taken.add(target)
        if (out / target).resolve() in photos:
            raise SettingsError(f"--out {out} would overwrite the photo {out / target}")
        outputs[photo] = out / target
    return outputs


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """One file per photo; ``folder`` holds them; ``names``: the file that lists them, if any."""

    outputs: Mapping[Path, Path]
    folder: Path
    names: Path | None = None

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.outputs.keys()

    def has(self, photo: Path) -> bool:
        """Whether the answer is there."""
        return self.outputs[photo].exists()

    def take(self, photo: Path, content: bytes) -> None:
        """Write an answer."""
        write_file(self.outputs[photo], content)

    def use(self, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """Nothing here depends on the classes."""

    def is_complete(self) -> bool:
        """Whether nothing is left to do once every photo has its file."""
        self.finish()
        return True

    def finish(self) -> None:
        """Write the list of the files that exist."""
        if self.names is not None:
            there = [path for path in self.outputs.values() if path.exists()]
            lines = [path.relative_to(self.folder).with_suffix("").as_posix() for path in there]
            write_file(self.names, "".join(f"{line}\n" for line in lines).encode())

    @classmethod
    def voc(cls, inputs: Iterable[Path], out: Path) -> OutputFiles:
        """VOC's layout: masks in ``SegmentationClass``, and the list of their names."""
        folder = out / VOC_MASKS
        return cls(plan_outputs(inputs, folder, ".png"), folder, out / VOC_LIST)


@dataclass(slots=True)
class CocoFile:
    """One COCO file for all photos, with an annotation for each class in each of them.

    Until all photos are done, records are lines of a file beside it, so that a later run resumes;
    ``overwrite`` discards what earlier runs left.
    """

    names: Mapping[Path, str]
    out: Path
    overwrite: bool = False
    _labels: LabelSet = field(default=VOC_LABELS, init=False)
    _class_ids: Collection[int] = field(default=VOC_LABELS.foreground, init=False)
    _records: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if self.overwrite:
            self._part.unlink(missing_ok=True)
            return
        for record in (*self._finished(), *self._unfinished()):
            self._records[record["image"]["file_name"]] = record

    @classmethod
    def plan(cls, inputs: Iterable[Path], out: Path, overwrite: bool) -> CocoFile:
        """Name photos by their place below the given folder, or by whole paths where two clash."""
        places = find_photos(inputs)
        short = [place.as_posix() for place in places.values()]
        names = {
            photo: name if short.count(name) == 1 else photo.as_posix()
            for photo, name in zip(places, short, strict=True)
        }
        return cls(names, out, overwrite)

    def use(self, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """Take the categories from ``labels``: the classes ``chosen``, or all but background."""
        self._labels = labels
        self._class_ids = labels.foreground if chosen is None else chosen

    def is_complete(self) -> bool:
        """Whether the whole file exists, and nothing that it lacks."""
        return (self.out / COCO_NAME).exists() and not self._part.exists()

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.names.keys()

    def has(self, photo: Path) -> bool:
        """Whether the photo's record is there."""
        return self.names[photo] in self._records

    def take(self, photo: Path, content: bytes) -> None:
        """Note an answer: the JSON of `Segmentation`."""
        found = Segmentation.model_validate_json(content)
        name = self.names[photo]
        record = {
            "image": {"file_name": name, "width": found.width, "height": found.height},
            "annotations": [_annotation(one) for one in found.classes if one.id in self._class_ids],
        }
        line = json.dumps(record, separators=(",", ":")) + "\n"
        with self._lock:
            self.out.mkdir(parents=True, exist_ok=True)
            with self._part.open("a", encoding="utf-8") as file:
                file.write(line)
            self._records[name] = record

    def finish(self) -> None:
        """Write the whole file: first what was there before, then by the order of the photos."""
        order = {name: number for number, name in enumerate(self.names.values())}
        records = sorted(
            self._records.values(), key=lambda one: order.get(one["image"]["file_name"], -1)
        )
        annotations: list[dict[str, Any]] = []
        for number, record in enumerate(records, 1):
            for annotation in record["annotations"]:
                ids = {"id": len(annotations) + 1, "image_id": number}
                annotations.append({**annotation, **ids})
        used = {one["category_id"] for one in annotations} | set(self._class_ids)
        whole = {
            "info": {"description": "Predicted by FCN Segment"},
            "images": [{**one["image"], "id": number} for number, one in enumerate(records, 1)],
            "categories": [
                {"id": index, "name": self._labels.names[index], "supercategory": ""}
                for index in sorted(used)
            ],
            "annotations": annotations,
        }
        write_file(self.out / COCO_NAME, json.dumps(whole, separators=(",", ":")).encode())
        self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self.out / COCO_PART_NAME

    def _finished(self) -> Iterator[dict[str, Any]]:
        path = self.out / COCO_NAME
        try:
            whole = json.loads(path.read_bytes())
            records: dict[int, dict[str, Any]] = {
                one["id"]: {"image": {**one, "id": None}, "annotations": []}
                for one in whole["images"]
            }
            for one in whole["annotations"]:
                records[one["image_id"]]["annotations"].append(one)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as exc:
            raise SettingsError(
                f"{path} is not a COCO file of an earlier run; --overwrite replaces it"
            ) from exc
        yield from records.values()

    def _unfinished(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            for line in self._part.read_text(encoding="utf-8").splitlines():
                # The last one may have been cut off.
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def _annotation(found: SegmentedClass) -> dict[str, Any]:
    """One class of one photo, without ids."""
    # COCO's own files have polygons for objects and run lengths for what it calls crowds, and
    # tools tell the two apart by that flag.
    segmentation: Any = found.polygons
    if found.rle is not None:
        segmentation = {"size": list(found.rle.size), "counts": found.rle.counts}
    return {
        "category_id": found.id,
        "segmentation": segmentation,
        "bbox": list(found.bbox),
        "area": found.pixels,
        "iscrowd": int(found.rle is not None),
        "score": round(found.confidence, 4),
    }


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content)


def _photos(named: Path, out: Path | None) -> list[tuple[Path, Path]]:
    """The photos that one argument names, each with its place below that."""
    if not named.is_dir():
        return [(named, Path(named.name))]
    inside = None if out is None else out.resolve()
    return [
        (path, path.relative_to(named))
        for path in sorted(named.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not (inside and path.resolve().is_relative_to(inside))
    ]
