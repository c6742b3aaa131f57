"""Sampling, by way of the callbacks that do it."""

import math
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_lightning.callbacks import (
    AmaxGain,
    StreamDiversity,
    StreamMatrixHeatmap,
    StreamSampler,
    Throughput,
)
from mhc_lightning.callbacks.gains import amax_gains
from mhc_lightning.errors import UserError

TAG = "amax_gain/composite/forward"


def sampled_steps(events: Any, tag: str = TAG) -> list[int]:
    return [event.step for event in events().Scalars(tag)]


def test_samples_the_steps_that_lightning_logs(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), AmaxGain(), log_every_n_steps=2, max_steps=6)
    assert sampled_steps(events) == [2, 4, 6]


def test_an_interval_of_its_own(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), AmaxGain(every_n_steps=3), log_every_n_steps=2, max_steps=7)
    assert sampled_steps(events) == [3, 6]


def test_hooks_exist_during_the_forward_of_sampled_steps_only(foreign: Any, fit: Any) -> None:
    module = foreign.Module()
    fit(module, AmaxGain(every_n_steps=3), max_steps=6, validate=True, val_check_interval=1)
    hooked = {(stage, step): n for stage, step, n in module.hooked if n > 0}
    assert set(hooked) == {("train", 2), ("train", 5)}  # while steps 3 and 6 are being computed
    assert {stage for stage, _, _ in module.hooked} == {"train", "optimizer", "validation"}
    assert not any(m._forward_hooks for m in module.modules())


def test_several_callbacks_share_a_step(foreign: Any, fit: Any, events: Any) -> None:
    gain, diversity = AmaxGain(), StreamDiversity()
    module = foreign.Module()
    fit(module, gain, diversity, StreamMatrixHeatmap(every_n_steps=4), max_steps=4)
    assert sampled_steps(events) == [2, 4]
    assert sampled_steps(events, "stream_diversity/mean") == [2, 4]
    assert {e.step for e in events().Images("stream_matrices/layer_0")} == {4}
    assert gain.last["step"] == diversity.last["step"] == 4


def test_the_first_micro_batch_of_an_accumulated_step(foreign: Any, fit: Any, batches: Any) -> None:
    module, gain = foreign.Module(), AmaxGain(every_n_steps=1)
    fit(module, gain, max_steps=1, accumulate_grad_batches=4)
    assert [n > 0 for stage, _, n in module.hooked if stage == "train"] == [True] + [False] * 3

    torch.manual_seed(0)
    fresh = foreign.Module()
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():  # undo the one step of SGD: the sample was taken before it
        for mine, trained in zip(fresh.parameters(), module.parameters(), strict=True):
            mine.copy_(trained + 0.001 * trained.grad if trained.grad is not None else trained)
    streams = next(iter(batches)).unsqueeze(-2).expand(-1, -1, 2, -1)
    residuals = []
    for mixer in fresh.mixers:
        residuals.append(mixer.mappings(streams).residual)
        streams = mixer(streams)
    expected = amax_gains(residuals)[2].max().item()
    assert gain.last[TAG] == pytest.approx(expected, rel=1e-4)


def test_steps_are_counted_in_optimizer_steps_under_accumulation(
    foreign: Any, fit: Any, events: Any
) -> None:
    fit(foreign.Module(), AmaxGain(), max_steps=4, accumulate_grad_batches=3)
    assert sampled_steps(events) == [2, 4]


def test_manual_optimization_with_a_backward_of_its_own(
    foreign: Any, fit: Any, events: Any
) -> None:
    module = foreign.Module(manual=2, recompute=True)
    fit(module, AmaxGain(every_n_steps=2), max_steps=4)
    assert sampled_steps(events) == [2, 4]
    assert f"{TAG}/layer_2" in events().Tags()["scalars"]
    assert f"{TAG}/layer_3" not in events().Tags()["scalars"]  # replays are no sub-layers
    hooked = [step for stage, step, n in module.hooked if stage == "train" and n > 0]
    assert hooked == [1, 3]  # one of the two micro-batches


def test_recomputed_activations_are_not_counted_twice(foreign: Any, fit: Any, events: Any) -> None:
    gain = AmaxGain()
    fit(foreign.Module(layers=3, recompute=True), gain, max_steps=2)
    assert sum("composite/forward/layer_" in tag for tag in gain.last) == 3


def test_a_resumed_run_keeps_the_rhythm(
    foreign: Any, fit: Any, events: Any, tmp_path: Path
) -> None:
    trainer = fit(foreign.Module(), AmaxGain(every_n_steps=3), max_steps=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = fit(foreign.Module(), max_steps=4)
    second.fit_loop.epoch_loop.max_steps = 10
    second.callbacks.append(AmaxGain(every_n_steps=3))
    second.fit(
        foreign.Module(), second.train_dataloader, ckpt_path=tmp_path / "a.ckpt", weights_only=False
    )
    # Two event files of one second and process are read in the order of their names.
    assert sorted(sampled_steps(events)) == [3, 6, 9]


def test_being_observed_changes_no_number(foreign: Any, fit: Any) -> None:
    def train(*callbacks: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = foreign.Module()
        fit(module, *callbacks, max_steps=3)
        return module.state_dict()

    plain = train()
    watched = train(AmaxGain(1), StreamDiversity(1), StreamMatrixHeatmap([0], 1))
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


def test_a_model_without_records_gets_one_warning(fit: Any) -> None:
    class Plain(torch.nn.Module):
        pass

    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    data = torch.utils.data.DataLoader(RandomDataset(32, 8))
    gain = AmaxGain(every_n_steps=1)
    with pytest.warns(UserWarning, match="saw no StreamMappings in step 1") as caught:
        fit(BoringModel(), gain, max_steps=3, data=data)
    assert sum("saw no StreamMappings" in str(w.message) for w in caught) == 1
    assert gain.last == {}


def test_an_exception_in_the_forward_leaves_no_hook(foreign: Any, fit: Any) -> None:
    class Failing(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise RuntimeError("in the middle")

    module = Failing()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, AmaxGain(every_n_steps=1))
    assert not any(m._forward_hooks for m in module.modules())


def test_values_are_there_for_checkpoints_to_monitor(foreign: Any, fit: Any) -> None:
    gain = AmaxGain()
    trainer = fit(foreign.Module(), gain, max_steps=2)
    assert trainer.callback_metrics[TAG].item() == pytest.approx(gain.last[TAG])


def test_csv_has_the_same_step_as_tensorboard(foreign: Any, fit: Any, csv_rows: Any) -> None:
    fit(foreign.Module(), AmaxGain(), max_steps=4)
    assert [row["step"] for row in csv_rows() if row.get(TAG)] == ["2", "4"]


@pytest.mark.parametrize("empty", ["batch", "first pass"])
def test_batches_without_tokens_log_nothing(
    foreign: Any, fit: Any, events: Any, empty: str
) -> None:
    class Empty(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            nothing = self(batch[:0]).sum()
            return nothing if empty == "batch" else nothing + self(batch).mean()

    module = Empty(layers=2)
    gain, diversity = AmaxGain(1), StreamDiversity(1)
    heatmap = StreamMatrixHeatmap(every_n_steps=1)
    throughput = Throughput(1, count_tokens=lambda _: 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, gain, diversity, heatmap, throughput, max_steps=3)
    assert not any("saw no StreamMappings" in str(w.message) for w in caught)
    assert throughput.last == {}
    assert all(math.isfinite(v) for v in [*gain.last.values(), *diversity.last.values()])
    layers = {tag.rpartition("_")[2] for tag in [*gain.last, *diversity.last] if "/layer_" in tag}
    images = {tag.partition("/")[2] for tag in events().Tags()["images"]}
    if empty == "batch":
        assert gain.last == diversity.last == {}
        assert not images
        assert not any(tag.startswith("amax") for tag in trainer.callback_metrics)
    else:  # numbered as they were called
        assert layers == {"2", "3"}
        assert images >= {"layer_2", "layer_3", "composite_2_to_3"}


@pytest.mark.parametrize("callback", [lambda: AmaxGain(1), lambda: Throughput(1)])
def test_the_same_callback_twice_is_a_user_error(foreign: Any, fit: Any, callback: Any) -> None:
    one = callback()
    with pytest.raises(UserError, match="the same callback twice"):
        fit(foreign.Module(), one, one)


def test_forward_passes_that_are_transformed_are_left_out(foreign: Any, fit: Any) -> None:
    class Transformed(foreign.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.func.vmap(self)(batch)
            torch.func.grad(lambda x: self(x).sum())(batch)
            return super().training_step(batch, batch_idx)

    gain = AmaxGain(1)
    fit(Transformed(layers=2), gain, max_steps=2)
    assert {tag[-1] for tag in gain.last if "/layer_" in tag} == {"0", "1"}


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True])
def test_a_wrong_interval_is_a_user_error(wrong: Any) -> None:
    with pytest.raises(UserError, match="AmaxGain: every_n_steps"):
        AmaxGain(every_n_steps=wrong)


def test_an_instrument_needs_reduce_alone(foreign: Any, fit: Any, events: Any) -> None:
    """The example in the docstring of `StreamSampler`, run as it stands there."""
    assert StreamSampler.__doc__ is not None
    (example,) = re.findall(r"```python\n(.*?)```", StreamSampler.__doc__, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)
    instrument = names["LargestEntry"](every_n_steps=1)
    trainer = fit(foreign.Module(layers=3), instrument, max_steps=2)
    by_layer = [instrument.last[f"largest_entry/layer_{k}"] for k in range(3)]
    assert instrument.last == {
        "largest_entry/max": max(by_layer), "step": 2,
        **{f"largest_entry/layer_{k}": value for k, value in enumerate(by_layer)},
    }  # fmt: skip
    assert sampled_steps(events, "largest_entry/max") == [1, 2]
    assert trainer.callback_metrics["largest_entry/max"].item() == pytest.approx(max(by_layer))
    assert "largest_entry/layer_0" not in trainer.callback_metrics
