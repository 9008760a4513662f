"""A short run of the fuzzer, and proof that it finds failures."""

import argparse
import faulthandler
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests import fuzz
from tests.artefacts import encode, two_class_photo
from tests.mutations import samples

PHOTO = encode(two_class_photo())


def test_damaged_files_are_answered_or_refused(tiny_artefact: Path) -> None:
    """The whole app answers 200 or a 4xx problem; undamaged files get 200."""
    with fuzz.running_app(tiny_artefact) as send:
        done = fuzz.fuzz(send, 7, 150)
        undamaged = {name: send(data).outcome for name, data in samples().items()}
    assert done.failure is None
    assert done.outcomes.total() == 150
    assert {outcome[:3] for outcome in done.outcomes} >= {"200", "415", "422"}
    refused = {name for name, outcome in undamaged.items() if outcome != "200"}
    assert refused == {"crop.avif", "text"}


def test_a_file_that_fails_is_shrunk() -> None:
    """Down to the least damage that still fails: here, one bit of the first sample."""

    def send(data: bytes) -> fuzz.Sent:
        raise ValueError("too much")

    failure = fuzz.fuzz(send, 0, 100).failure
    assert failure is not None
    assert failure.reason == "ValueError: too much"
    whole = next(iter(samples().values()))
    assert len(failure.data) == len(whole)
    changed = int.from_bytes(failure.data) ^ int.from_bytes(whole)
    assert changed.bit_count() == 1


@pytest.mark.parametrize(
    ("last_act", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("while True: pass", "SIGPROF: more than 2.0 s of CPU time"),
    ],
)
def test_a_file_that_ends_the_process_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last_act: str, reason: str
) -> None:
    """After a native crash or too much CPU time for a file, another process continues."""

    def work(connection: Connection, _model: Path, current: Path) -> None:
        def send(data: bytes) -> fuzz.Sent:
            if data != PHOTO:  # which comes first, to warm up
                exec(last_act, {"os": os, "signal": signal})  # noqa: S102
            return fuzz.Sent("200", 0.0)

        faulthandler.disable()  # pytest's, which would show a crash that is meant
        connection.recv()
        fuzz.bounded(send, current)(b"hostile")

    # Forked, so that they need not be found by their names.
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(fuzz, "_work", work)
    order = argparse.Namespace(cases=2 * fuzz.ROUND, seed=3, minutes=5, processes=1, out=tmp_path)
    totals = fuzz.run(order, tmp_path)
    assert [one["reason"] for one in totals.failures] == [f"the process ended with {reason}"] * 2
    assert [one["seed"] for one in totals.failures] == [3, 4]
    (kept,) = tmp_path.glob("*.bin")
    assert kept.read_bytes() == b"hostile"


def test_a_replayed_file_is_answered_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one process and without damage."""
    (tmp_path / "one.bin").write_bytes(samples()["rgb.png"])
    assert fuzz.replay(tmp_path / "one.bin", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "200"
