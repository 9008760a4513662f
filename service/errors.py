"""What can go wrong, in the service's own words. HTTP is spelt in ``routes``, never here.

::

    SegmentError
    ├── ArtefactError             the artefact folder cannot be served
    │   ├── ContractError         the contract, the graph and the manifest do not agree
    │   └── IntegrityError        a file is missing or is not the file the manifest names
    ├── DeviceUnavailable         the device that was asked for is not there
    ├── DeviceMemoryExhausted     the device has no memory left for what was asked of it
    ├── SettingsError             a setting is unknown or has an impossible value
    ├── Unauthorized              no API key was sent, or none that is known
    ├── RateLimited               the client sends more than it may; try again later
    ├── RequestError              what the caller asked for cannot be answered
    │   ├── MalformedRequest      the request is not of the protocol's form
    │   ├── NoImage               nothing that could be an image was sent
    │   ├── RequestTimeout        the client was too slow to send it
    │   ├── BodyTooLarge          more bytes than the cap
    │   ├── InvalidParameter      a parameter is out of its range
    │   ├── UnknownModel          no model of that name is served
    │   └── NotAcceptable         no representation of the kind the caller accepts
    ├── ImageError                the bytes that were sent are not a photo this service takes
    │   ├── UnsupportedImageType  not one of the allowed formats
    │   ├── UndecodableImage      an allowed format, but broken or truncated
    │   ├── ImageTooLarge         more pixels than the cap
    │   └── ImageUnavailable      it is kept elsewhere, and could not be fetched from there
    ├── RemoteError               another service, asked in this one's place, has no answer
    │   └── RemoteLost            it cannot be reached
    ├── ModelUnavailable          a model that is served on demand cannot be loaded
    ├── Overloaded                the queue is full; try again later
    ├── Draining                  the service is going down
    ├── DeadlineExceeded          the answer would have come too late
    └── InferenceFailed           the runtime failed on this batch
"""

from __future__ import annotations


class SegmentError(Exception):
    """Root of everything this package raises on purpose."""


class ArtefactError(SegmentError):
    """The artefact folder cannot be served. The message is one line."""


class ContractError(ArtefactError):
    """The metadata, the graph, the manifest or ``voc.CLASSES`` differ; the message says how."""


class IntegrityError(ArtefactError):
    """A file that the manifest names is missing or has another size or sha256."""


class DeviceUnavailable(SegmentError):
    """The device that was asked for is not there, or ONNX Runtime fell back from it."""


class DeviceMemoryExhausted(SegmentError):
    """The device has no memory left: at the start for a lane, later for a batch."""


class SettingsError(SegmentError):
    """A setting is unknown or has an impossible value. The message is one line."""


class Unauthorized(SegmentError):
    """No API key was sent, or none that is known."""


class RateLimited(SegmentError):
    """The client sends more than it may; ``retry_after_s`` from now it may again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(SegmentError):
    """What the caller asked for cannot be answered; asking again will not help."""


class MalformedRequest(RequestError):
    """The request is not of the form that its protocol wants."""


class NoImage(RequestError):
    """The request carries nothing that could be an image."""


class RequestTimeout(RequestError):
    """The client was too slow to send the request."""


class BodyTooLarge(RequestError):
    """The request's body has more bytes than allowed; the rest of it was not read."""


class InvalidParameter(RequestError):
    """A parameter is out of its range."""


class UnknownModel(RequestError):
    """No model of that name is served."""


class NotAcceptable(RequestError):
    """Nothing the service can answer here is what the caller accepts; ``available`` is."""

    def __init__(self, message: str, available: tuple[str, ...]) -> None:
        super().__init__(message)
        self.available = available


class ImageError(SegmentError):
    """The bytes that were sent are not a photo that this service takes."""


class UnsupportedImageType(ImageError):
    """The bytes are not of an allowed image format, whatever the header said."""


class UndecodableImage(ImageError):
    """The bytes are of an allowed format, but broken, truncated or of an unknown variant."""


class ImageTooLarge(ImageError):
    """The image has more pixels than allowed; known from its header, before decoding."""


class ImageUnavailable(ImageError):
    """The image is kept elsewhere, and could not be fetched from there."""


class RemoteError(SegmentError):
    """A running service that was asked in this one's place did not answer as it should."""


class RemoteLost(RemoteError):
    """That service cannot be reached: what else it would be asked would fail the same way."""


class ModelUnavailable(SegmentError):
    """A model that is served on demand cannot be loaded; the log says why."""


class Overloaded(SegmentError):
    """The queue is full. Nothing was queued."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        # With both, so that it survives pickling: in a cluster the queue is in another process.
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Draining(SegmentError):
    """The service is shutting down and takes nothing new."""


class DeadlineExceeded(SegmentError):
    """The request's time ran out before its answer was ready."""


class InferenceFailed(SegmentError):
    """The runtime raised while it ran the batch that the request was in."""
