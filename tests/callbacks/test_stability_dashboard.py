"""The dashboard: TensorBoard finds the layout, and each chart its tags."""

import re
from typing import Any

import torch
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from mhc_lightning.callbacks import (
    AmaxGain,
    MemoryReading,
    MemoryUse,
    StabilityDashboard,
    StreamDiversity,
    Throughput,
)
from mhc_lightning.callbacks.stability_dashboard import LAYOUT


def test_tensorboard_finds_the_layout(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), StabilityDashboard(), max_steps=2)
    event = events().Tensors(metadata.CONFIG_SUMMARY_TAG)[0]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert {category.title for category in layout.category} == set(LAYOUT)
    charts = {chart.title for category in layout.category for chart in category.chart}
    assert "composite Amax gain" in charts


def test_every_pattern_meets_the_tags_it_is_for(foreign: Any, fit: Any, events: Any) -> None:
    class Complete(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for tag in ("train/grad_norm", "train/learning_rate", "train/mfu"):
                self.log(tag, 1.0)
            return super().training_step(batch, batch_idx)

    def memory(module: Any, args: Any, output: Any) -> MemoryReading | None:
        if not isinstance(module, foreign.Mixer):
            return None
        rows = torch.zeros(3, 1, dtype=torch.int64)
        return MemoryReading("layer_0", torch.ones(3, 2), rows, rows, (1,), args[0], output)

    fit(
        Complete(), AmaxGain(), StreamDiversity(), StabilityDashboard(), MemoryUse(extract=memory),
        Throughput(count_tokens=len), max_steps=4, validate=True,
        val_check_interval=2,
    )  # fmt: skip
    scalars = events().Tags()["scalars"]
    layout: dict[str, dict[str, Any]] = {**LAYOUT}
    for category, charts in layout.items():
        for _, patterns in charts.values():
            for pattern in patterns:
                found = [tag for tag in scalars if re.match(pattern, tag)]  # as TensorBoard does
                assert found, pattern
                by_layer = category == "By sub-layer" or "layer_" in pattern
                assert all(("/layer_" in tag) == by_layer for tag in found), pattern


def test_other_loggers_are_left_alone(foreign: Any, fit: Any) -> None:
    fit(foreign.Module(), StabilityDashboard(), max_steps=1, logger=False)
