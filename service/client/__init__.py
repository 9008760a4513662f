"""Typed clients of the service, synchronous and asynchronous; they need the extra `client`."""

try:
    import httpx  # noqa: F401 - checked once, for all modules of the package
except ImportError as exc:
    raise ImportError("the client needs httpx: pip install 'fcn-segment[client]'") from exc

from service.client.client import AsyncClient, Client
from service.client.requests import (
    ClientError,
    NoAnswerInTime,
    Parameters,
    PhotoSource,
    RequestRefused,
    Retries,
    ServiceBusy,
    ServiceUnreachable,
    UnexpectedAnswer,
)

Photo = PhotoSource
"""The former name of `PhotoSource`."""

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "NoAnswerInTime",
    "Parameters",
    "Photo",
    "PhotoSource",
    "RequestRefused",
    "Retries",
    "ServiceBusy",
    "ServiceUnreachable",
    "UnexpectedAnswer",
]
