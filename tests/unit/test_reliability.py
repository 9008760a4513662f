"""How the reliability runs judge their observations."""

from dataclasses import replace
from http import HTTPStatus

import numpy as np
import pytest

from tests.benchmarks.bench import Target
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
    """The names of the missed targets."""
    return [target.name for target in report.targets if not target.met]


def test_a_sound_overload_meets_all_targets() -> None:
    """Times count from when a request was due."""
    assert missed(overload.judge(SOUND, DEADLINE_S)) == []
    late = REFUSED._replace(due_s=0.9)
    assert missed(overload.judge(replace(SOUND, load=[TAKEN, late]), DEADLINE_S)) == [
        "refused: p99 latency"
    ]


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"load": [TAKEN, REFUSED, TAKEN._replace(status=0)]}, "neither accepted nor refused"),
        ({"load": [TAKEN, REFUSED._replace(retry_after_s=None)]}, "refused without Retry-After"),
        ({"returned": [REFUSED]}, "refused again after Retry-After"),
        ({"first": REFUSED}, "first request afterwards failed"),
        ({"rss_mib": [100.0] * 10 + [110.0] * 2}, "memory growth, last sixth over first"),
    ],
)
def test_each_overload_target_can_be_missed(changes: dict[str, object], target: str) -> None:
    """A single bad observation misses its target."""
    assert target in missed(overload.judge(replace(SOUND, **changes), DEADLINE_S))  # type: ignore[arg-type]


def test_retry_after_is_compared_with_the_work_ahead() -> None:
    """That work was accepted before and answered later; without any, no wait is expected."""
    taken = [TAKEN, TAKEN._replace(sent_s=0.5, ended_s=3.51), TAKEN._replace(sent_s=1.5, ended_s=9)]
    refused = [REFUSED, REFUSED._replace(ended_s=20.0, retry_after_s=1.0)]
    assert waits_too_long_s(taken, refused) == pytest.approx(np.array([-0.5, 1.0]))


def test_a_soak_is_compared_with_an_early_round() -> None:
    """Growth of any resource and an unexpected status each miss a target."""
    early = soak.Round(1000, Resources(100.0, 10, 8), {})
    assert missed(soak.judge([early, early], 1, 3)) == []
    late = soak.Round(2000, Resources(104.0, 11, 9), {"no image: 500": 1})
    assert len(missed(soak.judge([early, late], 1, 3))) == 4


def test_a_report_shows_missed_targets() -> None:
    """Its table marks them, and `met`, which sets the exit status, is false."""
    met, broken = (Target(name, (figure,), "s", at_most=1) for name, figure in (("a", 1), ("b", 2)))
    assert Report([met], {}).met
    report = Report([met, broken], {})
    assert not report.met
    assert [line.count("MISSED") for line in report.table().splitlines()] == [0, 0, 0, 1]
