"""Batches of unequal lengths score like one sequence at a time."""

import random

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.evaluation.scoring import score_continuations


def random_pairs(count):
    generator = random.Random(1)

    def tokens(longest):
        return [generator.randrange(257) for _ in range(generator.randint(1, longest))]

    return [(tokens(20), tokens(6)) for _ in range(count)]


@torch.no_grad()
def greedy_continuation(network, context, length):
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_batches_of_unequal_lengths_score_like_one_sequence_at_a_time(network, direct, batch_size):
    pairs = random_pairs(11)
    pairs += [(context, greedy_continuation(network, context, 4)) for context, _ in pairs[:3]]
    counts: list[int] = []
    scores = score_continuations(
        network, pairs, batch_size=batch_size, max_length=40, on_batch=counts.append
    )
    assert sum(counts) == len(pairs) and max(counts) <= batch_size
    for score, pair in zip(scores, pairs, strict=True):
        expected, greedy = direct(*pair)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert score.is_greedy is greedy
    assert [score.is_greedy for score in scores] == [False] * 11 + [True] * 3


def test_what_is_too_long_loses_its_beginning(network, direct):
    ((context, continuation),) = random_pairs(1)
    context = [*range(50), *context]
    (score,) = score_continuations(network, [(context, continuation)], batch_size=2, max_length=10)
    seen = [*context, *continuation][-11:]
    expected, _ = direct(seen[: -len(continuation)], continuation)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_a_continuation_of_nothing_is_certain(network):
    assert score_continuations(network, [([1, 2], []), ([3], [4])], batch_size=2, max_length=9)[
        0
    ] == (0.0, True)
    assert score_continuations(network, [], batch_size=2, max_length=9) == []


def test_continuations_that_cannot_be_seen_whole_are_refused(network):
    with pytest.raises(UserError, match=r"a continuation to score has 6 tokens.*max_length=6"):
        score_continuations(network, [([1], [2] * 6)], batch_size=1, max_length=5)
