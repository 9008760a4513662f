"""The report of a run: targets, Markdown tables with ratios and their spread, JSON."""

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
from tests.benchmarks.bench import (
    Bench,
    Target,
    figures_of,
    markdown_table,
    short,
    short_commit,
    spread,
)
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
    """The machine, the commit, the versions and the peers' settings."""
    return {
        **harness.environment(PACKAGES),
        "peer_settings": {name: asdict(setting) for name, setting in BEST.items()},
    }


def targets(bench: Bench) -> list[Target]:
    """The targets for which this run has figures."""
    found = []
    for precision, network in (("fp32", "fp32"), ("auto", "default")):
        found += [
            Target(
                f"500x375 JPEG to mask over the bare session, {network} network",
                tuple(_by_round(bench, "p50_ms", "500x375", "bare session", precision, divide)),
                at_most=1.10,
            ),
            Target(
                f"12-megapixel photo, time beyond the network, {network} network",
                tuple(_by_round(bench, "p50_ms", "4000x3000", "bare session", precision, subtract)),
                unit="ms",
                at_most=150,
            ),
        ]
    peers = best_peers(bench)
    if peers:
        fastest = peers[0]
        found += [
            Target(
                f"throughput, same fp32 network, over the best peer ({fastest})",
                _serving_ratios(bench, "fp32", "fp32", fastest),
                at_least=1.15,
            ),
            Target(
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
            ("the best peer with its own means", own, 2.0),
            ("the best peer with our int8 file", [*own, *with_ours], None),
        ):
            precision, name = max(candidates, key=lambda one: capacity(bench, *one))
            found.append(
                Target(
                    f"throughput, each side's best precision, over {what} ({name}, {precision})"
                    if precision == "fp32"
                    else f"throughput, each side's best precision, over {what} ({name})",
                    _serving_ratios(bench, "best", precision, name),
                    at_least=bound,
                )
            )
        found.append(
            Target(
                f"throughput, our best precision, over {TORCH_PEER}",
                _serving_ratios(bench, "best", "fp32", TORCH_PEER),
                at_least=5.0,
            )
        )
    for network, what, bound in (
        ("mask", "peers get the finished mask", 1.5),
        ("logits", "all upsample", 1.5),
        ("decoded", "which only decodes and encodes", 1.0),
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
                Target(
                    f"throughput without the network, over the best peer ({name}), {what}",
                    tuple(divide(ours, theirs) for ours, theirs in pairs),
                    at_least=bound,
                )
            )
    found.append(
        Target(
            "time from start to ready",
            tuple(figures_of(bench, "start_s", part="start")),
            "s",
            at_most=5,
        )
    )
    rss = {row["requests"]: row["rss_mib"] for row in bench.rows if row["part"] == "memory"}
    if 2000 in rss:
        grown = rss[2000] / rss[200]
        found.append(
            Target(
                "memory after 2,000 mixed requests over memory after 200", (grown,), at_most=1.05
            )
        )
    return [target for target in found if target.figures]


def divide(ours: float, theirs: float) -> float:
    """The ratio of two figures; infinite if ``theirs`` is 0."""
    return ours / theirs if theirs else math.inf


def subtract(ours: float, theirs: float) -> float:
    """The difference of two figures."""
    return ours - theirs


def write(bench: Bench, machine: dict[str, Any]) -> Path:
    """Write ``results.json`` and ``results.md`` into ``bench.out``; returns the latter's path."""
    found = targets(bench)
    results = {
        "environment": machine,
        "targets": [
            {**asdict(target), "median": target.median, "met": target.met, "bound": target.bound}
            for target in found
        ],
        "masks": bench.masks,
        "rows": bench.rows,
    }
    text = json.dumps(results, indent=1, default=str)
    (bench.out / "results.json").write_text(text + "\n", encoding="utf-8")
    table = bench.out / "results.md"
    table.write_text(markdown(bench, found, machine), encoding="utf-8")
    return table


def markdown(bench: Bench, found: Sequence[Target], machine: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = [
        "# Benchmarks",
        f"{machine['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB, commit {short_commit(machine)}, "
        f"Python {machine['python']}, {versions}. The contenders alternate in each round. Figures "
        "and ratios are medians over the rounds (least..greatest).",
        "## Targets",
        markdown_table(
            ("", "median", "spread", "target", ""),
            (
                (
                    target.name,
                    f"{short(target.median)} {target.unit}",
                    f"{short(min(target.figures))}..{short(max(target.figures))}",
                    target.bound,
                    {True: "met", False: "**MISSED**", None: ""}[target.met],
                )
                for target in found
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
            f"Share of equal pixels in the photo with the fewest; at least {AGREEMENT} is "
            "required of the same network in fp32."
            + (f" **DISAGREE: {', '.join(wrong)}**" if wrong else ""),
            markdown_table(("", "equal to ours"), lines),
        ]
    return "\n\n".join(parts) + "\n"


def _serving_tables(bench: Bench) -> list[str]:
    parts = []
    for precision, title in (
        ("fp32", "the same fp32 network"),
        ("best", "each contender's best precision"),
    ):
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
            f"## Serving: {title}",
            "A 500x375 JPEG in, a PNG mask out, over HTTP on loopback. Saturated: "
            f"{SATURATION} connections in a closed loop. Open loop: the same Poisson arrivals for "
            "all, at three quarters of the best peer's capacity; latency counts from the arrival.",
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
    for network, returned in (
        ("logits", "stored logits"),
        ("mask", "the finished mask"),
        ("decoded", "the finished mask; nothing is resized"),
    ):
        for name in (OURS, *sides.BATCHING_PEERS):
            figures = pipe_figures(bench, network, name)
            if figures:
                where = {"part": "pipe", "network": network, "side": name}
                both = zip(pipe_figures(bench, "logits", OURS), figures, strict=False)
                ratios = [divide(one, other) for one, other in both]
                lines.append(
                    (
                        name,
                        returned,
                        spread(figures),
                        "" if name == OURS else spread(ratios),
                        f"{bench.median('cpu_ms', **where):.2f}",
                        f"{bench.median('p50_ms', **where):.1f}",
                        f"{100 * bench.median('client_cpu', **where):.0f} %",
                    )
                )
    if not lines:
        return []
    header = ("", "network returns", "requests/s", "ours is faster by", "CPU ms/request", "p50, ms")
    return [
        "## Without the network",
        f"{SATURATION} connections, one 500x375 JPEG. The load generator runs on the same cores.",
        markdown_table((*header, "load generator, % of a core"), lines),
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
    header = ("", "photos", "ms per photo", "faster than alone by")
    return ["## The network alone", markdown_table(header, lines)] if lines else []


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
    """The sides measured with a precision, in the order of measurement."""
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
    """Our throughput at saturation over a peer's, for each round."""
    where = {"part": "serving", "load": "closed", "connections": SATURATION}
    first = figures_of(bench, "throughput", **where, precision=ours, side=OURS)
    second = figures_of(bench, "throughput", **where, precision=theirs, side=name)
    return tuple(divide(one, two) for one, two in zip(first, second, strict=False))


def pipe_figures(bench: Bench, network: str, name: str) -> list[float]:
    """Requests per second of one side for each round; ``network``: see `serving.pipe`."""
    return figures_of(bench, "throughput", part="pipe", network=network, side=name)
