"""What the service believes of the two halves of a job."""

import json
import math
import pickle
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from service.jobs.base import Finish, Grant, Prepare
from service.jobs.checks import check_finished, check_prepared, geometry_of
from service.jobs.label_studio import BrushJob, ReadTasks
from service.jobs.view import ViewJob
from service.views import Options
from service.workers.replies import Check, read_reply
from service.workers.worker import Answer
from tests.artefacts import encode, make_contract, two_class_photo

CONTRACT = make_contract()
PICKLED = pickle.dumps(CONTRACT)
BODY = encode(two_class_photo())
GRANT = Grant(10_000_000, 2**26)
JOB = ViewJob.of(Options(view="overlay"))

check_first = partial(check_prepared, CONTRACT.shapes, 1280, GRANT, len(BODY))
check_second = partial(check_finished, JOB, False)


def prepared() -> Answer:
    """A right answer of the first half."""
    return Prepare(JOB, PICKLED, GRANT).run([BODY])


def finished() -> Answer:
    """A right answer of the second half."""
    first = prepared()
    geometry = geometry_of(first.facts)
    grid = [side // CONTRACT.stride for side in geometry.padded]
    logits = np.zeros((len(CONTRACT.classes), *grid), np.float32)
    task = Finish(PICKLED, GRANT.max_pixels, geometry, False, logits.shape, [])
    _, writer, shown = map(bytes, first.parts)
    return task.run([writer, shown, b"", logits.tobytes()])


def read(check: Check, facts: Mapping[str, Any], parts: Sequence[Any]) -> None:
    """Read a reply as the service does."""
    read_reply([json.dumps({"cpu_s": 0.0, **facts}).encode(), *map(bytes, parts)], check)


def test_right_answers_are_believed() -> None:
    """Of both halves, and a need for more memory."""
    read(check_first, prepared().facts, prepared().parts)
    read(check_first, {"needs": GRANT.memory_bytes + 1, "pixels": 0}, [])
    read(check_second, finished().facts, finished().parts)


SIZES = [[64, 96], [320, 480], [320, 480]]
LATER_S = time.perf_counter() + 1e6
STAGES = [["decode", 0.0, 0.0], ["preprocess", 0.0, 0.0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"needs": GRANT.memory_bytes, "pixels": 0},
        {"needs": math.inf, "pixels": 0},
        {"needs": GRANT.memory_bytes + 1},
        {"needs": GRANT.memory_bytes + 1, "pixels": 10_000_001},
        {"needs": GRANT.memory_bytes + 1, "pixels": -1},
        {"geometry": None},
        {"geometry": SIZES[:2]},
        {"geometry": [[64, 96], [64, 96], [64, 96, 3]]},
        {"geometry": [[64.0, 96.0], [64, 96], [64, 96]]},
        {"geometry": [[0, 0], [64, 96], [64, 96]]},
        {"geometry": [[64, 96], [64, 96], [32, 192]]},
        {"geometry": [[64, 96], [2**20, 2**20], [2**20, 2**20]]},
        {"with_confidence": 1},
        {"decodes_again": None},
        {"file_bytes": -1},
        {"file_bytes": len(BODY) + 1},
        {"stages": None},
        {"stages": STAGES[:1]},
        {"stages": [*STAGES, STAGES[0]]},
        {"stages": [["decode\r\nSet-Cookie: a=b", 0.0, 0.0], STAGES[1]]},
        {"stages": [["decode", math.nan, 0.0], STAGES[1]]},
        {"stages": [["decode", 0.0, math.nan], STAGES[1]]},
        {"stages": [["decode", 0.0, -1.0], STAGES[1]]},
        {"stages": [["decode", LATER_S, 0.0], STAGES[1]]},
        {"stages": [["decode", 0.0, LATER_S], STAGES[1]]},
    ],
)
def test_odd_facts_of_the_first_half_are_not_believed(changes: dict[str, Any]) -> None:
    """Of the wrong type, size or order, or more than the photo may have."""
    right = prepared()
    with pytest.raises(ValueError):  # noqa: PT011 - only the kind matters
        read(check_first, {**right.facts, **changes}, right.parts)


@pytest.mark.parametrize("parts", [[], [b""] * 3, [b""] * 4])
def test_odd_parts_of_the_first_half_are_not_believed(parts: list[bytes]) -> None:
    """Too few, too many, or not of the photo's size."""
    with pytest.raises(ValueError):  # noqa: PT011 - only the kind matters
        read(check_first, prepared().facts, parts)
    image, writer, shown = prepared().parts
    with pytest.raises(ValueError, match="size of the photo"):
        read(check_first, prepared().facts, [image, writer, bytes(shown)[1:]])


def test_missing_facts_are_not_made_up() -> None:
    """Of either half."""
    for check, answer in ((check_first, prepared()), (check_second, finished())):
        for name in answer.facts:
            others = {other: value for other, value in answer.facts.items() if other != name}
            with pytest.raises(ValueError, match=name):
                read(check, others, answer.parts)


def test_odd_answers_of_the_second_half_are_not_believed() -> None:
    """Facts of another job, other stages, or more than one content."""
    right = finished()
    for facts, parts in (
        ({"facts": {"json_bytes": 1}}, right.parts),
        ({"stages": STAGES}, right.parts),
        ({}, [*right.parts, b""]),
        ({}, []),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - only the kind matters
            read(check_second, {**right.facts, **facts}, parts)


@pytest.mark.parametrize(
    "facts",
    [
        {"regions": 2},
        {"regions": 2, "score": math.nan},
        {"regions": 2, "score": 10},
        {"regions": -1, "score": 0},
        {"regions": 1001, "score": 0},
        {"regions": [1], "score": 0},
    ],
)
def test_odd_facts_about_regions_are_not_believed(facts: dict[str, Any]) -> None:
    """Their number and scores are added up for each task."""
    job = BrushJob("image", b"", 0)
    read(lambda found, _: job.check(found, 0), {"regions": 2, "score": 1.5}, [])
    with pytest.raises(ValueError):  # noqa: PT011 - only the kind matters
        read(lambda found, _: job.check(found, 0), facts, [])


@pytest.mark.parametrize(
    "facts",
    [
        {"needs": 1},
        {"needs": 2**40},
        {"keys": ["image"]},
        {"keys": [1], "images": [[5]]},
        {"keys": "image", "images": [[5]] * 5},
        {"keys": ["image"], "images": [[5, 5]]},
        {"keys": ["image"], "images": [[4]]},
        {"keys": ["image"], "images": [[6], [-1]]},
        {"keys": ["image"], "images": [["5"]]},
        {"keys": [], "images": [[]] * 1_000_000},
        {"keys": ["image"], "images": [[5]] + [[None]] * 250},
    ],
)
def test_odd_facts_about_tasks_are_not_believed(facts: dict[str, Any]) -> None:
    """Each image is a stretch of the texts."""
    task = ReadTasks(CONTRACT.labels, 1000)
    read(task.check, {"keys": ["image"], "images": [[5], [None]]}, [b"texts", b""])
    with pytest.raises(ValueError):  # noqa: PT011 - only the kind matters
        read(task.check, facts, [b"texts", b""])
