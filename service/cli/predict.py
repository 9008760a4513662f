"""Segmenting files from the shell: by the service's own data path, without HTTP, or by a service.

Answers that are there already are left alone, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tqdm import tqdm

from service.app import open_service
from service.artefact import voc
from service.cli.outputs import CocoFile, Files, plan_outputs
from service.errors import InvalidParameter, RemoteError, RemoteLost, SegmentError, SettingsError
from service.settings import Settings
from service.views import MaskFormat, MediaType, Options, View, class_ids

if TYPE_CHECKING:
    from service.client import AsyncClient

Format = Literal["mask", "overlay", "json", "cutout", "voc", "coco"]

_ANSWERS: Final[dict[Format, tuple[View, MediaType, str]]] = {
    "mask": ("mask", "image/png", ".png"),
    "overlay": ("overlay", "image/png", ".png"),
    "cutout": ("cutout", "image/png", ".png"),
    "json": ("mask", "application/json", ".json"),
    "voc": ("mask", "image/png", ".png"),
    "coco": ("mask", "application/json", ".json"),
}

REMOTE_JOBS: Final = 4
"""Requests at once to a service, unless told otherwise."""

Answer = Callable[[bytes, Options], Awaitable[bytes]]
"""What segments a photo: its file's bytes to an encoded answer."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done.

    ``inputs``: files and folders; ``out``: the output folder; ``classes``: names, comma-separated,
    that answers are limited to; ``mask``: how JSON carries the mask (None: the format's own
    default); ``jobs``: photos at once (None: what keeps the model busy).
    """

    inputs: Sequence[Path]
    out: Path
    format: Format = "mask"
    mask: MaskFormat | None = None
    classes: str | None = None
    max_side: int | None = None
    jobs: int | None = None
    overwrite: bool = False


def predict(
    settings: Settings, order: Order, url: str | None = None, model: str | None = None
) -> int:
    """Segment files and folders; returns how many photos failed.

    By the model of ``settings``, or by the service at ``url`` and its model of that name. A photo
    that fails is reported on stderr and does not stop the rest. Outputs appear whole or not at
    all. Raises `SettingsError`, `ArtefactError`, `DeviceUnavailable` or, of a service that cannot
    be reached, `SegmentError`.
    """
    if url is None:
        _check_side(settings, order.max_side)
    options = replace(_options(order), model=model)
    outputs = _outputs(order, options)
    photos = [photo for photo in outputs.photos if order.overwrite or not outputs.has(photo)]
    there = len(outputs.photos) - len(photos)
    if there:
        total = len(outputs.photos)
        print(
            f"fcn-segment: {there} of {total} photos are done already (--overwrite does them anew)",
            file=sys.stderr,
        )
    if not photos:
        outputs.finish()
        return 0
    opened = _embedded(settings, order) if url is None else _remote(url, model, order.jobs)
    return asyncio.run(_predict_all(opened, photos, outputs, options, there))


def _check_side(settings: Settings, max_side: int | None) -> None:
    if max_side is not None and not settings.min_side <= max_side <= settings.max_side:
        raise SettingsError(
            f"--max-side: {max_side} is not in {settings.min_side} to {settings.max_side}"
        )


def _options(order: Order) -> Options:
    view, media_type, _ = _ANSWERS[order.format]
    mask = order.mask or ("polygons" if order.format == "coco" else "rle")
    if order.format == "coco" and mask not in ("polygons", "rle"):
        raise SettingsError(f"--mask: COCO files carry polygons or rle, not {mask}")
    try:
        chosen = None if order.classes is None else class_ids(order.classes.split(","))
    except InvalidParameter as exc:
        raise SettingsError(f"--{exc}") from exc
    return Options(
        view=view, media_type=media_type, classes=chosen, max_side=order.max_side, mask=mask
    )


def _outputs(order: Order, options: Options) -> Files | CocoFile:
    if order.format == "coco":
        return CocoFile.plan(order.inputs, order.out, options.classes, order.overwrite)
    if order.format == "voc":
        return Files.voc(order.inputs, order.out)
    suffix = _ANSWERS[order.format][2]
    return Files(plan_outputs(order.inputs, order.out, suffix), order.out)


@contextlib.asynccontextmanager
async def _embedded(settings: Settings, order: Order) -> AsyncIterator[tuple[Answer, int]]:
    """The model in this process, and how many photos it takes at once."""
    async with open_service(settings) as service:

        async def answer(data: bytes, options: Options) -> bytes:
            return (await service.segmenter.segment(data, options)).content

        # More than keep it busy would only hold decoded photos.
        yield answer, min(order.jobs or service.busy_with, service.segmenter.max_in_flight)


@contextlib.asynccontextmanager
async def _remote(
    url: str, model: str | None, jobs: int | None
) -> AsyncIterator[tuple[Answer, int]]:
    """A service, which is there and has the model."""
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
            raise RemoteLost(f"{exc}; the same command goes on from here") from exc
        except ClientError as exc:
            raise RemoteError(str(exc)) from exc

    async def answer(data: bytes, options: Options) -> bytes:
        with translated():
            return await client.fetch(data, options.media_type, _query(options))

    with translated():
        client = AsyncClient(url)
    async with client:
        with translated():
            await _check_model(client, model)
        yield answer, jobs or REMOTE_JOBS


async def _check_model(client: AsyncClient, model: str | None) -> None:
    names = [one.name for one in (await client.models()).models]
    if model is not None and model not in names:
        raise SettingsError(f"--model: no model {model!r} there; there are {', '.join(names)}")


def _query(options: Options) -> dict[str, Any]:
    query: dict[str, Any] = {"view": options.view, "mask": options.mask}
    if options.classes is not None:
        query["classes"] = ",".join(voc.CLASSES[index] for index in sorted(options.classes))
    for name, value in (("max_side", options.max_side), ("model", options.model)):
        if value is not None:
            query[name] = value
    return query


async def _predict_all(
    opened: contextlib.AbstractAsyncContextManager[tuple[Answer, int]],
    photos: Sequence[Path],
    outputs: Files | CocoFile,
    options: Options,
    there: int,
) -> int:
    failed = 0
    left = iter(photos)
    async with opened as (answer, jobs):
        total = there + len(photos)
        with tqdm(total=total, initial=there, unit="photo", disable=None) as progress:

            async def work() -> None:
                nonlocal failed
                for photo in left:
                    try:
                        data = await asyncio.to_thread(photo.read_bytes)
                        content = await answer(data, options)
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
                    for _ in range(min(jobs, len(photos))):
                        group.create_task(work())
            except* RemoteLost as lost:
                raise lost.exceptions[0] from None
    await asyncio.to_thread(outputs.finish)
    return failed
