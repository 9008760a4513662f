"""A client of the service, for threads (`Client`) and for asyncio (`AsyncClient`).

::

    with Client("http://localhost:8000") as client:
        mask = client.mask("photo.jpg")  # (H, W) uint8 class ids
        for found in client.segment("photo.jpg", classes="person,dog").classes:
            print(found.name, found.fraction)

If the service requires an API key, pass ``api_key`` or set FCN_API_KEY in the environment.

Failed connections and responses of 503 or 429 are retried. The wait is the response's
``Retry-After``, or else doubles with each try. Retries are safe for POST too: an answer depends on
its request alone, and the service stores nothing. Every other error is raised at once.

::

    ClientError
    ├── ServiceUnreachable   no connection, or a broken one, at every try
    ├── ServiceBusy          503 or 429 at every try
    ├── NoAnswerInTime       connected, but no answer within the timeout
    ├── RequestRefused       the service rejected the request: see ``problem``
    └── UnexpectedAnswer     the server at this URL is not this service
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import httpx

from service.client.requests import ClientError, Requests, Retries
from service.settings import API_KEY_VARIABLE

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_URL: Final = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S: Final = 5.0


class AsyncClient(Requests):
    """A client for asyncio.

    ``api_key``: by default the environment's ``FCN_API_KEY``, if it is set; ``timeout_s``: longest
    wait for an answer, in seconds; ``transport`` and ``sleep`` replace how it sends and waits.
    """

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
        super().__init__(retries)
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=_checked(url),
            headers=_authorization(api_key),
            timeout=_timeout(timeout_s),
            transport=transport,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, method: str, path: str, options: Mapping[str, Any]) -> httpx.Response:
        return await self._http.request(method, path, **options)

    async def _wait(self, seconds: float) -> None:
        await self._sleep(seconds)

    async def _work(self, work: Callable[[], bytes]) -> bytes:
        return await asyncio.to_thread(work)


class _BlockingRequests(Requests):
    """`Requests` whose coroutines block instead of suspending."""

    def __init__(
        self, http: httpx.Client, sleep: Callable[[float], None], retries: Retries | None
    ) -> None:
        super().__init__(retries)
        self._http = http
        self._sleep = sleep

    async def _send(self, method: str, path: str, options: Mapping[str, Any]) -> httpx.Response:
        return self._http.request(method, path, **options)

    async def _wait(self, seconds: float) -> None:
        self._sleep(seconds)

    async def _work(self, work: Callable[[], bytes]) -> bytes:
        return work()


def _blocking(
    method: Callable[Concatenate[Requests, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The method of `Client` for a method of `Requests`, with its parameters and docstring."""

    @wraps(method)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            method(client._requests, *args, **kwargs).send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        raise RuntimeError(f"{method.__name__} suspended, but nothing can resume it")

    return call


class Client:
    """A client for threads; several threads may share one.

    The parameters are the same as those of `AsyncClient`.
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
        self._http = httpx.Client(
            base_url=_checked(url),
            headers=_authorization(api_key),
            timeout=_timeout(timeout_s),
            transport=transport,
        )
        self._requests = _BlockingRequests(self._http, sleep, retries)

    segment = _blocking(Requests.segment)
    mask = _blocking(Requests.mask)
    confidence = _blocking(Requests.confidence)
    overlay = _blocking(Requests.overlay)
    cutout = _blocking(Requests.cutout)
    batch = _blocking(Requests.batch)
    classes = _blocking(Requests.classes)
    models = _blocking(Requests.models)
    views = _blocking(Requests.views)
    fetch = _blocking(Requests.fetch)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(url: str) -> httpx.URL:
    try:
        checked = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise ClientError(f"{url!r} is not a URL: {exc}") from exc
    if checked.scheme not in ("http", "https") or not checked.host:
        raise ClientError(f"{url!r} is not a URL: it must begin with http:// or https://")
    return checked


def _authorization(api_key: str | None) -> dict[str, str]:
    api_key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        # The key is a secret: the message must not repeat it.
        raise ClientError("the API key contains characters that are not printable ASCII")
    return {"Authorization": f"Bearer {api_key}"}


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
