"""Sampling tokens from a language model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer


@torch.no_grad()
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
        max_new_tokens: When to stop at the latest.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens.
        top_p: Keep the likeliest tokens whose probabilities add up to at least p.
        seed: Makes the draw repeatable.
        end_token: Stop when it is drawn; it is not yielded.

    Raises:
        UserError: If an argument is out of range.
    """
    if not prompt:
        raise UserError('the prompt is empty: give at least one character, prompt="…"')
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not temperature >= 0:
        raise UserError(f"temperature must be at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    caches = model.new_caches(1, len(prompt) + max_new_tokens)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(max_new_tokens):
        logits = model.forward_cached(tokens, caches)[0].float()
        token = _sample(logits, temperature, top_k, top_p, generator)
        if token == end_token:
            return
        yield token
        tokens = tokens.new_tensor([[token]])


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # The largest becomes zero first: no temperature, however low, makes them overflow.
    scaled = (logits - logits.max()) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(descending=True)
    if top_k is not None:
        probabilities[top_k:] = 0
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
