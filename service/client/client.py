"""A client of the service, for threads (`Client`) and for asyncio (`AsyncClient`).

::

    with Client("http://localhost:8000") as client:
        mask = client.mask("photo.jpg")  # (H, W) uint8 class ids
        for found in client.segment("photo.jpg", classes="person,dog").classes:
            print(found.name, found.fraction)

A service that asks for an API key is given ``api_key``, or else the environment's FCN_API_KEY.

What cannot be reached and what answers 503 or 429 is tried again, after as long as ``Retry-After``
says, or else after twice as long each time. That is safe for POST too: an answer depends on the
request alone, and leaves nothing behind. Everything else is raised at once.

::

    ClientError
    ├── ServiceUnreachable   no connection, or it broke, at every try
    ├── ServiceBusy          503 or 429 at every try
    ├── NoAnswerInTime       connected, but no answer within the timeout
    ├── RequestRefused       the service says what is wrong: ``problem``
    └── UnexpectedAnswer     whatever answers there, it is not this service
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Literal, Self, TypedDict, TypeVar, Unpack

try:
    import httpx
except ImportError as exc:
    raise ImportError("the client needs httpx: pip install 'fcn-segment[client]'") from exc
import numpy as np
import numpy.typing as npt

from service.client.requests import (
    ClientError,
    Exchange,
    Exchanges,
    NoAnswerInTime,
    Outcome,
    Photo,
    Read,
    RequestRefused,
    Retries,
    Send,
    ServiceBusy,
    ServiceUnreachable,
    UnexpectedAnswer,
    Wait,
)
from service.schemas import BatchItem, LabelMap, ModelList, Segmentation
from service.settings import API_KEY_VARIABLE

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "NoAnswerInTime",
    "Parameters",
    "Photo",
    "RequestRefused",
    "Retries",
    "ServiceBusy",
    "ServiceUnreachable",
    "UnexpectedAnswer",
]

T = TypeVar("T")

MaskFormat = Literal["rle", "polygons", "png", "none"]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S: Final = 5.0
BATCH_SIZE: Final = 16
"""Photos in one request of ``batch``: what the service takes unless its settings say else."""


class Parameters(TypedDict, total=False):
    """What every request may say; what is left out is the service's default.

    ``classes``: names, comma-separated; ``max_side``: pixels; ``model``: a name of ``models``.
    """

    classes: str
    max_side: int
    model: str


class Client:
    """A client for threads; one may be used by several.

    ``api_key``: by default the environment's ``FCN_API_KEY``, if any; ``timeout_s``: seconds that
    an answer may take; ``transport`` and ``sleep`` are what it sends and waits with.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchanges = Exchanges(retries or Retries())
        self._sleep = sleep
        self._http = httpx.Client(
            base_url=_checked(url),
            headers=_authorization(api_key),
            timeout=_timeout(timeout_s),
            transport=transport,
        )

    def segment(
        self, photo: Photo, *, mask: MaskFormat = "rle", **parameters: Unpack[Parameters]
    ) -> Segmentation:
        """The classes that are present, largest first, with the mask in the form asked for."""
        return self._run(self._exchanges.segment(photo, {**parameters, "mask": mask}))

    def mask(self, photo: Photo, **parameters: Unpack[Parameters]) -> npt.NDArray[np.uint8]:
        """Class ids, ``(H, W) uint8``."""
        return self._run(self._exchanges.pixels(photo, {**parameters, "view": "mask"}))

    def confidence(self, photo: Photo, **parameters: Unpack[Parameters]) -> npt.NDArray[np.uint8]:
        """The probability of each pixel's class in 255ths, ``(H, W) uint8``."""
        return self._run(self._exchanges.pixels(photo, {**parameters, "view": "confidence"}))

    def overlay(
        self,
        photo: Photo,
        *,
        alpha: float = 0.5,
        media_type: Literal["image/png", "image/jpeg", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """Photo and colours blended, as an image file."""
        query = {**parameters, "view": "overlay", "alpha": alpha}
        return self._run(self._exchanges.fetch(photo, media_type, query))

    def cutout(
        self,
        photo: Photo,
        *,
        media_type: Literal["image/png", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """The photo where it shows the chosen classes, transparent elsewhere, as an image file."""
        query = {**parameters, "view": "cutout"}
        return self._run(self._exchanges.fetch(photo, media_type, query))

    def batch(
        self,
        photos: Iterable[Photo],
        *,
        mask: MaskFormat = "rle",
        batch_size: int = BATCH_SIZE,
        **parameters: Unpack[Parameters],
    ) -> list[BatchItem]:
        """`segment` of many photos, ``batch_size`` in one request.

        Each in its place: its segmentation, or the problem with it.
        """
        query = {**parameters, "mask": mask}
        return self._run(self._exchanges.batch(list(photos), batch_size, query))

    def classes(self) -> LabelMap:
        """The label map."""
        return self._run(self._exchanges.get("/classes", LabelMap))

    def models(self) -> ModelList:
        """The models that are served, the default first."""
        return self._run(self._exchanges.get("/models", ModelList))

    def fetch(self, photo: Photo, media_type: str, query: Mapping[str, Any]) -> bytes:
        """Whatever ``POST /segment`` answers to these parameters."""
        return self._run(self._exchanges.fetch(photo, media_type, query))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, exchange: Exchange[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = exchange.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            match step:
                case Wait():
                    self._sleep(step.seconds)
                    outcome = None
                case Read():
                    outcome = step.work()
                case Send():
                    try:
                        outcome = self._http.request(step.method, step.path, **step.options)
                    except httpx.RequestError as exc:
                        outcome = exc


class AsyncClient:
    """A client for asyncio: what `Client` has, to be awaited."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._exchanges = Exchanges(retries or Retries())
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=_checked(url),
            headers=_authorization(api_key),
            timeout=_timeout(timeout_s),
            transport=transport,
        )

    async def segment(
        self, photo: Photo, *, mask: MaskFormat = "rle", **parameters: Unpack[Parameters]
    ) -> Segmentation:
        """As `Client.segment`."""
        return await self._run(self._exchanges.segment(photo, {**parameters, "mask": mask}))

    async def mask(self, photo: Photo, **parameters: Unpack[Parameters]) -> npt.NDArray[np.uint8]:
        """As `Client.mask`."""
        return await self._run(self._exchanges.pixels(photo, {**parameters, "view": "mask"}))

    async def confidence(
        self, photo: Photo, **parameters: Unpack[Parameters]
    ) -> npt.NDArray[np.uint8]:
        """As `Client.confidence`."""
        return await self._run(self._exchanges.pixels(photo, {**parameters, "view": "confidence"}))

    async def overlay(
        self,
        photo: Photo,
        *,
        alpha: float = 0.5,
        media_type: Literal["image/png", "image/jpeg", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """As `Client.overlay`."""
        query = {**parameters, "view": "overlay", "alpha": alpha}
        return await self._run(self._exchanges.fetch(photo, media_type, query))

    async def cutout(
        self,
        photo: Photo,
        *,
        media_type: Literal["image/png", "image/webp"] = "image/png",
        **parameters: Unpack[Parameters],
    ) -> bytes:
        """As `Client.cutout`."""
        query = {**parameters, "view": "cutout"}
        return await self._run(self._exchanges.fetch(photo, media_type, query))

    async def batch(
        self,
        photos: Iterable[Photo],
        *,
        mask: MaskFormat = "rle",
        batch_size: int = BATCH_SIZE,
        **parameters: Unpack[Parameters],
    ) -> list[BatchItem]:
        """As `Client.batch`."""
        query = {**parameters, "mask": mask}
        return await self._run(self._exchanges.batch(list(photos), batch_size, query))

    async def classes(self) -> LabelMap:
        """As `Client.classes`."""
        return await self._run(self._exchanges.get("/classes", LabelMap))

    async def models(self) -> ModelList:
        """As `Client.models`."""
        return await self._run(self._exchanges.get("/models", ModelList))

    async def fetch(self, photo: Photo, media_type: str, query: Mapping[str, Any]) -> bytes:
        """As `Client.fetch`."""
        return await self._run(self._exchanges.fetch(photo, media_type, query))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, exchange: Exchange[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = exchange.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            match step:
                case Wait():
                    await self._sleep(step.seconds)
                    outcome = None
                case Read():
                    outcome = await asyncio.to_thread(step.work)
                case Send():
                    try:
                        outcome = await self._http.request(step.method, step.path, **step.options)
                    except httpx.RequestError as exc:
                        outcome = exc


def _checked(url: str) -> httpx.URL:
    try:
        checked = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise ClientError(f"{url!r} is not a URL: {exc}") from exc
    if checked.scheme not in ("http", "https") or not checked.host:
        raise ClientError(f"{url!r} is not a URL: it begins with http:// or https://")
    return checked


def _authorization(api_key: str | None) -> dict[str, str]:
    api_key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ClientError("the API key has characters that no key has")  # and is not shown
    return {"Authorization": f"Bearer {api_key}"}


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
