"""Typed clients of the service, synchronous and asynchronous; they need the extra `client`."""

from service.client.client import (
    AsyncClient,
    Client,
    ClientError,
    NoAnswerInTime,
    Parameters,
    Photo,
    RequestRefused,
    Retries,
    ServiceBusy,
    ServiceUnreachable,
    UnexpectedAnswer,
)

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
