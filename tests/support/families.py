"""Tiny random models of the families that can be made wide, each built from a configuration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VOCABULARY = 40


class Family(NamedTuple):
    """A family of models, and how the tests use it.

    Attributes:
        name: Its row in the table.
        block: The class of its blocks.
        adds: How a block adds, and the number of its connections.
        build: Builds a tiny model; always the same.
        inputs: Keyword arguments of the model's forward pass.
        output: The name of the output that is compared.
        generates: Whether it generates text, with a cache.
    """

    name: str
    block: str
    adds: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    output: str = "logits"
    generates: bool = True


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    """Token ids [rows, length] without the special ones, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


class _AllInFloat64(TorchFunctionMode):
    """Casts to float32 in a model's code become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "float":
            return func.__self__.double() if not args else args[0].double()
        if name in ("to", "type", "softmax", "mean", "sum", "log_softmax"):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {
                k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()
            }
        return func(*args, **(kwargs or {}))


@contextmanager
def referee() -> Iterator[None]:
    """Have models that were cast to float64 compute in float64 throughout.

    Those of transformers compute norms, softmax and rotary angles in float32 otherwise.
    """
    with _AllInFloat64():
        yield


def scattered(model: Any, scale: float = 0.1) -> Any:
    """The model, its parameters moved so far that every sub-layer counts (DiT's gates are zero)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
_HEADS: dict[str, Any] = {"head_dim": 8}
_WINDOWS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}
_DELTA_RULE: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def language_model(model_type: str, attention: str = "eager", **changes: Any) -> Any:
    """A causal language model of transformers, always the same for the same arguments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **changes})
    config._experts_implementation = "eager"  # the others have no float64
    return scattered(AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def _language(
    name: str, model_type: str, block: str, adds: str = "pre-norm, 2", **changes: Any
) -> Family:
    build = partial(language_model, model_type, **changes)
    return Family(name, block, adds, build, lambda: {"input_ids": tokens()})


def _vision(name: str, model_class: str, block: str, **changes: Any) -> Family:
    def build() -> Any:
        import transformers

        torch.manual_seed(0)
        kind = getattr(transformers, model_class)
        sizes = {k: v for k, v in _SIZES.items() if "token" not in k and k != "vocab_size"}
        sizes |= {"image_size": 8, "patch_size": 4, **changes}
        config = kind.config_class(**sizes)
        config._attn_implementation = "eager"
        return scattered(kind(config))

    def inputs() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}

    return Family(name, block, "pre-norm, 2", build, inputs, "last_hidden_state", generates=False)


def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return scattered(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=4,
            num_embeds_ada_norm=10,
        )
    )


def _latents() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 8]),
    }


_SANDWICH, _AFTER, _PARALLEL = "norms before and after, 2", "norm after, 2", "parallel, 1"

FAMILIES = (
    _language("Llama, SmolLM", "llama", "LlamaDecoderLayer"),
    _language("SmolLM3", "smollm3", "SmolLM3DecoderLayer"),
    _language("Mistral", "mistral", "MistralDecoderLayer", sliding_window=4),
    _language("Ministral", "ministral", "MinistralDecoderLayer", **_HEADS, **_WINDOWS),
    _language("Mixtral", "mixtral", "MixtralDecoderLayer", **_EXPERTS),
    _language("Qwen2", "qwen2", "Qwen2DecoderLayer"),
    _language("Qwen2-MoE", "qwen2_moe", "Qwen2MoeDecoderLayer", **_EXPERTS),
    _language("Qwen3", "qwen3", "Qwen3DecoderLayer", **_HEADS),
    _language("Qwen3-MoE", "qwen3_moe", "Qwen3MoeDecoderLayer", **_EXPERTS, **_HEADS),
    _language(
        "Qwen3-Next", "qwen3_next", "Qwen3NextDecoderLayer", **_EXPERTS, **_DELTA_RULE, **_HEADS
    ),
    _language("Qwen3.5", "qwen3_5_text", "Qwen3_5DecoderLayer", **_DELTA_RULE, **_HEADS),
    _language("DeepSeek-V2", "deepseek_v2", "DeepseekV2DecoderLayer", **_EXPERTS, **_LATENT),
    _language("DeepSeek-V3", "deepseek_v3", "DeepseekV3DecoderLayer", **_EXPERTS, **_LATENT),
    _language("gpt-oss", "gpt_oss", "GptOssDecoderLayer", **_EXPERTS, **_WINDOWS, **_HEADS),
    _language("GLM-4", "glm", "GlmDecoderLayer", **_HEADS),
    _language("GLM-4 0414", "glm4", "Glm4DecoderLayer", _SANDWICH, **_HEADS),
    _language("GLM-4.5", "glm4_moe", "Glm4MoeDecoderLayer", **_EXPERTS, **_HEADS),
    _language("Gemma", "gemma", "GemmaDecoderLayer", **_HEADS),
    _language("Gemma 2", "gemma2", "Gemma2DecoderLayer", _SANDWICH, **_WINDOWS, **_HEADS),
    _language("Gemma 3", "gemma3_text", "Gemma3DecoderLayer", _SANDWICH, **_WINDOWS, **_HEADS),
    _language("OLMo", "olmo", "OlmoDecoderLayer"),
    _language("OLMoE", "olmoe", "OlmoeDecoderLayer", **_EXPERTS),
    _language("OLMo 2", "olmo2", "Olmo2DecoderLayer", _AFTER),
    _language("OLMo 3", "olmo3", "Olmo3DecoderLayer", _AFTER, **_WINDOWS),
    _language("EXAONE 4", "exaone4", "Exaone4DecoderLayer", _AFTER, **_WINDOWS),
    _language("Phi 1 to 2", "phi", "PhiDecoderLayer", _PARALLEL, resid_pdrop=0.2),
    _language("Phi-3, Phi-4", "phi3", "Phi3DecoderLayer", resid_pdrop=0.2),
    _language("Phi-3.5-MoE", "phimoe", "PhimoeDecoderLayer", **_EXPERTS),
    _language("Granite", "granite", "GraniteDecoderLayer", residual_multiplier=0.3),
    _language("Nemotron", "nemotron", "NemotronDecoderLayer"),
    _language("StarCoder2", "starcoder2", "Starcoder2DecoderLayer"),
    _language("ERNIE 4.5", "ernie4_5", "Ernie4_5DecoderLayer"),
    _language("Seed-OSS", "seed_oss", "SeedOssDecoderLayer", **_HEADS),
    _language("Command R", "cohere", "CohereDecoderLayer", _PARALLEL),
    _language("Command R7B", "cohere2", "Cohere2DecoderLayer", _PARALLEL, **_WINDOWS),
    _language("StableLM 2", "stablelm", "StableLmDecoderLayer", hidden_dropout=0.2),
    _language(
        "StableLM 2 12B",
        "stablelm",
        "StableLmDecoderLayer",
        _PARALLEL,
        use_parallel_residual=True,
        hidden_dropout=0.2,
    ),
    _language("GPT-2", "gpt2", "GPT2Block"),
    _language("GPT-NeoX, Pythia", "gpt_neox", "GPTNeoXLayer", _PARALLEL, hidden_dropout=0.2),
    _language(
        "GPT-NeoX, `use_parallel_residual=False`",
        "gpt_neox",
        "GPTNeoXLayer",
        use_parallel_residual=False,
        hidden_dropout=0.2,
    ),
    _language("Falcon 7B", "falcon", "FalconDecoderLayer", _PARALLEL, **_DROPOUT),
    _language(
        "Falcon 40B",
        "falcon",
        "FalconDecoderLayer",
        _PARALLEL,
        new_decoder_architecture=True,
        num_kv_heads=1,
        **_DROPOUT,
    ),
    _language(
        "Falcon RW",
        "falcon",
        "FalconDecoderLayer",
        parallel_attn=False,
        multi_query=False,
        alibi=True,
        **_DROPOUT,
    ),
    _language("OPT", "opt", "OPTDecoderLayer", ffn_dim=24, word_embed_proj_dim=16),
    _language("BLOOM", "bloom", "BloomBlock", **_DROPOUT),
    _vision("ViT", "ViTModel", "ViTLayer", hidden_dropout_prob=0.2),
    _vision("DeiT", "DeiTModel", "DeiTLayer", hidden_dropout_prob=0.2),
    _vision("DINOv2", "Dinov2Model", "Dinov2Layer", mlp_ratio=2, drop_path_rate=0.2),
    _vision(
        "DINOv2 with registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersLayer",
        mlp_ratio=2,
        drop_path_rate=0.2,
    ),
    _vision("DINOv3", "DINOv3ViTModel", "DINOv3ViTLayer", drop_path_rate=0.2),
    _vision("CLIP, image tower", "CLIPVisionModel", "CLIPEncoderLayer"),
    _vision("SigLIP, image tower", "SiglipVisionModel", "SiglipEncoderLayer"),
    Family("DiT", "BasicTransformerBlock", "pre-norm, 2", _dit, _latents, "sample", False),
)


def refused_model(model_type: str, **changes: Any) -> Any:
    """A model of transformers without its head and without weights."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **changes}))


def other_diffusion_model() -> Any:
    """A diffusion transformer whose blocks have the class of DiT's, and other norms."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        return PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)


# By row of the table: what builds the model, and a part of the reason.
_SUM = "norm the sum x + F(x) itself"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "BERT": (partial(refused_model, "bert"), _SUM),
    "RoBERTa": (partial(refused_model, "roberta"), _SUM),
    "XLM-RoBERTa": (partial(refused_model, "xlm-roberta"), _SUM),
    "CamemBERT": (partial(refused_model, "camembert"), _SUM),
    "ELECTRA": (partial(refused_model, "electra"), _SUM),
    "DeBERTa v2, v3": (partial(refused_model, "deberta-v2"), _SUM),
    "ALBERT": (partial(refused_model, "albert"), _SUM),
    "MPNet": (partial(refused_model, "mpnet"), _SUM),
    "BART": (partial(refused_model, "bart"), _SUM),
    "OPT-350M": (partial(refused_model, "opt", do_layer_norm_before=False), _SUM),
    "BLOOM, `apply_residual_connection_post_layernorm`": (
        partial(refused_model, "bloom", apply_residual_connection_post_layernorm=True),
        "add to their normed input",
    ),
    "MiniMax": (partial(refused_model, "minimax"), "go on with their normed input"),
    "Gemma 3n": (
        partial(refused_model, "gemma3n_text", num_kv_shared_layers=0),
        "predict and correct four streams of their own (AltUp)",
    ),
    "Gemma 4": (
        partial(refused_model, "gemma4_text"),
        "multiply all that the blocks before them have added",
    ),
    "GPT-2 with cross-attention": (
        partial(refused_model, "gpt2", add_cross_attention=True),
        "only the decoder alone has an adapter",
    ),
    "PixArt and other `BasicTransformerBlock`s": (
        other_diffusion_model,
        "only DiT's (ada_norm_zero) have an adapter",
    ),
}
