"""Over-Decoding adds a loss of the token after the next in training, and to nothing else."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import tiny_transformer
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.generation import generate
from mhc_lightning.kernels import IGNORE_INDEX
from mhc_lightning.modules import OverEncoding
from mhc_lightning.modules.memory.over_decoding import OverDecoding

WEIGHT = 0.3


def network(weight: float = WEIGHT) -> Any:
    memory = partial(OverEncoding, rows=57, num_heads=2, dim=8, over_decoding_weight=weight)
    return tiny_transformer(memory=memory).double()


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and next tokens [3, 9]; the second row is padded, and one place in the third."""
    tokens = torch.randint(40, (3, 10))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 5:] = IGNORE_INDEX
    targets[2, 3] = IGNORE_INDEX
    return inputs, targets


def expected_loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Position by position, with every logit."""
    hidden = model.read_out(*model.run(tokens))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(hidden, targets.tolist(), strict=True):
        for t, h in enumerate(row):
            if wanted[t] != IGNORE_INDEX:
                total = total - F.log_softmax(model.output(h), -1)[wanted[t]]
                count += 1
            if IGNORE_INDEX not in (wanted[t], *wanted[t + 1 : t + 2]) and t + 1 < len(wanted):
                projected = model.head_memory.projection.weight @ h
                log = F.log_softmax(model.output.weight @ projected, -1)
                total = total - WEIGHT * log[wanted[t + 1]]
    return total / count


def test_the_loss_and_its_gradients_are_those_of_the_equation() -> None:
    model = network()
    tokens, targets = batch()
    loss, expected = model.loss(tokens, targets), expected_loss(model, tokens, targets)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    for (name, _), one, other in zip(model.named_parameters(), ours, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 1e-6 * other.abs().max() + 1e-15, name
    head = model.head_memory.projection.weight
    assert any(p is head and g is not None for p, g in zip(trained, ours, strict=True))


def test_evaluation_and_generation_know_the_next_token_only() -> None:
    model, plain = network().eval(), network(0).eval()
    tokens, targets = batch()
    assert torch.equal(model.loss(tokens, targets), plain.loss(tokens, targets))
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    plain.train()
    losses = model.token_losses(tokens, targets)
    assert torch.equal(losses, plain.token_losses(tokens, targets))
    assert bool(model.loss(tokens, targets) > plain.loss(tokens, targets) + 0.1)
    prompt = tokens[0, :4].tolist()
    texts = [
        list(generate(each.eval(), prompt, max_new_tokens=5, seed=0)) for each in (model, plain)
    ]
    assert texts[0] == texts[1]


def test_the_other_weights_start_as_without_it() -> None:
    model, plain = network(), network(0)
    assert plain.head_memory is None
    ours = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.pop(name), value), name
    assert list(ours) == ["head_memory.projection.weight"]
    assert float(ours["head_memory.projection.weight"].std()) == pytest.approx(0.05, rel=0.2)


def test_parts_of_a_batch_add_up_to_the_whole_whatever_their_padding() -> None:
    """A pipeline weighs the losses of micro-batches by their targets."""
    model = network()
    tokens, targets = batch()
    whole = model.loss(tokens, targets).detach()
    weights = [int(model.count_targets(row[None])) for row in targets]
    rows = zip(tokens, targets, weights, strict=True)
    parts = sum(w * model.loss(x[None], y[None]).detach() for x, y, w in rows)
    assert float(whole) == pytest.approx(float(parts) / sum(weights), rel=1e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_without_a_token_after_the_next_it_adds_nothing(length: int) -> None:
    model, plain = network(), network(0)
    tokens, targets = torch.randint(40, (2, 3)), torch.full((2, 3), IGNORE_INDEX)
    targets[:, :length] = 5
    if length:
        assert torch.equal(model.loss(tokens, targets), plain.loss(tokens, targets))
    model.loss(tokens, targets).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    model.loss(tokens[:, :1], targets[:, :1]).backward()  # no position has one


def test_it_is_at_the_head() -> None:
    model = network()
    assert isinstance(model.head_memory, OverDecoding)
    assert model.parts_behind_blocks == ("norm", "output", "head_memory")
    assert network(0).parts_behind_blocks == ("norm", "output")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"memory\.over_decoding_weight must be at least 0"):
        network(weight)


def test_weights_with_and_without_it_are_told_apart() -> None:
    with pytest.raises(UserError, match=r"memory\.over_decoding_weight=above 0 \(not 0\)"):
        network(0).load_state_dict(network().state_dict())
    with pytest.raises(UserError, match=r"memory\.over_decoding_weight=0 \(not above 0\)"):
        network().load_state_dict(network(0).state_dict())
    network(0.1).load_state_dict(network().state_dict())
