"""The benchmark of accuracy against time: fronts, sizes, cached accuracy, order of timing."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.dataset import read_split
from service.artefact.contract import ModelContract
from service.images.decoding import DecodedPhoto
from service.inference.session import load_model
from tests.artefacts import STRIDE, make_contract, two_class_photo
from tests.benchmarks.front import (
    Side,
    artefact_sides,
    at_size,
    cache_key,
    count_all,
    label_as_coral,
    time_all,
)
from tests.benchmarks.front_points import Candidate, Point, pareto_front
from tests.voc_data import make_voc

TINY = Candidate("tiny", "int8", 96, "artefact", ("a", "b"))
NAMES = ("2007_000000", "2007_000001")


def point(ms: float, miou: float) -> Point:
    """A point with the same time in every round."""
    return Point("tiny", "fp32", 96, "artefact", ("a",), miou, 0.9, (ms, ms, ms))


def test_the_front_has_the_points_that_none_beats() -> None:
    """A point is beaten by one that is at least as fast and accurate, and better in one."""
    fast, middle, best = point(10, 0.5), point(20, 0.6), point(40, 0.7)
    slower, less_accurate, both = point(21, 0.6), point(20, 0.55), point(50, 0.4)
    points = [best, both, fast, slower, middle, less_accurate]
    assert pareto_front(points) == [fast, middle, best]
    assert pareto_front([]) == []


def test_equals_share_the_front() -> None:
    """Two points with the same time and accuracy are both on the front."""
    assert pareto_front([point(10, 0.5), point(10, 0.5)]) == [point(10, 0.5)] * 2


def test_times_are_compared_round_by_round() -> None:
    """A round in which the whole machine was slow does not change the ratio."""
    ours, theirs = (
        replace(point(1, 0.5), rounds_ms=figures)
        for figures in ((10.0, 40.0, 11.0), (20.0, 80.0, 22.0))
    )
    assert ours.ms == 11.0
    assert ours.over(theirs) == [0.5, 0.5, 0.5]


def test_another_size_scales_the_listed_shapes() -> None:
    """The shapes are multiples of 32, ascending by area, without duplicates from rounding."""
    contract = make_contract(shapes=((288, 512), (512, 288), (352, 512), (512, 512)))
    contract = ModelContract(**{**contract.model_dump(), "working_size": 512})
    assert at_size(contract, 512) == contract
    half = at_size(contract, 256)
    assert half.working_size == 256
    assert half.shapes == ((160, 256), (256, 160), (192, 256), (256, 256))
    assert at_size(contract, 64).shapes == ((64, 64),)
    assert at_size(contract, 640).shapes == ((384, 640), (640, 384), (448, 640), (640, 640))


@pytest.mark.parametrize("size", [64, 96, 160])
def test_another_size_reaches_the_network(tiny_artefact: Path, size: int) -> None:
    """The input has that longest side, and the logits are smaller than the input by the stride."""
    model = load_model(tiny_artefact, "cpu", threads=1)
    sized = replace(model, contract=at_size(model.contract, size))
    sized.warm_up()  # raises unless the logits have the size of the input over the stride
    assert max(itertools.chain(*sized.contract.shapes)) == size
    logits = sized.run(np.zeros((1, *sized.contract.shapes[0], 3), dtype=np.uint8))
    assert logits.shape[2:] == tuple(side // STRIDE for side in sized.contract.shapes[0])


def test_an_artefact_labels_at_every_size(tiny_artefact: Path) -> None:
    """There is one side per size and CPU precision, and a larger size gives a finer mask."""
    sides = list(artefact_sides(tiny_artefact, [32, 96]))
    assert [(side.precision, side.size) for side in sides] == [("fp32", 32), ("fp32", 96)]
    assert sides[0].files == sides[1].files
    coarse, fine = (side.label(DecodedPhoto.whole(two_class_photo())) for side in sides)
    assert coarse.shape == fine.shape == (64, 96)
    assert (fine[60, 2], fine[30, 90], fine[2, 2]) == (8, 15, 0)
    # The cat begins 16 pixels below the top. At size 32 a cell covers 48 pixels of the photo.
    assert (fine[24, 2], coarse[24, 2]) == (8, 0)


@pytest.mark.parametrize(
    ("candidate", "names", "code"),
    [
        (replace(TINY, files=("a", "c")), NAMES, "code"),
        (replace(TINY, size=128), NAMES, "code"),
        (replace(TINY, precision="fp32"), NAMES, "code"),
        (TINY, NAMES[:1], "code"),
        (TINY, NAMES, "other code"),
    ],
)
def test_the_key_depends_on_everything_that_changes_accuracy(
    candidate: Candidate, names: tuple[str, ...], code: str
) -> None:
    """Files, size, precision, photos and code each change the key."""
    assert cache_key(candidate, names, code) != cache_key(TINY, NAMES, "code")


def test_names_do_not_change_the_key() -> None:
    """The same files have the same key, whatever the folder's name."""
    renamed = replace(TINY, network="other", role="default")
    assert cache_key(renamed, NAMES, "code") == cache_key(TINY, NAMES, "code")


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    """Counts from before the interruption are reused."""
    samples = read_split(make_voc(tmp_path, images=3), "val")
    asked = []

    def right(photo: DecodedPhoto) -> NDArray[np.uint8]:
        asked.append(photo.size)
        return np.zeros(photo.size, dtype=np.uint8)

    def broken(photo: DecodedPhoto) -> NDArray[np.uint8]:
        raise InterruptedError("half way")

    def side(size: int, label: object) -> Side:
        return Side("tiny", "fp32", size, "artefact", ("a",), label)  # type: ignore[arg-type]

    cache = tmp_path / "accuracy.json"
    with pytest.raises(InterruptedError):
        count_all([side(96, right), side(128, broken)], samples, cache)
    assert asked == [(96, 128)] * 3
    first, second = count_all([side(96, broken), side(128, right)], samples, cache)
    assert len(asked) == 6
    assert np.array_equal(first.counts, second.counts)
    # Void pixels around the objects are left out.
    assert 0 < first.counts.sum() < 3 * 96 * 128
    assert first.counts[:, 1:].sum() == 0


def test_corals_ids_are_resized_to_the_photo() -> None:
    """The network gets the photo at the top left and grey below; ids are not interpolated."""
    seen = []

    def infer(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        seen.append(image)
        ids = np.full((65, 65), 5, dtype=np.uint8)
        ids[:33, :32], ids[:33, 32:] = 3, 20
        return ids

    photo = DecodedPhoto.whole(np.full((50, 100, 3), 200, dtype=np.uint8))
    mask = label_as_coral(infer, 65, photo)
    (image,) = seen
    assert image.shape == (65, 65, 3)
    assert (image[:32] == 200).all()
    assert (image[32:] == 128).all()
    assert mask.shape == (50, 100)
    assert set(np.unique(mask)) == {3, 20}
    assert np.array_equal(np.flatnonzero(np.diff(mask[0])), [48])


def test_sides_alternate() -> None:
    """After a warm-up, each round runs all sides, each after one photo that is not measured."""
    calls: list[str] = []
    photos = [DecodedPhoto.whole(np.zeros((1, width, 3), dtype=np.uint8)) for width in (1, 2)]

    def side(name: str) -> Side:
        def label(photo: DecodedPhoto) -> NDArray[np.uint8]:
            calls.append(f"{name}{photo.size[1]}")
            return np.zeros(photo.size, dtype=np.uint8)

        return Side(name, "fp32", 96, "artefact", ("a",), label)

    times = time_all([side("a"), side("b")], photos, rounds=2)
    turn = ["a2", "a1", "a2", "b2", "b1", "b2"]
    assert calls == ["a1", "a2", "b1", "b2", *turn, *turn]
    assert [len(figures) for figures in times] == [2, 2]
