"""How an ingress handles its devices' answers; real devices are in ``tests/integration``."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.artefact.manifest import load_manifest
from service.artefact.preprocessing import Geometry
from service.errors import InferenceFailed, ModelUnavailable, Overloaded, SegmentError
from service.inference.batcher import BatchResult
from service.inference.engine import Output
from service.inference.lanes import DeviceTask
from tests.artefacts import build_artefact, make_contract

with warnings.catch_warnings():
    # Ray's own use of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray.exceptions as ray_exceptions
    import ray.serve.exceptions as serve_exceptions

    from service.cluster import ATTEMPTS, RemoteModel, RemoteQueue, Reply

TASK = DeviceTask(
    np.zeros((64, 96, 3), dtype=np.uint8), Geometry((64, 96), (64, 96), (64, 96)), False
)
ANSWER: BatchResult[Output] = BatchResult(np.zeros((21, 4, 6), dtype=np.float32), 0.0, 0.1)

Outcome = Reply | Exception


@dataclass
class FakeHandle:
    """A deployment handle that returns the outcomes in turn, and repeats the last one."""

    outcomes: list[Outcome]
    expected: list[str] = field(default_factory=list)

    @property
    def infer(self) -> FakeHandle:
        """The method."""
        return self

    def remote(self, task: DeviceTask, expected: str) -> Awaitable[Reply]:
        """Return an awaitable answer, as Ray does."""
        self.expected.append(expected)
        number = min(len(self.expected), len(self.outcomes)) - 1
        outcome = self.outcomes[number]

        async def answer() -> Reply:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return answer()


@pytest.fixture
def describe(tmp_path: Path) -> Callable[[str], RemoteModel]:
    """Make a model's description, as a device returns it."""

    def make(name: str) -> RemoteModel:
        folder = build_artefact(tmp_path / name, name=name)
        contract = make_contract(name=name)
        manifest = load_manifest(folder)
        return RemoteModel(contract, manifest, "network.onnx", "CPUExecutionProvider", 1)

    return make


def queue(model: RemoteModel, *outcomes: Outcome) -> tuple[RemoteQueue, FakeHandle]:
    """A queue in front of devices with these outcomes."""
    handle = FakeHandle([*outcomes])
    return RemoteQueue(handle, model), handle


@pytest.mark.anyio
async def test_a_lost_device_is_not_the_callers_concern(
    describe: Callable[[str], RemoteModel],
) -> None:
    """The queue asks another device."""
    lost = ray_exceptions.ActorDiedError()
    asked, handle = queue(describe("tiny"), lost, Reply(ANSWER, None))
    assert await asked.submit(TASK, "key") is ANSWER
    assert len(handle.expected) == 2


@pytest.mark.anyio
async def test_a_photo_cannot_kill_them_all(describe: Callable[[str], RemoteModel]) -> None:
    """After `ATTEMPTS` devices the photo is refused."""
    asked, handle = queue(describe("tiny"), ray_exceptions.ActorDiedError())
    with pytest.raises(InferenceFailed):
        await asked.submit(TASK, "key")
    assert len(handle.expected) == ATTEMPTS


@pytest.mark.anyio
async def test_who_answered_is_known(describe: Callable[[str], RemoteModel]) -> None:
    """A device with another model describes it once; the engine then has that model."""
    old, new = describe("old"), describe("new")
    asked, handle = queue(old, Reply(ANSWER, None), Reply(ANSWER, new), Reply(ANSWER, None))
    names = []
    for _ in range(3):
        await asked.submit(TASK, "key")
        names.append(asked.engine.model.contract.name)
    assert names == ["old", "new", "new"]
    assert handle.expected == [old.sha256, old.sha256, new.sha256]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("outcome", "raised"),
    [
        (Reply(Overloaded("full", 7), None), Overloaded),
        (Reply(InferenceFailed("the batch failed"), None), InferenceFailed),
        (serve_exceptions.BackPressureError(1, 1), Overloaded),
        (
            serve_exceptions.DeploymentUnavailableError(
                serve_exceptions.DeploymentID(name="Device")
            ),
            ModelUnavailable,
        ),
        (ray_exceptions.RayTaskError("infer", "", ValueError("x")), InferenceFailed),
    ],
)
async def test_errors_are_the_services_own(
    outcome: Any,  # noqa: ANN401
    raised: type[SegmentError],
    describe: Callable[[str], RemoteModel],
) -> None:
    """Ray's exceptions become the errors that a batcher raises."""
    asked, _ = queue(describe("tiny"), outcome)
    with pytest.raises(raised):
        await asked.submit(TASK, "key")


def test_refusals_survive_the_way() -> None:
    """Pickling keeps `retry_after_s`."""
    came: Overloaded = pickle.loads(pickle.dumps(Overloaded("full", 7.0)))  # noqa: S301
    assert (str(came), came.retry_after_s) == ("full", 7.0)
