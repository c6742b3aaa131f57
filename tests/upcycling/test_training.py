"""Upcycled models learn: gradients, checkpointing, adapters, bfloat16, instruments."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from networks import CONNECTIONS
from pretrained import relative_difference, some_tokens, tiny_pretrained
from torch import Tensor, nn

from mhc_lightning.callbacks import AmaxGain, StreamDiversity, StreamMatrixHeatmap
from mhc_lightning.modules import Connection
from mhc_lightning.upcycling import upcycle

WIDE = sorted(set(CONNECTIONS) - {"residual"})


def trained(model: nn.Module, steps: int) -> list[float]:
    """Train on the same tokens each step; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens, losses = some_tokens(), []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def root_mean_square_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).square().mean().sqrt())


@pytest.mark.parametrize("name", WIDE)
def test_streams_come_to_differ_and_every_parameter_gets_a_gradient(name: str) -> None:
    model = upcycle(tiny_pretrained().train(), connection=CONNECTIONS[name])
    losses = trained(model, 6)
    assert losses[-1] < 0.8 * losses[0]
    for key, parameter in model.named_parameters():
        if ".connections." in key:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    with torch.no_grad():
        streams = model(some_tokens(), output_hidden_states=True).hidden_states[2]
    spread = (streams - streams.mean(-2, keepdim=True)).norm() / streams.norm()
    assert spread > 1e-4


@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass", "hc"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model, tokens = upcycle(tiny_pretrained(), connection=CONNECTIONS[name]).train(), some_tokens()
    trained(model, 1)  # away from a start that hides gradients
    runs: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(runs) == 3  # once, then again in backward
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass"])
def test_adapters_of_peft_train_and_merge(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = upcycle(tiny_pretrained(), connection=CONNECTIONS[name])
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config).train()
    for key, parameter in adapted.named_parameters():
        if ".connections." in key:
            parameter.requires_grad_(True)
    tokens = some_tokens()
    frozen = model.model.layers[0].mlp.up_proj.weight.clone()
    losses = trained(adapted, 6)
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(tokens).logits
        merged = adapted.merge_and_unload()
        assert relative_difference(merged(tokens).logits, expected) < 1e-5
    assert merged.state_dict()["model.layers.0.connections.0.phi"].abs().sum() > 0  # trained


@pytest.mark.parametrize("name", CONNECTIONS)
@torch.no_grad()
def test_bfloat16_is_as_exact_as_the_model_itself(name: str) -> None:
    model, tokens = tiny_pretrained().bfloat16(), some_tokens(16, 48)
    reference = copy.deepcopy(model).double()(tokens).logits
    own = root_mean_square_error(model(tokens).logits, reference)
    upcycle(model, connection=CONNECTIONS[name])
    model.to(torch.bfloat16)
    types = {p.dtype for m in model.modules() if isinstance(m, Connection) for p in m.parameters()}
    assert types <= {torch.float32}
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    # The largest difference is that of one rounding; the mean square is that of all.
    assert own > 1e-3  # there is an error to compare with
    assert root_mean_square_error(logits, reference) <= 1.02 * own


class Finetuning(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_instruments_see_every_sub_layer(checkpointing: bool) -> None:
    model = upcycle(tiny_pretrained().train(), connection=CONNECTIONS["hc"])
    if checkpointing:
        model.gradient_checkpointing_enable()
    gains, heat = AmaxGain(every_n_steps=1), StreamMatrixHeatmap(every_n_steps=1)
    diversity = StreamDiversity(every_n_steps=1)
    rows: Any = list(some_tokens(6))
    pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[gains, heat, diversity],
    ).fit(Finetuning(model), torch.utils.data.DataLoader(rows, batch_size=2))
    assert {f"amax_gain/single/forward/layer_{k}" for k in range(6)} <= set(gains.last)
    assert "amax_gain/single/forward/layer_6" not in gains.last
    assert diversity.last["stream_diversity/mean"] > 0
