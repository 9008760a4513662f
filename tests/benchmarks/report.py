"""What a run found: gates, a Markdown table of ratios with their spread, JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import bench as harness
from tests.benchmarks import sides
from tests.benchmarks.bench import Bench, Gate, figures_of, markdown_table, short, spread
from tests.benchmarks.components import CASES
from tests.benchmarks.serving import (
    AGREEMENT,
    SATURATION,
    best_peers,
    capacity,
    disagreements,
)
from tests.benchmarks.sides import BEST, OURS, TORCH_PEER

PACKAGES: Final = (
    *("onnxruntime", "torch", "litserve", "bentoml", "ray", "fastapi", "uvicorn"),
    *("numpy", "pillow"),
)


def environment() -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        **harness.environment(PACKAGES),
        "peer_settings": {name: asdict(setting) for name, setting in BEST.items()},
    }


def gates(bench: Bench) -> list[Gate]:
    """Every target that this run has figures for."""
    found = []
    for precision, network in (("fp32", "fp32"), ("auto", "default")):
        found += [
            Gate(
                f"500x375 JPEG to mask over the bare session, {network} network",
                tuple(_by_round(bench, "p50_ms", "500x375", "bare session", precision, divide)),
                at_most=1.10,
            ),
            Gate(
                f"12-megapixel photo beyond the network, {network} network",
                tuple(_by_round(bench, "p50_ms", "4000x3000", "bare session", precision, subtract)),
                unit="ms",
                at_most=150,
            ),
        ]
    peers = best_peers(bench)
    if peers:
        fastest = peers[0]
        found += [
            Gate(
                f"throughput, same fp32 network, over the best peer ({fastest})",
                _serving_ratios(bench, "fp32", "fp32", fastest),
                at_least=1.15,
            ),
            Gate(
                f"throughput, fp32, over {TORCH_PEER} (torchvision's fcn_resnet50)",
                _serving_ratios(bench, "fp32", "fp32", TORCH_PEER),
            ),
        ]
        own = [
            *(("fp32", name) for name in peers),
            *(("best", name) for name in measured(bench, "best") if "bf16" in name),
        ]
        with_ours = [("best", name) for name in measured(bench, "best") if "int8" in name]
        for what, candidates, bound in (
            ("the best that peers have", own, 2.0),
            ("the best peer with our int8 file", [*own, *with_ours], None),
        ):
            precision, name = max(candidates, key=lambda one: capacity(bench, *one))
            found.append(
                Gate(
                    f"throughput, each side's best precision, over {what} ({name}, {precision})"
                    if precision == "fp32"
                    else f"throughput, each side's best precision, over {what} ({name})",
                    _serving_ratios(bench, "best", precision, name),
                    at_least=bound,
                )
            )
        found.append(
            Gate(
                f"throughput, our best precision, over {TORCH_PEER}",
                _serving_ratios(bench, "best", "fp32", TORCH_PEER),
                at_least=5.0,
            )
        )
    for network, what, bound in (
        ("mask", "peers given the finished mask", 1.5),
        ("logits", "everybody upsampling", 1.5),
    ):
        present = {
            name: statistics.median(figures)
            for name in sides.BATCHING_PEERS
            if (figures := pipe_figures(bench, network, name))
        }
        if present:
            name = max(present, key=lambda one: present[one])
            pairs = zip(
                pipe_figures(bench, "logits", OURS),
                pipe_figures(bench, network, name),
                strict=False,
            )
            found.append(
                Gate(
                    f"pipe without the network, over the best peer ({name}), {what}",
                    tuple(divide(ours, theirs) for ours, theirs in pairs),
                    at_least=bound,
                )
            )
    found.append(
        Gate("start until ready", tuple(figures_of(bench, "start_s", part="start")), "s", at_most=5)
    )
    rss = {row["requests"]: row["rss_mib"] for row in bench.rows if row["part"] == "memory"}
    if 2000 in rss:
        grown = rss[2000] / rss[200]
        found.append(
            Gate("memory after 2,000 mixed requests over that after 200", (grown,), at_most=1.05)
        )
    return [gate for gate in found if gate.figures]


def divide(ours: float, theirs: float) -> float:
    """The ratio of two figures; infinite over a side that answered nothing."""
    return ours / theirs if theirs else math.inf


def subtract(ours: float, theirs: float) -> float:
    """Their difference."""
    return ours - theirs


def write(bench: Bench, met: dict[str, Any]) -> Path:
    """Write ``results.json`` and ``results.md`` into ``bench.out``; returns the table."""
    found = gates(bench)
    results = {
        "environment": met,
        "gates": [
            {**asdict(gate), "median": gate.median, "kept": gate.kept, "target": gate.target}
            for gate in found
        ],
        "masks": bench.masks,
        "rows": bench.rows,
    }
    text = json.dumps(results, indent=1, default=str)
    (bench.out / "results.json").write_text(text + "\n", encoding="utf-8")
    table = bench.out / "results.md"
    table.write_text(markdown(bench, found, met), encoding="utf-8")
    return table


def markdown(bench: Bench, found: Sequence[Gate], met: dict[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in met["versions"].items())
    parts = [
        "# Benchmarks",
        f"{met['date'][:10]}, {met['cores']} cores of {met['cpu']}, {met['memory_gib']} GiB, "
        f"commit {met['commit'][:12]}{'+changes' if met['commit'].endswith('changes') else ''}, "
        f"Python {met['python']}, {versions}. Ratios are medians over alternated rounds "
        "(least..greatest).",
        "## Targets",
        markdown_table(
            ("", "median", "spread", "target", ""),
            (
                (
                    gate.name,
                    f"{short(gate.median)} {gate.unit}",
                    f"{short(min(gate.figures))}..{short(max(gate.figures))}",
                    gate.target,
                    {True: "kept", False: "**MISSED**", None: ""}[gate.kept],
                )
                for gate in found
            ),
        ),
        *_serving_tables(bench),
        *_pipe_table(bench),
        *_component_table(bench),
        *_network_table(bench),
        *_memory_table(bench),
    ]
    wrong = disagreements(bench.masks)
    if bench.masks:
        lines = [(name, f"{equal:.5f}") for name, equal in bench.masks.items()]
        parts += [
            "## Same masks",
            f"Share of equal pixels, the photo with the fewest; at least {AGREEMENT} for the same "
            "network in fp32." + (f" **DISAGREE: {', '.join(wrong)}**" if wrong else ""),
            markdown_table(("", "equal to ours"), lines),
        ]
    return "\n\n".join(parts) + "\n"


def _serving_tables(bench: Bench) -> list[str]:
    parts = []
    for precision, title in (("fp32", "the same fp32 network"), ("best", "each side's best")):
        names = measured(bench, precision)
        if not names:
            continue
        lines = []
        for name in names:
            where = {"part": "serving", "precision": precision, "side": name}
            alone = bench.median("p50_ms", **where, load="closed", connections=1)
            busy = {**where, "load": "closed", "connections": SATURATION}
            pairs = _serving_ratios(bench, precision, precision, name)
            lines.append(
                (
                    name,
                    spread(figures_of(bench, "throughput", **busy)),
                    "" if name == OURS else spread(pairs),
                    f"{alone:.0f}",
                    f"{bench.median('p50_ms', **busy):.0f}",
                    _number(bench.median("p50_ms", **where, load="open"), 0),
                    _number(bench.median("p95_ms", **where, load="open"), 0),
                    f"{bench.median('cpu_ms', **busy):.0f}",
                    f"{bench.median('rss_mib', **busy):.0f}",
                )
            )
        parts += [
            f"## Serving, {title}",
            "JPEG of 500x375 in, PNG mask out, over HTTP on loopback. Saturation: "
            f"{SATURATION} connections in a closed loop. Open loop: the same Poisson arrivals for "
            "all, at three quarters of the best peer's capacity; time from the arrival.",
            markdown_table(
                (
                    *("", "photos/s", "ours is faster by", "p50 alone, ms", "p50 saturated, ms"),
                    *("p50 open, ms", "p95 open, ms", "CPU ms/photo", "RSS, MiB"),
                ),
                lines,
            ),
        ]
    return parts


def _pipe_table(bench: Bench) -> list[str]:
    lines = []
    for network in ("logits", "mask"):
        for name in (OURS, *sides.BATCHING_PEERS):
            figures = pipe_figures(bench, network, name)
            if figures:
                where = {"part": "pipe", "network": network, "side": name}
                both = zip(pipe_figures(bench, "logits", OURS), figures, strict=False)
                ratios = [divide(one, other) for one, other in both]
                lines.append(
                    (
                        name,
                        "stored logits" if network == "logits" else "the finished mask",
                        spread(figures),
                        "" if name == OURS else spread(ratios),
                        f"{bench.median('cpu_ms', **where):.2f}",
                        f"{bench.median('p50_ms', **where):.1f}",
                        f"{100 * bench.median('client_cpu', **where):.0f} %",
                    )
                )
    if not lines:
        return []
    header = ("", "network gives", "requests/s", "ours is faster by", "CPU ms/request", "p50, ms")
    return [
        "## The pipe without the network",
        f"{SATURATION} connections, one JPEG of 500x375. The load generator shares the cores.",
        markdown_table((*header, "load generator, of a core"), lines),
    ]


def _component_table(bench: Bench) -> list[str]:
    lines = []
    for case, names in CASES.items():
        ours_ms = figures_of(bench, "ms", part="component", case=case, side=OURS)
        for name in names if ours_ms else ():
            where = {"part": "component", "case": case, "side": name}
            figures = figures_of(bench, "ms", **where)
            pairs = [theirs / ours for ours, theirs in zip(ours_ms, figures, strict=True)]
            lines.append(
                (
                    case,
                    name,
                    spread(figures),
                    "" if name == OURS else spread(pairs),
                    short(bench.median("cpu_ms", **where)),
                    _number(bench.median("peak_mib", **where), 1),
                    _number(bench.median("bytes", **where), 0),
                )
            )
    if not lines:
        return []
    header = ("", "", "ms", "ours is faster by", "CPU ms", "peak memory, MiB", "bytes")
    return ["## Stages by size", markdown_table(header, lines)]


def _network_table(bench: Bench) -> list[str]:
    rows = [row for row in bench.rows if row["part"] == "network"]
    lines = []
    for precision, how in dict.fromkeys((row["precision"], row["side"]) for row in rows):
        of = {"part": "network", "precision": precision}
        figures = figures_of(bench, "ms", **of, side=how)
        alone = figures_of(bench, "ms", **of, side="alone")
        ratios = list(map(divide, alone, figures))
        lines.append((precision, how, spread(figures), spread(ratios)))
    header = ("", "photos", "ms a photo", "faster than alone by")
    return ["## The network by itself", markdown_table(header, lines)] if lines else []


def _memory_table(bench: Bench) -> list[str]:
    rows = [row for row in bench.rows if row["part"] == "memory"]
    lines = [
        (str(row["requests"]), f"{row['rss_mib']:.0f}", str(row.get("failures", "")))
        for row in rows
    ]
    if not lines:
        return []
    return [
        "## Memory under mixed sizes",
        markdown_table(("requests", "RSS, MiB", "failures"), lines),
    ]


def _number(figure: float, digits: int) -> str:
    return "" if math.isnan(figure) else f"{figure:.{digits}f}"


def measured(bench: Bench, precision: str) -> list[str]:
    """The sides that served with a precision, in order of appearance."""
    rows = (row for row in bench.rows if row["part"] == "serving")
    return list(dict.fromkeys(row["side"] for row in rows if row["precision"] == precision))


def _by_round(
    bench: Bench,
    figure: str,
    side: str,
    other: str,
    precision: str,
    combine: Callable[[float, float], float],
) -> list[float]:
    first, second = (
        figures_of(bench, figure, part="latency", precision=precision, side=name)
        for name in (side, other)
    )
    return [combine(one, two) for one, two in zip(first, second, strict=True)]


def _serving_ratios(bench: Bench, ours: str, theirs: str, name: str) -> tuple[float, ...]:
    """Our throughput at saturation over a peer's, by rounds."""
    where = {"part": "serving", "load": "closed", "connections": SATURATION}
    first = figures_of(bench, "throughput", **where, precision=ours, side=OURS)
    second = figures_of(bench, "throughput", **where, precision=theirs, side=name)
    return tuple(divide(one, two) for one, two in zip(first, second, strict=False))


def pipe_figures(bench: Bench, network: str, name: str) -> list[float]:
    """Requests per second of one side in every round; ``network``: ``logits`` or ``mask``."""
    return figures_of(bench, "throughput", part="pipe", network=network, side=name)
