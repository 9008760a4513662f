"""``fcn-segment predict``: segment files with a model in this process or with a running service.

Outputs of an earlier run with the same options are kept, so rerun the command to resume.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hashlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import numpy as np
from PIL import Image
from pydantic import ValidationError
from tqdm import tqdm

from service.artefact.contract import one_line
from service.artefact.labels import LabelSet
from service.cli.coco import CocoFile
from service.cli.outputs import STDOUT, VOC_MASKS, OutputFiles, StandardOutput, plan_outputs
from service.cli.photos import STDIN, Found, find_photos
from service.cli.records import Origin, PhotoId
from service.errors import (
    InvalidParameter,
    OutputFailed,
    Overloaded,
    RemoteError,
    RemoteLost,
    SegmentError,
    SettingsError,
    UndecodableImage,
)
from service.jobs.view import ViewJob
from service.runtime import open_service
from service.schemas import LabelMap
from service.settings import Settings, env_name, given_settings, load_settings
from service.telemetry import logs
from service.views import JSON, VIEWS, MaskFormat, Options, ViewName, check_side

if TYPE_CHECKING:
    from service.client import AsyncClient

LAYOUTS: Final[dict[str, ViewName]] = {"voc": "mask", "coco": "json"}
"""Formats with more than one file per photo, and the view that each uses."""

FORMATS: Final[dict[str, ViewName]] = {**dict(zip(VIEWS, VIEWS, strict=True)), **LAYOUTS}
"""All formats, and the view that each uses."""

REMOTE_JOBS: Final = 4
"""The default number of concurrent requests to a service."""

# No further output could be written either.
_DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_DIGITS: Final = 12

Outputs = OutputFiles | CocoFile | StandardOutput


@dataclass(frozen=True, slots=True)
class Predictor:
    """Segments photos, in this process or by a service.

    ``predict``: from an image file's bytes to the view in its default media type; ``labels``: the
    model's label set; ``model``: its name, version and a checksum; ``jobs``: the number of
    concurrent photos.
    """

    predict: Callable[[bytes, Options], Awaitable[bytes]]
    labels: LabelSet
    model: str
    jobs: int


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of ``predict``.

    ``inputs``: files and folders; ``out``: the output folder; ``mask``: the form of the mask in
    JSON (None: the format's default); ``classes``: comma-separated names that outputs are limited
    to; ``jobs``: the number of concurrent photos (None: as many as keep the model busy).
    """

    inputs: Sequence[Path]
    out: Path
    format: str = "mask"
    mask: MaskFormat | None = None
    classes: str | None = None
    max_side: int | None = None
    jobs: int | None = None
    overwrite: bool = False


@dataclass(slots=True)
class Tally:
    """What a run has done, in photos. ``classes``: photos by class id, where outputs show it."""

    total: int
    segmented: int = 0
    done_already: int = 0
    failed: int = 0
    classes: Counter[int] = field(default_factory=Counter)

    def summarise(self, labels: LabelSet, seconds: float) -> str:
        """One line about the run."""
        parts = [f"{self.segmented} segmented"]
        if self.done_already:
            parts.append(f"{self.done_already} done already (--overwrite repeats them)")
        if self.failed:
            parts.append(f"{self.failed} failed")
        line = f"{_photos(self.total)}: {', '.join(parts)}, in {seconds:.1f} s"
        if self.classes:
            shown = [f"{labels.names[one]} {count}" for one, count in self.classes.most_common()]
            line += f"; photos with {', '.join(shown)}"
        return line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "images",
        nargs="+",
        type=lambda text: STDIN if text == "-" else Path(text),
        metavar="IMAGE",
        help="file or folder; - is stdin",
    )
    parser.add_argument(
        "--out",
        type=lambda text: STDOUT if text == "-" else Path(text),
        required=True,
        metavar="DIR",
        help="output folder; - writes the view of a single photo to stdout",
    )
    parser.add_argument(
        "--format",
        "--view",
        choices=FORMATS,
        default="mask",
        metavar="FORMAT",
        help="one file per photo: "
        + "; ".join(f"{view.name}, {view.description}" for view in VIEWS.values())
        + "; or voc, a folder in VOC's layout; or coco, one COCO file (default mask)",
    )
    parser.add_argument(
        "--mask",
        choices=get_args(MaskFormat),
        help="form of the mask in json and coco (default rle in json, polygons in coco)",
    )
    parser.add_argument(
        "--classes", metavar="NAMES", help="comma-separated names that outputs are limited to"
    )
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="longest side that the network sees, pixels"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="number of concurrent photos")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing outputs (default: keep those of the same options and photos, and "
        "refuse others)",
    )
    parser.add_argument("--url", help="use a running service instead of a model in this process")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"artefact folder ({env_name('model')}); with --url, name of one of its models",
    )


def run(parsed: argparse.Namespace) -> int:
    """Segment the files; returns 1 if some failed."""
    flags = given_settings(parsed) if parsed.url is None else {}
    settings = load_settings({name: value for name, value in flags.items() if name == "model"})
    logs.configure("warning", settings.log_format)
    arguments = Arguments(
        inputs=parsed.images,
        out=parsed.out,
        format=parsed.format,
        mask=parsed.mask,
        classes=parsed.classes,
        max_side=parsed.max_side,
        jobs=parsed.jobs,
        overwrite=parsed.overwrite,
    )
    failed = predict(settings, arguments, parsed.url, parsed.model if parsed.url else None)
    return 1 if failed else 0


def _positive(text: str) -> int:
    """Parse an integer above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def predict(
    settings: Settings, arguments: Arguments, url: str | None = None, model: str | None = None
) -> int:
    """Segment files and folders; returns the number of photos that failed.

    Uses the model of ``settings``, or the model ``model`` of the service at ``url``. A photo that
    fails is reported on stderr; the others continue. Each output is written atomically.
    Raises `SettingsError`, `ArtefactError`, `DeviceUnavailable`, `OutputFailed`, or `RemoteError`
    for a service that cannot be reached.
    """
    if url is None:
        try:
            check_side(arguments.max_side, settings.max_side)
        except InvalidParameter as exc:
            raise _flag_error(str(exc)) from exc
    options = _options(arguments, model)
    # Where earlier outputs are, which are no photos.
    folders = {"voc": arguments.out / VOC_MASKS, "coco": None}
    found = find_photos(arguments.inputs, folders.get(arguments.format, arguments.out))
    _report(found, arguments.inputs)
    outputs = _outputs(arguments, found)
    opened = _embedded(settings, arguments) if url is None else _remote(url, model, arguments.jobs)
    failed = asyncio.run(_predict_all(opened, outputs, options, arguments))
    return failed + len(found.unreadable)


def _report(found: Found, inputs: Sequence[Path]) -> None:
    """Print what is left out. Raises `SettingsError` if no photo remains."""
    left_out = found.describe_left_out()
    for folder, reason in found.unreadable.items():
        _print(f"{folder}: {reason}")
    if not found.photos:
        folders = ", ".join(map(str, inputs))
        raise SettingsError(f"{folders}: no photo{left_out and ', only ' + left_out}")
    if left_out:
        _print(f"{_photos(len(found.photos))}; left out: {left_out}")


def _photos(count: int) -> str:
    return f"{count} photo{'' if count == 1 else 's'}"


def _print(line: str) -> None:
    print(f"fcn-segment: {line}", file=sys.stderr)


def _flag_error(message: str) -> SettingsError:
    """The error about a parameter (``max_side: reason``), with its flag's name instead."""
    name, _, reason = message.partition(":")
    return SettingsError(f"--{name.replace('_', '-')}:{reason}")


def _options(arguments: Arguments, model: str | None) -> Options:
    mask = arguments.mask or ("polygons" if arguments.format == "coco" else "rle")
    if arguments.format == "coco" and mask not in ("polygons", "rle"):
        raise SettingsError(f"--mask: COCO files carry polygons or rle, not {mask}")
    try:
        return Options(
            view=FORMATS[arguments.format],
            classes=arguments.classes,
            max_side=arguments.max_side,
            mask=mask,
            model=model,
        )
    except ValidationError as exc:
        raise _flag_error(one_line(exc)) from exc


def _outputs(arguments: Arguments, found: Found) -> Outputs:
    photos, out, overwrite = found.photos, arguments.out, arguments.overwrite
    if out == STDOUT:
        if len(photos) > 1 or arguments.format in LAYOUTS:
            raise SettingsError(f"--out -: stdout takes one photo, not {arguments.format} files")
        return StandardOutput(next(iter(photos)))
    if out.exists() and not out.is_dir():
        raise SettingsError(f"--out {out} is not a folder")
    if arguments.format == "coco":
        return CocoFile.plan(photos, out, overwrite)
    if arguments.format == "voc":
        return OutputFiles.voc(photos, out, overwrite)
    suffix = VIEWS[FORMATS[arguments.format]].suffix
    return OutputFiles(plan_outputs(photos, out, suffix), out, overwrite)


def _origin(arguments: Arguments, options: Options, model: str) -> Origin:
    """What, beside the photo, determines an output."""
    classes = {name.strip() for name in options.class_names}
    origin = {
        "--format": "coco" if arguments.format == "coco" else options.view,
        "--mask": options.mask if options.view == "json" else None,
        "--classes": ",".join(sorted(classes)) or None,
        "--max-side": options.max_side,
        "model": model,
    }
    return {name: value for name, value in origin.items() if value is not None}


@contextlib.asynccontextmanager
async def _embedded(settings: Settings, arguments: Arguments) -> AsyncIterator[Predictor]:
    """The model in this process."""
    async with open_service(settings) as service:

        async def predict(data: bytes, options: Options) -> bytes:
            while True:
                try:
                    return (await service.segmenter.segment(ViewJob.of(options), data)).content
                # A service refuses; here nobody else can take the photo, so it waits.
                except Overloaded as exc:
                    await asyncio.sleep(exc.retry_after_s)

        # More photos than keep it busy would only use memory.
        jobs = min(arguments.jobs or service.concurrency, service.segmenter.max_in_flight)
        model = service.engines.default.model
        contract, sha256 = model.contract, model.manifest.files[model.file_name].sha256
        name = f"{contract.name} {contract.version} ({sha256[:_DIGITS]})"
        yield Predictor(predict, contract.labels, name, jobs)


@contextlib.asynccontextmanager
async def _remote(url: str, model: str | None, jobs: int | None) -> AsyncIterator[Predictor]:
    """A model of a running service."""
    try:
        # Imported here because it needs a package that the service does not.
        from service.client import AsyncClient, ClientError, ServiceUnreachable  # noqa: PLC0415
    except ImportError as exc:
        raise SettingsError(f"--url: {exc}") from exc

    @contextlib.contextmanager
    def translated() -> Iterator[None]:
        try:
            yield
        except ServiceUnreachable as exc:
            raise RemoteLost(f"{exc}; rerun the command to resume") from exc
        except ClientError as exc:
            raise RemoteError(str(exc)) from exc

    async def predict(data: bytes, options: Options) -> bytes:
        media_type = VIEWS[options.view].media_types[0]
        # `Accept` selects JSON, so that services of 0.1.0, without a view of that name, answer too.
        exclude = {"view"} if media_type == JSON else None
        query = options.model_dump(exclude_none=True, exclude=exclude)
        with translated():
            return await client.fetch(data, media_type, query)

    with translated():
        client = AsyncClient(url)
    async with client:
        with translated():
            name = await _model_name(client, model)
            labels = _label_set(await client.classes(model))
        checksum = hashlib.sha256(labels.model_dump_json().encode()).hexdigest()[:_DIGITS]
        yield Predictor(predict, labels, f"{name} ({checksum})", jobs or REMOTE_JOBS)


async def _model_name(client: AsyncClient, model: str | None) -> str:
    """Name and version of the service's model of that name, or of its default one."""
    models = (await client.models()).models
    for one in models:
        if model in (None, one.name):
            return f"{one.name} {one.version}"
    names = ", ".join(one.name for one in models)
    raise SettingsError(f"--model: the service has no {model!r}, only {names}")


def _label_set(classes: LabelMap) -> LabelSet:
    return LabelSet(
        names=[one.name for one in classes.classes],
        colors=[one.color for one in classes.classes],
        ignore_index=classes.ignore_index,
    )


async def _predict_all(
    opened: contextlib.AbstractAsyncContextManager[Predictor],
    outputs: Outputs,
    options: Options,
    arguments: Arguments,
) -> int:
    """Segment the photos that are not done yet; returns the number that failed."""
    started_s = time.monotonic()
    async with opened as predictor:
        try:
            chosen = None if options.classes is None else predictor.labels.ids(options.class_names)
        except InvalidParameter as exc:
            raise _flag_error(str(exc)) from exc
        with _writing(arguments.out):
            outputs.resume(_origin(arguments, options, predictor.model), predictor.labels, chosen)
        photos = [photo for photo in outputs.photos if not outputs.has(photo)]
        tally = Tally(len(outputs.photos), done_already=len(outputs.photos) - len(photos))
        remaining = iter(photos)
        with tqdm(
            total=tally.total, initial=tally.done_already, unit="photo", disable=None
        ) as progress:

            async def work() -> None:
                for photo in remaining:
                    try:
                        await _predict_one(photo, predictor, outputs, options, tally)
                    except (RemoteLost, OutputFailed):
                        raise
                    except (SegmentError, OSError) as exc:
                        tally.failed += 1
                        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                        progress.write(f"fcn-segment: {photo}: {reason}", file=sys.stderr)
                    progress.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(predictor.jobs, len(photos))):
                        group.create_task(work())
            except* (RemoteLost, OutputFailed) as lost:
                raise lost.exceptions[0] from None
    with _writing(arguments.out):
        await asyncio.to_thread(outputs.finish)
    _print(tally.summarise(predictor.labels, time.monotonic() - started_s))
    return tally.failed


async def _predict_one(
    photo: Path, predictor: Predictor, outputs: Outputs, options: Options, tally: Tally
) -> None:
    data = await asyncio.to_thread(photo.read_bytes)
    if not data:
        raise UndecodableImage("the file is empty")
    if outputs.has(photo, data):
        tally.done_already += 1
        return
    photo_id = PhotoId.of(photo, data)
    content = await predictor.predict(data, options)
    try:
        await asyncio.to_thread(outputs.add, photo, photo_id, content)
    except OSError as exc:
        reason = f"its output cannot be written: {exc.strerror}"
        if exc.errno in _DISK_ERRORS:
            advice = "free space and rerun the command to resume"
            raise OutputFailed(f"{photo}: {reason}; {advice}") from exc
        raise OSError(exc.errno, reason) from exc
    tally.segmented += 1
    tally.classes.update(await asyncio.to_thread(_class_ids, content, options.view))


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Translate errors about the outputs as a whole."""
    try:
        yield
    except OSError as exc:
        raise OutputFailed(f"--out {out}: {exc.strerror}") from exc


def _class_ids(content: bytes, view: ViewName) -> list[int]:
    """The ids of the classes that an output shows, without background; of other views none."""
    if view == "json":
        return [one["id"] for one in json.loads(content)["classes"] if one["id"]]
    if view == "mask":
        with Image.open(io.BytesIO(content)) as mask:
            return [int(one) for one in np.unique(np.asarray(mask)) if one]
    return []
