"""The job of ``POST /segment`` and of ``fcn-segment predict``: one view of a photo."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from service.artefact.contract import ModelContract
from service.images.decoding import decode
from service.images.headers import Header
from service.jobs.base import Grant, Reading, Written
from service.views import VIEWS, MediaType, Options, Scene, ViewName


@dataclass(frozen=True, slots=True)
class ViewJob:
    """A view of an image file, encoded as ``media_type``. ``options.view`` is not read."""

    options: Options
    view: ViewName
    media_type: MediaType

    @classmethod
    def of(cls, options: Options) -> Self:
        """The view that ``options`` name, in its default media type."""
        view = VIEWS[options.view]
        return cls(options, view.name, view.media_types[0])

    @property
    def model(self) -> str | None:
        """See `service.jobs.base.Job`."""
        return self.options.model

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        view = VIEWS[self.view]
        max_side = self.options.max_side or contract.working_size
        contract.labels.ids(self.options.class_names)  # unknown names fail before decoding
        photo = grant.decode(body, max_side, self._writing_bytes)
        view.check_size(photo.size, self.media_type)
        writer = _ViewWriter(self, grant.max_pixels)
        return Reading(photo, max_side, view.needs_confidence, writer, len(body))

    def _writing_bytes(self, header: Header) -> int:
        """The most memory in bytes that the view takes while it is written."""
        view = VIEWS[self.view]
        photo = header.bytes_needed() if view.needs_photo else 0
        return photo + math.prod(header.size) * view.pixel_bytes


@dataclass(frozen=True, slots=True)
class _ViewWriter:
    """Renders a job's view. ``max_pixels``: see `service.images.decoding.decode`."""

    job: ViewJob
    max_pixels: int

    @property
    def needs_body(self) -> bool:
        """Whether the view shows the photo, which is then decoded at its own size."""
        return VIEWS[self.job.view].needs_photo

    def write(self, scene: Scene, body: bytes) -> Written:
        """See `service.jobs.base.Writer`."""
        if self.needs_body:
            scene = replace(scene, photo=decode(body, self.max_pixels).pixels)
        job = self.job
        return Written(VIEWS[job.view].render(scene, job.options, job.media_type))
