"""Estimates when the accepted photos will be done, so that no more are accepted than can be.

Photos differ by a factor of a thousand: a count of them says little. The estimate of a photo is the
time that others of its kind and size took, in a worker and on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from service.errors import Overloaded

# Seconds of a worker for a small photo, and per megapixel of a large one, until some were measured.
_FIRST_SMALL_S: Final = 0.01
_FIRST_MEGAPIXEL_S: Final = 0.1
_WEIGHT_OF_LAST: Final = 1 / 8
_MEGAPIXEL: Final = 1e6
# Fewer take as long as any small photo: they would teach a time per megapixel that has no meaning.
_LARGE_PIXELS: Final = 1_000_000


class Expected:
    """What a photo is expected to take from now on. ``device_s``: set by the caller."""

    def __init__(self, backlog: Backlog, kind: str) -> None:
        self.device_s = 0.0
        self.worker_s = backlog.small_s
        self._backlog = backlog
        self._kind = kind
        self._megapixels: float | None = None
        self._taken_s = 0.0

    @property
    def left_s(self) -> float:
        """Seconds that the service needs for it."""
        return self.device_s + max(0.0, self.worker_s - self._taken_s) / self._backlog.workers

    def grow(self, pixels: int) -> None:
        """The photo needs more memory than a small one; it may be large.

        Raises `Overloaded` if there is no time for it.
        """
        if pixels < _LARGE_PIXELS:
            return
        self._megapixels = pixels / _MEGAPIXEL
        self.worker_s = self._megapixels * self._backlog.megapixel_s(self._kind)
        self._backlog.check(self)

    def took(self, seconds: float) -> None:
        """A worker has taken these seconds for it."""
        self._taken_s += seconds

    def done(self) -> None:
        """It is done: the next estimates are better."""
        self._backlog.learn(self._kind, self._megapixels, self._taken_s)


class Backlog:
    """The accepted photos. ``limit_s``: most seconds that they may need; ``workers``: number."""

    def __init__(self, limit_s: float, workers: int) -> None:
        self.workers = workers
        self.small_s = _FIRST_SMALL_S
        self._limit_s = limit_s
        self._megapixel_s: dict[str, float] = {}
        self._photos: set[Expected] = set()

    @property
    def left_s(self) -> float:
        """Seconds until all accepted photos are done, by estimate."""
        return sum(photo.left_s for photo in self._photos)

    @contextmanager
    def photo(self, kind: str) -> Iterator[Expected]:
        """Count a photo while the context lasts. ``kind``: of job, for the estimate."""
        expected = Expected(self, kind)
        self._photos.add(expected)
        try:
            yield expected
        finally:
            self._photos.remove(expected)

    def check(self, photo: Expected | None = None) -> None:
        """Raise `Overloaded` if there is no time for ``photo``, or for a small one.

        A photo that is alone is always tried: the estimate may be wrong.
        """
        others_s = self.left_s - (0.0 if photo is None else photo.left_s)
        own_s = 0.0 if photo is None else photo.left_s
        if others_s > 0 and others_s + own_s > self._limit_s:
            raise Overloaded(
                f"the photos that are being worked on need {others_s:.0f} s", max(1.0, others_s)
            )

    def megapixel_s(self, kind: str) -> float:
        """Seconds of a worker for a megapixel of a large photo."""
        return self._megapixel_s.get(kind, _FIRST_MEGAPIXEL_S)

    def learn(self, kind: str, megapixels: float | None, seconds: float) -> None:
        """A photo took ``seconds`` of a worker; ``megapixels``: None for a small one."""
        if megapixels is None:
            self.small_s += _WEIGHT_OF_LAST * (seconds - self.small_s)
        else:
            usual_s = self.megapixel_s(kind)
            self._megapixel_s[kind] = usual_s + _WEIGHT_OF_LAST * (seconds / megapixels - usual_s)
