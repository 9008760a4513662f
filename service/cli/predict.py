"""``fcn-segment predict``: segment files, by the service's data path without HTTP or by a service.

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
from service.errors import InvalidParameter, RemoteError, RemoteLost, SegmentError, SettingsError
from service.runtime import open_service
from service.schemas import LabelMap
from service.segmenter import ViewJob
from service.settings import Settings, env_name, given_settings, load_settings
from service.telemetry import logs
from service.views import MIN_SIDE, VIEWS, MaskFormat, Options, ViewName

if TYPE_CHECKING:
    from service.client import AsyncClient

LAYOUTS: Final[dict[str, ViewName]] = {"voc": "mask", "coco": "json"}
"""Formats that are more than a file for each photo, and the view that each is made of."""

FORMATS: Final[dict[str, ViewName]] = {**dict(zip(VIEWS, VIEWS, strict=True)), **LAYOUTS}
"""All formats, and the view that each is made of."""

REMOTE_JOBS: Final = 4
"""Concurrent requests to a service by default."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """What segments photos.

    ``predict``: an image file's bytes to an answer in the view's default form; ``labels``: the
    model's; ``jobs``: photos at once.
    """

    predict: Callable[[bytes, Options], Awaitable[bytes]]
    labels: LabelSet
    jobs: int


@dataclass(frozen=True, slots=True)
class Order:
    """The arguments of ``predict``.

    ``inputs``: files and folders; ``out``: the output folder; ``classes``: names, comma-separated,
    that answers are limited to; ``mask``: how JSON carries the mask (None: the format's own
    default); ``jobs``: photos at once (None: what keeps the model busy).
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
        help="a file for each photo: "
        + "; ".join(f"{view.name}, {view.description}" for view in VIEWS.values())
        + "; or voc, a folder of VOC's layout; or coco, one COCO file (default mask)",
    )
    parser.add_argument(
        "--mask",
        choices=get_args(MaskFormat),
        help="how json and coco carry the mask (default rle in json, polygons in coco)",
    )
    parser.add_argument(
        "--classes", metavar="NAMES", help="comma-separated names that answers are limited to"
    )
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="longest side that the network sees, pixels"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="photos at once")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing outputs (default: keep them)"
    )
    parser.add_argument("--url", help="a running service, instead of a model in this process")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"artefact folder ({env_name('model')}), or with --url the name of a model there",
    )


def run(parsed: argparse.Namespace) -> int:
    """Segment the files; 1 if some failed."""
    flags = given_settings(parsed) if parsed.url is None else {}
    settings = load_settings({name: value for name, value in flags.items() if name == "model"})
    logs.configure("warning", settings.log_format)
    order = Order(
        inputs=parsed.images,
        out=parsed.out,
        format=parsed.format,
        mask=parsed.mask,
        classes=parsed.classes,
        max_side=parsed.max_side,
        jobs=parsed.jobs,
        overwrite=parsed.overwrite,
    )
    failed = predict(settings, order, parsed.url, parsed.model if parsed.url else None)
    if failed:
        print(f"fcn-segment: {failed} photos failed", file=sys.stderr)
    return 1 if failed else 0


def _positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def predict(
    settings: Settings, order: Order, url: str | None = None, model: str | None = None
) -> int:
    """Segment files and folders; returns how many photos failed.

    Uses the model of ``settings``, or the model ``model`` of the service at ``url``. A photo that
    fails is reported on stderr and does not stop the rest. Outputs appear whole or not at all.
    Raises `SettingsError`, `ArtefactError`, `DeviceUnavailable`, or `RemoteError` for a service
    that cannot be reached.
    """
    if url is None:
        _check_side(settings, order.max_side)
    options = _options(order, model)
    outputs = _outputs(order)
    photos = [photo for photo in outputs.photos if order.overwrite or not outputs.has(photo)]
    there = len(outputs.photos) - len(photos)
    if there:
        total = len(outputs.photos)
        print(
            f"fcn-segment: {there} of {total} photos are done already (--overwrite repeats them)",
            file=sys.stderr,
        )
    if not photos and outputs.is_complete():
        return 0
    opened = _embedded(settings, order) if url is None else _remote(url, model, order.jobs)
    return asyncio.run(_predict_all(opened, photos, outputs, options, there))


def _check_side(settings: Settings, max_side: int | None) -> None:
    if max_side is not None and not MIN_SIDE <= max_side <= settings.max_side:
        raise SettingsError(f"--max-side: {max_side} is not in {MIN_SIDE} to {settings.max_side}")


def _options(order: Order, model: str | None) -> Options:
    mask = order.mask or ("polygons" if order.format == "coco" else "rle")
    if order.format == "coco" and mask not in ("polygons", "rle"):
        raise SettingsError(f"--mask: COCO files carry polygons or rle, not {mask}")
    try:
        return Options(
            view=FORMATS[order.format],
            classes=order.classes,
            max_side=order.max_side,
            mask=mask,
            model=model,
        )
    except ValidationError as exc:
        raise SettingsError(f"--{one_line(exc).replace('_', '-')}") from exc


def _outputs(order: Order) -> OutputFiles | CocoFile:
    if order.format == "coco":
        return CocoFile.plan(order.inputs, order.out, order.overwrite)
    if order.format == "voc":
        return OutputFiles.voc(order.inputs, order.out)
    suffix = VIEWS[FORMATS[order.format]].suffix
    return OutputFiles(plan_outputs(order.inputs, order.out, suffix), order.out)


@contextlib.asynccontextmanager
async def _embedded(settings: Settings, order: Order) -> AsyncIterator[Predictor]:
    """The model in this process."""
    async with open_service(settings) as service:

        async def predict(data: bytes, options: Options) -> bytes:
            return (await service.segmenter.segment(ViewJob.of(data, options))).content

        # More than keep it busy would only hold decoded photos.
        jobs = min(order.jobs or service.busy_with, service.segmenter.max_in_flight)
        yield Predictor(predict, service.engines.default.model.contract.labels, jobs)


@contextlib.asynccontextmanager
async def _remote(url: str, model: str | None, jobs: int | None) -> AsyncIterator[Predictor]:
    """A running service that has the model."""
    try:
        # Here, because it takes a package that the service itself does without.
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
        query = options.model_dump(exclude_none=True)
        with translated():
            return await client.fetch(data, VIEWS[options.view].media_types[0], query)

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
        raise SettingsError(f"--model: no model {model!r} there; there are {', '.join(names)}")


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
    there: int,
) -> int:
    failed = 0
    left = iter(photos)
    async with opened as predictor:
        try:
            chosen = None if options.classes is None else predictor.labels.ids(options.class_names)
        except InvalidParameter as exc:
            raise SettingsError(f"--{exc}") from exc
        outputs.use(predictor.labels, chosen)
        total = there + len(photos)
        with tqdm(total=total, initial=there, unit="photo", disable=None) as progress:

            async def work() -> None:
                nonlocal failed
                for photo in left:
                    try:
                        data = await asyncio.to_thread(photo.read_bytes)
                        content = await predictor.predict(data, options)
                        await asyncio.to_thread(outputs.take, photo, content)
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
