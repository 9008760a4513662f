"""The outputs of ``fcn-segment predict``: their paths, and which of them exist already."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.artefact.files import replace_file, write_atomically
from service.artefact.labels import LabelSet
from service.cli.photos import RealFolders
from service.cli.records import JsonLines, Origin, PhotoId, compare
from service.errors import SettingsError

VOC_MASKS: Final = Path("SegmentationClass")
VOC_LIST: Final = Path("ImageSets") / "Segmentation" / "pred.txt"
RECORDS_NAME: Final = ".fcn-segment.jsonl"
STDOUT: Final = Path("/dev/stdout")
"""The output folder that the argument ``-`` stands for."""


def plan_outputs(photos: Mapping[Path, Path], out: Path, suffix: str) -> dict[Path, Path]:
    """The output of each photo: ``{photo: output}``, in the order of ``photos``.

    ``photos``: `Found.photos`. An output keeps the photo's path below its input, and its stem.
    Photos that would share an output keep their suffix too (``a.jpg.png``) and, if needed, get a
    number (``a-2.jpg.png``). Raises `SettingsError` if an output would overwrite a photo.
    """
    folders = RealFolders()
    places = {(folders.real(photo.parent), photo.name) for photo in photos}
    wanted = [relative.with_suffix(suffix) for relative in photos.values()]
    counts = Counter(wanted)
    outputs: dict[Path, Path] = {}
    taken: set[Path] = set()
    numbers: Counter[Path] = Counter()
    for (photo, relative), short in zip(photos.items(), wanted, strict=True):
        target = short if counts[short] == 1 else relative.with_name(relative.name + suffix)
        while target in taken:
            numbers[relative] += 1
            name = f"{relative.stem}-{numbers[relative] + 1}{relative.suffix}{suffix}"
            target = relative.with_name(name)
        taken.add(target)
        output = out / target
        if (folders.real(output.parent), output.name) in places:
            raise SettingsError(f"--out {out} would overwrite the photo {output}")
        outputs[photo] = output
    return outputs


@dataclass(slots=True)
class OutputFiles:
    """One file per photo below ``out``; ``listed``: a file with their names, and their folder.

    A hidden file in ``out`` records the options and the photo of each output.
    """

    outputs: Mapping[Path, Path]
    out: Path
    overwrite: bool = False
    listed: tuple[Path, Path] | None = None
    _origin: Origin = field(default_factory=dict, init=False)
    _photo_ids: dict[str, PhotoId | None] = field(default_factory=dict, init=False)
    _records: JsonLines = field(init=False)

    def __post_init__(self) -> None:
        self._records = JsonLines(self.out / RECORDS_NAME)

    @classmethod
    def voc(cls, photos: Mapping[Path, Path], out: Path, overwrite: bool) -> OutputFiles:
        """VOC's layout: masks in ``SegmentationClass`` and the list of their names."""
        folder = out / VOC_MASKS
        outputs = plan_outputs(photos, folder, ".png")
        return cls(outputs, out, overwrite, (out / VOC_LIST, folder))

    @property
    def photos(self) -> Collection[Path]:
        """All photos."""
        return self.outputs.keys()

    def resume(self, origin: Origin, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """Look for outputs of earlier runs.

        Raises `SettingsError` if one comes from other options or has no record.
        """
        self._origin = origin
        records = {one.get("output"): one for one in self._records.read()}
        for output in () if self.overwrite else self.outputs.values():
            if output.exists():
                record: dict[str, Any] = records.get(self._key(output), {})
                if difference := compare(record.get("options"), origin):
                    raise SettingsError(
                        f"{output} comes from another run ({difference}); choose another --out, "
                        "or --overwrite to replace existing outputs"
                    )
                self._photo_ids[self._key(output)] = PhotoId.parse(record.get("photo"))

    def has(self, photo: Path, content: bytes | None = None) -> bool:
        """Whether the output exists of the photo, with this content if it was read."""
        known = self._photo_ids.get(self._key(self.outputs[photo]))
        return known is not None and known.fits(photo, content)

    def add(self, photo: Path, photo_id: PhotoId, content: bytes) -> None:
        """Write a photo's output."""
        output = self.outputs[photo]
        record = {
            "output": self._key(output),
            "options": dict(self._origin),
            "photo": photo_id.as_json(),
        }
        with write_atomically(output) as file:
            file.write(content)
            file.flush()
            # No output may ever have another one's record: first the old output goes, then the
            # record changes, then the new one appears.
            output.unlink(missing_ok=True)
            self._records.append(record)

    def finish(self) -> None:
        """Write the list of existing files, if there is one."""
        if self.listed is not None:
            path, folder = self.listed
            existing = [output for output in self.outputs.values() if output.exists()]
            lines = [f"{one.relative_to(folder).with_suffix('').as_posix()}\n" for one in existing]
            # A name's own bytes: it need not be UTF-8.
            replace_file(path, os.fsencode("".join(lines)))

    def _key(self, output: Path) -> str:
        return output.relative_to(self.out).as_posix()


@dataclass(frozen=True, slots=True)
class StandardOutput:
    """The output of one photo, written to stdout."""

    photo: Path

    @property
    def photos(self) -> Collection[Path]:
        """The photo."""
        return (self.photo,)

    def resume(self, origin: Origin, labels: LabelSet, chosen: Collection[int] | None) -> None:
        """No effect: there is nothing to resume."""

    def has(self, photo: Path, content: bytes | None = None) -> bool:
        """False."""
        return False

    def add(self, photo: Path, photo_id: PhotoId, content: bytes) -> None:
        """Write the photo's output."""
        with open(1, "wb", closefd=False) as file:
            file.write(content)

    def finish(self) -> None:
        """No effect."""
