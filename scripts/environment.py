"""Create a virtual environment from a lock file, or bring an existing one up to date.

    python3 scripts/environment.py .venv-serve requirements/cpu.txt

It does nothing if the environment is up to date. It starts from scratch if the lock file changed,
this folder was moved, the interpreter is gone, or the last set-up was interrupted. If only
pyproject.toml changed, it installs the project again and keeps the packages.

It needs Python 3.11 or newer and pip, and no other package: `pip --python` fills the environment
from outside, so Debian's python3-venv (ensurepip) is not needed. It installs wheels only, so
nothing is compiled on the user's machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command line; exits with one line on stderr if the set-up fails."""
    parser = argparse.ArgumentParser(description="Create or update a virtual environment.")
    parser.add_argument("environment", help="its folder, such as .venv")
    parser.add_argument("lock_file", type=Path, help="such as requirements/dev.txt")
    arguments = parser.parse_args()
    environment, lock_file = ROOT / arguments.environment, ROOT / arguments.lock_file

    wanted = {
        # The scripts and the editable install contain this path.
        "home": str(ROOT),
        "lock": _sha256(lock_file),
        "project": _sha256(ROOT / "pyproject.toml"),
    }
    # Written last, so an interrupted set-up has none.
    ready = environment / "ready"
    found = _read(ready) if _runs(environment / "bin" / "python") else {}
    if found == wanted:
        return
    _check_pip()
    if {**found, "project": ""} != {**wanted, "project": ""}:
        _check_torch(lock_file)
        print(
            f"Setting up {arguments.environment} from {arguments.lock_file} (once; a minute or so)"
        )
        create(environment)
        pip(environment, "--require-hashes", "--only-binary=:all:", "--requirement", str(lock_file))
    ready.unlink(missing_ok=True)
    pip(environment, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    ready.write_text(json.dumps(wanted), encoding="utf-8")


def create(environment: Path) -> None:
    """Make an empty environment without pip, in place of an existing one."""
    if environment.exists():
        shutil.rmtree(environment)
    venv.create(environment, symlinks=True)


def pip(environment: Path, *arguments: str) -> None:
    """Run ``pip install`` for an environment with the pip of this interpreter."""
    python = str(environment / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input"]
    if subprocess.run([*command, *arguments], check=False).returncode:
        sys.exit(f"pip could not fill {environment.name}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _runs(python: Path) -> bool:
    try:
        return subprocess.run([python, "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def _check_pip() -> None:
    pip = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        sys.exit(f"pip is needed for {sys.executable} (Debian: apt-get install python3-pip)")


def _check_torch(lock_file: Path) -> None:
    """Stop before a download of several GB if pip cannot find PyTorch's CPU build.

    On Linux the public index's torch is the CUDA build, which no test needs, and pip would report
    the wrong hash only after the download.
    """
    torch = re.search(r"^torch==(\S+)", lock_file.read_text(encoding="utf-8"), re.MULTILINE)
    if torch is None or sys.platform != "linux":
        return
    if (sys.version_info[:2], platform.machine()) != ((3, 11), "x86_64"):
        sys.exit(
            f"{lock_file.name} locks torch's CPU build for Python 3.11 on x86-64; this is Python "
            f"{platform.python_version()} on {platform.machine()}: see CONTRIBUTING.md"
        )
    versions = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if f"{torch[1]}+cpu" not in versions:
        sys.exit(
            f"pip finds no CPU build of torch {torch[1]}: give it PyTorch's index of CPU wheels "
            "(PIP_EXTRA_INDEX_URL) or a folder with the wheel (PIP_FIND_LINKS)"
        )


if __name__ == "__main__":
    main()
