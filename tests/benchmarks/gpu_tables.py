"""The results of a run on a GPU as Markdown: targets, ratios, a table for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.bench import Gate, Row, markdown_table, short
from tests.benchmarks.gpu_device import sides_of
from tests.benchmarks.gpu_network import DEFAULTS, LANDSCAPE, SQUARE
from tests.benchmarks.gpu_report import best, over, verdict


def markdown(results: Mapping[str, Any], found: Sequence[Gate]) -> str:
    """The whole report."""
    met, rows = results["environment"], results["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in met["versions"].items())
    about = [f"{met['device']}"]
    if met["on_gpu"]:
        about.append(f"driver {met['driver']} (CUDA {met['cuda_of_the_driver']})")
    about += [
        f"{met['cores']} cores of {met['cpu']}",
        f"commit {met['commit'][:12]}{'+changes' if met['commit'].endswith('changes') else ''}",
        f"Python {met['python']}",
        versions,
        f"photos of {met['photos']}",
    ]
    parts = ["# Benchmarks on a GPU", f"{met['date'][:10]}. {', '.join(about)}."]
    quick = [name for name, part in results["parts"].items() if part["quick"]]
    if quick:
        parts.append(f"A quick run, with shorter windows and fewer points: {', '.join(quick)}.")
    parts += [
        "## Targets",
        markdown_table(
            ("", "measured", "target", ""),
            (
                (
                    gate.name,
                    f"{short(gate.median)} {gate.unit}" if gate.figures else "",
                    gate.target,
                    f"**{verdict(gate)}**" if gate.kept is False else verdict(gate),
                )
                for gate in found
            ),
        ),
    ]
    for section in (_ratios, _session, _options, _upsampling, _lanes, _serving, _pytorch, _limits):
        parts += section(rows)
    troubles = [(name, part["error"]) for name, part in results["parts"].items() if part["error"]]
    troubles += [(_what(row), str(row["error"])) for row in rows if "error" in row]
    troubles += [(_what(row), row["not_measured"]) for row in rows if "not_measured" in row]
    unseen = dict.fromkeys(row.get("gpu_busy_missing") for row in rows)
    troubles += [("how busy the GPU is", str(reason)) for reason in unseen if reason]
    if troubles:
        parts += ["## What could not be measured", markdown_table(("", "why"), troubles)]
    return "\n\n".join(parts) + "\n"


def _what(row: Row) -> str:
    left_out = {"part", "error", "not_measured", "changes"}
    words = [f"{key} {value}" for key, value in row.items() if key not in left_out]
    return ", ".join([row["part"], *words])


def _ratios(rows: Sequence[Row]) -> list[str]:
    """How the stages of the way compare, from the bare network to HTTP."""
    lines: list[tuple[str, str, str]] = []
    raw = {"part": "session", "shape": sides_of(LANDSCAPE)}
    for precision in _in_order(rows, "session", "precision"):
        bare = best(rows, "images_per_s", **raw, precision=precision)
        without = best(rows, "images_per_s", **raw, precision=precision, graphs=False)
        replayed = best(rows, "images_per_s", **raw, precision=precision, graphs=True)
        two = best(rows, "images_per_s", part="lanes", precision=precision)
        for name, one, figure, other in (
            (f"CUDA graphs over none, {precision}", replayed, "images_per_s", without),
            (f"lanes without HTTP over the bare session, {precision}", two, "images_per_s", bare),
        ):
            ratio = over(one, figure, other, "images_per_s")
            if ratio is not None:
                lines.append((name, _rate(one, figure), f"{ratio:.3f}"))
    service = best(rows, "throughput", part="serving", load="closed")
    for name, other in (
        ("lanes without HTTP", best(rows, "images_per_s", part="lanes")),
        ("the bare session", best(rows, "images_per_s", **raw)),
    ):
        ratio = over(service, "throughput", other, "images_per_s")
        if ratio is not None:
            lines.append(
                (f"service over HTTP over {name}", _rate(service, "throughput"), f"{ratio:.3f}")
            )
    header = ("384x512, a photo of 500x375", "photos/s", "ratio")
    return ["## Ratios", markdown_table(header, lines)] if lines else []


def _rate(row: Row | None, figure: str) -> str:
    return "" if row is None else f"{row[figure]:.0f}"


def _session(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row["part"] == "session" and "images_per_s" in row]
    batches = sorted({row["batch"] for row in mine})
    kinds = dict.fromkeys((row["precision"], row["shape"], row["graphs"]) for row in mine)
    lines = []
    for precision, shape, graphs in kinds:
        figures = {
            row["batch"]: row
            for row in mine
            if (row["precision"], row["shape"], row["graphs"]) == (precision, shape, graphs)
        }
        lines.append(
            (
                precision,
                shape,
                "yes" if graphs else "no",
                *(_rate(figures.get(batch), "images_per_s") for batch in batches),
            )
        )
    header = ("", "shape", "graphs", *(f"batch {batch}" for batch in batches))
    text = "Images per second; uint8 photos and float32 logits stay on the device."
    return ["## The bare session", text, markdown_table(header, lines)] if lines else []


def _options(rows: Sequence[Row]) -> list[str]:
    parts = []
    for precision in _in_order(rows, "options", "precision"):
        mine = [
            row
            for row in rows
            if row["part"] == "options" and row["precision"] == precision and "images_per_s" in row
        ]
        at = {(row["options"], row["shape"], row["batch"]): row for row in mine}
        key = (sides_of(LANDSCAPE), 16)
        whole = {name: at[name, *key] for name in dict.fromkeys(row["options"] for row in mine)}
        ours = whole.get(DEFAULTS)
        fastest = max(whole, key=lambda name: float(whole[name]["images_per_s"]))
        lines = [
            (
                f"**{name}**" if name == fastest else name,
                f"{row['images_per_s']:.0f}",
                f"{row['images_per_s'] / ours['images_per_s']:.3f}" if ours else "",
                _number(at.get((name, sides_of(LANDSCAPE), 1)), "ms", "{:.2f}"),
                _rate(at.get((name, sides_of(SQUARE), 16)), "images_per_s"),
                f"{row['start_s']:.1f}",
                f"{row['first_run_s']:.2f}",
                f"{row['used_mib']}",
                f"{row['same_cells']:.6f}",
            )
            for name, row in whole.items()
        ]
        header = (
            *("", "images/s, batch 16", "over ours", "ms alone", "images/s at 512x512"),
            *("s to open", "s of a shape's first run", "MiB taken on the GPU", "same cells"),
        )
        parts += [
            f"## Options of the CUDA provider, {precision}",
            "One option changed at a time, then together what was better alone; the fastest in "
            "bold. At 384x512 where nothing else is said.",
            markdown_table(header, lines),
        ]
    return parts


def _number(row: Row | None, figure: str, form: str) -> str:
    return "" if row is None else form.format(row[figure])


def _upsampling(rows: Sequence[Row]) -> list[str]:
    kernel = [
        (
            row["photo"],
            str(row["photos"]),
            "yes" if row["confidence"] else "no",
            f"{row['us_per_photo']:.1f}",
            short(row["gb_per_s"]),
            short(row["gpixel_per_s"]),
        )
        for row in rows
        if row["part"] == "upsampling" and "us_per_photo" in row
    ]
    copied = [
        (row["way"], f"{row['bytes'] / 1e6:.1f}", f"{row['us']:.0f}", short(row["gb_per_s"]))
        for row in rows
        if row["part"] == "copies" and "us" in row
    ]
    parts = []
    if kernel:
        header = ("photo", "at once", "confidences", "us a photo", "GB/s", "gigapixels/s")
        parts += [
            "## The upsampling kernel",
            "GB/s of what has to be read and written: the logits once and every id. The kernel "
            "computes more than it moves.",
            markdown_table(header, kernel),
        ]
    if copied:
        parts += [
            "## The way up and down",
            "Page-locked memory, a full batch of 500x375 photos.",
            markdown_table(("", "MB", "us", "GB/s"), copied),
        ]
    return parts


def _lanes(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["precision"], str(row["lanes"]), f"{row['images_per_s']:.0f}")
        for row in rows
        if row["part"] == "lanes" and "images_per_s" in row
    ]
    if not lines:
        return []
    return [
        "## Lanes, without HTTP and decoding",
        "Batches of 500x375 photos, up, through network and upsampling, and down.",
        markdown_table(("", "lanes", "photos/s"), lines),
    ]


def _serving(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row["part"] == "serving" and "throughput" in row]
    alone = [
        (row["photo"], *(f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "mean_ms")))
        for row in mine
        if row["load"] == "alone" and row["answers"]
    ]
    closed = [
        (
            str(row["processes"]),
            str(row["clients"]),
            f"{row['throughput']:.0f}",
            *(
                _number(row if name in row else None, name, "{:.1f}")
                for name in ("p50_ms", "p99_ms")
            ),
            f"{100 * row['gpu_busy']:.0f} %" if row["gpu_busy"] is not None else "",
            f"{row['cpu_ms']:.2f}",
            f"{100 * row['client_cpu']:.0f} %"
            + (" **saturated**" if row["generator_saturated"] else ""),
            str(row["failures"]),
        )
        for row in mine
        if row["load"] == "closed"
    ]
    parts = []
    if alone:
        header = ("one photo at a time", "p50, ms", "p99, ms", "mean, ms")
        parts += ["## Over HTTP", markdown_table(header, alone)]
    if closed:
        columns = (
            *("processes", "clients", "photos/s", "p50, ms", "p99, ms", "GPU busy"),
            *("CPU ms/photo", "busiest load generator, of a core", "failures"),
        )
        parts += [
            "JPEG of 500x375 in, PNG mask out, over HTTP on loopback, in a closed loop; service "
            "and load generators share the cores. GPU busy: the share of the time in which any "
            "kernel ran, by NVML, mean of the window without its first second.",
            markdown_table(columns, closed),
        ]
    return parts


def _pytorch(rows: Sequence[Row]) -> list[str]:
    square = {"part": "session", "precision": "fp16", "shape": sides_of(SQUARE)}
    ours = best(rows, "images_per_s", **square)
    lines = []
    for row in rows:
        if row["part"] == "pytorch" and "images_per_s" in row:
            same = best(rows, "images_per_s", **square, batch=row["batch"])
            ratio = over(same, "images_per_s", row, "images_per_s")
            most = over(ours, "images_per_s", row, "images_per_s")
            lines.append(
                (
                    f"{row['side']}, {row['precision']}",
                    str(row["batch"]),
                    f"{row['images_per_s']:.0f}",
                    f"{ratio:.2f}" if ratio else "",
                    f"{most:.2f}" if most else "",
                    f"{row['first_run_s']:.0f}",
                )
            )
    header = (
        *("512x512", "batch", "images/s", "ours is faster by, same batch"),
        *("ours at its best batch", "s of the first run"),
    )
    return ["## PyTorch", markdown_table(header, lines)] if lines else []


def _limits(rows: Sequence[Row]) -> list[str]:
    """The roofline: which of arithmetic and memory bounds the network, and how near we are."""
    matrices = best(rows, "tflop_per_s", what="matrices")
    copied = best(rows, "gb_per_s", part="roofline", what="copies")
    lines = []
    if matrices is not None and copied is not None:
        for network in (row for row in rows if row.get("what") == "network"):
            by_matrices = 1e12 * matrices["tflop_per_s"] / (2 * network["multiply_adds"])
            by_memory = 1e9 * copied["gb_per_s"] / network["fp16_bytes"]
            ours = best(
                rows, "images_per_s", part="session", precision="fp16", shape=network["shape"]
            )
            rate = ours["images_per_s"] if ours else None
            lines.append(
                (
                    network["shape"],
                    f"{network['multiply_adds'] / 1e9:.2f} G",
                    f"{network['fp16_bytes'] / 1e6:.0f} MB",
                    f"{by_matrices:.0f}",
                    f"{by_memory:.0f}",
                    "" if rate is None else f"{rate:.0f}",
                    "" if rate is None else f"{100 * rate / by_matrices:.0f} %",
                    "" if rate is None else f"{100 * rate / min(by_matrices, by_memory):.0f} %",
                )
            )
    if matrices is None or copied is None:
        return []
    header = (
        *("fp16", "multiply-adds an image", "least traffic", "images/s by matrices"),
        *("images/s by memory", "ours", "of the matrix rate", "of the nearer limit"),
    )
    return [
        "## The roofline",
        f"Measured: {matrices['tflop_per_s']:.0f} TFLOP/s in a product of matrices "
        f"({matrices['side']}), {copied['gb_per_s']:.0f} GB/s in a copy, reads and writes counted. "
        "Least traffic: everything fused that can be.",
        markdown_table(header, lines),
    ]


def _in_order(rows: Sequence[Row], part: str, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows if row["part"] == part and key in row))
