"""Tables and a picture of what `gpu_suite.py` measured, or the words "not measured".

    python benchmarks/gpu_report.py

writes ``gpu.md`` among the results, and draws ``gpu_roofline_<device>.png`` for each GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_results import file_name
from published import PUBLISHED

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
# Whose minimum of traffic says something, in the order of the table.
OPERATIONS = (
    *("project", "project_backward", "aggregate_forward", "aggregate_backward"),
    *("aggregate_backward_of_pre", "replay_forward"),
    *("merge_forward", "merge_backward", "merge_project", "merge_project_backward"),
    *("mappings_forward", "mappings_backward", "read_forward", "read_backward"),
    *("seam_forward", "seam_backward", "single_pass_forward", "single_pass_backward"),
)
RIVALS = ("triton", "torch", "torch.compile", "liger")
Record = dict[str, Any]


def read_results(folder: Path) -> dict[str, dict[str, Record]]:
    """Device -> part -> what its file holds; files of toy size are left out."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("gpu_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["toy"]:
            part = record["benchmark"].removeprefix("gpu_")
            found.setdefault(record["environment"]["device"], {})[part] = record
    return found


def report(folder: Path = RESULTS) -> str:
    """All tables as Markdown: one section per GPU, or one that says that none was measured."""
    devices = read_results(folder) or {"Any GPU": {}}
    sections = ["# What was measured on GPUs"]
    for device, parts in devices.items():
        sections += [
            f"## {device}",
            _environment(parts),
            correctness_table(parts.get("correctness")),
            *(kernel_table(parts.get("kernels"), n) for n in _streams(parts.get("kernels"))),
            *(
                connection_table(parts.get("connection"), n)
                for n in _streams(parts.get("connection"))
            ),
            training_table(parts.get("training")),
            memory_table(parts.get("memory")),
        ]
    sections += ["## Published by others", published_table()]
    return "\n\n".join(section for section in sections if section)


def correctness_table(record: Record | None) -> str:
    """Checks by kind and dtype: how many, how many failed, the largest error over its limit."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in record["rows"] if record else ():
        kind = (
            row["check"]
            if row["check"] == "matrix"
            else f"{row['check']} {row.get('operation', '')}"
        )
        groups.setdefault((kind.strip(), row.get("dtype", "")), []).append(row)
    lines = []
    for (kind, dtype), rows in groups.items():
        failed = sum(row["passed"] is False for row in rows)
        skipped = sum(row["passed"] is None for row in rows)
        beyond = sum(row.get("as_torch", False) for row in rows)
        within = [r for r in rows if r.get("limit") and r["error_found"] <= r["limit"]]
        worst = max((r["error_found"] / r["limit"] for r in within), default=None)
        shown = "" if worst is None else f"{worst:.2f}"
        lines.append((kind, dtype, len(rows) - skipped, failed, beyond, shown, skipped or ""))
    head = (
        *("check", "dtype", "checks", "failed", "beyond the limit, as plain torch is"),
        *("largest other error over the limit", "not run"),
    )
    return table("Results against float64", head, lines, record)


def kernel_table(record: Record | None, n: int = 4) -> str:
    """Milliseconds and percent of the copy's bandwidth, by operation, implementation and width."""
    copy = copy_bandwidth(record)
    title = f"Kernels and operations: ms, and percent of the copy's bandwidth (n = {n})"
    if copy:
        title += f"; the copy runs at {copy / 1e12:.2f} TB/s"
    names = [(operation, rival) for operation in OPERATIONS for rival in RIVALS]
    return _by_width(title, ("operation", "by"), names, record, n)


def connection_table(record: Record | None, n: int = 4) -> str:
    """Milliseconds of a connection, forward and backward, per sub-layer."""
    title = f"One connection, forward and backward: ms per sub-layer, and percent (n = {n})"
    rows = record["rows"] if record else ()
    names = dict.fromkeys(r["implementation"] for r in rows if r["operation"] == "connection")
    return _by_width(title, ("", "by"), [("connection", name) for name in names], record, n)


def _by_width(
    title: str, head: tuple[str, str], names: list[tuple[str, str]], record: Record | None, n: int
) -> str:
    """Times of operations by implementations, a column for each width."""
    copy = copy_bandwidth(record)
    cells = {
        (row["operation"], row["implementation"], row["width"]): _time_and_share(row, copy)
        for row in (record["rows"] if record else ())
        if row.get("n") == n
    }
    widths = sorted({width for _, _, width in cells})
    lines = [
        (*name, *(cells.get((*name, width), NOT_MEASURED) for width in widths))
        for name in names
        if any((*name, width) in cells for width in widths)
    ]
    columns = [f"C = {width}" for width in widths] or ["time"]
    return table(title, (*head, *columns), lines, record)


def _streams(record: Record | None) -> list[int]:
    """The values of n that were measured, 4 if none."""
    rows = record["rows"] if record else ()
    return list(dict.fromkeys(row["n"] for row in rows if "n" in row)) or [4]


def training_table(record: Record | None) -> str:
    """Tokens per second, MFU, and the overhead over the baseline that ran the same way."""
    rows = [row for row in (record["rows"] if record else ()) if row.get("seconds")]
    lines = []
    for row in rows:
        compiled = "compile=true" in row["overrides"]
        base = next(
            (
                r
                for r in rows
                if r["model"].startswith("baseline")
                and ("compile=true" in r["overrides"]) == compiled
            ),
            None,
        )
        over, each = "", ""
        if base is not None and base is not row:
            extra = row["seconds"]["median"] - base["seconds"]["median"]
            over = f"{100 * extra / base['seconds']['median']:+.1f}%"
            each = f"{1e9 * extra / row['tokens'] / row['sub_layers']:.2f}"
        lines.append(
            (
                *(row["model"], row["overrides"], row["kernels"], row["sequences"]),
                *(f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.1f}%", over, each),
            )
        )
    head = (
        *("model", "settings", "kernels", "sequences", "tokens/s", "MFU", "over baseline"),
        "ns per token and sub-layer",
    )
    return table("A training step of 4,096-token sequences on one GPU", head, lines, record)


def memory_table(record: Record | None) -> str:
    """The plan's prediction over what was allocated."""
    lines = [
        (
            *(row["model"], row["overrides"], row["sequences"], row["micro_batches"]),
            *(row["kernels"], f"{row['measured_bytes'] / 2**30:.2f}"),
            f"{row['predicted_over_measured']:.3f}",
        )
        for row in (record["rows"] if record else ())
        if row.get("measured_bytes")
    ]
    head = ("model", "settings", "sequences", "micro-batches", "kernels", "GiB allocated")
    return table("Memory: what `plan` predicts", (*head, "predicted over that"), lines, record)


def published_table() -> str:
    """Figures that others published, on their hardware."""
    lines = [
        (
            *(p.operation, p.who, p.hardware, p.shape, f"{p.bandwidth / 1e12:.2f}"),
            *("unknown GPU" if p.share is None else f"{100 * p.share:.0f}%", p.where),
        )
        for p in PUBLISHED
    ]
    head = ("operation", "published by", "on", "tokens x C", "TB/s", "of its data sheet", "in")
    return table("Published figures, not measured here", head, lines, {})


def table(title: str, head: tuple, lines: list[tuple], record: Record | None) -> str:
    """A Markdown table under a title; one row of "not measured" if there are no lines."""
    lines = lines or [(NOT_MEASURED,) * len(head)]
    rows = [head, ("---",) * len(head), *lines]
    stopped = (
        "\n\nStopped early: what is missing was not measured."
        if (record and record.get("stopped_early"))
        else ""
    )
    body = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return f"**{title}**\n\n{body}{stopped}"


def copy_bandwidth(record: Record | None) -> float | None:
    """The best of the copies that were timed in the same run, bytes per second."""
    found = [
        r["bytes_per_second"]
        for r in (record["rows"] if record else ())
        if r["operation"] == "copy"
    ]
    return max((value for value in found if value), default=None)


def draw(record: Record, path: Path, n: int = 4) -> None:
    """Percent of the copy's bandwidth by operation, one mark per implementation and width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    copy = copy_bandwidth(record)
    shown = [o for o in OPERATIONS if any(r["operation"] == o for r in record["rows"])]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(shown) + 1.8), layout="constrained")
    colours = dict(zip(RIVALS, ("C0", "C7", "C1", "C2"), strict=True))
    for rival in RIVALS:
        marks = [
            (100 * share, shown.index(row["operation"]))
            for row in record["rows"]
            if row["operation"] in shown
            and row["implementation"] == rival
            and row["n"] == n
            and (share := share_of(row, copy)) is not None
        ]
        label = "ours" if rival == "triton" else rival
        if marks:
            shares, places = zip(*marks, strict=True)
            axes.scatter(shares, places, color=colours[rival], label=label, s=30)
    others = [
        (100 * p.share, shown.index(p.operation))
        for p in PUBLISHED
        if p.share is not None and p.operation in shown
    ]
    if others:
        axes.scatter(
            *zip(*others, strict=True),
            marker="D",
            facecolors="none",
            edgecolors="C3",
            label="published, other hardware, of its data sheet",
        )
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel(
        "percent of the bandwidth of a copy on this GPU, by the least bytes to be moved"
    )
    device = record["environment"]["device"]
    axes.set_title(f"{device}, n = {n}, bfloat16; marks of one kind: the widths C")
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def share_of(row: Record, copy: float | None) -> float | None:
    """An operation's bandwidth over the copy's."""
    seconds = row.get("seconds")
    if not seconds or not copy or not row["bytes"]:
        return None
    return row["bytes"] / seconds["median"] / copy


def _time_and_share(row: Record, copy: float | None) -> str:
    if "error" in row:
        return f"failed: {row['error'].split(':')[0]}"
    if not row.get("seconds"):
        return NOT_MEASURED
    share = share_of(row, copy)
    time = f"{1e3 * row['seconds']['median']:.3f}"
    return time if share is None else f"{time} ({100 * share:.0f}%)"


def _environment(parts: dict[str, Record]) -> str:
    lines = []
    for part, record in parts.items():
        about = record["environment"]
        versions = ", ".join(f"{k} {about[k]}" for k in ("torch", "triton", "cuda", "driver"))
        lines.append(f"- `{part}`: {versions}, commit {about['commit']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    (args.results / "gpu.md").write_text(report(args.results) + "\n", encoding="utf-8")
    for device, parts in read_results(args.results).items():
        if "kernels" in parts and copy_bandwidth(parts["kernels"]):
            draw(parts["kernels"], args.results / f"gpu_roofline_{file_name(device)}.png")


if __name__ == "__main__":
    main()
