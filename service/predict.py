"""Segmenting files from the shell: the service's own data path, without HTTP."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from tqdm import tqdm

from service.app import open_service
from service.errors import SegmentError, SettingsError
from service.segmenter import MediaType, Options, Segmenter, View
from service.settings import Settings

PredictView = Literal["mask", "overlay", "json"]

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)
"""What is taken for a photo in a folder; files that are named themselves may have any name."""

_ANSWERS: Final[dict[PredictView, tuple[View, MediaType, str]]] = {
    "mask": ("mask", "image/png", ".png"),
    "overlay": ("overlay", "image/png", ".png"),
    "json": ("mask", "application/json", ".json"),
}


def plan_outputs(inputs: Iterable[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """Where the answer of each photo goes: ``{photo: output}``, sorted by what was named first.

    Photos in a folder keep their place below it, stems are kept. Photos that would share an
    output keep their suffix too (``a.jpg.png``), and past that get a number (``a-2.jpg.png``).
    What already lies in ``out`` is not taken for a photo. Raises `SettingsError` if an output
    would overwrite a photo.
    """
    places: dict[Path, Path] = {}  # photo -> its place below out
    seen: set[Path] = set()
    for named in inputs:
        for photo, place in _photos(named, out):
            if photo.resolve() not in seen:
                seen.add(photo.resolve())
                places[photo] = place
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
        if (out / target).resolve() in seen:
            raise SettingsError(f"--out {out} would overwrite the photo {out / target}")
        outputs[photo] = out / target
    return outputs


def predict(
    settings: Settings,
    inputs: Sequence[Path],
    out: Path,
    view: PredictView = "mask",
    max_side: int | None = None,
) -> int:
    """Segment files and folders into ``out``; returns how many photos failed.

    A photo that fails is reported on stderr and does not stop the rest. Outputs appear whole or
    not at all. Raises `SettingsError`, `ArtefactError` or `DeviceUnavailable`.
    """
    if max_side is not None and not settings.min_side <= max_side <= settings.max_side:
        raise SettingsError(
            f"--max-side: {max_side} is not in {settings.min_side} to {settings.max_side}"
        )
    request_view, media_type, suffix = _ANSWERS[view]
    outputs = plan_outputs(inputs, out, suffix)
    options = Options(view=request_view, media_type=media_type, max_side=max_side)
    return asyncio.run(_predict_all(settings, outputs, options))


async def _predict_all(settings: Settings, outputs: Mapping[Path, Path], options: Options) -> int:
    failed = 0
    async with open_service(settings) as service:
        # More would only hold decoded photos.
        slots = asyncio.Semaphore(service.busy_with)
        with tqdm(total=len(outputs), unit="photo", disable=None) as progress:

            async def one(photo: Path, output: Path) -> None:
                nonlocal failed
                async with slots:
                    try:
                        await _predict_one(service.segmenter, photo, output, options)
                    except (SegmentError, OSError) as exc:
                        failed += 1
                        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                        progress.write(f"fcn-segment: {photo}: {reason}", file=sys.stderr)
                progress.update()

            async with asyncio.TaskGroup() as group:
                for photo, output in outputs.items():
                    group.create_task(one(photo, output))
    return failed


async def _predict_one(segmenter: Segmenter, photo: Path, output: Path, options: Options) -> None:
    data = await asyncio.to_thread(photo.read_bytes)
    result = await segmenter.segment(data, options)
    await asyncio.to_thread(_write, output, result.content)


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fcn-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            # A temporary file is private to its owner; an output is like any new file.
            os.fchmod(file.fileno(), 0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _photos(named: Path, out: Path) -> list[tuple[Path, Path]]:
    """The photos that one argument names, each with its place below the output folder."""
    if not named.is_dir():
        return [(named, Path(named.name))]
    inside = out.resolve()
    return [
        (path, path.relative_to(named))
        for path in sorted(named.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not path.resolve().is_relative_to(inside)
    ]
