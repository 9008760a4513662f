"""``fcn-segment predict``: segment files with a model in this process or with a running service.

Existing outputs are kept, so rerun the command to resume.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from pydantic import ValidationError
from tqdm import tqdm

from service.artefact.contract import one_line
from service.artefact.labels import LabelSet
from service.cli.outputs import CocoFile, OutputFiles, plan_outputs
from service.errors import (
    InvalidParameter,
    Overloaded,
    RemoteError,
    RemoteLost,
    SegmentError,
    SettingsError,
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


@dataclass(frozen=True, slots=True)
class Predictor:
    """Segments photos, in this process or by a service.

    ``predict``: from an image file's bytes to the view in its default media type; ``labels``: the
    model's label set; ``jobs``: the number of concurrent photos.
    """

    predict: Callable[[bytes, Options], Awaitable[bytes]]
    labels: LabelSet
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
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
        "--overwrite", action="store_true", help="replace existing outputs (default: keep them)"
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
    if failed:
        print(f"fcn-segment: {failed} photos failed", file=sys.stderr)
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
    Raises `SettingsError`, `ArtefactError`, `DeviceUnavailable`, or `RemoteError` for a service
    that cannot be reached.
    """
    if url is None:
        try:
            check_side(arguments.max_side, settings.max_side)
        except InvalidParameter as exc:
            raise _flag_error(str(exc)) from exc
    options = _options(arguments, model)
    outputs = _outputs(arguments)
    photos = [photo for photo in outputs.photos if arguments.overwrite or not outputs.has(photo)]
    done = len(outputs.photos) - len(photos)
    if done:
        total = len(outputs.photos)
        print(
            f"fcn-segment: {done} of {total} photos are done already (--overwrite repeats them)",
            file=sys.stderr,
        )
    # The names of classes are known only once the model is open.
    if not photos and arguments.classes is None and outputs.is_complete():
        return 0
    opened = _embedded(settings, arguments) if url is None else _remote(url, model, arguments.jobs)
    return asyncio.run(_predict_all(opened, photos, outputs, options, done))


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


def _outputs(arguments: Arguments) -> OutputFiles | CocoFile:
    if arguments.format == "coco":
        return CocoFile.plan(arguments.inputs, arguments.out, arguments.overwrite)
    if arguments.format == "voc":
        return OutputFiles.voc(arguments.inputs, arguments.out)
    suffix = VIEWS[FORMATS[arguments.format]].suffix
    return OutputFiles(plan_outputs(arguments.inputs, arguments.out, suffix), arguments.out)


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
        yield Predictor(predict, service.engines.default.model.contract.labels, jobs)


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
            await _check_model(client, model)
            labels = _label_set(await client.classes(model))
        yield Predictor(predict, labels, jobs or REMOTE_JOBS)


async def _check_model(client: AsyncClient, model: str | None) -> None:
    names = [one.name for one in (await client.models()).models]
    if model is not None and model not in names:
        raise SettingsError(f"--model: the service has no {model!r}, only {', '.join(names)}")


def _label_set(classes: LabelMap) -> LabelSet:
    return LabelSet(
        names=[one.name for one in classes.classes],
        colors=[one.color for one in classes.classes],
        ignore_index=classes.ignore_index,
    )


async def _predict_all(
    opened: contextlib.AbstractAsyncContextManager[Predictor],
    photos: Sequence[Path],
    outputs: OutputFiles | CocoFile,
    options: Options,
    done: int,
) -> int:
    failed = 0
    remaining = iter(photos)
    async with opened as predictor:
        try:
            chosen = None if options.classes is None else predictor.labels.ids(options.class_names)
        except InvalidParameter as exc:
            raise _flag_error(str(exc)) from exc
        outputs.set_classes(predictor.labels, chosen)
        total = done + len(photos)
        with tqdm(total=total, initial=done, unit="photo", disable=None) as progress:

            async def work() -> None:
                nonlocal failed
                for photo in remaining:
                    try:
                        data = await asyncio.to_thread(photo.read_bytes)
                        content = await predictor.predict(data, options)
                        await asyncio.to_thread(outputs.add, photo, content)
                    except RemoteLost:
                        raise
                    except (SegmentError, OSError) as exc:
                        failed += 1
                        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                        progress.write(f"fcn-segment: {photo}: {reason}", file=sys.stderr)
                    progress.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(predictor.jobs, len(photos))):
                        group.create_task(work())
            except* RemoteLost as lost:
                raise lost.exceptions[0] from None
    await asyncio.to_thread(outputs.finish)
    return failed
