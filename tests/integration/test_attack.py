"""Short versions of the attacks, which check everything but the times."""

from collections.abc import Iterator

import pytest

from tests.artefacts import build_artefact
from tests.processes import Logged, logged
from tests.reliability.report import Report

MEMORY_MB = 1024
TIMES = ("p99", "CPU", "late")
"""Targets whose names have one of these depend on the machine."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """A server process on the tiny artefact, with little memory and short limits."""
    model = build_artefact(tmp_path_factory.mktemp("attack") / "tiny")
    with logged(model, log_level="info", memory_mb=MEMORY_MB, photo_cpu_s=0.5) as running:
        yield running


def missed(report: Report) -> dict[str, float]:
    """The missed targets and their figures, without those that depend on the machine."""
    return {
        target.name: target.median
        for target in report.targets
        if not target.met and not any(word in target.name for word in TIMES)
    }
