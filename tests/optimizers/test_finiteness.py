"""What is not finite is named before it is saved, and what was saved before stays."""

import math
import os

import lightning.pytorch as pl
import pytest
import torch
from noisy_run import Data, Noisy, newest, run

from mhc_lightning.callbacks import StabilityAlarm
from mhc_lightning.checkpoints.names import saved_steps
from mhc_lightning.checkpoints.refusals import fault_in
from mhc_lightning.errors import NonFiniteLossError
from mhc_lightning.optimizers.finiteness import NonFinite, non_finite

FORMS = {"file": {}, "folder": {"sharded": True}, "background": {"asynchronous": True}}


def infinite_parameter(trainer):
    trainer.lightning_module.layer.bias[0] = -math.inf


def state_with_nan(trainer):
    trainer.optimizers[0].state[trainer.lightning_module.layer.weight]["exp_avg_sq"][:, 2] = (
        math.nan
    )


class Spoil(pl.Callback):
    """Spoils what an update has left."""

    def __init__(self, step, spoils):
        self.step, self.spoils = step, spoils

    @torch.no_grad()
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.spoils(trainer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("step", "steps"), [(8, 20), (7, 7)], ids=["during the run", "at its end"])
@pytest.mark.parametrize(
    ("spoils", "words"),
    [
        (infinite_parameter, "parameter layer.bias is infinite in 1 of 8 values"),
        (state_with_nan, "the optimizer's exp_avg_sq of layer.weight is NaN in 8 of 64 values"),
    ],
)
def test_it_is_named_and_the_last_good_checkpoint_stays(tmp_path, form, step, steps, spoils, words):
    """Only the newest is kept, so that a bad one would cost the good one."""
    with pytest.raises(NonFiniteLossError) as stopped:
        run(tmp_path, steps, callbacks=[Spoil(step, spoils)], keep_last=1, **FORMS[form])
    assert str(stopped.value).startswith(
        f"a checkpoint was refused because {words} at step {step} ("
    )
    assert stopped.value.step == step
    folder = tmp_path / "checkpoints"
    assert saved_steps(folder) == [4] and fault_in(newest(tmp_path)) is None
    assert os.readlink(folder / "last") == newest(tmp_path).name
    assert not list(folder.glob(".aside*"))


def test_a_run_that_is_told_to_stop_says_so_too(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"layer.bias is infinite .* at step 6"):
        run(tmp_path, callbacks=[Spoil(6, infinite_parameter), Spoil(6, lambda trainer: os.kill(
            os.getpid(), 15))])  # fmt: skip
    assert saved_steps(tmp_path / "checkpoints") == [4]


@pytest.mark.parametrize("own", [True, False], ids=["RunCheckpoint", "no such callback"])
def test_an_alarm_saves_no_such_state(tmp_path, own):
    """A parameter that is not finite shows in the loss, which is what the alarm goes off at."""
    alarm = StabilityAlarm(["checkpoint"], loss="train/loss", grad_norm=None, gains=())
    callbacks = [Spoil(6, infinite_parameter), alarm]
    with pytest.raises(NonFiniteLossError, match=r"refused because parameter layer.* at step 7"):
        if own:
            run(tmp_path, callbacks=callbacks)
        else:
            trainer = pl.Trainer(default_root_dir=tmp_path, max_steps=9, accelerator="cpu",
                                 logger=False, callbacks=callbacks, enable_checkpointing=False,
                                 enable_progress_bar=False, num_sanity_val_steps=0,
                                 limit_val_batches=0)  # fmt: skip
            trainer.fit(Noisy(), datamodule=Data())
    assert [step for step, _ in alarm.interventions] == [7]
    assert not list(tmp_path.rglob("alarm_step_*"))
    assert saved_steps(tmp_path / "checkpoints") == ([4] if own else [])


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_what_is_not_trained_may_hold_what_they_like(tmp_path, form):
    class Masked(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            mask = torch.full((8, 8), -math.inf).triu(1)
            pl_module.register_buffer("mask", mask)
            pl_module.table = torch.nn.Parameter(mask * math.nan, requires_grad=False)

    run(tmp_path, callbacks=[Masked()], **FORMS[form])
    assert saved_steps(tmp_path / "checkpoints") == [8, 12]


def test_what_is_found_is_counted():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).bfloat16()
    module.has_no_values_yet = torch.nn.LazyLinear(3)
    optimizer = torch.optim.SGD(module[:2].parameters(), lr=1.0, momentum=0.9)
    assert non_finite(module, [optimizer]) == []
    for parameter in [*module[0].parameters(), *module[1].parameters()]:
        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter), "step": 3}
    with torch.no_grad():
        module[0].weight[1, :3] = math.nan
        module[0].weight[2, 0] = -math.inf
        module[1].weight.requires_grad_(False).fill_(math.nan)
    bias = module.get_parameter("1.bias")
    optimizer.state[bias]["momentum_buffer"][0] = math.inf
    found = non_finite(module, [optimizer])
    assert found == [
        NonFinite("parameter 0.weight", 3, 1, 12),
        NonFinite("the optimizer's momentum_buffer of 1.bias", 0, 1, 2),
    ]
    assert str(found[0]) == "parameter 0.weight is NaN in 3 and infinite in 1 of 12 values"
