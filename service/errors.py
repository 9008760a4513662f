"""The errors of the service. They know nothing of HTTP: `service.http.problems` maps them.

::

    SegmentError
    ├── ArtefactError             the artefact folder cannot be served
    │   ├── ContractError         contract, graph and manifest differ
    │   └── IntegrityError        a file is missing or differs from the manifest
    ├── DeviceUnavailable         the requested device is not available
    ├── DeviceMemoryExhausted     the device is out of memory
    ├── SettingsError             a setting is unknown or invalid
    ├── Unauthorized              the API key is missing or unknown
    ├── RateLimited               the client exceeds its rate limit; retry later
    ├── RequestError              the request is invalid
    │   ├── MalformedRequest      the request does not follow its protocol
    │   ├── NoImage               the request contains no image
    │   ├── RequestTimeout        the client sent the request too slowly
    │   ├── BodyTooLarge          the body has too many bytes
    │   ├── InvalidParameter      a parameter has an invalid value
    │   ├── UnknownModel          no model of that name is served
    │   └── NotAcceptable         no media type that the client accepts
    ├── ImageError                the image cannot be segmented
    │   ├── UnsupportedImageType  the image has no allowed format
    │   ├── UndecodableImage      the image is broken or truncated
    │   ├── ImageTooLarge         the image has too many pixels
    │   ├── TooExpensive          the image costs far more than its size
    │   └── ImageUnavailable      the image could not be fetched from its URL
    ├── RemoteError               a remote service failed
    │   └── RemoteLost            the remote service cannot be reached
    ├── OutputFailed              the outputs cannot be written
    ├── ModelUnavailable          a model that is loaded on demand cannot be loaded
    ├── WorkersUnavailable        no image worker can be started
    ├── WorkerLost                the process that worked on the photo was lost
    ├── Overloaded                the queue is full; retry later
    ├── Draining                  the service is shutting down
    ├── DeadlineExceeded          the deadline passed before the answer was ready
    └── InferenceFailed           the runtime failed on this batch
"""

from __future__ import annotations


class SegmentError(Exception):
    """Base of all errors that this package raises on purpose."""


class ArtefactError(SegmentError):
    """The artefact folder cannot be served. The message is one line."""


class ContractError(ArtefactError):
    """Metadata, graph and manifest differ. The message names the difference."""


class IntegrityError(ArtefactError):
    """A file of the manifest is missing or has another sha256."""


class DeviceUnavailable(SegmentError):
    """The requested device is not available, or ONNX Runtime fell back to another one."""


class DeviceMemoryExhausted(SegmentError):
    """The device has no memory left for a lane at start, or for a batch later."""


class SettingsError(SegmentError):
    """A setting is unknown or invalid. The message is one line."""


class Unauthorized(SegmentError):
    """The API key is missing or unknown."""


class RateLimited(SegmentError):
    """The client exceeds its rate limit. It may retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(SegmentError):
    """The request is invalid; a retry fails too."""


class MalformedRequest(RequestError):
    """The request does not follow its protocol."""


class NoImage(RequestError):
    """The request contains no image."""


class RequestTimeout(RequestError):
    """The client sent the request too slowly."""


class BodyTooLarge(RequestError):
    """The body has more bytes than allowed. The rest of it is not read."""


class InvalidParameter(RequestError):
    """A parameter has an invalid value."""


class UnknownModel(RequestError):
    """No model of that name is served."""


class NotAcceptable(RequestError):
    """The client accepts none of the ``available`` media types."""

    def __init__(self, message: str, available: tuple[str, ...]) -> None:
        # Both arguments, so that it can be pickled and sent by an image worker.
        super().__init__(message, available)
        self.available = available

    def __str__(self) -> str:
        return str(self.args[0])


class ImageError(SegmentError):
    """The image cannot be segmented."""


class UnsupportedImageType(ImageError):
    """The bytes have no allowed image format. The Content-Type header is ignored."""


class UndecodableImage(ImageError):
    """The image has an allowed format, but is broken, truncated or an unsupported variant."""


class ImageTooLarge(ImageError):
    """The image has more pixels, or needs more memory, than allowed.

    Its header is checked before it is decoded.
    """


class TooExpensive(ImageError):
    """Decoding or encoding the image takes far more time or memory than others of its size."""


class ImageUnavailable(ImageError):
    """The image could not be fetched from its URL."""


class RemoteError(SegmentError):
    """A remote service failed or gave an unexpected answer."""


class RemoteLost(RemoteError):
    """The remote service cannot be reached; further requests would fail too."""


class OutputFailed(SegmentError):
    """The outputs cannot be written; further ones would fail too. The message is one line."""


class ModelUnavailable(SegmentError):
    """A model that is loaded on demand cannot be loaded. The log has the reason."""


class WorkersUnavailable(SegmentError):
    """No image worker can be started. The message is one line."""


class WorkerLost(SegmentError):
    """The process that worked on the photo was lost, and so was the one that tried it again."""


class Overloaded(SegmentError):
    """The queue is full. Nothing was queued."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        # Both arguments, so that it can be pickled: in a cluster the queue is in another process.
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Draining(SegmentError):
    """The service is shutting down and accepts no photos."""


class DeadlineExceeded(SegmentError):
    """The deadline passed before the answer was ready."""


class InferenceFailed(SegmentError):
    """The runtime raised an error while it ran the photo's batch."""
