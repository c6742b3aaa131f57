"""Log-likelihoods of continuations, in batches of sequences of unequal length."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.precision import widened
from mhc_lightning.modules import Transformer

_ROWS = 1024  # predictions whose logits are in memory at once


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        log_likelihood: Log-probability after the context, in nats.
        is_greedy: True if every token is the likeliest one.
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

    Sequences are padded at their end, which does not affect the tokens before it in a causal
    network. A sequence that is too long loses the beginning of its context.

    Args:
        model: The network, in evaluation mode.
        pairs: Tokens of contexts (at least one each) and of continuations.
        batch_size: Sequences per forward pass.
        max_length: Largest number of tokens in a sequence.
        on_batch: Called after each batch with the number of sequences in it.

    Returns:
        The scores, in the order of `pairs`.

    Raises:
        UserError: A continuation alone is longer than `max_length`.
    """
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > max_length:
        raise UserError(
            f"a continuation to score has {longest} tokens, more than"
            f" evaluate.max_length={max_length}; give evaluate.max_length={longest} or more"
        )
    if not all(context for context, _ in pairs):
        raise ValueError("a context has no token to predict from")
    # Similar lengths together; the batch that needs the most memory comes first.
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
    inputs = pad_sequence([sequence[:-1] for sequence in sequences], batch_first=True)  # [B, S]
    targets = torch.cat([s[a:b] for s, (a, b) in zip(sequences, spans, strict=True)]).to(device)
    # Row and position in `inputs` that predict each target, [K] both.
    rows = torch.arange(len(pairs)).repeat_interleave(torch.tensor(counts)).to(device)
    predictors = torch.cat([torch.arange(a - 1, b - 1) for a, b in spans]).to(device)
    hidden = model.read_out(*model.run(inputs.to(device)))  # [B, S, C]
    log_likelihoods, greedy = _score_tokens(model, hidden[rows, predictors], targets)
    return [
        Score(float(part.double().sum()), bool(best.all()))
        for part, best in zip(log_likelihoods.split(counts), greedy.split(counts), strict=True)
    ]


def _score_tokens(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [K] of targets [K] given hidden [K, C], and whether each is the largest."""
    log_likelihoods, greedy = [], []
    for rows, ids in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = widened(model.output(rows))  # [rows, V]
        log_likelihoods.append(logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        greedy.append(logits.argmax(-1) == ids)
    return torch.cat(log_likelihoods).cpu(), torch.cat(greedy).cpu()
