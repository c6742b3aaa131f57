"""Sampling against the probabilities a model states."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import MEMORIES
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mhc_lightning.errors import UserError
from mhc_lightning.generation import Sampling, _distribution, generate, generate_together
from mhc_lightning.modules import Transformer

END = 7  # the token that ends documents


class Fixed(nn.Module):
    """States the same next-token probabilities whatever it reads."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def new_caches(self, batch_size: int, max_length: int) -> list:
        return []

    def forward_cached(self, tokens: Tensor, caches: list, counts: Tensor | None = None) -> Tensor:
        return self.logits.expand(len(tokens), -1)


class Counter(nn.Module):
    """Always expects the successor of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def new_caches(self, batch_size: int, max_length: int) -> list:
        return []

    def forward_cached(self, tokens: Tensor, caches: list, counts: Tensor | None = None) -> Tensor:
        return self.scale * nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10)


def generated(model: Any, prompt: list[int], **options: Any) -> list[int]:
    return list(generate(model, prompt, **options))


def draw(model: nn.Module, count: int = 4000, **options: Any) -> Tensor:
    tokens = generated(model, [0], max_new_tokens=count, seed=1, **options)
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
    assert (draw(model, 2000, top_k=2) - two).abs().max() < 0.03
    assert draw(model, 50, top_p=0.7)[2:].tolist() == [0, 0]
    assert draw(model, 50, top_p=0.4).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_settings_make_the_distribution_that_transformers_makes(
    temperature: float, top_k: int | None, top_p: float | None, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(50, generator=generator)
    if ties:
        logits = logits.round()
        logits[7] = -torch.inf
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    warped = logits[None]
    for warper in warpers:
        warped = warper(torch.zeros(1, 1, dtype=torch.long), warped)
    weights, tokens = _distribution(logits, Sampling(1, temperature, top_k, top_p))
    found = torch.zeros(50).index_copy(0, tokens, weights / weights.sum())  # as multinomial does
    expected = warped[0].softmax(-1)
    # Of equally likely tokens at the border of top_p, each sorts another one first.
    if ties:
        found, expected = found.sort().values, expected.sort().values
    assert (found - expected).abs().max() < 1e-6
    assert torch.equal(found > 0, expected > 0)


def test_top_p_is_of_what_top_k_left() -> None:
    model = Fixed([0.4, 0.3, 0.2, 0.1])
    # Of 4/7 and 3/7 the first holds 0.5 alone; of 0.4 and 0.3 it does not.
    assert draw(model, 50, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_state_no_probabilities_are_refused(temperature: float, value: float) -> None:
    model = Fixed([0.5, 0.3, 0.2])
    assert generated(model, [0], max_new_tokens=2, temperature=1e-300) == [0, 0]
    with torch.no_grad():
        model.logits[1] = value
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        generated(model, [0], max_new_tokens=1, temperature=temperature)


def test_greedy_reads_what_it_wrote() -> None:
    tokens = generated(Counter(), [3], max_new_tokens=9, temperature=0)
    assert tokens == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    tokens = generated(Counter(), [3], max_new_tokens=9, temperature=0, end_token=7)
    assert tokens == [4, 5, 6]
    assert generated(Counter(), [3], max_new_tokens=3, temperature=1e-40, seed=0) == [4, 5, 6]


@pytest.fixture(params=["no memory", *MEMORIES])
def network(
    tiny_transformer: Callable[..., Transformer], request: pytest.FixtureRequest
) -> Transformer:
    """A network with experts that is sure enough of itself for its choices to differ.

    Documents end with the token that the tests pad with.
    """
    memory = {} if request.param == "no memory" else {"memory": MEMORIES[request.param]}
    model = tiny_transformer(num_layers=3, init_std=0.5, **memory).eval()
    model.memory.bind(np.arange(40) // 2, END)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("phi") or ".memory." in name or name.startswith("input_memory"):
            torch.nn.init.normal_(parameter, generator=generator)
    return model


def test_the_cache_changes_nothing(network: Transformer) -> None:
    """Greedy tokens and logits equal those of whole sequences read anew for every token."""
    model = network
    prompt = [3, 1, END, 1, 5]
    drawn = generated(model, prompt, max_new_tokens=12, temperature=0)
    sequence = list(prompt)
    caches = model.new_caches(1, 40)
    for token in drawn:
        logits = model(torch.tensor([sequence]))[0, -1]
        unread = torch.tensor([sequence[caches[0].longest :]])
        cached = model.forward_cached(unread, caches)[0]
        assert (logits - cached).abs().max() < 1e-4 * logits.abs().max()
        assert token == int(logits.argmax())
        sequence.append(token)
    # Several new tokens at once see each other causally.
    more = torch.randint(0, 40, (1, 4))
    cached = model.forward_cached(torch.cat([torch.tensor([sequence[-1:]]), more], 1), caches)
    whole = model(torch.cat([torch.tensor([sequence]), more], 1))[:, -1]
    assert (cached - whole).abs().max() < 1e-4 * whole.abs().max()
    with pytest.raises(UserError, match="the cache holds 40 tokens, not 43"):
        model.forward_cached(torch.randint(0, 40, (1, 43 - caches[0].longest)), caches)


def test_rows_of_different_length_share_a_batch(network: Transformer) -> None:
    """Logits of every row equal those of the row alone, also after others have left."""
    prompts = [torch.randint(0, 40, (length,)) for length in (9, 2, 5, 1)]
    prompts[0][-1] = prompts[2][3] = END
    padded = torch.full((4, 9), END)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    caches = network.new_caches(4, 14)
    alone = [network.new_caches(1, 14) for _ in prompts]
    running = [0, 1, 2, 3]
    with torch.no_grad():
        together = network.forward_cached(padded, caches, torch.tensor([9, 2, 5, 1]))
        expected = [
            network.forward_cached(prompt[None], own)
            for prompt, own in zip(prompts, alone, strict=True)
        ]
        assert (together - torch.cat(expected)).abs().max() < 1e-5 * together.abs().max()
        for leaving, counts in ((None, [1, 1, 1, 1]), (0, [2, 1, 2]), (2, [1, 1])):
            if leaving is not None:
                kept = torch.tensor([row for row, k in enumerate(running) if k != leaving])
                for cache in caches:
                    cache.keep(kept)
                running.remove(leaving)
            more = torch.randint(0, 40, (len(running), max(counts)))
            together = network.forward_cached(more, caches, torch.tensor(counts))
            for row, (k, count) in enumerate(zip(running, counts, strict=True)):
                own = network.forward_cached(more[row : row + 1, :count], alone[k])
                assert (together[row] - own[0]).abs().max() < 1e-5 * own.abs().max()
    assert caches[0].lengths.tolist() == [6, 5]


@pytest.mark.parametrize("counts", [[0, 3], [1, 4]])
def test_counts_beyond_the_new_tokens_are_refused(network: Transformer, counts: list[int]) -> None:
    """A count of 0 would give the logits of another position."""
    with pytest.raises(UserError, match=r"counts must be from 1 to 3 \(new tokens of each row\)"):
        network.forward_cached(
            torch.ones(2, 3).long(), network.new_caches(2, 9), torch.tensor(counts)
        )


def test_prompts_together_are_continued_as_each_alone(network: Transformer) -> None:
    prompts = [[3, 1, 4, END, 5, 9, 2, 6], [5], [3, 5, 8], [9, END], [1, 1]]
    samplings = [
        Sampling(12, temperature=0),
        Sampling(30, temperature=0),
        Sampling(5, temperature=0.8, top_k=20, seed=4),
        Sampling(0),
        Sampling(20, temperature=0),
    ]
    alone = [
        generated(network, prompt, **dataclasses.asdict(sampling))
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert [len(tokens) for tokens in alone] == [12, 30, 5, 0, 20]
    assert len(set(alone[1])) >= 5

    lengths: list[int] = []

    def read(tokens: Tensor, caches: list, counts: Tensor | None = None) -> Tensor:
        lengths.append(tokens.numel())
        return forward(tokens, caches, counts)

    forward = network.forward_cached
    network.forward_cached = read  # type: ignore[method-assign]
    together: list[list[int]] = [[] for _ in prompts]
    stop = alone[4][6]  # a text may stop anywhere
    drawn = generate_together(
        network,
        prompts,
        samplings,
        end_token=alone[0][-1],
        is_over=lambda k, token: k == 4 and token == stop,
    )
    for k, token in drawn:
        together[k].append(token)

    def until(tokens: list[int], end: int, keep: int) -> list[int]:
        return tokens[: tokens.index(end) + keep] if end in tokens else tokens

    expected = [until(tokens, alone[0][-1], 0) for tokens in alone]
    expected[4] = until(expected[4], stop, 1)
    assert together == expected
    # All prompts are read once; then each that still goes on costs one token per step.
    stopped = [
        len(tokens) == s.max_new_tokens for tokens, s in zip(together, samplings, strict=True)
    ]
    stopped[4] |= together[4][-1] == stop
    draws = [len(tokens) + (not over) for tokens, over in zip(together, stopped, strict=True)]
    going_on = [sum(count > step for count in draws) for step in range(1, max(draws))]
    assert lengths == [4 * 8, *going_on]


def test_seed_repeats_the_draw() -> None:
    model = Fixed([0.25] * 4)
    first = generated(model, [0], max_new_tokens=50, seed=3)
    assert first == generated(model, [0], max_new_tokens=50, seed=3)
    assert first != generated(model, [0], max_new_tokens=50, seed=4)


def test_bad_arguments() -> None:
    for bad, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"seed": 2**64}, r"below 2\*\*64, not 18446744073709551616"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            generated(Fixed([1.0]), [0], **{"max_new_tokens": 1, **bad})
    with pytest.raises(UserError, match="prompt is empty"):
        generated(Fixed([1.0]), [], max_new_tokens=1)
