"""The network alone: the effect of batches and of concurrent runs, by precision."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from service.inference.session import InferenceSession, Model, load_model
from tests.benchmarks.bench import Bench

SHAPE: Final = (384, 512)
PHOTOS: Final = 4
REPETITIONS: Final = 5


def measure(bench: Bench) -> None:
    """Measure ms per photo: alone, four in a batch, and two at once on half the threads each."""
    models = {one: load_model(bench.artefact, "cpu", precision=one) for one in ("fp32", "int8")}
    for model in models.values():
        model.warm_up()
    for turn in range(bench.rounds):
        for precision, model in models.items():
            for how, seconds in (
                ("alone", _one_by_one(model)),
                (f"{PHOTOS} in a batch", _in_a_batch(model)),
                ("two at once", _two_at_once(model)),
            ):
                ms = seconds / (REPETITIONS * PHOTOS) * 1000
                bench.add(part="network", round=turn, precision=precision, side=how, ms=ms)


def _one_by_one(model: Model) -> float:
    return _timed(model, model.session, REPETITIONS * PHOTOS, 1)


def _in_a_batch(model: Model) -> float:
    return _timed(model, model.session, REPETITIONS, PHOTOS)


def _two_at_once(model: Model) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        half = partial(_timed, model, runs=REPETITIONS * PHOTOS // 2, batch=1)
        list(pool.map(half, model.shares))
    return time.perf_counter() - started


def _timed(model: Model, session: InferenceSession, runs: int, batch: int) -> float:
    image = np.zeros((batch, *SHAPE, 3), dtype=np.uint8)
    started = time.perf_counter()
    for _ in range(runs):
        model.run(image, session)
    return time.perf_counter() - started
