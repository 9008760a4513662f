"""The output of ``fcn-segment predict --format coco``: one COCO file for all photos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.artefact.files import replace_file
from service.artefact.labels import VOC_LABELS, LabelSet
from service.cli.records import JsonLines, Origin, PhotoId, compare
from service.errors import SettingsError
from service.schemas import Segmentation, SegmentedClass

COCO_NAME: Final = "annotations.json"
COCO_PART_NAME: Final = "annotations.jsonl.part"


@dataclass(slots=True)
class CocoFile:
    """One COCO file for all photos, with one annotation per photo and class.

    Until all photos are done, each photo's record is a line of a partial file, after a line with
    the options. A later run with the same options resumes from both files; records of photos that
    have changed are replaced. ``overwrite`` discards the records of earlier runs.
    """

    names: Mapping[Path, str]
    out: Path
    overwrite: bool = False
    _origin: Origin = field(default_factory=dict, init=False)
    _labels: LabelSet = field(default=VOC_LABELS, init=False)
    _class_ids: Collection[int] = field(default=VOC_LABELS.foreground, init=False)
    _records: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _part: JsonLines = field(init=False)

    def __post_init__(self) -> None:
        self._part = JsonLines(self.out / COCO_PART_NAME)

    @classmethod
    def plan(cls, photos: Mapping[Path, Path], out: Path, overwrite: bool) -> CocoFile:
        """Name photos by their paths below their inputs, or by whole paths if two are equal."""
        short = {photo: relative.as_posix() for photo, relative in photos.items()}
        counts = Counter(short.values())
        names = {
            photo: name if counts[name] == 1 else photo.as_posix() for photo, name in short.items()
        }
        return cls(names, out, overwrite)

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.names.keys()

    def resume(self, origin: Origin, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """Take up the records of earlier runs.

        The categories are the classes ``chosen`` of ``labels``, or all except background. Raises
        `SettingsError` if earlier records come from other options.
        """
        self._origin = origin
        self._labels = labels
        self._class_ids = labels.foreground if chosen is None else chosen
        if self.overwrite:
            self._part.remove()
        else:
            for record in (*self._finished(), *self._unfinished()):
                self._records[record["image"]["file_name"]] = record
        self._part.append({"options": dict(origin)})

    def has(self, photo: Path, content: bytes | None = None) -> bool:
        """Whether the photo, with this content if it was read, has a record."""
        record = self._records.get(self.names[photo])
        known = None if record is None else PhotoId.parse(record["image"].get("photo"))
        return known is not None and known.fits(photo, content)

    def add(self, photo: Path, photo_id: PhotoId, content: bytes) -> None:
        """Add a photo's record; ``content`` is the JSON of `Segmentation`."""
        found = Segmentation.model_validate_json(content)
        name = self.names[photo]
        size = {"width": found.width, "height": found.height}
        record = {
            "image": {"file_name": name, **size, "photo": photo_id.as_json()},
            "annotations": [_annotation(one) for one in found.classes if one.id in self._class_ids],
        }
        self._part.append(record)
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
        whole = {
            "info": {"description": "Predicted by FCN Segment", "options": dict(self._origin)},
            "images": [{**one["image"], "id": number} for number, one in enumerate(records, 1)],
            "categories": [
                {"id": index, "name": self._labels.names[index], "supercategory": ""}
                for index in sorted(self._class_ids)
            ],
            "annotations": annotations,
        }
        replace_file(self.out / COCO_NAME, json.dumps(whole, separators=(",", ":")).encode())
        self._part.remove()

    def _check(self, path: Path, origin: object) -> None:
        if difference := compare(origin, self._origin):
            raise SettingsError(
                f"{path} comes from other options ({difference}); choose another --out, or "
                "--overwrite to replace it"
            )

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
            origin = whole["info"].get("options")
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise SettingsError(
                f"{path} is not a COCO file of an earlier run; --overwrite replaces it"
            ) from exc
        self._check(path, origin)
        yield from records.values()

    def _unfinished(self) -> Iterator[dict[str, Any]]:
        origin = None
        for line in self._part.read():
            if "image" not in line:
                origin = line.get("options")
                continue
            self._check(self._part.path, origin)
            yield line


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
