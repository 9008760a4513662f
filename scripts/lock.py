"""Resolve pyproject.toml into the lock files in requirements/.

    python3 scripts/lock.py                           keep each version that still fits
    python3 scripts/lock.py --upgrade-package NAME    arguments go to uv
    python3 scripts/lock.py --lowest FILE             lock the lowest versions that are allowed

uv runs from an environment of its own, .venv-lock.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from environment import ROOT, create, pip

UV = "0.13.9"
TORCH = "2.13.0"
# sha256 of torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, PyTorch's own CPU wheel. The
# public index does not have it, so uv cannot know its hash: this is `sha256sum` of the file. On
# Linux it is the only hash allowed, because pip would prefer the public CUDA build. On other
# systems the public wheels are CPU builds, and their hashes come from the index.
TORCH_CPU_SHA256 = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"

MADE_BY = "Made by 'make lock' from pyproject.toml; do not edit."
LOCK_ENVIRONMENT = ROOT / ".venv-lock"

CPU, GPU = "requirements/cpu.txt", "requirements/gpu.txt"
DEV, GPU_DEV = "requirements/dev.txt", "requirements/gpu-dev.txt"
BENCH = "requirements/bench.txt"


def main(arguments: Sequence[str]) -> None:
    """Write all lock files, or with ``--lowest`` only the file it names."""
    uv = LOCK_ENVIRONMENT / f"uv-{UV}"
    if not uv.exists():
        create(LOCK_ENVIRONMENT)
        pip(LOCK_ENVIRONMENT, f"uv=={UV}")
        uv.touch()
    if arguments[:1] == ["--lowest"]:
        lock_lowest(*arguments[1:])
    else:
        lock_all(arguments)


def lock_all(arguments: Sequence[str]) -> None:
    """Write every lock file; each constrains the next, so that shared packages agree."""

    def lock(path: str, title: str, *options: str) -> None:
        compile_lock(path, *options, *arguments)
        _write(path, f"# {title}. {MADE_BY}\n", _read(path))

    serving = ["--universal", "--extra=client", "--extra=tracing"]
    lock(CPU, "Serving on a CPU", *serving, "--extra=cpu")
    lock(GPU, "Serving on an NVIDIA GPU", *serving, "--extra=gpu", f"--constraint={CPU}")

    def lock_with_torch(path: str, title: str, *options: str) -> None:
        # uv would copy the hash of the CPU wheel from the old file, so take torch out first.
        _write(path, re.sub(r"^torch==.*\n(?:[ #].*\n)*", "", _read(path), flags=re.MULTILINE))
        compile_lock(path, "--extra=cpu", "--extra=train", *options, *arguments)
        pin = f"torch=={TORCH} "
        _write(
            path,
            f"# {title}. {MADE_BY}\n",
            "# On Linux, only PyTorch's own CPU wheel: scripts/lock.py gives the reason.\n",
            f"{pin}; sys_platform == 'linux' \\\n    --hash=sha256:{TORCH_CPU_SHA256}\n",
            _read(path).replace(f"\n{pin}", f"\n{pin}; sys_platform != 'linux' "),
        )

    lock_with_torch(
        DEV,
        "Serving on a CPU, training, tests and checks",
        *("--universal", "--extra=tracing", "--group=dev", f"--constraint={CPU}"),
    )
    lock(
        GPU_DEV,
        "Tests and benchmarks on an NVIDIA GPU",
        *("--universal", "--extra=gpu", "--group=gpu"),
        *(f"--constraint={GPU}", f"--constraint={DEV}"),
    )
    # The peers agree on no versions for all platforms, nor on the service's opentelemetry.
    shared = LOCK_ENVIRONMENT / "shared.txt"
    pins = re.findall(r"^(?!opentelemetry)[^ #\n].*(?= \\$)", _read(CPU), flags=re.MULTILINE)
    shared.write_text("\n".join(pins), encoding="utf-8")
    lock_with_torch(
        BENCH,
        "Benchmarks: the peers and the harness",
        *("--python-platform=x86_64-manylinux_2_28", "--group=bench"),
        f"--constraint={shared.relative_to(ROOT)}",
    )


def lock_lowest(path: str) -> None:
    """Resolve the lowest allowed direct dependencies of the serving half and its tests' tools."""
    (ROOT / path).unlink(missing_ok=True)  # uv would keep its versions
    compile_lock(
        path,
        *("--resolution=lowest-direct", "--only-binary=:all:", "--group=test"),
        *("--extra=cpu", "--extra=client", "--extra=tracing"),
    )


def compile_lock(path: str, *options: str) -> None:
    """Run ``uv pip compile`` for Python 3.11 with hashes; ``path`` is relative to the root."""
    command = [
        *(str(LOCK_ENVIRONMENT / "bin" / "uv"), "pip", "compile", "pyproject.toml"),
        *("--quiet", "--python-version=3.11", "--generate-hashes"),
        *("--no-emit-index-url", "--no-header", "--group=build", f"--output-file={path}"),
        *options,
    ]
    print(f"Resolving {path}")
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"uv could not resolve {path}")


def _read(path: str) -> str:
    file = ROOT / path
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _write(path: str, *parts: str) -> None:
    (ROOT / path).write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
