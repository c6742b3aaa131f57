"""Sampling against the probabilities a model states."""

import pytest
import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.generation import generate
from mhc_lightning.modules import ManifoldHyperConnection, Transformer


class Fixed(nn.Module):
    """States the same next-token probabilities whatever it reads."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def new_caches(self, batch_size: int, max_length: int) -> list:
        return []

    def forward_cached(self, tokens: Tensor, caches: list) -> Tensor:
        return self.logits.expand(len(tokens), -1)


class Counter(nn.Module):
    """Always expects the successor of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def new_caches(self, batch_size: int, max_length: int) -> list:
        return []

    def forward_cached(self, tokens: Tensor, caches: list) -> Tensor:
        return self.scale * nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10)


def draw(model: nn.Module, count: int = 4000, **options: object) -> Tensor:
    tokens = list(generate(model, [0], max_new_tokens=count, seed=1, **options))
    return torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)


def test_frequencies_follow_the_distribution() -> None:
    model = Fixed([0.5, 0.3, 0.15, 0.05])
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert (draw(model) - expected).abs().max() < 0.03
    sharpened = expected.square() / expected.square().sum()
    assert (draw(model, temperature=0.5) - sharpened).abs().max() < 0.03


def test_top_k_and_top_p() -> None:
    model = Fixed([0.5, 0.3, 0.15, 0.05])
    two = torch.tensor([0.625, 0.375, 0, 0])
    assert (draw(model, top_k=2) - two).abs().max() < 0.03
    assert (draw(model, top_p=0.7) - two).abs().max() < 0.03
    assert (draw(model, top_p=0.4) - torch.tensor([1.0, 0, 0, 0])).abs().max() == 0
    assert (
        draw(model, top_k=100, top_p=1.0) - torch.tensor([0.5, 0.3, 0.15, 0.05])
    ).abs().max() < 0.03


def test_greedy_reads_what_it_wrote() -> None:
    tokens = list(generate(Counter(), [3], max_new_tokens=9, temperature=0))
    assert tokens == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    tokens = list(generate(Counter(), [3], max_new_tokens=9, temperature=0, end_token=7))
    assert tokens == [4, 5, 6]
    assert list(generate(Counter(), [3], max_new_tokens=3, temperature=1e-40, seed=0)) == [4, 5, 6]


def test_the_cache_changes_nothing() -> None:
    """Greedy tokens and logits equal those of whole sequences read anew for every token."""
    model = Transformer(
        connection=ManifoldHyperConnection,
        vocab_size=30,
        dim=32,
        num_layers=3,
        num_heads=2,
        ffn_dim=48,
        head_dim=16,
        rope_dim=8,
        kv_rank=12,
        num_experts=4,
        num_active_experts=2,
        num_shared_experts=1,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prompt = [3, 1, 4, 1, 5]
    drawn = list(generate(model, prompt, max_new_tokens=12, temperature=0))
    sequence = list(prompt)
    caches = model.new_caches(1, 40)
    for token in drawn:
        logits = model(torch.tensor([sequence]))[0, -1]
        unread = torch.tensor([sequence[caches[0].length :]])
        cached = model.forward_cached(unread, caches)[0]
        assert (logits - cached).abs().max() < 1e-4 * logits.abs().max()
        assert token == int(logits.argmax())
        sequence.append(token)
    # Several new tokens at once see each other causally.
    more = torch.randint(0, 30, (1, 4))
    cached = model.forward_cached(torch.cat([torch.tensor([sequence[-1:]]), more], 1), caches)
    whole = model(torch.cat([torch.tensor([sequence]), more], 1))[:, -1]
    assert (cached - whole).abs().max() < 1e-4 * whole.abs().max()
    with pytest.raises(UserError, match="the cache holds 40 tokens, not 43"):
        model.forward_cached(torch.randint(0, 30, (1, 43 - caches[0].length)), caches)


def test_seed_repeats_the_draw() -> None:
    model = Fixed([0.25] * 4)
    first = list(generate(model, [0], max_new_tokens=50, seed=3))
    assert first == list(generate(model, [0], max_new_tokens=50, seed=3))
    assert first != list(generate(model, [0], max_new_tokens=50, seed=4))


def test_bad_arguments() -> None:
    for bad, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ):
        with pytest.raises(UserError, match=message):
            list(generate(Fixed([1.0]), [0], **{"max_new_tokens": 1, **bad}))
    with pytest.raises(UserError, match="prompt is empty"):
        list(generate(Fixed([1.0]), [], max_new_tokens=1))
