"""`UpcycledForCausalLM`: a model of transformers that was made n streams wide, saved and read."""

import copy
import inspect
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from mhc_lightning.errors import UserError
from mhc_lightning.huggingface.causal_lm import MhcForCausalLM
from mhc_lightning.huggingface.config import MhcConfig
from mhc_lightning.interchange.model_settings import connection_builder
from mhc_lightning.modules import Connection
from mhc_lightning.upcycling import WideBlock, upcycle
from mhc_lightning.upcycling.cache_name import cache_name

_PLAIN = (bool, int, float, str, type(None))


class UpcycledForCausalLM(MhcForCausalLM):
    """A causal language model of transformers, upcycled, with a configuration that says so.

    `MhcForCausalLM` and the Auto classes build one from a configuration with `upcycled`. Everything
    goes to the model inside: its forward pass, its caches, its attention.

    Args:
        config: The configuration.
        network: The upcycled model that it describes; by default a new one, with initial weights.

    Attributes:
        model: The upcycled model of transformers.

    Raises:
        UserError: The configuration names no model or connection of this version.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    model: Any

    def _build(self, config: MhcConfig, attention: str | None) -> nn.Module:
        base, described = config.base_config(), config.upcycled
        assert described is not None
        more = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(base, **more)
        connection = connection_builder(described["connection"], "config.json")
        wide: nn.Module = upcycle(model, connection, described["num_streams"])
        return wide

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return cast(nn.Module, self.model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`."""
        embedding = self.model.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.vocab_size = self.model.config.vocab_size
        return cast(nn.Embedding, embedding)

    @can_return_tuple
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The forward pass of the model inside, with its arguments and results."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{cache_name(): past_key_values if cache is None else cache},
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model inside."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]  # is annotated to return a bool
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        self.model._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        PreTrainedModel._set_gradient_checkpointing(self, *args, **kwargs)

    def _check_described(self) -> None:
        """The configuration was made from the model."""


# Pipelines complain of models of which no class is registered under their class's name.
UpcycledForCausalLM.__name__ = MhcForCausalLM.__name__


def from_upcycled(model: nn.Module) -> MhcForCausalLM:
    """See `MhcForCausalLM.from_upcycled`."""
    if isinstance(model, MhcForCausalLM) and model.config.upcycled is None:
        return _with_its_connections(model)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, WideBlock)]
    if not (blocks and isinstance(model, PreTrainedModel) and model.can_generate()):
        raise UserError(
            f"this {type(model).__name__} is no upcycled causal language model of transformers;"
            " upcycle one first (mhc_lightning.upcycling.upcycle)"
        )
    connection = blocks[0].connections[0]
    base: Any = model.config
    special: dict[str, Any] = {
        name: getattr(base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = MhcConfig(
        upcycled={
            "base": {**base.to_dict(), "architectures": [type(model).__name__]},
            "connection": _described(connection),
            "num_streams": connection.num_streams,
        },
        dtype=model.dtype,
        **special,
    )
    wide = UpcycledForCausalLM(config, model)
    if model.generation_config is not None:
        wide.generation_config = model.generation_config
    return wide.train(model.training)


def _with_its_connections(model: MhcForCausalLM) -> MhcForCausalLM:
    """A network of this package, with a configuration of the connections that it has now."""
    connection = next(m for m in model.modules() if isinstance(m, Connection))
    config: Any = copy.deepcopy(model.config)
    config.sections["connection"] = _described(connection)
    config.sections["model"]["num_streams"] = connection.num_streams
    return MhcForCausalLM(config, model.model).train(model.training)


def _described(connection: Connection) -> dict[str, Any]:
    """The class of a connection, and the arguments beyond its sizes, which it keeps by name."""
    cls = type(connection)
    names = [*inspect.signature(cls.__init__).parameters][4:]  # after self and the sizes
    values = {name: getattr(connection, name, ...) for name in names}
    strange = next((name for name, value in values.items() if not isinstance(value, _PLAIN)), None)
    if strange is not None:
        raise UserError(
            f"{cls.__name__} does not keep its argument {strange} as an attribute, a number or a"
            " text, so a configuration cannot describe it; have its __init__ set"
            f" self.{strange}"
        )
    return {"class": f"{cls.__module__}.{cls.__qualname__}", **values}
