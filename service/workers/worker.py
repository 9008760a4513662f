"""An image worker: a process that holds nothing but the photo in its hands.

It is forked from a template (see `service.workers.template`) and has neither the service's sockets
nor its secrets. Limits hold for each task: of CPU time (the kernel ends the process), of memory
(allocations fail), and of wall time (the pool ends the process).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from service.errors import ImageError, RequestError, TooExpensive
from service.system import give_back_freed, keep_freed_buffers
from service.workers.channel import Memory, Part, receive

IDLE_S: Final = 10.0
"""Seconds without a task after which freed memory is given back to the operating system."""

_PR_SET_PDEATHSIG: Final = 1
_OUT_OF_MEMORY_SCORE: Final = "800"
# What the interpreter, the decoders' tables and the allocator keep beside a task's own arrays.
_SLACK_BYTES: Final = 160 * 2**20

_NO_MEMORY: Final = "decoding or encoding it takes more memory than others of its size"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task returns. ``facts``: JSON; ``parts``: bytes or C-contiguous arrays."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Part] = ()


class Task(Protocol):
    """What a worker does. It is pickled, so its class must be importable in the worker."""

    def run(self, parts: Sequence[bytes]) -> Answer:
        """Do the work; ``parts`` are the pool's arguments.

        May raise any `RequestError` or `ImageError`.
        """


class CheckedTask(Task, Protocol):
    """A task that knows what its answer may be."""

    def check(self, facts: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """Check the answer, in the service; see `service.workers.replies.Check`."""


class Order(NamedTuple):
    """A task with its limits: ``cpu_s`` seconds of CPU time and ``memory_bytes``."""

    task: Task
    cpu_s: float
    memory_bytes: int


def live(control: socket.socket, memory_number: int, parent: int) -> None:
    """Work until the service closes ``control``; ``parent``: the template's process."""
    _prepare_process(parent)
    memory = Memory(memory_number)
    address_space = _AddressSpace()
    while packet := _next(control):
        pickled, *parts = memory.get(memory.lengths_of(packet))
        order: Order = pickle.loads(pickled)  # noqa: S301 - the service wrote it
        with address_space.limited(order.memory_bytes):
            answer = _run(order, parts)
        facts = json.dumps(answer.facts).encode()
        control.send(memory.put([facts, *answer.parts]))


def _prepare_process(parent: int) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)
    # The service ends its workers; a signal to the whole group must not end them under a request.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # When memory runs out, the kernel should end a worker and not the service.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_SCORE)
    if sys.stderr is not None:
        faulthandler.enable()
    keep_freed_buffers()


def _next(control: socket.socket) -> bytes:
    """The next packet. Gives back freed memory once, if none comes for a while."""
    if not select.select([control], [], [], IDLE_S)[0]:
        give_back_freed()
    return receive(control)


def _run(order: Order, parts: Sequence[bytes]) -> Answer:
    started_s = time.process_time()
    # The kernel counts both user and system time of all threads, and ends the process.
    signal.setitimer(signal.ITIMER_PROF, order.cpu_s)
    try:
        answer = order.task.run(parts)
    except (RequestError, ImageError) as exc:
        answer = Answer({"error": type(exc).__name__, "arguments": list(exc.args)})
    except MemoryError:
        answer = Answer({"error": TooExpensive.__name__, "arguments": [_NO_MEMORY]})
    # The service logs it and answers 500; the worker is as good as before.
    except Exception:  # noqa: BLE001
        answer = Answer({"unforeseen": traceback.format_exc(limit=-12)[-8192:]})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    cpu_s = time.process_time() - started_s
    return Answer({**answer.facts, "cpu_s": cpu_s}, answer.parts)


class _AddressSpace:
    """Limits how much a task may add to what the worker has at its start."""

    def __init__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        self._at_start = pages * resource.getpagesize()
        _, self._hard = resource.getrlimit(resource.RLIMIT_AS)

    @contextlib.contextmanager
    def limited(self, memory_bytes: int) -> Iterator[None]:
        """Let the address space grow by ``memory_bytes``, and by what the worker itself needs.

        The limit is lifted at the end: the next task's parts are read before its limit is known.
        """
        limit = self._at_start + memory_bytes + _SLACK_BYTES
        if self._hard != resource.RLIM_INFINITY:
            limit = min(limit, self._hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, self._hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (self._hard, self._hard))
