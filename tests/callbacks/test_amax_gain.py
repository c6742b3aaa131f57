"""Amax gains while training: tags, peaks, and the profiles drawn."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_lightning.callbacks import AmaxGain
from mhc_lightning.callbacks.gains import GAIN_TAGS, amax_gains


def test_logs_every_tag_with_the_maximum_over_sub_layers(
    foreign: Any, fit: Any, events: Any
) -> None:
    gain = AmaxGain()
    fit(foreign.Module(layers=3), gain, max_steps=2)
    scalars = events().Tags()["scalars"]
    layers = [f"{tag}/layer_{k}" for tag in GAIN_TAGS for k in range(3)]
    assert {tag for tag in scalars if tag.startswith("amax_gain/")} == {*GAIN_TAGS, *layers}
    for tag in GAIN_TAGS:
        (event,) = events().Scalars(tag)
        assert event.value == max(events().Scalars(f"{tag}/layer_{k}")[0].value for k in range(3))
        assert gain.last[tag] == pytest.approx(event.value)


def test_logged_gains_are_those_of_the_mappings(foreign: Any, fit: Any) -> None:
    records: list[torch.Tensor] = []

    class Noting(foreign.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            handles = [
                mixer.window.register_forward_hook(lambda _m, _a, out: records.append(out.residual))
                for mixer in self.mixers
            ]
            result = super().forward(x)
            for handle in handles:
                handle.remove()
            return result

    for token_mean in (False, True):
        records.clear()
        gain = AmaxGain(every_n_steps=1, token_mean=token_mean)
        fit(Noting(layers=4), gain, max_steps=1)
        expected = amax_gains(records, token_mean=token_mean)
        for tag, by_layer in zip(GAIN_TAGS, expected.tolist(), strict=True):
            for k, value in enumerate(by_layer):
                assert gain.last[f"{tag}/layer_{k}"] == pytest.approx(value, rel=1e-6)


def test_peaks_keep_the_largest_of_the_run_and_where_it_was() -> None:
    gain = AmaxGain()
    trainer: Any = SimpleNamespace(
        loggers=[], log_every_n_steps=1, max_steps=-1, is_global_zero=True
    )
    module: Any = SimpleNamespace(log_dict=lambda *_, **__: None)

    def gains(row: list[float]) -> Any:
        return SimpleNamespace(layers=range(3), values=torch.tensor([row] * 4))

    for step, rows in enumerate([[1.0, 3.0, 2.0], [9.0, 1.0, 1.0], [1.0, 1.0, 4.0]], start=1):
        gain.report(trainer, module, step, gains(rows))
    assert gain.peaks["amax_gain/composite/backward"] == (9.0, 0, 2)
    gain.report(trainer, module, 4, gains([1.0, math.nan, 1.0]))
    gain.report(trainer, module, 5, gains([math.nan, 99.0, 1.0]))
    value, layer, step = gain.peaks["amax_gain/single/forward"]
    assert math.isnan(value)  # the first step that was not a number stays
    assert (layer, step) == (1, 4)


def test_profiles_are_drawn_at_the_ends_and_now_and_then(
    foreign: Any, fit: Any, events: Any
) -> None:
    fit(foreign.Module(layers=1), AmaxGain(), max_steps=52, log_every_n_steps=1, max_epochs=-1)
    assert [e.step for e in events().Images("amax_gain/profile")] == [1, 50, 52]


def test_profiles_at_an_interval_of_their_own(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), AmaxGain(every_n_steps=1, profile_every_n_steps=3), max_steps=7)
    assert [e.step for e in events().Images("amax_gain/profile")] == [3, 6, 7]


def test_nothing_is_drawn_for_loggers_that_take_no_images(
    foreign: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("mhc_lightning.callbacks.amax_gain.gain_profile", refuse)
    gain = AmaxGain(every_n_steps=1)
    fit(foreign.Module(), gain, max_steps=2, logger=False)
    assert gain.last["step"] == 2
