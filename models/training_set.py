"""The samples of a training run: their photos on the device, how often and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from models.dataset import Sample, require_classes
from models.transforms import Augmentation, Example
from service.artefact.voc import IGNORE_INDEX


def repeat_factors(present: NDArray[np.bool_], threshold: float) -> NDArray[np.float64]:
    """Return how often each sample is seen per epoch, so that rare classes are learnt.

    Repeat-factor sampling of Gupta, Dollar, Girshick, "LVIS" (2019): with ``f_c`` the share of
    images that contain class c, a class has factor ``max(1, sqrt(threshold / f_c))`` and an image
    has the factor of its rarest class. A threshold of 0 gives ones.

    Args:
        present: ``(N, C)``, the classes in each sample's mask.
        threshold: share of the images.

    Returns:
        ``(N,)`` float64, each at least 1.
    """
    frequency = np.maximum(present.mean(axis=0), 1 / max(1, len(present)))
    per_class = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors: NDArray[np.float64] = np.where(present, per_class, 1.0).max(axis=1)
    return factors


class TrainingSet:
    """Photos decoded once and kept on the training device, where the crops are drawn.

    ``present``: ``(N, C)`` bool, the classes in each photo's mask.

    Args:
        samples: the photos.
        augmentation: how a crop is drawn.
        seed: of every random draw.
        device: of the photos and the crops.

    Raises:
        DatasetError: an image or a mask is missing or wrong, or the masks cannot teach anything.
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

        labels = samples[0].labels

        def load(sample: Sample) -> tuple[Example, NDArray[np.bool_]]:
            image, mask = sample.load()
            planes = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
            target = np.array(mask)
            present = np.bincount(target.ravel(), minlength=IGNORE_INDEX)[: len(labels)] > 0
            return Example(planes.to(device), torch.from_numpy(target).to(device)), present

        with ThreadPoolExecutor() as pool:
            loaded = list(pool.map(load, samples))
        self.photos = [photo for photo, _ in loaded]
        self.present: NDArray[np.bool_] = np.stack([present for _, present in loaded])
        known: NDArray[np.bool_] = np.logical_or.reduce(self.present)
        require_classes(known, labels, f"the masks of {len(samples)} photos")

    def without_class(self) -> list[Sample]:
        """The samples whose masks show nothing but background or void."""
        return [
            sample
            for sample, present in zip(self.samples, self.present, strict=True)
            if not present[1:].any()
        ]

    def batch(self, keys: Sequence[tuple[int, int]]) -> Example:
        """Return the crops of ``(epoch, index)`` keys; a crop depends only on its key and the seed.

        A resumed run therefore sees the same crops as a run that was never interrupted.
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
    probability, drawn per epoch. Batch i depends only on the seed and i.
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
            # Each repeat within an epoch has its own epoch number, hence another crop.
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
