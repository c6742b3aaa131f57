"""What the residual baseline is timed against is of its dimensions, and a causal language model."""

import pytest
import torch
from torch import nn

import baseline_step

DIM, BLOCKS, LENGTH = 64, 2, 16


def models() -> dict[str, nn.Module]:
    return {
        "ours": baseline_step.ours(DIM, BLOCKS),
        "gpt": baseline_step.PlainGpt(DIM, BLOCKS, LENGTH),
        "llama": baseline_step.llama(DIM, BLOCKS),
        "deepseek_v3": baseline_step.deepseek(DIM, BLOCKS),
    }


def test_parameters_are_as_many() -> None:
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in models().items()}
    assert counts["deepseek_v3"] == counts["ours"]
    for count in counts.values():
        assert count == pytest.approx(counts["ours"], rel=0.12)


def test_no_logits_depend_on_later_tokens_and_a_step_changes_the_weights() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, baseline_step.VOCABULARY, (2, LENGTH))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % baseline_step.VOCABULARY
    for name, model in models().items():
        with torch.no_grad():
            one, other = (getattr(out, "logits", out) for out in map(model, (tokens, changed)))
        torch.testing.assert_close(one[:, :10], other[:, :10], msg=name)
        assert not torch.allclose(one[:, 10:], other[:, 10:])
        before = [p.detach().clone() for p in model.parameters()]
        baseline_step.step_of(model, torch.cat([tokens, tokens[:, :1]], 1))()
        pairs = zip(before, model.parameters(), strict=True)
        assert sum(not torch.equal(a, b) for a, b in pairs) > len(before) // 2
