"""``python -m tests.reliability``: measure reliability targets, print them and write them as JSON.

Exit status: 0, or 1 if a target was missed. The times are meaningful only on a machine without
other load.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.reliability import overload, recovery, soak
from tests.reliability.report import Report

PARTS: Final[dict[str, Callable[[Path], Report]]] = {
    "overload": overload.measure,
    "recovery": recovery.measure,
    "soak": soak.measure,
}


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(prog="tests.reliability", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="parts to run")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reliability"), metavar="DIR", help="folder"
    )
    given = parser.parse_args()
    reports = {}
    for part in given.parts:
        reports[part] = PARTS[part](given.out)
        reports[part].write(given.out / f"{part}.json")
        print(f"\n{reports[part].table()}\n", flush=True)
    return 0 if all(report.met for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
