"""Adapters of peft beside the connections, saved together."""

from pathlib import Path

import pytest
import torch
from families import language_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model

from mhc_lightning.upcycling import upcycle


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_connections_learn_and_are_saved_with_the_adapter(model_type: str, tmp_path: Path) -> None:
    settings = LoraConfig(
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["connections.0", "connections.1"],
        r=4,
    )
    tuned = get_peft_model(upcycle(language_model(model_type)), settings)
    with torch.no_grad():
        untrained = language_model(model_type)(tokens()).logits
        torch.testing.assert_close(tuned(tokens()).logits, untrained, rtol=1e-5, atol=1e-5)
    learning = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in learning} == {"weight", "phi", "alpha", "bias"}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    for _ in range(3):
        tuned(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = tuned.eval()(tokens()).logits
        assert (expected - untrained).abs().max() > 1e-2
        tuned.save_pretrained(str(tmp_path))
        read = PeftModel.from_pretrained(upcycle(language_model(model_type)), tmp_path).eval()
        assert torch.equal(read(tokens()).logits, expected)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
