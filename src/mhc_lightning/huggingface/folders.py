"""Folders that transformers reads, written from the weights of a network."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.data.model_tokenizer import tokenizer_of_model
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.huggingface.causal_lm import MhcForCausalLM
from mhc_lightning.huggingface.config import MhcConfig
from mhc_lightning.huggingface.model_card import write_card
from mhc_lightning.huggingface.tokenizer_folder import copy_tokenizer, write_tokenizer
from mhc_lightning.interchange.exported_model import HUGGINGFACE_PREFIX
from mhc_lightning.interchange.exporting import SHARD_BYTES, check_export, new_folder
from mhc_lightning.interchange.model_settings import section_records
from mhc_lightning.interchange.safetensors_files import write_tensors
from mhc_lightning.modules import Transformer


def export_upcycled(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    pretrained: str,
    tokenizer: Tokenizer,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write an upcycled model of transformers as `AutoModelForCausalLM.from_pretrained` reads it.

    The tokenizer is that of the data, with the chat template and all else that `prepare` has kept
    of it; where it has kept nothing, that of the pretrained model, if there is one. The token that
    ends the documents of the data also ends generated texts.

    Args:
        model: What `upcycle` returned.
        folder: The new folder.
        pretrained: The folder, name on the hub, or GGUF file that the model was read from.
        tokenizer: The tokenizer that the model was trained with.
        shard_bytes: Largest number of bytes of tensors in one file.
        overwrite: Replace an exported model that the folder already holds.

    Raises:
        UserError: The model cannot be described, or the folder is taken or cannot be written.
    """
    described = MhcForCausalLM.from_upcycled(model)
    described.generation_config = _ending_with(described.generation_config, tokenizer)
    with new_folder(Path(folder), overwrite) as aside:
        described.save_pretrained(aside, max_shard_size=shard_bytes)
        if not copy_tokenizer(tokenizer, aside):
            own = tokenizer_of_model(pretrained)
            if own is None or not copy_tokenizer(own, aside):
                write_tokenizer(tokenizer, aside)
        write_card(aside)


def _ending_with(settings: GenerationConfig | None, tokenizer: Tokenizer) -> GenerationConfig:
    """The settings of generation, with the token that ends documents among those that end texts."""
    settings = GenerationConfig() if settings is None else copy.deepcopy(settings)
    ends: Any = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [end for end in [ends] if end is not None]
    if tokenizer.end_of_document not in ends:
        settings.eos_token_id = [*ends, tokenizer.end_of_document]
    return settings


def export_for_huggingface(
    model: Transformer | Mapping[str, Tensor],
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    step: int = 0,
    document_mask: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model as `AutoModelForCausalLM.from_pretrained` reads it, with its tokenizer.

    Arguments and refusals are those of `export_model`. The files are written beside `folder`, which
    appears only when it is complete. Tensors are read one file at a time.

    Raises:
        UserError: As `export_model`; or the tokenizer has no form that transformers reads.
    """
    tensors = check_export(model, settings, tokenizer)
    end = tokenizer.end_of_document
    begin = (tokenizer.beginning or [end])[0]
    special: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    config = MhcConfig(
        network=section_records(settings),
        tokenizer=tokenizer.record(),
        step=step,
        document_end=end if document_mask else None,
        architectures=["MhcForCausalLM"],
        dtype=describe(tensors)["embedding.weight"].dtype,
        **special,
    )
    with new_folder(Path(folder), overwrite) as aside:
        write_tensors(tensors, aside, shard_bytes, HUGGINGFACE_PREFIX)
        config.save_pretrained(aside)
        GenerationConfig(**special).save_pretrained(aside)
        write_tokenizer(tokenizer, aside)
        write_card(aside)
