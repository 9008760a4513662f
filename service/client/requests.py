"""The requests that both clients send, and the errors that they raise.

Each request is written once, as a coroutine of `Requests`. `AsyncClient` is a `Requests` whose
coroutines run on asyncio. `Client` runs the same coroutines with blocking calls: they never
suspend, so one ``send(None)`` runs each of them to its end, without an event loop.
"""

from __future__ import annotations

import io
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import ValidationError

from service.images.encoding import encode_image
from service.schemas import BatchItem, LabelMap, ModelList, Problem, Schema, Segmentation, ViewList

SchemaT = TypeVar("SchemaT", bound=Schema)

PhotoSource = bytes | str | os.PathLike[str] | npt.NDArray[np.uint8]
"""An image file's bytes, its path, or an ``(H, W, 3) uint8`` RGB array."""

MaskFormat = Literal["rle", "polygons", "png", "none"]

BATCH_SIZE: Final = 16
"""Photos in one request of ``batch``: the service's default limit."""


class ClientError(Exception):
    """Base class of the clients' errors."""


class ServiceUnreachable(ClientError):
    """No connection to the service, or a broken one, at every try."""


class ServiceBusy(ClientError):
    """The service was overloaded or limited this client's rate at every try."""


class NoAnswerInTime(ClientError):
    """The service accepted the request but did not answer within the timeout."""


class RequestRefused(ClientError):
    """The service rejected the request; ``problem`` is its explanation."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class UnexpectedAnswer(ClientError):
    """The response does not look like one from this service."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How many tries to make in total, and how long to wait between them, in seconds.

    Without ``Retry-After`` the wait is ``backoff_s`` after the first failure and doubles after each
    further one, up to ``longest_s``. A ``Retry-After`` above ``longest_s`` ends the retries.
    """

    tries: int = 5
    backoff_s: float = 0.5
    longest_s: float = 60.0

    def wait_s(self, failed: int, retry_after_s: float | None) -> float | None:
        """Seconds to wait after ``failed`` failed tries; None: stop retrying."""
        if failed >= self.tries:
            return None
        if retry_after_s is None:
            return min(self.backoff_s * 2.0 ** (failed - 1), self.longest_s)
        return retry_after_s if retry_after_s <= self.longest_s else None


class Parameters(TypedDict, total=False):
    """Optional parameters of every request; the service has a default for each.

    ``classes``: names, comma-separated; ``max_side``: pixels; ``model``: a name from ``models``.
    """

    classes: str
    max_side: int
    model: str


class Requests(ABC):
    """The requests of both clients. Each raises `ClientError`, or `OSError` for an unreadable file.

    Subclasses decide how to send a request, how to wait and where slow work runs.
    """

    def __init__(self, retries: Retries | None) -> None:
        self._retries = retries or Retries()

    @abstractmethod
    async def _send(self, method: str, path: str, options: Mapping[str, Any]) -> httpx.Response:
        """Send one request; ``options`` are keyword arguments of `httpx.Client.request`."""

    @abstractmethod
    async def _wait(self, seconds: float) -> None:
        """Wait before the next try."""

    @abstractmethod
    async def _work(self, work: Callable[[], bytes]) -> bytes:
        """Run work that blocks, such as reading a file."""

    async def segment(
        self, photo: PhotoSource, *, mask: MaskFormat = "rle", **parameters: Unpack[Parameters]
    ) -> Segmentation:
        """The classes that are present, largest first, with the mask in the given format."""
        response = await self._post(photo, "application/json", {**parameters, "mask": mask})
        return _parsed(response, Segmentation, response.content)

    async def mask(
        self, photo: PhotoSource, **parameters: Unpack[Parameters]
    ) -> npt.NDArray[np.uint8]:
        """Class ids, ``(H, W) uint8``."""
        return _pixels(await self._post(photo, "image/png", {**parameters, "view": "mask"}))

    async def confidence(
        self, photo: PhotoSource, **parameters: Unpack[Parameters]
    ) -> npt.NDArray[np.uint8]:
        """The probability of each pixel's class in 255ths, ``(H, W) uint8``."""
        return _pixels(await self._post(photo, "image/png", {**parameters, "view": "confidence"}))

    async def overlay(
        self,
        photo: PhotoSource,
        *,
        alpha: float = 0.5,
        media_type: Literal["image/png", "image/jpeg", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """The photo blended with the class colours, as an image file."""
        return await self.fetch(
            photo, media_type, {**parameters, "view": "overlay", "alpha": alpha}
        )

    async def cutout(
        self,
        photo: PhotoSource,
        *,
        media_type: Literal["image/png", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """The photo's pixels of the chosen classes, transparent elsewhere, as an image file."""
        return await self.fetch(photo, media_type, {**parameters, "view": "cutout"})

    async def batch(
        self,
        photos: Iterable[PhotoSource],
        *,
        mask: MaskFormat = "rle",
        batch_size: int = BATCH_SIZE,
        **parameters: Unpack[Parameters],
    ) -> list[BatchItem]:
        """`segment` for many photos, with ``batch_size`` photos in each request.

        The items are in the order of ``photos``. Each holds a segmentation or a problem.
        """
        photos = list(photos)
        items: list[BatchItem] = []
        for start in range(0, len(photos), batch_size):
            files = []
            for number, photo in enumerate(photos[start : start + batch_size], start):
                name = Path(photo).name if isinstance(photo, str | os.PathLike) else str(number)
                files.append(("image", (name, await self._read(photo))))
            response = await self._ask(
                "POST",
                "/segment/batch",
                files=files,
                params={**parameters, "mask": mask},
                headers={"Accept": "application/x-ndjson"},
            )
            found = [_parsed(response, BatchItem, line) for line in response.content.splitlines()]
            if len(found) != len(files):
                raise _unexpected(response)
            items += [item.model_copy(update={"index": start + item.index}) for item in found]
        return items

    async def classes(self, model: str | None = None) -> LabelMap:
        """The label map of a model (None: the default)."""
        params = {} if model is None else {"model": model}
        response = await self._ask("GET", "/classes", params=params)
        return _parsed(response, LabelMap, response.content)

    async def models(self) -> ModelList:
        """The served models, the default first."""
        response = await self._ask("GET", "/models")
        return _parsed(response, ModelList, response.content)

    async def views(self) -> ViewList:
        """The views of a photo that the service offers, with their media types and parameters."""
        response = await self._ask("GET", "/views")
        return _parsed(response, ViewList, response.content)

    async def fetch(self, photo: PhotoSource, media_type: str, query: Mapping[str, Any]) -> bytes:
        """The body that ``POST /segment`` returns for these query parameters.

        With ``{"view": name}`` that is any view of `views`, those added later included.
        """
        return (await self._post(photo, media_type, query)).content

    async def _post(
        self, photo: PhotoSource, media_type: str, query: Mapping[str, Any]
    ) -> httpx.Response:
        content = await self._read(photo)
        headers = {"Accept": media_type}
        response = await self._ask(
            "POST", "/segment", content=content, params=query, headers=headers
        )
        if response.headers.get("Content-Type") != media_type:
            raise _unexpected(response)
        return response

    async def _read(self, photo: PhotoSource) -> bytes:
        if isinstance(photo, bytes):
            return photo
        if isinstance(photo, np.ndarray):
            if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
                raise ValueError(
                    f"a photo array must be (H, W, 3) uint8, not {photo.shape} {photo.dtype}"
                )
            return await self._work(partial(encode_image, np.ascontiguousarray(photo), "PNG"))
        return await self._work(Path(photo).read_bytes)

    async def _ask(
        self,
        method: Literal["GET", "POST"],
        path: str,
        **options: Any,  # noqa: ANN401 - httpx's own
    ) -> httpx.Response:
        """A successful response. Retries a service that is busy or cannot be reached."""
        failed = 0
        while True:
            error: ClientError
            cause, retry_after_s = None, None
            try:
                response = await self._send(method, path, options)
            except httpx.RequestError as exc:
                error, cause = _failure(exc), exc
            else:
                if response.is_success:
                    return response
                error = _refusal(response)
                retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
            failed += 1
            retriable = isinstance(error, ServiceUnreachable | ServiceBusy)
            wait_s = self._retries.wait_s(failed, retry_after_s) if retriable else None
            if wait_s is None:
                raise error from cause
            # Clients that were refused together must not all return at the same moment.
            await self._wait(wait_s * (1 + random.random() / 4))  # noqa: S311


def _failure(exc: httpx.RequestError) -> ClientError:
    """The client's error for one of httpx's."""
    url = exc.request.url
    where = f"{url.scheme}://{url.netloc.decode('ascii')}"
    match exc:
        # The service may still work on the request: sending it again would add to its load.
        case httpx.ReadTimeout() | httpx.WriteTimeout() | httpx.PoolTimeout():
            return NoAnswerInTime(f"{where}: no answer in time")
        case httpx.DecodingError() | httpx.TooManyRedirects() | httpx.LocalProtocolError():
            return UnexpectedAnswer(f"{where}: {exc}")
        case _:
            return ServiceUnreachable(f"{where}: {str(exc) or type(exc).__name__}")


def _refusal(response: httpx.Response) -> ClientError:
    """The client's error for a response that is not a success."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = None
    if response.status_code in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        # A proxy in front of the service sends these too, with a body of its own.
        status = HTTPStatus(response.status_code)
        return ServiceBusy(problem.detail if problem else f"{status} {status.phrase}")
    return RequestRefused(problem) if problem else _unexpected(response)


def _retry_after_s(header: str | None) -> float | None:
    """``Retry-After`` in seconds from now. Source: RFC 9110, section 10.2.3."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _pixels(response: httpx.Response) -> npt.NDArray[np.uint8]:
    """The ``(H, W) uint8`` of a PNG with one channel."""
    try:
        with Image.open(io.BytesIO(response.content), formats=("PNG",)) as image:
            return np.array(image)
    except OSError as exc:
        raise _unexpected(response) from exc


def _parsed(response: httpx.Response, schema: type[SchemaT], content: bytes) -> SchemaT:
    try:
        return schema.model_validate_json(content)
    except ValidationError as exc:
        raise _unexpected(response) from exc


def _unexpected(response: httpx.Response) -> UnexpectedAnswer:
    kind = response.headers.get("Content-Type", "no content type")
    return UnexpectedAnswer(
        f"{response.request.url.copy_with(query=None)} answered {response.status_code} ({kind}): "
        "is this FCN Segment?"
    )
