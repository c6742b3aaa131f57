"""Stream diversity and the Sinkhorn residual, of known streams and in training."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mhc_lightning.callbacks import StreamDiversity
from mhc_lightning.callbacks.doubly_stochastic import sum_residuals
from mhc_lightning.callbacks.stream_diversity import relative_diversity
from mhc_lightning.callbacks.watching.lineage import streams_in_arguments
from mhc_lightning.kernels import StreamMappings, sinkhorn_knopp


def test_equal_streams_have_none_and_cancelling_ones_all() -> None:
    x = torch.randn(5, 1, 8)
    assert relative_diversity(x.expand(5, 4, 8)).item() == 0
    assert relative_diversity(torch.cat([x, -x], dim=-2)).item() == pytest.approx(1)
    assert relative_diversity(torch.zeros(5, 4, 8)).item() == 0


def test_independent_streams_have_the_documented_diversity() -> None:
    streams = torch.randn(200, 4, 500)
    assert relative_diversity(streams).item() == pytest.approx(math.sqrt(1 - 1 / 4), rel=1e-2)


def test_small_differences_survive_in_float32_and_do_not_depend_on_scale() -> None:
    common, apart = torch.randn(64, 1, 256), torch.randn(64, 4, 256)
    streams = common + 1e-4 * apart
    expected = relative_diversity(common.double() + 1e-4 * apart.double()).item()
    assert 5e-5 < expected < 2e-4
    assert relative_diversity(streams).item() == pytest.approx(expected, rel=1e-3)
    assert relative_diversity(1000 * streams).item() == pytest.approx(expected, rel=1e-3)


def test_matches_the_equation() -> None:
    streams = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    total = 0.0
    for token in streams.reshape(6, 4, 5):
        mean = sum(token) / 4
        spread = sum(float(((x - mean) ** 2).sum()) for x in token)
        total += math.sqrt(spread / sum(float((x**2).sum()) for x in token)) / 6
    assert relative_diversity(streams).item() == pytest.approx(total, rel=1e-12)


def test_sum_residuals_are_the_largest_over_rows_and_columns() -> None:
    matrix = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.0, 1.25]]])
    rows, columns = sum_residuals(matrix).tolist()
    assert rows == pytest.approx(0.25)
    assert columns == pytest.approx(0.35)


def test_sinkhorn_leaves_its_residual_in_the_columns() -> None:
    rows, columns = sum_residuals(sinkhorn_knopp(3 * torch.randn(100, 4, 4))).tolist()
    assert rows < 1e-5 < columns


def test_streams_are_the_argument_of_their_shape() -> None:
    mappings = StreamMappings(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2, 2))
    streams = torch.ones(3, 2, 7)
    found = streams_in_arguments(mappings, (None, torch.ones(3, 7), streams, mappings))
    assert found is streams
    assert streams_in_arguments(mappings, (torch.ones(3, 4, 7), torch.ones(3, 2).long())) is None


def test_logs_mean_and_min_without_the_copies_of_the_first_sub_layer(
    foreign: Any, fit: Any, events: Any
) -> None:
    callback = StreamDiversity()
    fit(foreign.Module(layers=3), callback, max_steps=2)
    scalars = events().Tags()["scalars"]
    for family in ("stream_diversity", "sinkhorn_residual/row", "sinkhorn_residual/column"):
        assert {f"{family}/layer_{k}" for k in range(3)} <= set(scalars)
    later = [callback.last[f"stream_diversity/layer_{k}"] for k in (1, 2)]
    assert callback.last["stream_diversity/layer_0"] == 0
    assert callback.last["stream_diversity/mean"] == pytest.approx(sum(later) / 2)
    assert callback.last["stream_diversity/min"] == pytest.approx(min(later)) != 0
    columns = [callback.last[f"sinkhorn_residual/column/layer_{k}"] for k in range(3)]
    assert callback.last["sinkhorn_residual/column"] == max(columns)


def test_streams_that_cannot_be_found_leave_the_residual(foreign: Any, fit: Any) -> None:
    class Hidden(foreign.Module):
        def __init__(self) -> None:
            super().__init__(layers=1)
            self.hidden = nn.Identity()

    def extract(module: Any, args: Any, output: Any) -> StreamMappings | None:
        return output if isinstance(module, foreign.Window) else None

    callback = StreamDiversity(extract=extract, extract_streams=lambda *_: None)
    fit(Hidden(), callback, max_steps=2)
    assert not any(tag.startswith("stream_diversity") for tag in callback.last)
    assert callback.last["sinkhorn_residual/row"] > 0


def test_streams_from_elsewhere(foreign: Any, fit: Any) -> None:
    fixed = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    callback = StreamDiversity(extract_streams=lambda *_: fixed)
    fit(foreign.Module(layers=2), callback, max_steps=2)
    assert callback.last["stream_diversity/layer_1"] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e18, 1e38])
def test_diversity_is_that_of_any_size_of_streams(scale: float) -> None:
    streams = torch.randn(4, 3, 8, dtype=torch.float64)
    expected = relative_diversity(streams).item()
    found = relative_diversity((streams * scale).float()).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert math.isnan(relative_diversity(torch.full((1, 2, 2), math.nan)).item())
    assert math.isnan(relative_diversity(torch.tensor([[[math.inf], [1.0]]])).item())


def test_the_first_sub_layers_of_all_passes_are_left_out(foreign: Any, fit: Any) -> None:
    class Views(foreign.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(2 * x)

    callback = StreamDiversity()
    fit(Views(layers=2), callback, max_steps=2)
    found = [callback.last[f"stream_diversity/layer_{k}"] for k in range(4)]
    assert found[0] == found[2] == 0
    assert callback.last["stream_diversity/min"] == pytest.approx(min(found[1], found[3])) != 0
