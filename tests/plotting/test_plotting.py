"""Gain profiles and matrix heat maps: what is drawn, and that any number can be."""

import math
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from mhc_lightning.callbacks.gains import GAIN_TAGS
from mhc_lightning.formatting import format_cell
from mhc_lightning.plotting import gain_profile as profile_module
from mhc_lightning.plotting import matrix_heatmap as heatmap_module
from mhc_lightning.plotting import theme
from mhc_lightning.plotting.gain_profile import gain_profile
from mhc_lightning.plotting.matrix_heatmap import matrix_heatmap


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Figures as they are rendered."""
    made: list[Any] = []
    render = theme.to_array

    def keep(figure: Any) -> np.ndarray:
        made.append(figure)
        return render(figure)

    monkeypatch.setattr(profile_module, "to_array", keep)
    monkeypatch.setattr(heatmap_module, "to_array", keep)
    return made


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
def test_everything_is_inside_the_picture_and_cells_hold_their_numbers(n: int, drawn: Any) -> None:
    matrix = np.arange(n * n).reshape(n, n) * -17.3
    picture = matrix_heatmap(matrix, "Sub-layers 10 to 59, product", 120_000)
    assert picture.dtype == np.uint8
    (figure,) = drawn
    height, width = picture.shape[:2]
    renderer = figure.canvas.get_renderer()
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    labels = [t.get_text() for t in figure.axes[0].texts]
    assert len(labels) == n * n + 2 * n
    at = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    for k in range(n):  # (x, y): row sums in the last column, column sums in the last row
        assert at[n, k] == format_cell(float(matrix[k].sum()))
        assert at[k, n] == format_cell(float(matrix[:, k].sum()))
    cell = figure.axes[0].transData.transform([(0, 0), (1, 0)])
    side = cell[1, 0] - cell[0, 0]
    for text in figure.axes[0].texts:
        assert text.get_window_extent(renderer).width <= side


def test_colours_are_centred_and_comparable(drawn: Any) -> None:
    for matrix in (np.eye(4), np.full((4, 4), 0.25), np.array([[5.0, -30.0], [0.0, 1.0]])):
        matrix_heatmap(matrix, "a", 1)
    limits = [figure.axes[0].images[0].get_clim() for figure in drawn]
    assert limits == [(-1, 1), (-1, 1), (-30, 30)]


def test_numbers_that_are_not_finite_are_shown() -> None:
    assert matrix_heatmap(np.array([[np.nan, 1.0], [np.inf, 0.0]]), "a", 1).std() > 0


def profile(low: float, high: float) -> dict[str, list[float]]:
    tags = [f"amax_gain/{k}/{d}" for k in ("single", "composite") for d in ("forward", "backward")]
    return {tag: [low, high, 1.0] for tag in tags}


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(1.0, 1.0, "linear"), (1.0, 1.6, "linear"), (0.7, 3000.0, "log"), (1.0, np.inf, "linear")],
)
def test_the_gain_axis_is_logarithmic_where_gains_spread(
    low: float, high: float, scale: str, drawn: Any
) -> None:
    assert gain_profile(profile(low, high), 50).std() > 0
    assert [axes.get_yscale() for axes in drawn[0].axes] == [scale, scale]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [-1.0, 1e-320, 1e300, math.inf, math.nan])
def test_any_number_can_be_drawn(value: float) -> None:
    assert gain_profile({tag: [1.0, value] for tag in GAIN_TAGS}, 1).std() > 0
    assert matrix_heatmap(np.array([[1.0, value], [value, 0.0]]), "any", 1).std() > 0
