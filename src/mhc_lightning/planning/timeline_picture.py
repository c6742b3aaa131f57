"""The picture of a pipeline's pass: devices against time, without and with overlap.

Uses matplotlib's object interface, so nothing here touches a display or pyplot's global state.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from mhc_lightning.formatting import format_seconds
from mhc_lightning.planning.pipeline import PipelineForecast
from mhc_lightning.planning.timeline import Activity, Lane, Span, Timeline
from mhc_lightning.plotting.theme import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IDLE = "#ececec"


class _Look(NamedTuple):
    """The colours of an activity: on a device's first stage, on later stages, and of numbers."""

    label: str
    first: str
    later: str
    ink: str = "white"


_LOOKS = {
    Activity.FORWARD: _Look("forward", "#4a9ab8", "#1f6f8b"),
    Activity.BACKWARD: _Look("backward", "#d1495b", "#9e2b3c"),
    Activity.BACKWARD_INPUT: _Look("backward, inputs", "#e98a95", "#d96575"),
    Activity.BACKWARD_WEIGHT: _Look("backward, weights", "#f2c14e", "#dba21f", INK),
    Activity.REPLAY: _Look("replay", "#5aa469", "#3c7d4a"),
    Activity.SEND: _Look("communication", "#4b4b5c", "#4b4b5c"),
    Activity.EXCHANGE: _Look("dispatch and combine", "#7d7d92", "#a3a3b5"),
    Activity.MERGE: _Look("merges, high priority", "#9a6fb0", "#9a6fb0"),
}
# Beginning of each lane, from the top of a device's row, and height, both as shares of the row.
_LANES = {
    Lane.PRIORITY: (0.04, 0.12),
    Lane.COMPUTE: (0.16, 0.58),
    Lane.COMMUNICATION: (0.76, 0.16),
}
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 15.0, 1.15, 0.25, 1.15, 0.55, 0.75  # inches
_POINTS = 7.0  # size of micro-batch numbers


def draw_timelines(name: str, forecast: PipelineForecast, file: str) -> None:
    """Draw one pass, without and with overlap, below each other on the same scale.

    Args:
        name: Name of the experiment.
        forecast: The prediction to draw.
        file: Path of the PNG file.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan, lines = forecast.pipeline.plan, (forecast.sequential, forecast.overlapped)
    panel = plan.devices * max(0.16, min(0.5, 9.0 / plan.devices))
    height = _TOP + 2 * panel + _BETWEEN + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    unit, scale = ("s", 1.0) if lines[0].seconds >= 1 else ("ms", 1e3)
    until = max(line.seconds for line in lines) * scale
    used: set[Activity] = set()
    for number, (line, about) in enumerate(
        zip(lines, ("nothing overlapped", "communication and replay overlapped"), strict=True)
    ):
        bottom = _BOTTOM + (1 - number) * (panel + _BETWEEN)
        box = (_LEFT, bottom, _WIDTH - _LEFT - _RIGHT, panel)
        across = (_WIDTH, height, _WIDTH, height)
        axes = figure.add_axes(tuple(a / b for a, b in zip(box, across, strict=True)))  # type: ignore[arg-type]
        axes.set(xlim=(0, until), ylim=(plan.devices, 0))
        _devices(axes, forecast, line, scale, (_WIDTH - _LEFT - _RIGHT) / until)
        used |= {span.work for span in line.spans}
        seconds = forecast.seconds(overlapped=line.overlapped)
        axes.set_title(
            f"{about}: {format_seconds(line.seconds)} a pass, {format_seconds(seconds)} a step,"
            f" bubble {line.bubble:.1%}",
            fontsize=10,
            loc="left",
            color=INK,
        )
        if number:
            axes.set_xlabel(unit, fontsize=9, color=FAINT)
    stages = len(plan.blocks)
    figure.text(
        0.15 / _WIDTH,
        1 - 0.35 / height,
        f"{name}: {plan.schedule}, {stages} stages on {plan.devices} devices,"
        f" {forecast.pipeline.micro_batches} micro-batches",
        fontsize=12,
        weight="bold",
        parse_math=False,
    )
    patches = [
        Patch(color=look.first, label=look.label) for work, look in _LOOKS.items() if work in used
    ]
    figure.legend(
        handles=[*patches, Patch(color=_IDLE, label="idle")],
        loc="upper left",
        ncols=len(patches) + 1,
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.2,
        bbox_to_anchor=(0.05 / _WIDTH, 1 - 0.42 / height),
    )
    if len(plan.stages_of(0)) > 1:
        figure.text(
            1 - _RIGHT / _WIDTH,
            1 - 0.66 / height,
            "darker: a device's later stages",
            ha="right",
            fontsize=8.5,
            color=FAINT,
        )
    figure.savefig(file, format="png")


def _devices(
    axes: "Axes", forecast: PipelineForecast, line: Timeline, scale: float, inches: float
) -> None:
    """Draw every device's lanes; `inches` is the length of a unit of time."""
    plan = forecast.pipeline.plan
    bars: dict[tuple[int, Lane, str], list[tuple[float, float]]] = defaultdict(list)
    for device in range(plan.devices):
        top, tall = _LANES[Lane.COMPUTE]
        axes.broken_barh(
            [(0, line.seconds * scale)], (device + top, tall), facecolors=_IDLE, linewidth=0
        )
    for span in line.spans:
        look, start = _LOOKS[span.work], span.start * scale
        length = span.end * scale - start
        later = span.action.stage != plan.stages_of(span.device)[0]
        colour = look.later if later else look.first
        # A transfer that keeps its device from computing is drawn on the compute lane.
        lane = span.lane if line.overlapped else Lane.COMPUTE
        bars[span.device, lane, colour].append((start, length))
        _number(axes, span, start + length / 2, length * inches, look.ink)
    for (device, lane, colour), spans in bars.items():
        top, tall = _LANES[lane]
        wide = lane is Lane.COMPUTE and min(length for _, length in spans) * inches > 0.05
        axes.broken_barh(
            spans,
            (device + top, tall),
            facecolors=colour,
            edgecolor="white",
            linewidth=0.5 if wide else 0,
        )
    labels = [
        f"{device}: {', '.join(map(str, plan.stages_of(device)))}" for device in range(plan.devices)
    ]
    axes.set_yticks([device + 0.5 for device in range(plan.devices)], labels)
    axes.set_ylabel("device: stages", fontsize=9, color=FAINT)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _number(axes: "Axes", span: Span, middle: float, inches: float, ink: str) -> None:
    """Write a micro-batch's number, where there is room."""
    text = str(span.action.micro_batch)
    if span.lane is not Lane.COMPUTE or span.work is Activity.REPLAY:  # too thin, too many
        return
    if inches < (0.65 * len(text) + 0.3) * _POINTS / 72:
        return
    top, tall = _LANES[Lane.COMPUTE]
    axes.text(
        middle,
        span.device + top + tall / 2,
        text,
        ha="center",
        va="center",
        fontsize=_POINTS,
        color=ink,
        clip_on=True,
    )
