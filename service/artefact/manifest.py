"""``manifest.json``: the facts about an artefact folder that its graphs cannot carry.

The training stage writes it last, with these classes. The service reads it first and loads no file
whose sha256 differs from the manifest's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from service.artefact.contract import ModelContract, Precision, UnitInterval, one_line
from service.artefact.files import replace_file, sha256_of
from service.errors import ContractError, IntegrityError

MANIFEST_NAME: Final = "manifest.json"


class FileEntry(BaseModel):
    """One network file: sha256 (hex), size in bytes, precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0)
    precision: Precision

    @classmethod
    def of(cls, path: Path, precision: Precision) -> Self:
        """Measure a file on disk. Raises `OSError` if it cannot be read."""
        return cls(sha256=sha256_of(path), bytes=path.stat().st_size, precision=precision)


class Accuracy(BaseModel):
    """Scores of one confusion matrix over a whole set, as fractions in [0, 1].

    ``per_class_iou`` maps every class name to its IoU, or to None if neither the ground truth nor
    the prediction contains the class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    miou: UnitInterval
    pixel_accuracy: UnitInterval
    mean_accuracy: UnitInterval
    frequency_weighted_iou: UnitInterval
    per_class_iou: dict[str, UnitInterval | None]


class Manifest(BaseModel):
    """The manifest of one artefact folder, immutable; see `load_manifest` and `write`.

    ``files`` maps file names to entries, ``metrics`` a precision to its measured accuracy,
    ``licences`` a part (``code``, ``data``, ``starting_weights``, ...) to its licence. ``recipe``,
    ``data`` and ``parity`` are free-form records of the training stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    files: dict[str, FileEntry] = Field(min_length=1)
    recipe: dict[str, JsonValue] = {}
    data: dict[str, JsonValue] = {}
    metrics: dict[Precision, Accuracy] = {}
    parity: dict[str, JsonValue] = {}
    licences: dict[str, str] = {}
    created: date

    @field_validator("files")
    @classmethod
    def _names_stay_in_the_folder(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if name != Path(name).name or name in {"", ".", ".."} or "\\" in name:
                raise ValueError(f"{name!r} is not a plain file name")
        return files

    def write(self, folder: Path) -> Path:
        """Write ``manifest.json`` into ``folder`` atomically; returns its path."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        path = folder / MANIFEST_NAME
        replace_file(path, text.encode())
        return path

    def pick_file(self, preference: Sequence[Precision]) -> str:
        """The name of the file whose precision is first in ``preference``.

        Raises `ContractError` if the folder has none of them.
        """
        for precision in preference:
            for name, entry in self.files.items():
                if entry.precision == precision:
                    return name
        available = ", ".join(sorted({entry.precision for entry in self.files.values()}))
        raise ContractError(f"no network of precision {' or '.join(preference)}, only {available}")

    def check_contract(self, contract: ModelContract, file_name: str) -> None:
        """Compare with the contract in ``file_name``. Raises `ContractError` if they differ."""
        pairs = (
            ("name", self.name, contract.name),
            ("version", self.version, contract.version),
            ("precision", self.files[file_name].precision, contract.precision),
        )
        for key, ours, theirs in pairs:
            if ours != theirs:
                raise ContractError(
                    f"{key} is {ours!r} in {MANIFEST_NAME}, but {theirs!r} in {file_name}"
                )


def load_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``.

    Raises `IntegrityError` if it is missing or unreadable, `ContractError` if its content is not
    a manifest; both with one line that names the file.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise IntegrityError(f"{path}: {exc.strerror}") from exc
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as exc:
        raise ContractError(f"{path}: {one_line(exc)}") from exc


def read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read every file and compare it with the manifest's sha256.

    Returns the contents by name: the service uses the bytes that were compared, even if the folder
    changes later. Raises `IntegrityError` with one line that names the first file that differs.
    """
    files: dict[str, bytes] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise IntegrityError(f"{path}: {exc.strerror}") from exc
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry.sha256:
            raise IntegrityError(
                f"{path}: sha256 is {digest[:12]}… ({len(content)} bytes), but {MANIFEST_NAME} "
                f"says {entry.sha256[:12]}… ({entry.bytes} bytes)"
            )
        files[name] = content
    return files
