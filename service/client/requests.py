"""What the clients of the service do, without a network.

Each exchange is a generator that yields what is to be done next (send this, read that, wait so
long) and is sent what came of it. `service.client` drives them, in threads or on asyncio.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import ValidationError

from service.images.encoding import encode_image
from service.schemas import BatchItem, Problem, Schema, Segmentation

T = TypeVar("T")
SchemaT = TypeVar("SchemaT", bound=Schema)

Photo = bytes | str | os.PathLike[str] | npt.NDArray[np.uint8]
"""An image file's bytes, its path, or ``(H, W, 3) uint8`` RGB."""


class ClientError(Exception):
    """Root of what the clients raise."""


class ServiceUnreachable(ClientError):
    """No connection to the service, or it broke before the answer, at every try."""


class ServiceBusy(ClientError):
    """The service had no place for the request at any try, or this client may not send more."""


class NoAnswerInTime(ClientError):
    """The service took the request and did not answer within the timeout."""


class RequestRefused(ClientError):
    """The service says what is wrong with the request, in ``problem``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class UnexpectedAnswer(ClientError):
    """The answer is not one of this service's."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often to try in all, and how long to wait in between, in seconds.

    ``backoff_s`` before the second try where the service does not say, twice as long before each
    further one, at most ``longest_s``. A service that wants to be left alone for longer than
    ``longest_s`` is given up.
    """

    tries: int = 5
    backoff_s: float = 0.5
    longest_s: float = 60.0

    def wait_s(self, failed: int, retry_after_s: float | None) -> float | None:
        """Seconds to wait after so many tries that failed; None: give up."""
        if failed >= self.tries:
            return None
        if retry_after_s is None:
            return min(self.backoff_s * 2.0 ** (failed - 1), self.longest_s)
        return retry_after_s if retry_after_s <= self.longest_s else None


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Read:
    """Work that takes a moment, such as reading a file."""

    work: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Send:
    """A request; ``options`` as `httpx.Client.request` takes them."""

    method: Literal["GET", "POST"]
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


Step = Wait | Read | Send
Outcome = httpx.Response | httpx.RequestError | bytes | None
Exchange = Generator[Step, Outcome, T]


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What both clients do, step by step."""

    retries: Retries

    def get(self, path: str, schema: type[SchemaT]) -> Exchange[SchemaT]:
        """What a ``GET`` answers."""
        response = yield from self._ask(Send("GET", path))
        return _parsed(response, schema, response.content)

    def segment(self, photo: Photo, query: Mapping[str, Any]) -> Exchange[Segmentation]:
        """A photo's classes."""
        response = yield from self._post(photo, "application/json", query)
        return _parsed(response, Segmentation, response.content)

    def pixels(self, photo: Photo, query: Mapping[str, Any]) -> Exchange[npt.NDArray[np.uint8]]:
        """The ``(H, W) uint8`` of a view that is a PNG of one channel."""
        response = yield from self._post(photo, "image/png", query)
        try:
            with Image.open(io.BytesIO(response.content), formats=("PNG",)) as image:
                return np.array(image)
        except OSError as exc:
            raise _unexpected(response) from exc

    def fetch(self, photo: Photo, media_type: str, query: Mapping[str, Any]) -> Exchange[bytes]:
        """Whatever ``POST /segment`` answers."""
        response = yield from self._post(photo, media_type, query)
        return response.content

    def batch(
        self, photos: Sequence[Photo], batch_size: int, query: Mapping[str, Any]
    ) -> Exchange[list[BatchItem]]:
        """The classes of many photos, ``batch_size`` in one request."""
        items: list[BatchItem] = []
        for start in range(0, len(photos), batch_size):
            files = []
            for number, photo in enumerate(photos[start : start + batch_size], start):
                name = Path(photo).name if isinstance(photo, str | os.PathLike) else str(number)
                files.append(("image", (name, (yield from _bytes_of(photo)))))
            send = Send(
                "POST",
                "/segment/batch",
                {
                    "files": files,
                    "params": query,
                    "headers": {"Accept": "application/x-ndjson"},
                },
            )
            response = yield from self._ask(send)
            found = [_parsed(response, BatchItem, line) for line in response.content.splitlines()]
            if len(found) != len(files):
                raise _unexpected(response)
            items += [item.model_copy(update={"index": start + item.index}) for item in found]
        return items

    def _post(
        self, photo: Photo, media_type: str, query: Mapping[str, Any]
    ) -> Exchange[httpx.Response]:
        content = yield from _bytes_of(photo)
        options = {"content": content, "params": query, "headers": {"Accept": media_type}}
        response = yield from self._ask(Send("POST", "/segment", options))
        if response.headers.get("Content-Type") != media_type:
            raise _unexpected(response)
        return response

    def _ask(self, send: Send) -> Exchange[httpx.Response]:
        """Send a request until it is answered."""
        failed = 0
        while True:
            outcome = yield send
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            failed += 1
            error, cause, retry_after_s = _judge(outcome)
            again = isinstance(error, ServiceUnreachable | ServiceBusy)
            wait_s = self.retries.wait_s(failed, retry_after_s) if again else None
            if wait_s is None:
                raise error from cause
            # Those who were refused together should not come back together.
            yield Wait(wait_s * (1 + random.random() / 4))  # noqa: S311


def _bytes_of(photo: Photo) -> Exchange[bytes]:
    if isinstance(photo, bytes):
        return photo
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
            raise ValueError(f"a photo is (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
        work: Callable[[], bytes] = partial(encode_image, np.ascontiguousarray(photo), "PNG")
    else:
        work = Path(photo).read_bytes
    content = yield Read(work)
    if not isinstance(content, bytes):
        raise TypeError(f"not what was read: {content!r}")
    return content


def _judge(outcome: Outcome) -> tuple[ClientError, Exception | None, float | None]:
    """What a try that failed means: the error, its cause, and ``Retry-After`` in seconds."""
    match outcome:
        case httpx.Response():
            return _refusal(outcome), None, _retry_after_s(outcome.headers.get("Retry-After"))
        # What was sent may be worked on still: the same again would only make it worse.
        case httpx.ReadTimeout() | httpx.WriteTimeout() | httpx.PoolTimeout():
            error: ClientError = NoAnswerInTime(f"{_where(outcome)}: no answer in time")
        case httpx.DecodingError() | httpx.TooManyRedirects() | httpx.LocalProtocolError():
            error = UnexpectedAnswer(f"{_where(outcome)}: {outcome}")
        case httpx.RequestError():
            reason = str(outcome) or type(outcome).__name__
            error = ServiceUnreachable(f"{_where(outcome)}: {reason}")
        case _:
            raise TypeError(f"no outcome of a request: {outcome!r}")
    return error, outcome, None


def _where(exc: httpx.RequestError) -> str:
    url = exc.request.url
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _refusal(response: httpx.Response) -> ClientError:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = None
    if response.status_code in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        # A proxy before the service may say so too, in its own words.
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
