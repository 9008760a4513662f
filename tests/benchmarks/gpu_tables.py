"""The results of a GPU run as Markdown: targets, ratios, and a table for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.bench import Row, Target, markdown_table, matching, short, short_commit
from tests.benchmarks.gpu_device import shape_text
from tests.benchmarks.gpu_network import DEFAULTS, LANDSCAPE, SQUARE
from tests.benchmarks.gpu_report import best, over, verdict


def markdown(results: Mapping[str, Any], found: Sequence[Target]) -> str:
    """The report as Markdown."""
    machine, rows = results["environment"], results["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    about = [machine["device"]]
    if machine["on_gpu"]:
        about.append(f"driver {machine['driver']} (CUDA {machine['cuda_of_the_driver']})")
    about += [
        f"{machine['cores']} cores of {machine['cpu']}",
        f"commit {short_commit(machine)}",
        f"Python {machine['python']}",
        versions,
        f"photos from {machine['photos']}",
    ]
    parts = ["# Benchmarks on a GPU", f"{machine['date'][:10]}. {', '.join(about)}."]
    quick = [name for name, part in results["parts"].items() if part["quick"]]
    if quick:
        parts.append(f"Measured with --quick (shorter windows, fewer points): {', '.join(quick)}.")
    parts += [
        "## Targets",
        markdown_table(
            ("", "measured", "target", ""),
            (
                (
                    target.name,
                    f"{short(target.median)} {target.unit}" if target.figures else "",
                    target.bound,
                    f"**{verdict(target)}**" if target.met is False else verdict(target),
                )
                for target in found
            ),
        ),
    ]
    for section in (_ratios, _session, _options, _upsampling, _lanes, _serving, _pytorch, _limits):
        parts += section(rows)
    troubles = [(name, part["error"]) for name, part in results["parts"].items() if part["error"]]
    troubles += [(_what(row), str(row["error"])) for row in rows if "error" in row]
    troubles += [(_what(row), row["not_measured"]) for row in rows if "not_measured" in row]
    unseen = dict.fromkeys(row.get("gpu_busy_missing") for row in rows)
    troubles += [("GPU utilisation", str(reason)) for reason in unseen if reason]
    if troubles:
        parts += ["## Not measured", markdown_table(("", "reason"), troubles)]
    return "\n\n".join(parts) + "\n"


def _what(row: Row) -> str:
    left_out = {"part", "error", "not_measured", "changes"}
    words = [f"{key} {value}" for key, value in row.items() if key not in left_out]
    return ", ".join([row["part"], *words])


def _ratios(rows: Sequence[Row]) -> list[str]:
    """Ratios between the stages, from the bare network to HTTP."""
    lines: list[tuple[str, str, str]] = []
    raw = {"part": "session", "shape": shape_text(LANDSCAPE)}
    for precision in _in_order(rows, "session", "precision"):
        bare = best(rows, "images_per_s", **raw, precision=precision)
        without = best(rows, "images_per_s", **raw, precision=precision, graphs=False)
        replayed = best(rows, "images_per_s", **raw, precision=precision, graphs=True)
        two = best(rows, "images_per_s", part="lanes", precision=precision)
        for name, one, figure, other in (
            (f"with CUDA graphs over without, {precision}", replayed, "images_per_s", without),
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
    header = ("384x512, a 500x375 photo", "photos/s", "ratio")
    return ["## Ratios", markdown_table(header, lines)] if lines else []


def _rate(row: Row | None, figure: str) -> str:
    return "" if row is None else f"{row[figure]:.0f}"


def _session(rows: Sequence[Row]) -> list[str]:
    mine = matching(rows, "images_per_s", part="session")
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
    text = "Images per second; the uint8 photos and float32 logits stay on the device."
    return ["## The bare session", text, markdown_table(header, lines)] if lines else []


def _options(rows: Sequence[Row]) -> list[str]:
    parts = []
    for precision in _in_order(rows, "options", "precision"):
        mine = matching(rows, "images_per_s", part="options", precision=precision)
        at = {(row["options"], row["shape"], row["batch"]): row for row in mine}
        key = (shape_text(LANDSCAPE), 16)
        whole = {name: at[name, *key] for name in dict.fromkeys(row["options"] for row in mine)}
        ours = whole.get(DEFAULTS)
        fastest = max(whole, key=lambda name: float(whole[name]["images_per_s"]))
        lines = [
            (
                f"**{name}**" if name == fastest else name,
                f"{row['images_per_s']:.0f}",
                f"{row['images_per_s'] / ours['images_per_s']:.3f}" if ours else "",
                _number(at.get((name, shape_text(LANDSCAPE), 1)), "ms", "{:.2f}"),
                _rate(at.get((name, shape_text(SQUARE), 16)), "images_per_s"),
                f"{row['start_s']:.1f}",
                f"{row['first_run_s']:.2f}",
                f"{row['used_mib']}",
                f"{row['same_cells']:.6f}",
            )
            for name, row in whole.items()
        ]
        header = (
            *("", "images/s, batch 16", "over the service's", "ms alone", "images/s at 512x512"),
            *("opening, s", "a shape's first run, s", "GPU memory used, MiB", "equal cells"),
        )
        parts += [
            f"## Options of the CUDA provider, {precision}",
            "One changed option at a time, then all that were faster alone together. The fastest "
            "is in bold. The shape is 384x512 unless stated.",
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
        for row in matching(rows, "us_per_photo", part="upsampling")
    ]
    copied = [
        (row["way"], f"{row['bytes'] / 1e6:.1f}", f"{row['us']:.0f}", short(row["gb_per_s"]))
        for row in matching(rows, "us", part="copies")
    ]
    parts = []
    if kernel:
        header = ("photo", "at once", "confidences", "us per photo", "GB/s", "gigapixels/s")
        parts += [
            "## The upsampling kernel",
            "GB/s counts the least that must be read and written: the logits once, and every class "
            "id. The kernel computes more than it moves.",
            markdown_table(header, kernel),
        ]
    if copied:
        parts += [
            "## Copies to and from the GPU",
            "Page-locked memory, a full batch of 500x375 photos. Up is to the GPU.",
            markdown_table(("", "MB", "us", "GB/s"), copied),
        ]
    return parts


def _lanes(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["precision"], str(row["lanes"]), f"{row['images_per_s']:.0f}")
        for row in matching(rows, "images_per_s", part="lanes")
    ]
    if not lines:
        return []
    return [
        "## Lanes, without HTTP and decoding",
        "Batches of 500x375 photos: upload, network, upsampling, download.",
        markdown_table(("", "lanes", "photos/s"), lines),
    ]


def _serving(rows: Sequence[Row]) -> list[str]:
    mine = matching(rows, "throughput", part="serving")
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
            *("CPU ms/photo", "busiest load generator, % of a core", "failures"),
        )
        parts += [
            "A 500x375 JPEG in, a PNG mask out, over HTTP on loopback, in a closed loop. Service "
            "and load generators share the cores. GPU busy: the share of the time in which any "
            "kernel ran (NVML), averaged over the window without its first second.",
            markdown_table(columns, closed),
        ]
    return parts


def _pytorch(rows: Sequence[Row]) -> list[str]:
    square = {"part": "session", "precision": "fp16", "shape": shape_text(SQUARE)}
    ours = best(rows, "images_per_s", **square)
    lines = []
    for row in matching(rows, "images_per_s", part="pytorch"):
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
        *("ours is faster by, at its best batch", "first run, s"),
    )
    return ["## PyTorch", markdown_table(header, lines)] if lines else []


def _limits(rows: Sequence[Row]) -> list[str]:
    """The roofline: whether arithmetic or memory limits the network, and how close we get."""
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
        *(
            "fp16",
            "multiply-adds per image",
            "least traffic per image",
            "arithmetic limit, images/s",
        ),
        *("memory limit, images/s", "ours", "of the arithmetic limit", "of the lower limit"),
    )
    return [
        "## The roofline",
        f"Measured: {matrices['tflop_per_s']:.0f} TFLOP/s in a matrix product "
        f"({matrices['side']}), {copied['gb_per_s']:.0f} GB/s in a copy, reads and writes counted. "
        "The least traffic assumes all possible fusions.",
        markdown_table(header, lines),
    ]


def _in_order(rows: Sequence[Row], part: str, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows if row["part"] == part and key in row))
