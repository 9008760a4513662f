"""The job of ``POST /segment`` and of ``fcn-segment predict``: one view of a photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from service.artefact.contract import ModelContract
from service.jobs.base import Grant, Reading, Written
from service.views import VIEWS, MediaType, Options, Scene, ViewName
from service.workers.replies import require


class ViewJob(NamedTuple):
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
        pixel_bytes = dict(zip(view.media_types, view.pixel_bytes, strict=True))[self.media_type]
        photo = grant.decode(body, max_side, pixel_bytes, shown=view.needs_photo)
        view.check_size(photo.size, self.media_type)
        return Reading(photo, max_side, view.needs_confidence, _ViewWriter(self), len(body))

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""
        require(not facts, "there are no facts")


@dataclass(frozen=True, slots=True)
class _ViewWriter:
    """Renders a job's view."""

    job: ViewJob

    @property
    def needs_photo(self) -> bool:
        """See `service.jobs.base.Writer`."""
        return VIEWS[self.job.view].needs_photo

    def write(self, scene: Scene) -> Written:
        """See `service.jobs.base.Writer`."""
        job = self.job
        return Written(VIEWS[job.view].render(scene, job.options, job.media_type))
