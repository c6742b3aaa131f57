"""Log-likelihoods of continuations, in batches of sequences of unequal length."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.precision import widened
from mhc_lightning.modules import Transformer

_ROWS = 1024  # predictions whose logits exist at once


class Score(NamedTuple):
    """What a network thinks of a continuation.

    Attributes:
        log_likelihood: Its log-probability after the context, in nats.
        is_greedy: Whether every token of it is the likeliest one.
    """

    log_likelihood: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    max_length: int,
    on_batch: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score continuations after their contexts.

    Sequences are padded behind their end, which a causal network cannot see before it. Of a
    sequence that is too long, the beginning of the context is left out.

    Args:
        model: The network, in evaluation mode.
        pairs: Tokens of contexts (at least one each) and of continuations.
        batch_size: Sequences per forward pass.
        max_length: Tokens that the network sees at once.
        on_batch: Called after each batch with the number of sequences in it.

    Returns:
        The scores, in the order of `pairs`.

    Raises:
        UserError: A continuation alone is longer than `max_length`.
    """
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > max_length:
        raise UserError(
            f"a continuation to score has {longest} tokens, more than the model is to see at once"
            f" ({max_length}); give evaluate.max_length={longest} or more"
        )
    if not all(context for context, _ in pairs):
        raise ValueError("a context has no token to predict from")
    # Like lengths together, and what needs most memory first.
    order = sorted(range(len(pairs)), key=lambda k: -len(pairs[k][0]) - len(pairs[k][1]))
    scores: list[Score | None] = [None] * len(pairs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _score_batch(model, [pairs[k] for k in chosen], max_length)
        for k, score in zip(chosen, batch, strict=True):
            scores[k] = score
        on_batch(len(chosen))
    return [score for score in scores if score is not None]


def _score_batch(
    model: Transformer, pairs: list[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> list[Score]:
    device = next(model.parameters()).device
    sequences = [
        torch.tensor([*context, *continuation][-max_length - 1 :])
        for context, continuation in pairs
    ]
    counts = [len(continuation) for _, continuation in pairs]
    spans = [(len(s) - n, len(s)) for s, n in zip(sequences, counts, strict=True)]
    inputs = pad_sequence([sequence[:-1] for sequence in sequences], batch_first=True)
    targets = torch.cat([s[a:b] for s, (a, b) in zip(sequences, spans, strict=True)]).to(device)
    rows = torch.arange(len(pairs)).repeat_interleave(torch.tensor(counts)).to(device)
    predictors = torch.cat([torch.arange(a - 1, b - 1) for a, b in spans]).to(device)
    hidden = model.read_out(*model.run_blocks(model.embed(inputs.to(device))))
    log_likelihoods, greedy = _score_tokens(model, hidden[rows, predictors], targets)
    return [
        Score(float(part.double().sum()), bool(best.all()))
        for part, best in zip(log_likelihoods.split(counts), greedy.split(counts), strict=True)
    ]


def _score_tokens(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [K] of targets [K] after [K, C], and whether each is the best."""
    log_likelihoods, greedy = [], []
    for rows, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = widened(model.output(rows))
        log_likelihoods.append(logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(log_likelihoods).cpu(), torch.cat(greedy).cpu()
