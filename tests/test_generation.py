"""Sampling against the probabilities a model states."""

import pytest
import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.generation import generate


class Fixed(nn.Module):
    """States the same next-token probabilities whatever it reads."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


class Counter(nn.Module):
    """Always expects the successor of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot((tokens + 1) % 10, 10)


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
