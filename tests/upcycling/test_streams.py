"""Wide models of any number of streams, before and after training."""

from typing import Any

import pytest
import torch
from families import language_model, tokens
from networks import CONNECTIONS
from torch import Tensor
from torch.nn import functional

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, GatedHyperConnection
from mhc_lightning.upcycling import upcycle

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_the_function_stays_for_any_number_of_streams(kind: str, num_streams: int) -> None:
    if kind == "mhc_lite" and num_streams == 8:
        num_streams = 3  # all permutations of eight are too many
    model = language_model("llama")
    if num_streams == 1 and isinstance(
        CONNECTIONS[kind](dim=16, num_streams=1, layer_index=0), GatedHyperConnection
    ):
        with pytest.raises(UserError, match="take at least 2 streams"):
            upcycle(model, CONNECTIONS[kind], num_streams=1)
        return
    with torch.no_grad():
        expected = model(tokens()).logits
        found = upcycle(model, CONNECTIONS[kind], num_streams=num_streams)(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _divergence(model: Any) -> float:
    """The largest distance of a stream from the mean of the streams, by their norm."""
    seen: list[Tensor] = []
    hooks = [
        module.window.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        for module in model.modules()
        if isinstance(module, Connection)
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    last = seen[-1]
    return float(((last - last.mean(-2, keepdim=True)).norm() / last.norm()).detach())


@pytest.mark.parametrize("kind", [kind for kind in CONNECTIONS if kind != "residual"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_trained_streams_differ_and_generate_with_a_cache(model_type: str, kind: str) -> None:
    wide = upcycle(language_model(model_type), CONNECTIONS[kind], num_streams=4)
    assert _divergence(wide) < 1e-6
    optimizer = torch.optim.AdamW(wide.parameters(), lr=3e-2)
    batch, losses = tokens(4, 12), []
    for _ in range(8):
        logits = wide(batch).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert _divergence(wide) > 1e-2

    prompt = tokens(2, 6)
    settings: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": 5,
        "max_new_tokens": 5,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    generated = wide.generate(prompt, use_cache=True, **settings)
    with torch.no_grad():
        logits = wide(generated.sequences[:, :-1], use_cache=False).logits[:, -5:]
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits)
