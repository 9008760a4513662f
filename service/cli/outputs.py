"""The outputs of ``fcn-segment predict``: their paths, and which of them exist already."""

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
"""Suffixes of photos in a folder; a file that is an argument itself may have any name."""

VOC_MASKS: Final = Path("SegmentationClass")
VOC_LIST: Final = Path("ImageSets") / "Segmentation" / "pred.txt"
COCO_NAME: Final = "annotations.json"
COCO_PART_NAME: Final = "annotations.jsonl.part"


def find_photos(inputs: Iterable[Path], out: Path | None = None) -> dict[Path, Path]:
    """The photos in files and folders: ``{photo: path below its input}``, without duplicates.

    Files in ``out`` are left out.
    """
    relative_paths: dict[Path, Path] = {}
    seen: set[Path] = set()
    for argument in inputs:
        for photo, relative in _photos(argument, out):
            if photo.resolve() not in seen:
                seen.add(photo.resolve())
                relative_paths[photo] = relative
    return relative_paths


def plan_outputs(inputs: Iterable[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """The output of each photo: ``{photo: output}``, in the order of ``inputs``.

    An output keeps the photo's path below its input, and its stem. Photos that would share an
    output keep their suffix too (``a.jpg.png``) and, if needed, get a number (``a-2.jpg.png``).
    Files in ``out`` are not photos. Raises `SettingsError` if an output would overwrite a photo.
    """
    relative_paths = find_photos(inputs, out)
    photos = {photo.resolve() for photo in relative_paths}
    wanted = [relative.with_suffix(suffix) for relative in relative_paths.values()]
    outputs: dict[Path, Path] = {}
    taken: set[Path] = set()
    for (photo, relative), short in zip(relative_paths.items(), wanted, strict=True):
        target = short if wanted.count(short) == 1 else relative.with_name(relative.name + suffix)
        number = 2
        while target in taken:
            target = relative.with_name(f"{relative.stem}-{number}{relative.suffix}{suffix}")
            number += 1
        taken.add(target)
        if (out / target).resolve() in photos:
            raise SettingsError(f"--out {out} would overwrite the photo {out / target}")
        outputs[photo] = out / target
    return outputs


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """One file per photo in ``folder``; ``names``: the file that lists them, if any."""

    outputs: Mapping[Path, Path]
    folder: Path
    names: Path | None = None

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.outputs.keys()

    def has(self, photo: Path) -> bool:
        """Whether the photo's output exists."""
        return self.outputs[photo].exists()

    def add(self, photo: Path, content: bytes) -> None:
        """Write a photo's output."""
        write_file(self.outputs[photo], content)

    def set_classes(self, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """No effect: these outputs do not depend on the classes."""

    def is_complete(self) -> bool:
        """True: once every photo has its file, only the list is missing; it is written here."""
        self.finish()
        return True

    def finish(self) -> None:
        """Write the list of existing files, if there is one."""
        if self.names is not None:
            existing = [path for path in self.outputs.values() if path.exists()]
            lines = [path.relative_to(self.folder).with_suffix("").as_posix() for path in existing]
            write_file(self.names, "".join(f"{line}\n" for line in lines).encode())

    @classmethod
    def voc(cls, inputs: Iterable[Path], out: Path) -> OutputFiles:
        """VOC's layout: masks in ``SegmentationClass`` and the list of their names."""
        folder = out / VOC_MASKS
        return cls(plan_outputs(inputs, folder, ".png"), folder, out / VOC_LIST)


@dataclass(slots=True)
class CocoFile:
    """One COCO file for all photos, with one annotation per photo and class.

    Until all photos are done, each photo's record is a line of a partial file, after a line with
    the categories. A later run resumes from it if its model has the same classes. ``overwrite``
    discards the records of earlier runs.
    """

    names: Mapping[Path, str]
    out: Path
    overwrite: bool = False
    _labels: LabelSet = field(default=VOC_LABELS, init=False)
    _class_ids: Collection[int] = field(default=VOC_LABELS.foreground, init=False)
    _earlier: dict[int, str] = field(default_factory=dict, init=False)
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
        """Name photos by their paths below their inputs, or by whole paths if two are equal."""
        relative_paths = find_photos(inputs)
        short = [relative.as_posix() for relative in relative_paths.values()]
        names = {
            photo: name if short.count(name) == 1 else photo.as_posix()
            for photo, name in zip(relative_paths, short, strict=True)
        }
        return cls(names, out, overwrite)

    def set_classes(self, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """Set the categories: the classes ``chosen`` of ``labels``, or all except background.

        Raises `SettingsError` if records of earlier runs have other classes.
        """
        names = dict(enumerate(labels.names))
        for class_id, name in self._earlier.items():
            if names.get(class_id) != name:
                raise SettingsError(
                    f"{self.out}: in the annotations of an earlier run class {class_id} is "
                    f"{name!r}, unlike this model's; --overwrite replaces them"
                )
        self._labels = labels
        self._class_ids = labels.foreground if chosen is None else chosen

    def is_complete(self) -> bool:
        """Whether the COCO file exists and contains every record."""
        return not (self.overwrite or self._part.exists()) and (self.out / COCO_NAME).exists()

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.names.keys()

    def has(self, photo: Path) -> bool:
        """Whether the photo has a record."""
        return self.names[photo] in self._records

    def add(self, photo: Path, content: bytes) -> None:
        """Add a photo's record; ``content`` is the JSON of `Segmentation`."""
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
                if not file.tell():
                    names = dict(enumerate(self._labels.names))
                    file.write(json.dumps({"categories": names}) + "\n")
                file.write(line)
            self._records[name] = record

    def finish(self) -> None:
        """Write the COCO file: first records of other photos, then those of this run's photos."""
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
            self._earlier |= {one["id"]: one["name"] for one in whole["categories"]}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as exc:
            raise SettingsError(
                f"{path} is not a COCO file of an earlier run; --overwrite replaces it"
            ) from exc
        yield from records.values()

    def _unfinished(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            names = dict(enumerate(VOC_LABELS.names))  # those of 0.1.0, which wrote no categories
            for line in self._part.read_text(encoding="utf-8").splitlines():
                # The last line may be incomplete.
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if "categories" in record:
                        names = {int(index): name for index, name in record["categories"].items()}
                    else:
                        yield record
            self._earlier |= names


def _annotation(found: SegmentedClass) -> dict[str, Any]:
    """The annotation of one class of one photo, without ids."""
    # COCO's own files have polygons for objects and run lengths for crowds; tools choose the
    # decoder by `iscrowd`.
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


def _photos(argument: Path, out: Path | None) -> list[tuple[Path, Path]]:
    """The photos of one argument, each with its path below it."""
    if not argument.is_dir():
        return [(argument, Path(argument.name))]
    inside = None if out is None else out.resolve()
    return [
        (path, path.relative_to(argument))
        for path in sorted(argument.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not (inside and path.resolve().is_relative_to(inside))
    ]
