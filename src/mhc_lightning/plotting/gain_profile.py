"""The gain profile: single-layer and composite Amax gains against the sub-layer."""

from collections.abc import Mapping, Sequence

import numpy as np

from mhc_lightning.formatting import format_gain
from mhc_lightning.plotting.theme import (
    BACKWARD,
    FAINT,
    FORWARD,
    TEXT,
    draw_reference,
    drawable,
    fit_height,
    new_picture,
    style_axes,
    to_array,
    use_whole_numbers,
)


def gain_profile(gains: Mapping[str, Sequence[float]], step: int | None) -> np.ndarray:
    """Draw gains against sub-layers: single-layer gains above, composite gains below.

    Args:
        gains: By tag `amax_gain/{single,composite}/{forward,backward}`, one value per sub-layer.
        step: Optimizer steps completed, for the title; None leaves the step out.

    Returns:
        uint8 image [height, width, 3].
    """
    figure = new_picture(5.0, 5.2)
    panels = figure.subplots(2, 1)
    figure.subplots_adjust(left=0.11, right=0.97, top=0.87, bottom=0.09, hspace=0.42)
    for axes, kind in zip(panels, ("single", "composite"), strict=True):
        style_axes(axes)
        both = []
        for direction, colour, marker in (("forward", FORWARD, "o"), ("backward", BACKWARD, "s")):
            values = np.asarray(gains[f"amax_gain/{kind}/{direction}"], dtype=float)
            both.append(drawable(values))
            axes.plot(
                range(len(values)),
                both[-1],
                color=colour,
                marker=marker,
                markersize=3.5 if len(values) <= 40 else 0,
                linewidth=1.4,
                label=f"{direction}, max {format_gain(float(values.max()))}",
            )
        draw_reference(axes, 1.0)
        fit_height(axes, np.concatenate(both), around=1.0)
        use_whole_numbers(axes)
        axes.set_title(
            f"{'Single-layer' if kind == 'single' else 'Composite'} gain", fontsize=10, loc="left"
        )
        axes.set_xlabel("sub-layer", fontsize=TEXT, color=FAINT)
        # The legend stands on the line of the title, where it covers no data.
        axes.legend(
            frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.98),
            columnspacing=1.2, handlelength=1.4,
        )  # fmt: skip
    title = "Amax gain" if step is None else f"Amax gain, step {step:,}"
    figure.text(0.02, 0.95, title, fontsize=11, weight="bold")
    return to_array(figure)
