"""Models train in transformers' `Trainer`, with checkpointing, with experts and with adapters."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from causal_lms import EXPERTS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhc_lightning.huggingface import BalanceExperts

AutoModel: Any = AutoModelForCausalLM  # its annotations know no models of others


@pytest.fixture
def rows():
    tokens = torch.randint(4, 40, (12, 9))
    tokens[::2, 6:] = 3  # padding at the right
    labels = tokens.masked_fill(tokens == 3, -100)
    mask = (tokens != 3).long()
    columns = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    return [{name: column[row] for name, column in columns.items()} for row in range(12)]


def train(model, rows, folder, **settings):
    callbacks = settings.pop("callbacks", [])
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, **settings}
    arguments = TrainingArguments(
        str(folder),
        **{"learning_rate": 0.01, "save_strategy": "no", "logging_steps": 1, **settings},
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_trains_every_weight(build, rows, tmp_path, bf16):
    model = build("SinglePassHyperConnection")
    before = copy.deepcopy(model.state_dict())
    trainer = train(model, rows, tmp_path, bf16=bf16, save_strategy="steps", save_steps=3)
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())
    assert all(not torch.equal(t, before[name]) for name, t in model.state_dict().items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all()
    saved = AutoModel.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in model.state_dict().items())


def test_accumulated_steps_are_the_mean_over_all_their_targets(build, rows, tmp_path):
    """Batches of unequal numbers of targets: the loss is summed and divided once."""
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "seed": 1}
    one, several = build(), build()
    train(one, rows, tmp_path, per_device_train_batch_size=4, **settings)
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    train(several, rows, tmp_path, **more, **settings)
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [{}, {"use_reentrant": True}])
def test_checkpointing_changes_no_gradient(build, kind, monkeypatch):
    tokens = torch.randint(4, 40, (2, 9))
    plain, model = build(**EXPERTS).train(), build(**EXPERTS).train()
    model.activation_checkpointing_enable(kind or None)
    assert model.is_gradient_checkpointing
    calls = []
    model.model.blocks[1].attention.register_forward_hook(lambda *_: calls.append(1))
    for each in (plain, model):
        each(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2, "the block ran again in backward"
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    model.activation_checkpointing_disable()
    assert all("forward" not in vars(block) for block in model.model.blocks)
    model(tokens)
    assert len(calls) == 3 and not model.is_gradient_checkpointing


def test_experts_are_balanced_by_a_callback(build, rows, tmp_path):
    biases = []
    for callbacks in ([], [BalanceExperts()]):
        model = build(**EXPERTS)
        [balance] = [m.balance for m in model.modules() if hasattr(m, "balance")]
        with torch.no_grad():
            balance.bias.zero_()
        train(model, rows, tmp_path, callbacks=callbacks)
        biases.append(balance.bias.abs().max().item())
        assert (balance.load.sum() == 0) == bool(callbacks)
    assert biases[0] == 0
    assert 0.001 <= biases[1] <= 0.003 + 1e-9


def test_an_adapter_trains_alone_and_comes_back(build, rows, tmp_path):
    base = build()
    before = copy.deepcopy(base.state_dict())
    settings = LoraConfig(r=2, target_modules=["query", "key_value"], task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    train(model, rows, tmp_path, gradient_checkpointing=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    model.eval()
    tokens = torch.randint(4, 40, (2, 9))
    logits = model(input_ids=tokens).logits
    plain = build()
    assert not torch.equal(logits, plain(tokens).logits), "the adapter has learnt something"
    assert all(
        torch.equal(t, before[name.replace(".base_layer", "")])
        for name, t in base.state_dict().items()
        if "lora_" not in name
    )
    model.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.equal(back(input_ids=tokens).logits, logits)
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    found = [m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, back)]
    assert torch.equal(*found)
    assert torch.equal(model.merge_and_unload().generate(**prompt, max_new_tokens=4), found[0])


def test_a_push_uploads_what_from_pretrained_reads(build, tmp_path, monkeypatch):
    """Up to the upload itself, which needs the hub."""
    model = build()

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def create_commit(self, operations, **_):
            for operation in operations:
                shutil.copyfile(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *_, **__: SimpleNamespace(save=lambda file: Path(file).write_text("a card")),
    )
    model.push_to_hub("me/mine")
    back = AutoModel.from_pretrained(tmp_path)
    tokens = torch.randint(4, 40, (2, 9))
    assert torch.equal(back(tokens).logits, model(tokens).logits)
