"""What the halves of a job may answer, checked in the service: see `service.workers.replies`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

from service.artefact.contract import Shape
from service.artefact.preprocessing import Geometry
from service.jobs.base import Grant, Job
from service.workers.replies import boolean, number, require, whole

_RGB: Final = 3


def check_prepared(
    shapes: Sequence[Shape],
    max_side: int,
    grant: Grant,
    body_bytes: int,
    facts: Mapping[str, Any],
    parts: Sequence[bytes],
) -> None:
    """Check the answer of `service.jobs.base.Prepare`.

    ``shapes``: the contract's; ``max_side``: longest side that the network may see; ``body_bytes``:
    size of the request's body.
    """
    if "needs" in facts:
        whole(facts["needs"], grant.memory_bytes + 1, sys.maxsize)
        whole(facts["pixels"], 0, grant.max_pixels)
        return
    geometry = geometry_of(facts)
    for side in chain.from_iterable(geometry):
        whole(side, 1, grant.max_pixels)
    pixels = whole(math.prod(geometry.photo), 1, grant.max_pixels)
    longest = whole(max(geometry.resized), 1, max_side)
    require(geometry == Geometry.plan(geometry.photo, longest, shapes), "wrong geometry")
    image, _, shown = parts
    require(len(image) == _RGB * math.prod(geometry.padded), "wrong size of the network's input")
    require(len(shown) in {0, _RGB * pixels}, "wrong size of the photo")
    boolean(facts["with_confidence"])
    boolean(facts["decodes_again"])
    if facts["file_bytes"] is not None:
        whole(facts["file_bytes"], 0, body_bytes)
    _check_stages(facts["stages"], "decode", "preprocess")


def check_finished(
    job: Job, upsampled: bool, facts: Mapping[str, Any], parts: Sequence[bytes]
) -> None:
    """Check the answer of `service.jobs.base.Finish`. ``upsampled``: whether the device did it."""
    (content,) = parts
    job.check(facts["facts"], len(content))
    _check_stages(facts["stages"], *([] if upsampled else ["upsample"]), "encode")


def geometry_of(facts: Mapping[str, Any]) -> Geometry:
    """The geometry in the facts of `service.jobs.base.Prepare`."""
    photo, resized, padded = ((height, width) for height, width in facts["geometry"])
    return Geometry(photo, resized, padded)


def _check_stages(stages: Sequence[Sequence[Any]], *names: str) -> None:
    """Their names become a header and labels of metrics; the worker's clock is ours."""
    require(tuple(name for name, _, _ in stages) == names, "wrong stages")
    now_s = time.perf_counter()
    for _, started_s, seconds in stages:
        number(seconds, now_s - number(started_s, now_s))
