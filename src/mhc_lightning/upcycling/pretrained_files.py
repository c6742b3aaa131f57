"""Reading a pretrained model of transformers: a folder, a name on the hub, or a GGUF file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhc_lightning.errors import UserError, one_line_message
from mhc_lightning.files.hub import hub_folder, is_hub_name

_HUB_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors")
_OTHER_WEIGHTS = ("pytorch_model*.bin",)  # in their place, in early uploads
# Where a model comes from, and code of its own: nothing that a checkpoint may say.
_NOT_ARCHITECTURE = ("_name_or_path", "auto_map", "transformers_version")


def _library() -> tuple[Any, Any, Any]:
    """Torch, and the Auto classes of models and configurations.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            'pretrained needs the extra huggingface: pip install "mhc-lightning[huggingface]"'
        ) from error
    return torch, AutoModelForCausalLM, AutoConfig


def load_pretrained(source: str, attention: str | None = None) -> Any:
    """A causal language model with its weights, in float32 and evaluation mode.

    Args:
        source: A folder, a name on the hub, or a GGUF file.
        attention: The implementation of attention; None for the library's choice.

    Raises:
        UserError: It cannot be read, or a library for it is not installed.
    """
    torch, auto, _ = _library()
    from safetensors import SafetensorError

    settings: dict[str, Any] = {"dtype": torch.float32}
    if attention is not None:
        settings["attn_implementation"] = attention
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"pretrained={source} is not there; give a GGUF file that is")
        settings["gguf_file"], source = path.name, str(path.parent)
    elif is_hub_name(source):
        folder = hub_folder(source, _HUB_PATTERNS, "pretrained")
        if not any(folder.glob("*.safetensors")):
            folder = hub_folder(source, (*_HUB_PATTERNS, *_OTHER_WEIGHTS), "pretrained")
        source = str(folder)
    _refuse_own(Path(source))
    try:
        with _without_bars():
            model, loaded = auto.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
    except ImportError as error:
        raise UserError(
            f"pretrained={path} needs a library that is not installed"
            f" ({one_line_message(error)}); the extra huggingface has it:"
            ' pip install "mhc-lightning[huggingface]"'
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"pretrained={path} cannot be read as a causal language model of transformers"
            f" ({one_line_message(error)}); give a folder that save_pretrained wrote, a GGUF file,"
            " or a name on the hub that this machine can reach"
        ) from error
    _require_weights(path, loaded)
    return model


def _require_weights(path: Path, loaded: dict[str, Any]) -> None:
    """Refuse weights that do not fit, or are not there; the library would draw new ones."""
    for name, saved, expected in sorted(loaded["mismatched_keys"]):
        raise UserError(
            f"pretrained={path} has weights {name} of shape {list(saved)}, and its configuration"
            f" asks for {list(expected)}; give a model whose files belong together"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"pretrained={path} lacks {len(missing)} weights of a causal language model, such as"
            f" {missing[0]}; give a folder with all of them"
        )


def _refuse_own(folder: Path) -> None:
    """Refuse a folder that this package has written, of which transformers might know nothing."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of which the library says more
        return
    if isinstance(record, dict) and (
        record.get("model_type") == "mhc" or record.get("format") == "mhc-lightning"
    ):
        raise UserError(
            f"pretrained={folder} is no pretrained model of another program: this package has"
            " written it; go on with the checkpoint of its run (ckpt_path=…)"
        )


def architecture_of(model: Any) -> dict[str, Any]:
    """The configuration of a model, of which `build_described` builds one like it."""
    settings = model.config.to_dict()
    return {name: value for name, value in settings.items() if name not in _NOT_ARCHITECTURE}


def build_described(architecture: Mapping[str, Any], attention: str | None = None) -> Any:
    """A causal language model of transformers with initial weights, in float32.

    Args:
        architecture: As `architecture_of` gives it.
        attention: As for `load_pretrained`.

    Raises:
        UserError: The installed transformers knows no such model, or is not installed.
    """
    torch, auto, config = _library()
    more = {} if attention is None else {"attn_implementation": attention}
    try:
        described = config.for_model(**architecture)
        return auto.from_config(described, dtype=torch.float32, **more)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the installed transformers does not build the model of the checkpoint"
            f" ({one_line_message(error)}); use the version that it was trained with"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library from drawing a bar for each file that it reads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
