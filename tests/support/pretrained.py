"""Tiny models of transformers, in place of pretrained ones; the same at each call."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # larger than usual: sub-layers matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
# By family: the name of its classes in transformers, and settings of its own.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8}),
}


def tiny_pretrained(family: str = "llama", **changes: Any) -> Any:
    """A causal language model of three blocks, in evaluation mode.

    Args:
        family: A name in `DECODERS`.
        changes: Settings of its config that differ.
    """
    import transformers

    name, settings = DECODERS[family]
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **settings, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def in_float64(model: Any) -> Any:
    """A copy in float64. Experts run one by one: torch's grouped product has no float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model


def some_tokens(rows: int = 2, length: int = 11) -> Tensor:
    """Tokens [rows, length] that are neither padding, nor the start or end of a text."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the largest value of the reference."""
    reference = reference.detach().double()
    return float((value.detach().double() - reference).abs().max() / reference.abs().max())


def pretrained_folder(folder: Path, text: str) -> Path:
    """Save a tiny Llama with a byte-level BPE tokenizer of its own, as people download models.

    Args:
        folder: The new folder.
        text: What the tokenizer's merges are learnt from.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]  # with the ids that `_SIZES` has
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tiny_pretrained(vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    whole.save_pretrained(folder)
    return folder
