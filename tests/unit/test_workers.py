"""The pool of image workers, with tasks that misbehave."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from service.errors import (
    Draining,
    TooExpensive,
    UndecodableImage,
    WorkerLost,
    WorkersUnavailable,
)
from service.workers import pool as pool_module
from service.workers.channel import MAPPED_BYTES, Memory
from service.workers.pool import Limits, Rank, WorkerPool
from service.workers.template import TEMPLATE, Template
from tests.tasks import (
    Allocate,
    Echo,
    EncodeWebp,
    End,
    EndOnce,
    Fail,
    HangUp,
    Inspect,
    Lie,
    Spin,
    Wait,
)

pytestmark = pytest.mark.anyio

MIB = 2**20
LIMITS = Limits(cpu_s=20.0, wall_s=60.0, memory_bytes=64 * MIB)


@pytest.fixture
async def lost() -> list[str]:
    """The reasons of lost workers."""
    return []


@pytest.fixture
async def pool(lost: list[str]) -> AsyncIterator[WorkerPool]:
    """A pool of one worker."""
    async with WorkerPool.open(1, lost.append) as opened:
        yield opened


async def pid_of(pool: WorkerPool) -> int:
    """The process id of a worker, asked by a task."""
    pid: int = (await pool.run(Echo(), [], LIMITS)).facts["pid"]
    return pid


async def test_parts_go_there_and_back(pool: WorkerPool) -> None:
    """Bytes, arrays, empty parts, and more than the file in memory keeps."""
    large = np.arange(2 * MAPPED_BYTES // 8, dtype=np.int64)
    done = await pool.run(Echo(), [b"photo", b"", large, np.empty((0, 3))], LIMITS)
    assert [len(part) for part in done.parts] == [5, 0, large.nbytes, 0]
    assert done.parts[0] == b"photo"
    assert np.array_equal(np.frombuffer(done.parts[2], dtype=np.int64), large)
    assert done.cpu_s >= 0
    # The large message's memory is given back, and the worker is the same one.
    assert (await pool.run(Echo(), [b"next"], LIMITS)).parts == [b"next"]
    assert len(pool.pids) == 1


async def test_a_worker_is_clean(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no web framework, no runtime, no secret, no other thread and no socket but its own."""
    monkeypatch.setenv("FCN_LABEL_STUDIO_TOKEN", "secret")
    TEMPLATE.close()  # the next worker's template starts under this environment
    async with WorkerPool.open(1) as fresh:
        facts = (await fresh.run(Inspect(), [], LIMITS)).facts
        threads = (await fresh.run(Echo(), [], LIMITS)).facts["threads"]
    assert not {"fastapi", "starlette", "onnxruntime", "uvicorn"} & set(facts["modules"])
    assert not [name for name in facts["environment"] if name.startswith("FCN_")]
    assert (facts["sockets"], threads) == (1, 1)


async def test_errors_of_tasks_come_back(pool: WorkerPool, lost: list[str]) -> None:
    """The service's errors keep type and message; others name their cause. The worker stays."""
    before = await pid_of(pool)
    with pytest.raises(UndecodableImage, match="broken on purpose"):
        await pool.run(Fail(foreseen=True), [], LIMITS)
    with pytest.raises(RuntimeError, match="nobody foresaw this"):
        await pool.run(Fail(foreseen=False), [], LIMITS)
    assert await pid_of(pool) == before
    assert lost == []


@pytest.mark.parametrize(
    ("task", "limits", "error", "message"),
    [
        (Spin(), replace(LIMITS, cpu_s=0.05), TooExpensive, "CPU time"),
        (Wait(), replace(LIMITS, wall_s=0.05), TooExpensive, "more than 0.05 s"),
        (End(signal.SIGSEGV), LIMITS, UndecodableImage, "crashed"),
        (End(signal.SIGABRT), LIMITS, UndecodableImage, "crashed"),
    ],
)
async def test_a_photo_that_ends_its_worker_fails_alone(
    pool: WorkerPool,
    lost: list[str],
    task: Spin | Wait | End,
    limits: Limits,
    error: type[Exception],
    message: str,
) -> None:
    """It is not tried again; the next task gets a new worker."""
    before = await pid_of(pool)
    with pytest.raises(error, match=message):
        await pool.run(task, [], limits)
    assert await pid_of(pool) != before
    assert lost == [error.__name__]


async def test_memory_is_limited_for_each_task(pool: WorkerPool) -> None:
    """A task that wants more than its limit fails; the same worker does what others may."""
    before = await pid_of(pool)
    with pytest.raises(TooExpensive, match="more memory"):
        await pool.run(Allocate(512 * MIB), [], LIMITS)
    generous = replace(LIMITS, memory_bytes=600 * MIB)
    assert (await pool.run(Allocate(512 * MIB), [], generous)).facts["sum"] == 512 * MIB
    assert await pid_of(pool) == before


async def test_an_encoder_without_memory(pool: WorkerPool) -> None:
    """Its own error means the same."""
    little = replace(LIMITS, memory_bytes=MIB)
    with pytest.raises(TooExpensive, match="more memory"):
        await pool.run(EncodeWebp(4200), [], little)
    await pool.run(EncodeWebp(600), [], little)


async def test_a_small_task_leaves_room_for_the_parts_of_a_large_one(
    pool: WorkerPool, lost: list[str]
) -> None:
    """They are read before the large one's own limit holds."""
    await pool.run(Echo(), [], replace(LIMITS, memory_bytes=MIB))
    large = bytes(160 * MIB)
    done = await pool.run(Allocate(MIB), [large], replace(LIMITS, memory_bytes=400 * MIB))
    assert done.facts["sum"] == MIB
    assert lost == []


async def test_a_worker_killed_by_others_is_tried_again(
    pool: WorkerPool, lost: list[str], tmp_path: Path
) -> None:
    """Once, on another worker; if that is killed too, the error says so."""
    done = await pool.run(EndOnce(tmp_path / "mark"), [b"photo"], LIMITS)
    assert done.parts == [b"photo"]
    assert lost == ["killed"]
    with pytest.raises(WorkerLost):
        await pool.run(End(signal.SIGKILL), [], LIMITS)
    assert lost == ["killed"] * 3


async def test_an_idle_worker_that_is_killed_is_replaced(pool: WorkerPool, lost: list[str]) -> None:
    """Nobody notices."""
    before = await pid_of(pool)
    os.kill(before, signal.SIGKILL)
    assert await pid_of(pool) != before
    assert lost == ["killed"]


async def test_a_template_that_is_killed_is_replaced(pool: WorkerPool) -> None:
    """Its workers end with it, the tasks in their hands are tried again."""
    before = await pid_of(pool)
    os.kill(TEMPLATE.pid, signal.SIGKILL)
    done = await asyncio.gather(*(pool.run(Echo(), [b"photo"], LIMITS) for _ in range(3)))
    assert all(one.parts == [b"photo"] for one in done)
    async with asyncio.timeout(30):
        while await pid_of(pool) == before:
            continue


async def test_what_is_no_longer_wanted_is_ended(pool: WorkerPool) -> None:
    """Cancelling ends the worker with its work; a task that waited is simply forgotten."""
    before = await pid_of(pool)
    running = asyncio.create_task(pool.run(Wait(), [], LIMITS))
    waiting = asyncio.create_task(pool.run(Echo(), [], LIMITS))
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    for task in (running, waiting):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await pid_of(pool) != before


async def test_photos_are_finished_before_others_begin(pool: WorkerPool, tmp_path: Path) -> None:
    """While the worker is busy, tasks wait: those that finish a photo go first, then in order."""
    order: list[str] = []

    async def run(name: str, rank: Rank) -> None:
        await pool.run(Echo(), [], LIMITS, rank)
        order.append(name)

    gate = tmp_path / "gate"
    async with asyncio.TaskGroup() as group:
        group.create_task(pool.run(Wait(gate), [], LIMITS))
        await asyncio.sleep(0)
        for name, rank in (
            ("begin 1", Rank.BEGIN),
            ("begin 2", Rank.BEGIN),
            ("finish 1", Rank.FINISH),
            ("finish 2", Rank.FINISH),
        ):
            group.create_task(run(name, rank))
        await asyncio.sleep(0)
        gate.touch()
    assert order == ["finish 1", "finish 2", "begin 1", "begin 2"]


async def test_a_worker_that_only_hangs_up_is_ended(pool: WorkerPool) -> None:
    """Nobody waits for its end; the next task gets a new worker."""
    async with asyncio.timeout(20):
        with pytest.raises(WorkerLost):
            await pool.run(HangUp(), [], LIMITS)
        await pid_of(pool)


async def test_a_worker_is_replaced_once_there_are_descriptors_again(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that had none for a moment does not stay without workers."""
    monkeypatch.setattr(pool_module, "_RETRY_S", 0.01)
    before = await pid_of(pool)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        os.kill(before, signal.SIGKILL)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await pool.run(Echo(), [], LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with asyncio.timeout(20):
        assert await pid_of(pool) != before


async def test_a_pool_that_closes_under_its_tasks() -> None:
    """They end at once, running, waiting or late, and so do their workers."""
    async with WorkerPool.open(1) as closing:
        tasks = [asyncio.create_task(closing.run(Wait(), [], LIMITS)) for _ in range(2)]
        pid = closing.pids[0]
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(closing.run(Echo(), [], LIMITS)))
    async with asyncio.timeout(20):
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, Draining)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_template_that_cannot_fork_keeps_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of processes may be reached for a moment: the error says so, and nothing ends."""
    template = Template()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(template, "_running", lambda: ours)
    with ours, theirs, Path(os.devnull).open() as memory:
        theirs.send(b"Resource temporarily unavailable")
        monkeypatch.setattr(template, "_stop", lambda: pytest.fail("it was ended"))
        with pytest.raises(WorkersUnavailable, match="started: Resource temporarily unavailable"):
            template.fork(theirs, memory.fileno())


async def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(pool_module, "TEMPLATE", Template())
    with pytest.raises(WorkersUnavailable, match="no image worker could be started"):
        async with WorkerPool.open(1):
            pytest.fail("it opened")


@pytest.mark.parametrize(
    "packet", [b"{}", b"[-1]", b"[9999999]", b"[true]", b'["1"]', b"[", b"[1.5]"]
)
def test_a_packet_that_lies_is_refused(packet: bytes) -> None:
    """A worker may be under a file's control: what it says is checked."""
    with contextlib.closing(Memory.create()) as memory:
        assert memory.get(memory.lengths_of(memory.put([b"0123456789"]))) == [b"0123456789"]
        with pytest.raises(ValueError, match="describe"):
            memory.lengths_of(packet)
        with pytest.raises(ValueError, match="shorter"):
            memory.get([MAPPED_BYTES, 1])


ERROR = '{"cpu_s": 0, "error": %s, "arguments": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"cpu_s": "1"}',
        '{"cpu_s": true}',
        '{"cpu_s": -1}',
        '{"cpu_s": NaN}',
        '{"cpu_s": Infinity}',
        f'{{"cpu_s": 1{"0" * 400}}}',
        f'{{"cpu_s": {"9" * 5000}}}',
        f'{{"cpu_s": 0, "more": "{"x" * 2**20}"}}',
        ERROR % ('"NotAcceptable"', '["one"]'),
        ERROR % ('"NotAcceptable"', '["two", [3]]'),
        ERROR % ('"UndecodableImage"', "[]"),
        ERROR % ('"UndecodableImage"', "[{}]"),
        ERROR % ('"UndecodableImage"', "null"),
        ERROR % ('"Draining"', '["only the service says so"]'),
        ERROR % ('"annotations"', '["not a class"]'),
        ERROR % ('"nothing"', '["no such error"]'),
        ERROR % ("{}", '["no name"]'),
        '{"cpu_s": 0, "error": "UndecodableImage"}',
    ],
)
async def test_facts_that_no_task_gives_end_the_worker(
    pool: WorkerPool, lost: list[str], text: str
) -> None:
    """It may be under a file's control: the photo is refused, and the next gets a new worker."""
    before = await pid_of(pool)
    with pytest.raises(UndecodableImage, match="crashed"):
        await pool.run(Lie(text), [], LIMITS)
    assert await pid_of(pool) != before


async def test_an_answer_that_its_check_refuses_ends_the_worker(pool: WorkerPool) -> None:
    """Whatever the check raises for facts and parts that it did not expect."""
    for check in (lambda facts, _: facts["no such fact"], lambda _, parts: parts[3]):
        before = await pid_of(pool)
        with pytest.raises(UndecodableImage, match="crashed"):
            await pool.run(Echo(), [b""], LIMITS, check=check)
        assert await pid_of(pool) != before


def test_a_large_message_leaves_no_memory_in_the_file() -> None:
    """Only the part that is mapped keeps its own."""
    with contextlib.closing(Memory.create()) as memory:
        packet = memory.put([bytes(MAPPED_BYTES), b"1" * MAPPED_BYTES])
        assert os.fstat(memory.number).st_blocks * 512 == 2 * MAPPED_BYTES
        assert memory.get(memory.lengths_of(packet))[1] == b"1" * MAPPED_BYTES
        assert os.fstat(memory.number).st_blocks * 512 == MAPPED_BYTES


def test_the_file_cannot_be_truncated() -> None:
    """Or a worker under a file's control could crash the service, which maps it."""
    with contextlib.closing(Memory.create()) as memory:
        with pytest.raises(PermissionError):
            os.ftruncate(memory.number, 0)
        assert memory.get(memory.lengths_of(memory.put([b"photo"]))) == [b"photo"]


async def test_a_clients_slow_tasks_leave_a_worker_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets no other task until one of them ends; tasks that are not slow take all workers."""
    monkeypatch.setattr(pool_module, "SLOW_S", 0.0)
    gate = tmp_path / "gate"
    async with WorkerPool.open(2) as two, asyncio.TaskGroup() as group:
        group.create_task(two.run(Wait(gate), [], LIMITS, client="one"))
        await asyncio.sleep(0.01)
        more = group.create_task(two.run(Echo(), [b"more"], LIMITS, client="one"))
        for client in ("other", None):
            assert (await two.run(Echo(), [b"photo"], LIMITS, client=client)).parts == [b"photo"]
        assert not more.done()
        gate.touch()
    assert more.result().parts == [b"more"]


async def test_a_pool_without_workers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """While none can be started; afterwards everything is as before."""
    monkeypatch.setattr(pool_module, "_RETRY_S", 0.01)
    async with WorkerPool.open(1) as pool:
        tried = asyncio.Event()
        loop = asyncio.get_running_loop()

        def fail(*_: object) -> None:
            loop.call_soon_threadsafe(tried.set)
            raise WorkersUnavailable("none on purpose")

        with monkeypatch.context() as patched:
            patched.setattr(pool_module, "TEMPLATE", Mock(fork=fail))
            os.kill(pool.pids[0], signal.SIGKILL)
            await asyncio.wait_for(tried.wait(), 30)
            tried.clear()
            await asyncio.wait_for(tried.wait(), 30)  # so the first failure has been handled
            assert pool.stranded
        assert (await pool.run(Echo(), [b"photo"], LIMITS)).parts == [b"photo"]
        assert not pool.stranded
