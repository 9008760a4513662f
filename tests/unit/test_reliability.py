"""What the long runs make of what they have seen."""

from dataclasses import replace
from http import HTTPStatus

import numpy as np
import pytest

from tests.benchmarks.bench import Gate
from tests.reliability import overload, soak
from tests.reliability.overload import Observed, Reply, waits_too_long_s
from tests.reliability.report import Report
from tests.reliability.resources import Resources

DEADLINE_S = 30.0

TAKEN = Reply(0.0, 0.0, 2.5, HTTPStatus.OK)
REFUSED = Reply(1.0, 1.0, 1.01, HTTPStatus.SERVICE_UNAVAILABLE, 2.0)
SOUND = Observed(
    load=[TAKEN, REFUSED],
    probes={"/readyz": [TAKEN._replace(ended_s=0.01)], "/metrics": [TAKEN._replace(ended_s=0.02)]},
    returned=[TAKEN],
    first=TAKEN,
    rss_mib=[100.0] * 11 + [102.0],
)


def missed(report: Report) -> list[str]:
    """The promises that were not kept."""
    return [gate.name for gate in report.gates if not gate.kept]


def test_an_overload_that_was_borne() -> None:
    """All promises are kept; times count from when a request was due."""
    assert missed(overload.judge(SOUND, DEADLINE_S)) == []
    late = REFUSED._replace(due_s=0.9)
    assert missed(overload.judge(replace(SOUND, load=[TAKEN, late]), DEADLINE_S)) == [
        "refused: time, p99"
    ]


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"load": [TAKEN, REFUSED, TAKEN._replace(status=0)]}, "neither answered nor refused"),
        ({"load": [TAKEN, REFUSED._replace(told_s=None)]}, "refused without Retry-After"),
        ({"returned": [REFUSED]}, "came back as told and were refused again"),
        ({"first": REFUSED}, "first request afterwards fails"),
        ({"rss_mib": [100.0] * 10 + [110.0] * 2}, "memory: last sixth over the first"),
    ],
)
def test_an_overload_that_was_not(changes: dict[str, object], promise: str) -> None:
    """Each promise shows."""
    assert promise in missed(overload.judge(replace(SOUND, **changes), DEADLINE_S))  # type: ignore[arg-type]


def test_retry_after_is_held_against_the_work_ahead() -> None:
    """Which is what was taken before and answered later; nothing ahead means no wait."""
    taken = [TAKEN, TAKEN._replace(sent_s=0.5, ended_s=3.51), TAKEN._replace(sent_s=1.5, ended_s=9)]
    told = [REFUSED, REFUSED._replace(ended_s=20.0, told_s=1.0)]
    assert waits_too_long_s(taken, told) == pytest.approx(np.array([-0.5, 1.0]))


def test_a_soak_is_held_against_an_early_round() -> None:
    """Growth in any kind, and an answer that should have been another, are each told."""
    early = soak.Round(1000, Resources(100.0, 10, 8), {})
    assert missed(soak.judge([early, early], 1, 3)) == []
    late = soak.Round(2000, Resources(104.0, 11, 9), {"no image: 500": 1})
    assert len(missed(soak.judge([early, late], 1, 3))) == 4


def test_a_report_says_what_was_missed() -> None:
    """In its table, and by `kept`, which makes the exit status."""
    kept, broken = (Gate(name, (figure,), "s", at_most=1) for name, figure in (("a", 1), ("b", 2)))
    assert Report([kept], {}).kept
    report = Report([kept, broken], {})
    assert not report.kept
    assert [line.count("MISSED") for line in report.table().splitlines()] == [0, 0, 0, 1]
