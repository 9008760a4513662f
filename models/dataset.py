"""PASCAL VOC 2012 segmentation, with the SBD masks beside VOC's own.

The folder is VOCdevkit's ``VOC2012``: ``ImageSets/Segmentation/<split>.txt`` names the images,
``JPEGImages`` holds them, ``SegmentationClass`` VOC's masks (void = 255) and
``SegmentationClassAug`` the masks of SBD (Hariharan et al. 2011) as class ids. Where both exist,
VOC's finer mask wins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.transforms import Augmentation, Example
from service.artefact.voc import CLASSES, IGNORE_INDEX


class DatasetError(Exception):
    """A split, an image or a mask is missing or wrong; the message names the file."""


@dataclass(frozen=True)
class Sample:
    """One image and its mask, as files."""

    name: str
    image_path: Path
    mask_path: Path

    def load(self) -> tuple[Image.Image, Image.Image]:
        """Return ``(RGB image, mask of class ids as mode L)``, checked against each other.

        Raises:
            DatasetError: a file cannot be read, the sizes differ, or a label is neither a class
                id nor void.
        """
        try:
            with Image.open(self.image_path) as file:
                image = file.convert("RGB")
        except OSError as exc:
            raise DatasetError(f"{self.image_path}: cannot be read: {exc}") from exc
        mask = self.load_mask()
        if mask.size != image.size:
            raise DatasetError(
                f"{self.mask_path}: {mask.size[0]}x{mask.size[1]}, but {self.image_path.name} "
                f"is {image.size[0]}x{image.size[1]}"
            )
        return image, mask

    def load_mask(self) -> Image.Image:
        """Return the mask of class ids as a mode L image.

        Raises:
            DatasetError: the file cannot be read or holds anything but class ids and void.
        """
        try:
            with Image.open(self.mask_path) as file:
                if file.mode not in ("P", "L"):
                    raise DatasetError(f"{self.mask_path}: mode {file.mode}, expected P or L")
                # Not convert("L"): that would turn palette indices into grey levels.
                labels = np.asarray(file)
        except OSError as exc:
            raise DatasetError(f"{self.mask_path}: cannot be read: {exc}") from exc
        wrong = labels[(labels >= len(CLASSES)) & (labels != IGNORE_INDEX)]
        if wrong.size:
            raise DatasetError(
                f"{self.mask_path}: label {int(wrong[0])} is neither a class id "
                f"(0..{len(CLASSES) - 1}) nor void ({IGNORE_INDEX})"
            )
        return Image.fromarray(labels)


def voc_root(data: Path) -> Path:
    """Return the ``VOC2012`` folder for ``data``, which is that folder or its ``VOCdevkit``.

    Raises:
        DatasetError: neither holds ``ImageSets/Segmentation``.
    """
    for root in (data, data / "VOC2012"):
        if (root / "ImageSets" / "Segmentation").is_dir():
            return root
    raise DatasetError(f"{data}: no VOC2012/ImageSets/Segmentation in it")


def read_split(data: Path, split: str) -> list[Sample]:
    """Return the samples that ``ImageSets/Segmentation/<split>.txt`` lists, in its order.

    Raises:
        DatasetError: the list, an image or a mask is missing; the message names the file.
    """
    root = voc_root(data)
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except OSError as exc:
        raise DatasetError(f"{listing}: cannot be read: {exc}") from exc
    if not names:
        raise DatasetError(f"{listing}: lists no image")
    samples = []
    for name in names:
        image_path = root / "JPEGImages" / f"{name}.jpg"
        candidates = [
            root / folder / f"{name}.png"
            for folder in ("SegmentationClass", "SegmentationClassAug")
        ]
        mask_path = next((path for path in candidates if path.is_file()), None)
        if not image_path.is_file():
            raise DatasetError(f"{image_path}: missing, but {listing.name} lists it")
        if mask_path is None:
            raise DatasetError(f"{candidates[0]}: missing, and so is {candidates[1]}")
        samples.append(Sample(name, image_path, mask_path))
    return samples


def hold_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Split off ``count`` samples to choose by, so that ``val`` is only ever reported.

    They are those with VOC's own mask (SBD's have no void and coarser edges) whose names hash
    lowest: the same ones on every machine, whatever the order of the list.

    Returns:
        ``(training samples, held-out samples)``, each in the order given.

    Raises:
        DatasetError: fewer than ``count`` samples have VOC's own mask, or none would be left.
    """
    candidates = [s for s in samples if s.mask_path.parent.name == "SegmentationClass"]
    if len(candidates) < count or len(samples) <= count:
        raise DatasetError(
            f"cannot hold out {count} of {len(samples)} images, "
            f"{len(candidates)} of them with a mask in SegmentationClass"
        )
    candidates.sort(key=lambda s: hashlib.sha256(s.name.encode()).digest())
    held_names = {s.name for s in candidates[:count]}
    training = [s for s in samples if s.name not in held_names]
    return training, [s for s in samples if s.name in held_names]


def repeat_factors(samples: Sequence[Sample], threshold: float) -> NDArray[np.float64]:
    """Return how often each sample should be seen per epoch, so that rare classes are learnt.

    Repeat-factor sampling of Gupta, Dollar, Girshick, "LVIS" (2019): with ``f_c`` the share of
    images that hold class c, a class has factor ``max(1, sqrt(threshold / f_c))`` and an image
    that of its rarest class. A threshold of 0 gives ones.

    Returns:
        (len(samples),) float64, each at least 1.
    """
    present = np.zeros((len(samples), len(CLASSES)), dtype=bool)
    if threshold > 0:
        for row, sample in zip(present, samples, strict=True):
            labels = np.unique(np.asarray(sample.load_mask()))
            row[labels[labels != IGNORE_INDEX]] = True
    frequency = np.maximum(present.mean(axis=0), 1 / max(1, len(samples)))
    per_class = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors: NDArray[np.float64] = np.where(present, per_class, 1.0).max(axis=1)
    return factors


class TrainingSet:
    """Photos decoded once and kept on the training device, from which crops are drawn there.

    Args:
        samples: the photos.
        augmentation: how a crop is drawn.
        seed: of every draw.
        device: where the photos are kept and the crops made.

    Raises:
        DatasetError: an image or a mask is missing or wrong.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
    ) -> None:
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed

        def load(sample: Sample) -> Example:
            image, mask = sample.load()
            planes = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
            return Example(planes.to(device), torch.from_numpy(np.array(mask)).to(device))

        with ThreadPoolExecutor() as pool:
            self.photos = list(pool.map(load, samples))

    def batch(self, keys: Sequence[tuple[int, int]]) -> Example:
        """Return the crops of ``(epoch, index)`` keys: each depends on its key and the seed alone.

        That makes a resumed run see exactly the crops that the killed one would have seen.
        """
        crops = [self._crop(epoch, index) for epoch, index in keys]
        images, targets = zip(*crops, strict=True)
        return Example(torch.stack(images), torch.stack(targets))

    def _crop(self, epoch: int, index: int) -> Example:
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.augmentation(self.photos[index], rng)


class ResumableBatches:
    """Batches of ``(epoch, index)`` keys from iteration ``start`` to ``stop``.

    An epoch is a shuffle of the samples, each repeated by its factor; the fractional part is a
    chance drawn per epoch. Batch i is a function of the seed and i alone.
    """

    def __init__(
        self, factors: NDArray[np.float64], batch_size: int, start: int, stop: int, seed: int
    ) -> None:
        self.factors = factors
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.seed = seed

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def _keys(self) -> Iterator[tuple[int, int]]:
        epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, epoch))
            whole = np.floor(self.factors)
            chance = rng.random(len(self.factors)) < self.factors - whole
            indices = np.repeat(np.arange(len(self.factors)), (whole + chance).astype(np.int64))
            # A repeat within an epoch gets an epoch number of its own, hence another crop.
            seen: dict[int, int] = {}
            for index in rng.permutation(indices).tolist():
                seen[index] = seen.get(index, 0) + 1
                yield epoch * 1000 + seen[index], index
            epoch += 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = self._keys()
        for iteration in range(self.stop):
            batch = [next(keys) for _ in range(self.batch_size)]
            if iteration >= self.start:
                yield batch
