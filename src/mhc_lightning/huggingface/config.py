"""`MhcConfig`: what transformers needs to know to build a model of this package."""

from collections.abc import Mapping
from typing import Any, Self

from transformers import AutoConfig, PretrainedConfig

from mhc_lightning.errors import UserError
from mhc_lightning.interchange.exported_model import HUGGINGFACE_MODEL_TYPE


class MhcConfig(PretrainedConfig):
    """The configuration of an `MhcForCausalLM`, plain data throughout.

    Args:
        network: The settings of a `Transformer` by section: `model` and `connection`, and `memory`
            if it has one. Each is a class (dotted name, under `class`) and its arguments.
        tokenizer: The record of the tokenizer that the model was trained with, if it is known.
        step: Optimizer steps of the training.
        document_end: The token that ends a document, if documents of a text are kept apart as
            `Transformer.mask_documents` does; None to look at a text as a whole.
        upcycled: In place of `network`, the description of a model of transformers that was made n
            streams wide: `base` (its own configuration), `connection` (a class and its arguments)
            and `num_streams`. `MhcForCausalLM.from_upcycled` makes it.
        kwargs: What every configuration of transformers takes.
    """

    model_type = HUGGINGFACE_MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    network: dict[str, Any] | None = None
    upcycled: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    step: int = 0
    document_end: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """See `PretrainedConfig.from_dict`.

        Raises:
            UserError: It describes a model of another type.
        """
        found = config_dict.get("model_type")
        if found != cls.model_type:
            described = "of no model of transformers" if found is None else f"of a {found} model"
            raise UserError(
                f"the config.json is {described}, not of an `{cls.model_type}` model; write a"
                " folder with `export … form=huggingface` or `MhcForCausalLM.save_pretrained`"
            )
        return super().from_dict(dict(config_dict), **kwargs)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings of the network by section.

        Raises:
            UserError: The configuration describes no network.
        """
        if not self.network or not {"model", "connection"} <= self.network.keys():
            raise UserError(
                "MhcConfig describes no network; give network={'model': {…}, 'connection': {…}}, or"
                " read a folder that `export … form=huggingface` wrote"
            )
        return self.network

    def base_config(self) -> PretrainedConfig:
        """The configuration of the model that was upcycled.

        Raises:
            UserError: There is none, or transformers does not know its type.
        """
        base = dict((self.upcycled or {}).get("base") or {})
        model_type = base.pop("model_type", None)
        try:
            found: PretrainedConfig = AutoConfig.for_model(model_type, **base)
        except ValueError as error:
            raise UserError(
                f"config.json describes an upcycled model of the type {model_type}, which this"
                " transformers does not know; install the version that wrote it, or a newer one"
            ) from error
        return found

    # What transformers and tools around it ask configurations for, under their usual names.

    @property
    def vocab_size(self) -> int | None:
        """V; None if the configuration describes no network."""
        return self._model_setting("vocab_size", "vocab_size")

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        if self.upcycled is not None:
            self.upcycled["base"]["vocab_size"] = value
        else:
            self.sections["model"]["vocab_size"] = value

    @property
    def hidden_size(self) -> int | None:
        """C."""
        return self._model_setting("dim", "hidden_size")

    @property
    def num_hidden_layers(self) -> int | None:
        """Blocks."""
        return self._model_setting("num_layers", "num_hidden_layers")

    @property
    def num_attention_heads(self) -> int | None:
        """Attention heads."""
        return self._model_setting("num_heads", "num_attention_heads")

    @property
    def max_position_embeddings(self) -> int:
        """The longest text of an upcycled model; a `Transformer` has no such limit."""
        if self.upcycled is None:
            raise AttributeError("a Transformer's positions have no limit")
        return int(self.base_config().max_position_embeddings)

    def _model_setting(self, ours: str, theirs: str) -> int | None:
        value: int | None
        if self.upcycled is not None:
            value = getattr(self.base_config(), theirs, None)
        else:
            value = (self.network or {}).get("model", {}).get(ours)
        return value
