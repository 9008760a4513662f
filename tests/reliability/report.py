"""What a part has found, and whether it is what was promised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bench import Gate, environment, markdown_table, short

_PACKAGES: Final = ("onnxruntime", "fastapi", "uvicorn", "uvloop", "httptools", "pillow", "numpy")


@dataclass(frozen=True, slots=True)
class Report:
    """The promises of a part, with what was measured, and all other ``figures`` for the file."""

    gates: Sequence[Gate]
    figures: dict[str, Any]

    @property
    def kept(self) -> bool:
        """Whether every promise is."""
        return all(gate.kept for gate in self.gates)

    def table(self) -> str:
        """For people."""
        return markdown_table(
            ("promised", "measured", "bound", ""),
            [
                (gate.name, f"{short(gate.median)} {gate.unit}".rstrip(), gate.target, _word(gate))
                for gate in self.gates
            ],
        )

    def write(self, path: Path) -> None:
        """As JSON, with where it was measured."""
        content = {
            "environment": environment(_PACKAGES),
            "promises": [
                {
                    "name": gate.name,
                    "measured": gate.median,
                    "bound": gate.target,
                    "kept": gate.kept,
                }
                for gate in self.gates
            ],
            **self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _word(gate: Gate) -> str:
    return "kept" if gate.kept else "MISSED"
