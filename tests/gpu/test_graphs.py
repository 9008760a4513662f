"""CUDA graphs are captured for the listed shapes and replayed with each batch's photos."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from service.artefact.contract import Precision
from service.inference.lanes import DeviceTask, Lane, batch_sizes
from tests.gpu.conftest import MAX_BATCH, Gpu, Photo, differing, masks, open_gpu

SAME = 1e-4
"""Two sessions may choose different kernels; a single session always gives the same bytes."""


def listed(
    gpu: Gpu, photos: Sequence[Photo], prepare: Callable[..., DeviceTask]
) -> list[list[DeviceTask]]:
    """A batch of every captured size in every listed shape."""
    return [
        [prepare(photos[nth % len(photos)], shape) for nth in range(size)]
        for shape in gpu.model.contract.shapes
        for size in batch_sizes(MAX_BATCH)
    ]


def test_every_listed_shape_and_size_is_captured(fp32: Gpu, fp32_lane: Lane) -> None:
    """There is one graph for each listed shape and batch size."""
    shapes, sizes = fp32.model.contract.shapes, batch_sizes(MAX_BATCH)
    assert fp32_lane.captured == len(shapes) * len(sizes)


def test_a_replay_gives_what_a_run_gives(
    fp32: Gpu, fp32_lane: Lane, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """In one session, which runs the same kernels either way, the masks are equal."""
    plain = fp32.open_lane(graphs=False)
    assert plain.captured == 0
    for tasks in listed(fp32, photos, prepare):
        for found, wanted in zip(masks(fp32_lane, tasks), masks(plain, tasks), strict=True):
            assert np.array_equal(found, wanted)


def test_a_replay_sees_the_photos_of_its_own_batch(
    fp32_lane: Lane, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """Two alternating batches get their own masks."""
    one, other = ([prepare(photo, (375, 500))] * 4 for photo in photos[:2])
    first, second = masks(fp32_lane, one), masks(fp32_lane, other)
    assert differing(first[0], second[0]) > 0.01
    for _ in range(3):
        assert np.array_equal(masks(fp32_lane, one), first)
        assert np.array_equal(masks(fp32_lane, other), second)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_off_switch(
    precision: Precision,
    request: pytest.FixtureRequest,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
) -> None:
    """A session without graphs gives the same masks except near ties."""
    lane: Lane = request.getfixturevalue(f"{precision}_lane")
    gpu = open_gpu(precision, graphs=False)
    plain = gpu.open_lane(graphs=False)
    plain.warm_up()
    for tasks in listed(gpu, photos, prepare):
        for found, wanted in zip(masks(plain, tasks), masks(lane, tasks), strict=True):
            assert differing(found, wanted) <= SAME
