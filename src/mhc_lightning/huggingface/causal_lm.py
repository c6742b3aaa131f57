"""`MhcForCausalLM`: a network of this package with the interface of transformers' models.

Shapes: B batch, S sequence, K positions whose logits are kept, V vocabulary.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mhc_lightning.errors import UserError
from mhc_lightning.huggingface.cache import MhcCache
from mhc_lightning.huggingface.checkpointing import checkpoint_blocks
from mhc_lightning.huggingface.config import MhcConfig
from mhc_lightning.huggingface.model_card import write_card
from mhc_lightning.huggingface.padding import Padding
from mhc_lightning.interchange.model_settings import build_network
from mhc_lightning.kernels import IGNORE_INDEX
from mhc_lightning.modules import Connection, Transformer
from mhc_lightning.modules.mixture_of_experts import LoadBalance
from mhc_lightning.modules.precision import KeepsFloat32
from mhc_lightning.upcycling.cache_name import cache_name


class MhcForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer` for `generate`, `pipeline`, `Trainer` and everything else that takes models.

    Parameters of connections and tables of a memory stay float32 in a model of lower precision.

    Args:
        config: The configuration.
        network: The network that it describes; by default a new one, with initial weights.

    Attributes:
        model: The network.

    Raises:
        UserError: The configuration describes no network, or asks for tied weights.
    """

    config_class = MhcConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (not for instances, says transformers)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    model: Transformer

    def __new__(cls, config: MhcConfig | None = None, *args: Any, **kwargs: Any) -> Self:
        """An `UpcycledForCausalLM` if the configuration describes one."""
        if cls is MhcForCausalLM and config is not None and config.upcycled is not None:
            from mhc_lightning.huggingface.upcycled import UpcycledForCausalLM

            return cast(Self, super().__new__(UpcycledForCausalLM))
        return super().__new__(cls)

    def __init__(self, config: MhcConfig, network: nn.Module | None = None) -> None:
        attention = config._attn_implementation  # what the user asks for, if anything
        super().__init__(config)
        if config.tie_word_embeddings:
            raise UserError(
                "MhcForCausalLM has an output projection of its own; leave out"
                " tie_word_embeddings=True"
            )
        self.model = cast(Any, self._build(config, attention) if network is None else network)
        self.vocab_size = config.vocab_size
        if isinstance(self.model, Transformer):
            self.model.mask_documents(config.document_end)
            self.vocab_size = self.model.vocab_size
        self._keep_in_fp32_modules_strict = {
            f"{name}." for name, module in self.named_modules() if isinstance(module, KeepsFloat32)
        }
        self.post_init()

    def _build(self, config: MhcConfig, attention: str | None) -> nn.Module:
        """The network that a configuration describes, with initial weights."""
        return build_network(config.sections, "MhcConfig")

    @classmethod
    def from_upcycled(cls, model: nn.Module) -> "MhcForCausalLM":
        """An upcycled causal language model, as one that can be saved and read.

        Args:
            model: What `mhc_lightning.upcycling.upcycle` returned for a model of transformers, or
                for an `MhcForCausalLM`. Its weights are not copied.

        Raises:
            UserError: The model is not upcycled, or its connections cannot be described.
        """
        from mhc_lightning.huggingface.upcycled import from_upcycled

        return from_upcycled(model)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            UserError: The folder lacks weights of the network or has others, or the devices lack
                room for them.
        """
        _refuse_offloading(kwargs.get("device_map"))
        both: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, found = both
        _refuse_offloading(getattr(model, "hf_device_map", None))
        for kind, names in (("lack", found["missing_keys"]), ("have", found["unexpected_keys"])):
            first = min(names, default=None)
            if first is not None:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(
                    f"the weights to load {kind} {first}{more}: they are not those of the network"
                    " that their config.json describes"
                )
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`; a README says what to import.

        Raises:
            UserError: The network is not the one that the configuration describes.
        """
        self._check_described()
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(Path(save_directory))

    def _check_described(self) -> None:
        """Refuse a network whose connections are others than those of the configuration."""
        with torch.device("meta"):
            described = build_network(self.config.sections, "MhcConfig")
        kinds = [
            [type(m) for m in network.modules() if isinstance(m, Connection)]
            for network in (described, self.model)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the network has {kinds[1][0].__name__}s, and config.network describes"
                f" {kinds[0][0].__name__}s; if it was upcycled, save"
                " MhcForCausalLM.from_upcycled(model)"
            )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing but loads, which no file holds: a network draws its weights when it is built."""
        if isinstance(module, LoadBalance):
            module.load.zero_()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.model.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.model.output = cast(nn.Linear, value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`.

        Raises:
            UserError: The network has a memory, whose hashes depend on the vocabulary.
        """
        if self.model.memory.hash is not None:
            raise UserError(
                "the rows of a memory of n-grams depend on the vocabulary, so it cannot be resized;"
                " train the model with the vocabulary it is to have"
            )
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.vocab_size = self.vocab_size
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss if there are labels.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], or with the columns of earlier calls before them; 0 at padding,
                which may be anywhere.
            past_key_values: The `MhcCache` of earlier calls.
            labels: int64 [B, S], like `input_ids`; -100 where nothing is to be learnt. The token
                behind padding at the left does not count, which padding would have to predict.
            use_cache: True to begin a cache, and return it.
            logits_to_keep: Number of last positions, or positions [K]; 0 for all.
            cache: Transformers' name for `past_key_values` since 5.24.
            kwargs: `num_items_in_batch` for the loss; everything else must be absent, None or
                False.

        Returns:
            Logits [B, K, V] (without meaning at padding), the loss, and the cache.

        Raises:
            UserError: An argument has another shape, or is one that this model does not take.
        """
        loss_settings = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        for name, value in kwargs.items():
            if value is not None and value is not False:
                raise UserError(
                    f"MhcForCausalLM does not take {name}; it takes input_ids, attention_mask,"
                    f" labels, {cache_name()}, use_cache and logits_to_keep"
                )
        padding = Padding(attention_mask, input_ids.shape)
        tokens = padding.to_end(input_ids)
        past = self._cache(past_key_values if cache is None else cache, use_cache)
        streams, carry = self.model.run(tokens) if past is None else past.run(tokens, padding)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = self.model.read_out(
            padding.take(streams, kept), None if carry is None else padding.take(carry, kept)
        )
        logits = self.model.output(hidden)
        loss = None
        if labels is not None:
            labels = padding.predictable(labels, IGNORE_INDEX)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_settings
            )
            if self.model.head_memory is not None and self.training:
                loss = loss + self._memory_loss(hidden, labels, loss_settings["num_items_in_batch"])
        caches: dict[str, Any] = {cache_name(): past}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **caches)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> MhcCache | None:
        if given is None:
            return MhcCache(self.model) if use_cache else None
        if not isinstance(given, MhcCache):
            raise UserError(
                f"MhcForCausalLM keeps its tokens in an MhcCache, not in a {type(given).__name__};"
                f" leave out {cache_name()} in the first call"
            )
        return given

    def _memory_loss(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """What a memory adds to the loss, weighted as the loss is."""
        assert self.model.head_memory is not None
        targets = labels[:, 1:].contiguous()
        added: Tensor = self.model.head_memory(
            self.model.output, hidden[:, :-1], targets, IGNORE_INDEX
        )
        return added if num_items is None else added * (targets != IGNORE_INDEX).sum() / num_items

    def _prepare_cache_for_generation(  # type: ignore[override]  # is annotated to return a bool
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UserError(
                f"MhcForCausalLM has no {generation_config.cache_implementation} cache; leave out"
                " cache_implementation"
            )
        if generation_config.use_cache and model_kwargs.get(cache_name()) is None:
            model_kwargs[cache_name()] = MhcCache(self.model)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        checkpoint_blocks(self.model.blocks, enable, gradient_checkpointing_func, every_n_layers)


def _refuse_offloading(device_map: Any) -> None:
    """Refuse weights that accelerate brings to their device module by module.

    It does so when a module is called, and a block reads its connections without calling them.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise UserError(
            "MhcForCausalLM computes where its weights are, and device_map leaves some of them on"
            " the disk or in the machine's memory; give more devices, or a lower dtype"
        )
