"""What a worker's reply may be: the worker may be under the control of the file that it decodes.

A reply that no task gives is a `ValueError`, and ends its worker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service import errors
from service.errors import ImageError, NotAcceptable, RequestError

Check = Callable[[Mapping[str, Any], Sequence[bytes]], object]
"""Raises any of `_NONSENSE` unless a task can answer with these facts and parts."""

# Label Studio's keys are the longest: a configuration has at most a quarter of this.
_MOST_FACTS_BYTES: Final = 2**20

# What Python raises for values of another type, number or size than was expected.
_NONSENSE: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that was checked. ``error``: what the task ended with; None if it has an answer."""

    facts: Mapping[str, Any]
    parts: Sequence[bytes]
    cpu_s: float
    error: Exception | None


def read_reply(content: Sequence[bytes], check: Check | None) -> Reply:
    """The reply in the parts of a message. Raises `ValueError` if ``check`` or these lines do."""
    try:
        text, *parts = content
        if len(text) > _MOST_FACTS_BYTES:
            raise ValueError("its facts are too long")
        facts = json.loads(text)
        cpu_s = number(facts.pop("cpu_s"))
        error = _error(facts)
        if error is None and check is not None:
            check(facts, parts)
    except _NONSENSE as exc:
        raise ValueError(f"{exc!r:.200}") from exc
    return Reply(facts, parts, cpu_s, error)


def require(condition: bool, what: str) -> None:
    """Raise `ValueError` that says ``what`` is wrong, unless the condition holds."""
    if not condition:
        raise ValueError(what)


def number(value: Any, most: float = math.inf) -> float:  # noqa: ANN401
    """A finite number in 0 to ``most``. Raises `ValueError`."""
    if type(value) not in {int, float} or not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{value!r:.40} is not a number in 0 to {most}")
    return float(value)


def whole(value: Any, least: int, most: int) -> int:  # noqa: ANN401
    """A whole number in ``least`` to ``most``. Raises `ValueError`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} is not a whole number in {least} to {most}")
    return value


def boolean(value: Any) -> bool:  # noqa: ANN401
    """True or False. Raises `ValueError`."""
    if type(value) is not bool:
        raise ValueError(f"{value!r:.40} is not true or false")
    return value


def _error(facts: Mapping[str, Any]) -> Exception | None:
    """The error that a task ended with, if it did."""
    if "unforeseen" in facts:  # a fault of ours
        return RuntimeError(f"an image worker failed:\n{facts['unforeseen']}")
    if "error" not in facts:
        return None
    found, arguments = getattr(errors, facts["error"]), facts["arguments"]
    # It can only complain about the request and the image.
    if not issubclass(found, RequestError | ImageError):
        raise ValueError(f"{found} is not an error of the request or the image")
    if found is NotAcceptable:
        message, available = arguments
        return NotAcceptable(_text(message), tuple(_text(one) for one in available))
    (message,) = arguments
    error: RequestError | ImageError = found(_text(message))
    return error


def _text(value: Any) -> str:  # noqa: ANN401
    if type(value) is not str:
        raise ValueError(f"{value!r:.40} is not text")
    return value
