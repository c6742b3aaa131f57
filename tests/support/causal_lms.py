"""Small models of transformers with random weights."""

from typing import Any

import torch
from networks import scrambled

from mhc_lightning.huggingface import MhcConfig, MhcForCausalLM

EXPERTS = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1}
ENGRAM = {"class": "mhc_lightning.modules.Engram", "rows": 31, "num_heads": 2, "dim": 8}
OVER_ENCODING = {
    "class": "mhc_lightning.modules.OverEncoding",
    "rows": 57,
    "num_heads": 2,
    "dim": 8,
    "over_decoding_weight": 0.5,
}


def tiny_config(connection: str = "ManifoldHyperConnection", **changes: Any) -> MhcConfig:
    """A configuration of two blocks.

    Args:
        connection: Name of its class.
        changes: Settings of the network; `memory` is a section, `document_end` the configuration's.
    """
    memory, end = changes.pop("memory", None), changes.pop("document_end", None)
    model = {
        "class": "mhc_lightning.modules.Transformer",
        "vocab_size": 40,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 20,
        "head_dim": 8,
        "rope_dim": 4,
        "kv_rank": 8,
        "init_std": 0.3,
    }
    network = {
        "model": {**model, **changes},
        "connection": {"class": f"mhc_lightning.modules.{connection}"},
        **({} if memory is None else {"memory": memory}),
    }
    special: dict[str, Any] = {"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 3}
    return MhcConfig(network=network, document_end=end, **special)


def tiny_causal_lm(*args: Any, **changes: Any) -> MhcForCausalLM:
    """A model in evaluation mode, always the same; arguments are those of `tiny_config`."""
    torch.manual_seed(0)
    model = MhcForCausalLM(tiny_config(*args, **changes))
    model.model.memory.bind_alone()
    return scrambled(model, 0.2, seed=0).eval()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": ("ResidualConnection", {}),
    "mhc_experts": ("ManifoldHyperConnection", EXPERTS),
    "single_pass_engram": ("SinglePassHyperConnection", {"memory": ENGRAM}),
    "mhc_documents": ("ManifoldHyperConnection", {"document_end": 5}),
    "hc_over_encoding": ("HyperConnection", {"memory": OVER_ENCODING}),
}
