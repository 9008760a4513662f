"""The results of a part, and whether they meet its targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bench import Target, environment, markdown_table, short

_PACKAGES: Final = ("onnxruntime", "fastapi", "uvicorn", "uvloop", "httptools", "pillow", "numpy")


@dataclass(frozen=True, slots=True)
class Report:
    """A part's targets with their measured figures, and further ``figures`` for the file."""

    targets: Sequence[Target]
    figures: dict[str, Any]

    @property
    def met(self) -> bool:
        """Whether all targets are met."""
        return all(target.met for target in self.targets)

    def table(self) -> str:
        """The targets as a Markdown table."""
        return markdown_table(
            ("", "measured", "target", ""),
            [
                (
                    target.name,
                    f"{short(target.median)} {target.unit}".rstrip(),
                    target.bound,
                    _word(target),
                )
                for target in self.targets
            ],
        )

    def write(self, path: Path) -> None:
        """Write the targets, figures and environment as JSON."""
        content = {
            "environment": environment(_PACKAGES),
            "targets": [
                {
                    "name": target.name,
                    "measured": target.median,
                    "bound": target.bound,
                    "met": target.met,
                }
                for target in self.targets
            ],
            **self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _word(target: Target) -> str:
    return "met" if target.met else "MISSED"
