"""VOC's layout is read unchanged; errors name the file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.dataset import DatasetError, hold_out, read_names, read_split
from models.training_set import ResumableBatches, TrainingSet, repeat_factors
from models.transforms import Augmentation
from service.artefact.labels import LabelSet
from service.images.decoding import decode
from tests.voc_data import make_voc, write_mask


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The ``VOC2012`` folder of a made-up VOCdevkit."""
    return make_voc(tmp_path) / "VOC2012"


def test_a_split_is_read_in_its_order(voc: Path) -> None:
    """Each listed name becomes a sample; VOCdevkit and VOC2012 are the same data."""
    samples = read_split(voc, "train")
    assert [sample.name for sample in samples] == [f"2007_{i:06}" for i in range(12)]
    assert samples == read_split(voc.parent, "train")


def test_labels_keep_their_ids_and_void(voc: Path) -> None:
    """Palette indices are class ids, 255 stays 255, and SBD's masks are found."""
    samples = read_split(voc, "train")
    image, mask = samples[0].load()
    assert (image.mode, image.size) == ("RGB", mask.size)
    assert set(np.unique(np.asarray(mask))) == {0, 8, 255}
    assert samples[2].mask_path.parent.name == "SegmentationClassAug"
    assert set(np.unique(np.asarray(samples[2].load()[1]))) == {0, 15}


def test_vocs_own_mask_wins_over_sbds(voc: Path) -> None:
    """Where both exist, the finer one is used."""
    write_mask(voc / "SegmentationClassAug/2007_000000.png", np.zeros((96, 128), np.uint8))
    assert read_split(voc, "train")[0].mask_path.parent.name == "SegmentationClass"


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("JPEGImages/2007_000001.jpg", "2007_000001.jpg"),
        ("SegmentationClass/2007_000001.png", "2007_000001.png"),
        ("ImageSets/Segmentation/train.txt", "train.txt"),
    ],
)
def test_a_missing_file_is_named(voc: Path, missing: str, named: str) -> None:
    """Reading the split stops at the first missing file."""
    (voc / missing).unlink()
    with pytest.raises(DatasetError, match=named):
        read_split(voc, "train")


def test_a_folder_without_voc_is_named(tmp_path: Path) -> None:
    """A wrong --data is reported at once."""
    with pytest.raises(DatasetError, match=str(tmp_path)):
        read_split(tmp_path, "train")


def test_a_size_mismatch_is_named(voc: Path) -> None:
    """A mask of another size than its photo stops the run."""
    write_mask(voc / "SegmentationClass/2007_000000.png", np.zeros((96, 127), np.uint8))
    with pytest.raises(DatasetError, match=r"2007_000000\.png: 127x96.* 128x96"):
        read_split(voc, "train")[0].load()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_as_the_service_shows_them(voc: Path, orientation: int) -> None:
    """Training, evaluation and serving see the same pixels: masks are drawn on upright photos."""
    upright = np.zeros((96, 128, 3), np.uint8)
    upright[:48, :64, 0] = upright[48:, 64:, 2] = 255
    stored = upright
    if orientation in (5, 6, 7, 8):
        stored = stored.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    # Orientation 6 is turned clockwise to be upright, 8 counterclockwise.
    if orientation in (6, 8):
        stored = stored[::-1, ::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = voc / "JPEGImages/2007_000000.jpg"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, quality=95, exif=exif)
    image, _ = read_split(voc, "train")[0].load()
    assert image.size == (128, 96)
    assert np.abs(np.asarray(image).astype(int) - upright).mean() < 8
    served = decode(path.read_bytes(), max_pixels=1 << 20).pixels
    assert np.array_equal(np.asarray(image), served)


def test_a_mask_that_was_not_turned_is_named(voc: Path) -> None:
    """The error says that the photo was."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 96)).save(voc / "JPEGImages/2007_000000.jpg", exif=exif)
    with pytest.raises(DatasetError, match=r"2007_000000\.png: 128x96.*96x128 upright.*turn the"):
        read_split(voc, "train")[0].load()


@pytest.mark.parametrize(
    "content",
    [
        "a b\nüber\nc\n".encode(),
        "a b\r\nüber\r\n\r\nc".encode("utf-8-sig"),
        "  a b \rüber\rc".encode(),
        "a b\r\nüber\r\nc\r\n".encode("utf-16"),
        b"\xfe\xff" + "a b\nüber\nc".encode("utf-16-be"),
    ],
    ids=["unix", "bom-crlf", "cr", "utf-16", "utf-16-be"],
)
def test_a_list_is_read_as_any_editor_saves_it(tmp_path: Path, content: bytes) -> None:
    """Byte order marks, line ends, UTF-16, and spaces within names."""
    (tmp_path / "train.txt").write_bytes(content)
    assert read_names(tmp_path / "train.txt") == ["a b", "über", "c"]


def test_names_that_are_not_utf_8_are_found(voc: Path) -> None:
    """They are the files' own bytes."""
    listing = voc / "ImageSets/Segmentation/train.txt"
    name = os.fsdecode(b"caf\xe9")
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (voc / f"{folder}/2007_000000.{suffix}").rename(voc / f"{folder}/{name}.{suffix}")
    listing.write_bytes(b"caf\xe9\n")
    (sample,) = read_split(voc, "train")
    assert sample.load()[0].size == (128, 96)


@pytest.mark.parametrize("content", [b"a\0\n\0", b"\xff\xfea", b"\n \r\n"])
def test_what_is_no_list_is_named(tmp_path: Path, content: bytes) -> None:
    """UTF-16 without a mark, cut UTF-16, and a list of nothing."""
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=r"train\.txt: "):
        read_names(tmp_path / "train.txt")


@pytest.mark.parametrize(
    ("values", "found"),
    [((0, 255), "background"), ((255, 255), "no class"), ((15, 255), "person"), ((0, 0), "backg")],
)
def test_masks_that_cannot_teach_stop_the_run(
    voc: Path, values: tuple[int, int], found: str
) -> None:
    """Masks of 0 and 255, as paint programs export them, are background and void only."""
    mask = np.repeat(np.array(values, np.uint8), 64)[None].repeat(96, axis=0)
    for path in voc.glob("SegmentationClass*/*.png"):
        write_mask(path, mask)
    with pytest.raises(DatasetError, match=rf"12 photos show {found}.*replace 255 by a class id"):
        training_set(voc)


def test_masks_without_a_class_are_listed(voc: Path) -> None:
    """They are allowed: the photo shows nothing of interest, or they are wrong."""
    assert training_set(voc).without_class() == []
    write_mask(voc / "SegmentationClass/2007_000001.png", np.zeros((96, 128), np.uint8))
    (sample,) = training_set(voc).without_class()
    assert sample.name == "2007_000001"


def test_a_label_beyond_the_classes_is_named(voc: Path) -> None:
    """21 is neither a class nor void."""
    write_mask(voc / "SegmentationClass/2007_000000.png", np.full((96, 128), 21, np.uint8))
    with pytest.raises(DatasetError, match=r"2007_000000\.png: label 21"):
        read_split(voc, "train")[0].load()


PETS = LabelSet(
    names=("background", "cat", "dog"), colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)), ignore_index=7
)


def test_void_is_the_label_sets(voc: Path) -> None:
    """Whatever value the masks have for it, it is 255 from here on."""
    mask = np.array([[0, 1], [2, 7]], np.uint8).repeat(48, axis=0).repeat(64, axis=1)
    write_mask(voc / "SegmentationClass/2007_000000.png", mask)
    loaded = np.asarray(read_split(voc, "train", PETS)[0].load()[1])
    assert np.array_equal(loaded, np.where(mask == 7, 255, mask))


@pytest.mark.parametrize("label", [3, 255])
def test_a_label_beyond_the_label_set_is_named(voc: Path, label: int) -> None:
    """VOC's void is no label of a set whose void is 7."""
    write_mask(voc / "SegmentationClass/2007_000000.png", np.full((96, 128), label, np.uint8))
    sample = read_split(voc, "train", PETS)[0]
    with pytest.raises(DatasetError, match=rf"label {label} .*\(0\.\.2\) nor void \(7\)"):
        sample.load()


def test_an_rgb_mask_is_refused(voc: Path) -> None:
    """Colours are not class ids."""
    Image.new("RGB", (128, 96)).save(voc / "SegmentationClass/2007_000000.png")
    with pytest.raises(DatasetError, match="mode RGB"):
        read_split(voc, "train")[0].load()


@pytest.mark.parametrize(
    "folder", ["JPEGImages/2007_000000.jpg", "SegmentationClass/2007_000000.png"]
)
def test_an_unreadable_file_is_named(voc: Path, folder: str) -> None:
    """A broken image or mask is a `DatasetError`."""
    (voc / folder).write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="2007_000000"):
        read_split(voc, "train")[0].load()


def test_held_out_images_are_vocs_own_and_stay_the_same(voc: Path) -> None:
    """Only masks with void are held out, in any list order, and they are not trained on."""
    samples = read_split(voc, "train")
    training, held_out = hold_out(samples, 3)
    assert {s.mask_path.parent.name for s in held_out} == {"SegmentationClass"}
    assert {s.name for s in hold_out(samples[::-1], 3)[1]} == {s.name for s in held_out}
    assert len(training) == 9
    assert not set(training) & set(held_out)


def test_too_large_a_held_out_slice_is_refused(voc: Path) -> None:
    """Four of the twelve masks are SBD's: nine cannot be held out."""
    with pytest.raises(DatasetError, match="cannot hold out 9"):
        hold_out(read_split(voc, "train"), 9)


def test_rare_classes_are_repeated(voc: Path) -> None:
    """An image has the factor of its rarest class; frequent classes stay at one."""
    samples = read_split(voc, "train")
    rare = [samples[0], *[s for s in samples if s.mask_path.parent.name != "SegmentationClass"]]
    augmentation = Augmentation(64, 128, (0.5, 2.0), 0.3)
    present = TrainingSet(rare, augmentation, 1, torch.device("cpu")).present
    factors = repeat_factors(present, threshold=0.8)
    np.testing.assert_allclose(factors, [2.0, 1, 1, 1, 1])
    assert (repeat_factors(present, threshold=0) == 1).all()


def test_batches_resume_where_they_stopped() -> None:
    """Starting at iteration 7 gives the same batches as an uninterrupted run."""
    factors = np.array([1.0, 2.5, 1.0, 1.3, 1.0])
    whole = list(ResumableBatches(factors, 4, start=0, stop=20, seed=3))
    assert list(ResumableBatches(factors, 4, start=7, stop=20, seed=3)) == whole[7:]
    assert list(ResumableBatches(factors, 4, start=0, stop=20, seed=4)) != whole
    assert len(whole) == 20


def test_an_epoch_shows_every_image_and_each_crop_once() -> None:
    """Repeats within an epoch are different crops of the same image."""
    batches = ResumableBatches(np.array([1.0, 3.0]), 4, start=0, stop=5, seed=0)
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == 20
    assert sorted(index for _, index in keys[:4]) == [0, 1, 1, 1]


def training_set(voc: Path) -> TrainingSet:
    """Crops of 64 pixels of the training list."""
    augmentation = Augmentation(64, 128, (0.5, 2.0), 0.3)
    return TrainingSet(read_split(voc, "train"), augmentation, 1, torch.device("cpu"))


def test_a_crop_depends_on_its_key_alone(voc: Path) -> None:
    """The same key gives the same crop in any batch; another epoch gives another crop."""
    crops = training_set(voc)
    batch = crops.batch([(0, 5), (1, 5), (0, 2)])
    again = crops.batch([(0, 7), (0, 5)])
    assert batch.image.shape == (3, 3, 64, 64)
    assert batch.target.shape == (3, 64, 64)
    assert batch.image[0].equal(again.image[1])
    assert batch.target[0].equal(again.target[1])
    assert not batch.image[0].equal(batch.image[1])
