"""Request ids and log lines."""

import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from service.telemetry import logs


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leave logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.mark.parametrize("sane", ["abc-123", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa-01"])
def test_a_sane_request_id_is_kept(sane: str) -> None:
    """The caller can find its request in the log."""
    assert logs.request_id(sane) == sane


@pytest.mark.parametrize("insane", [None, "", "a b", "x" * 129, "a\nb", "é", "<script>"])
def test_any_other_is_replaced(insane: str | None) -> None:
    """An id that could forge a log line is not used; new ids are unique."""
    fresh = logs.request_id(insane)
    assert re.fullmatch("[0-9a-f]{32}", fresh)
    assert fresh != logs.request_id(insane)


def test_long_texts_are_cut() -> None:
    """A long path is truncated; a short one is unchanged."""
    assert logs.shortened("/segment") == "/segment"
    assert len(logs.shortened("x" * 8000)) < 300


HOSTILE = "x\n2026-01-01 [info] forged\r\x1b[2J\x85\u2028\u202e\x00"


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_nobody_forges_lines(
    log_format: Literal["json", "console"], capsys: pytest.CaptureFixture[str]
) -> None:
    """Line breaks, terminal escapes and bidirectional controls are escaped."""
    logs.configure("info", log_format)
    structlog.get_logger("ours").info("event", path=HOSTILE)
    logging.getLogger("theirs").warning("about %s", HOSTILE)
    written = capsys.readouterr().err
    assert written.count("\n") == 2
    assert written.replace("\n", "").isprintable()
    assert written.count("forged") == 2


@pytest.mark.usefixtures("restored_logging")
def test_a_traceback_is_no_place_for_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """In the console format each line of a traceback is indented, the message included."""
    logs.configure("info", "console")
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        structlog.get_logger("ours").exception("broken")
    _, *lines = capsys.readouterr().err.splitlines()
    assert any("forged" in line for line in lines)
    for line in lines:
        assert line.startswith("  ")
        assert line.isprintable()


@pytest.mark.usefixtures("restored_logging")
def test_json_lines_carry_the_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object a line, from structlog and the standard library."""
    logs.configure("info", "json")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("ours").info("event", answer=42)
        logging.getLogger("theirs").warning("watch %s", "out")
        logging.getLogger("theirs").debug("unseen")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["answer"], ours["level"]) == ("event", 42, "info")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == (
        "watch out",
        "warning",
        "theirs",
    )
    assert ours["request_id"] == theirs["request_id"] == "r1"


@pytest.mark.usefixtures("restored_logging")
def test_lines_of_several_processes_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line has its worker's number, also in threads without a request."""
    logs.configure("info", "json", worker=1)
    structlog.get_logger("ours").info("event")
    thread = threading.Thread(target=logging.getLogger("theirs").warning, args=("watch out",))
    thread.start()
    thread.join()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["worker"] for line in lines] == [1, 1]


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_values(
    log_format: Literal["json", "console"], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the location and the message, but no local variables: they may contain API keys."""
    logs.configure("info", log_format)
    key = "-".join(["fcn", "secret"])
    try:
        raise RuntimeError("as it happens", len(key))
    except RuntimeError:
        structlog.get_logger("ours").exception("broken")
    shown = capsys.readouterr().err
    assert "as it happens" in shown
    assert "test_logs.py" in shown
    assert "fcn-secret" not in shown


@pytest.mark.usefixtures("restored_logging")
def test_console_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """The event and its values are on one line."""
    logs.configure("info", "console")
    structlog.get_logger("ours").info("event", answer=42)
    (line,) = capsys.readouterr().err.splitlines()
    assert "event" in line
    assert "answer=42" in line
