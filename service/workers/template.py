"""The process that image workers are forked from: it has their modules and does nothing else.

A fork takes milliseconds, where a new interpreter takes half a second, and the workers share the
memory of the modules. `multiprocessing`'s fork server would do, but it runs the service's main
module in each worker, which imports Ray, a test runner or whatever the service is embedded in.

The template is started once per process, when the first pool opens, with an environment of its own:
workers must not have the service's secrets.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Final

from service.errors import WorkersUnavailable
from service.workers.worker import live

_FORK: Final = b"fork"
_ENDED: Final = b"ended"
_REPLY_S: Final = 30.0

_JOBS: Final = "service.jobs"

# Numerical libraries would start a thread per core in each worker.
_ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker's process. ``handle``: its pidfd, which the owner closes."""

    pid: int
    handle: int

    def kill(self) -> None:
        """End it at once; nothing happens if it has ended."""
        try:
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        except ProcessLookupError:
            return


class Template:
    """The service's end of the template. Blocking; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int:
        """The process id of the template; 0 if it does not run."""
        return self._process.pid if self._process is not None else 0

    def fork(self, control: socket.socket, memory: int) -> Forked:
        """Fork a worker that gets these two; the caller closes its own copies.

        Raises `WorkersUnavailable`.
        """
        with self._lock:
            for attempt in range(2):
                try:
                    channel = self._running()
                    socket.send_fds(channel, [_FORK], [control.fileno(), memory])
                    message, handles, _, _ = socket.recv_fds(channel, 64, 1)
                    if message.isdigit() and handles:
                        return Forked(int(message), handles[0])
                    reason = message.decode(errors="replace") or "the template ended"
                except OSError as exc:
                    reason = exc.strerror or str(exc)
                else:
                    if message and not message.isdigit():
                        # It could not fork, but it lives, and so do its other workers.
                        raise WorkersUnavailable(f"no image worker could be started: {reason}")
                # A new one, in case the old one was killed.
                self._stop()
                if attempt:
                    raise WorkersUnavailable(f"no image worker could be started: {reason}")
        raise AssertionError("unreachable")

    def status(self, pid: int) -> int | None:
        """Wait for the end of a worker and return its wait status; None if that is not known."""
        with self._lock:
            if self._control is None:
                return None
            try:
                self._control.send(b"%s %d" % (_ENDED, pid))
                reply = self._control.recv(64)
            except OSError:
                # An answer that comes late would be taken for that to the next question.
                self._stop()
                return None
            return int(reply) if reply.isdigit() else None

    def close(self) -> None:
        """End the template. Its workers end with it."""
        with self._lock:
            self._stop()

    def _running(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_REPLY_S)
        with theirs:
            inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env={**inherited, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where it is closed, its number may be that of any other file.
                stderr=subprocess.DEVNULL if sys.stderr is None else None,
                # Ctrl-C goes to the terminal's whole group: the service decides who ends when.
                start_new_session=True,
            )
        self._control = ours
        return ours

    def _stop(self) -> None:
        control, process = self._control, self._process
        self._control = self._process = None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            process.wait()


TEMPLATE: Final = Template()
"""This process's template."""

atexit.register(TEMPLATE.close)


def main(control_number: int) -> None:
    """Run the template: fork a worker for each request, until the service closes the socket."""
    # By its name: the pool does not depend on what its workers do.
    importlib.import_module(_JOBS).prepare_process()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    service = socket.socket(fileno=control_number)
    own = os.getpid()
    while True:
        message, handles, _, _ = socket.recv_fds(service, 64, 2)
        if not message:
            return
        verb, _, pid_text = message.partition(b" ")
        if verb == _ENDED:
            try:
                _, status = os.waitpid(int(pid_text), 0)
                service.send(b"%d" % status)
            except ChildProcessError:
                service.send(b"unknown")
            continue
        try:
            pid = os.fork()
        except OSError as exc:
            service.send((exc.strerror or "fork failed").encode()[:64])
            for handle in handles:
                os.close(handle)
            continue
        if pid == 0:
            service.close()
            status = 1
            try:
                live(socket.socket(fileno=handles[0]), handles[1], own)
                status = 0
            except Exception:  # noqa: BLE001 - nothing else would show it
                traceback.print_exc()
            finally:
                os._exit(status)
        for handle in handles:
            os.close(handle)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(service, [b"%d" % pid], [pidfd])
        os.close(pidfd)


if __name__ == "__main__":
    main(int(sys.argv[1]))
