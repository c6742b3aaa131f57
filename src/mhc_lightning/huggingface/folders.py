"""Folders that transformers reads, written from the weights of a network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.huggingface.config import MhcConfig
from mhc_lightning.huggingface.model_card import write_card
from mhc_lightning.huggingface.tokenizer_folder import write_tokenizer
from mhc_lightning.interchange.exported_model import HUGGINGFACE_PREFIX
from mhc_lightning.interchange.exporting import SHARD_BYTES, check_export, new_folder
from mhc_lightning.interchange.model_settings import section_records
from mhc_lightning.interchange.safetensors_files import write_tensors
from mhc_lightning.modules import Transformer


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
    special: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
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
