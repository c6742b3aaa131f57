"""Sampling tokens from a language model, for one prompt or several at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.precision import widened
from mhc_lightning.modules import Transformer

_SEEDS = 2**64  # number of seeds that torch's generators distinguish


@dataclass(frozen=True)
class Sampling:
    """The settings of a prompt's continuation.

    Temperature, `top_k` and `top_p` act in this order, each on the renormalised result of the
    preceding one, as in transformers and vLLM.

    Args:
        max_new_tokens: The largest number of new tokens.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens, and all tokens as likely as the k-th.
        top_p: Keep the likeliest tokens whose probabilities add up to at least p.
        seed: Makes the draw repeatable; at least 0 and below 2**64.

    Raises:
        UserError: An argument is out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be at least 0, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, or null for all, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < _SEEDS):
            raise UserError(
                f"seed must be a whole number, at least 0 and below 2**64, not {self.seed}"
            )


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end_token: int | None = None,
) -> Iterator[int]:
    """Yield sampled tokens one by one, as they are drawn.

    Args:
        model: The network, in evaluation mode.
        prompt: At least one token.
        max_new_tokens: The largest number of new tokens; for the other settings see `Sampling`.
        temperature: Divides the logits.
        top_k: The number of likeliest tokens to keep.
        top_p: The probability to keep.
        seed: The seed of the draw.
        end_token: Token that ends the continuation when it is drawn; it is not yielded.

    Raises:
        UserError: An argument is out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    for _, token in generate_together(model, [prompt], [sampling], end_token=end_token):
        yield token


@torch.no_grad()
def generate_together(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    end_token: int | None = None,
    is_over: Callable[[int, int], bool] = lambda prompt, token: False,
) -> Iterator[tuple[int, int]]:
    """Continue several prompts of any lengths at once, each as if it were alone.

    Each prompt is read once. A new token then costs the computation of one token, and attention to
    all preceding ones (see `Transformer.forward_cached`). Finished prompts leave the batch.

    Args:
        model: The network, in evaluation mode.
        prompts: At least one token each.
        samplings: The settings of each prompt.
        end_token: Token that ends a continuation when it is drawn; it is not yielded.
        is_over: Called with a prompt's index and a yielded token; True if that token ends the
            continuation.

    Yields:
        (index of the prompt, token), each prompt's tokens in their order.

    Raises:
        UserError: A prompt is empty, or the network gives no probabilities (NaN).
    """
    if not all(prompts):
        raise UserError('the prompt is empty: give at least one character, prompt="…"')
    # Prompts without any token to draw are not read.
    running = [k for k, sampling in enumerate(samplings) if sampling.max_new_tokens > 0]
    if not running:
        return
    device = next(model.parameters()).device
    generators = {k: _generator(samplings[k], device) for k in running}
    remaining = {k: samplings[k].max_new_tokens for k in running}
    tokens = pad_sequence([torch.tensor(list(prompts[k])) for k in running], batch_first=True)
    counts = torch.tensor([len(prompts[k]) for k in running], device=device)
    caches = model.new_caches(len(running), max(len(prompts[k]) + remaining[k] for k in running))
    logits = widened(model.forward_cached(tokens.to(device), caches, counts))
    while True:
        drawn = _draw(logits, [samplings[k] for k in running], [generators[k] for k in running])
        unfinished = []
        for row, (k, token) in enumerate(zip(running, drawn, strict=True)):
            if token == end_token:
                continue
            yield k, token
            remaining[k] -= 1
            if remaining[k] and not is_over(k, token):
                unfinished.append(row)
        if not unfinished:
            return
        if len(unfinished) < len(running):
            rows = torch.tensor(unfinished, device=device)
            for cache in caches:
                cache.keep(rows)
        running = [running[row] for row in unfinished]
        last = torch.tensor([[drawn[row]] for row in unfinished], device=device)
        logits = widened(model.forward_cached(last, caches))


def _generator(sampling: Sampling, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def _draw(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    """A token for each row of logits [B, V].

    Raises:
        UserError: A row's largest logit is NaN or infinite.
    """
    largest, tokens = logits.max(-1)
    if not largest.isfinite().all():
        raise UserError(
            "the model's logits are NaN or infinite, as after a run that diverged; use an earlier"
            " checkpoint"
        )
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if sampling.temperature > 0:
            tokens[row] = _sample(logits[row], sampling, generator)
    return [int(token) for token in tokens.tolist()]


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token drawn from the distribution of logits [V] under the settings."""
    probabilities, tokens = _distribution(logits, sampling)
    return tokens[torch.multinomial(probabilities, 1, generator=generator)].squeeze()


def _distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The distribution to draw from, likeliest first: weights [V] and their tokens [V]."""
    # The largest logit becomes zero first, so that no low temperature makes logits overflow.
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    scaled, tokens = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled[sampling.top_k - 1], -math.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1, rounding must not remove tokens
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return probabilities, tokens
