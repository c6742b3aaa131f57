"""`generate`: continue a prompt, printing each token as it is drawn."""

import contextlib
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.fewer_collections import fewer_collections
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from mhc_lightning.data.tokenizers import Tokenizer
    from mhc_lightning.language_model import LanguageModel


def generate(experiment: Experiment, arguments: Arguments) -> None:
    """Write the prompt's continuation to standard output, and nothing else.

    Raises:
        UserError: the settings or the checkpoint cannot be used, or the prompt is missing.
    """
    prompt = experiment.values()["prompt"]
    if not prompt:
        raise UserError('generate needs a prompt: prompt="Once upon a time"')
    if experiment.values()["ckpt_path"] is None:
        raise UserError("generate needs ckpt_path=last, ckpt_path=best or a checkpoint")
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        _write_continuation(experiment, str(prompt), output)


def _write_continuation(experiment: Experiment, prompt: str, output: Any) -> None:
    import torch

    from mhc_lightning.cli.value_types import check_arguments
    from mhc_lightning.generation import generate as draw

    values = experiment.values()
    settings = values["generate"]
    echo = settings.pop("echo")
    module, tokenizer = _loaded(experiment)
    accelerator = values["trainer"]["accelerator"]
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    model = module.model.to("cuda" if on_gpu else "cpu").eval()
    tokens = [*tokenizer.beginning, *(int(token) for token in tokenizer.encode(prompt))]
    check_arguments("generate", draw, settings)
    drawn = draw(
        model, tokens, seed=values["seed"], end_token=tokenizer.end_of_document, **settings
    )
    first = next(drawn, None)  # mistakes in the settings are raised before anything is printed
    stream = tokenizer.stream(tokens)
    if echo:
        _write(output, prompt)
    for token in drawn if first is None else chain([first], drawn):
        _write(output, stream.push(token))
    _write(output, stream.flush() + "\n")


@fewer_collections()
def _loaded(experiment: Experiment) -> "tuple[LanguageModel, Tokenizer]":
    """The model with the checkpoint's weights, and its tokenizer."""
    from mhc_lightning.cli.checkpoints import load_fitting, require_checkpoint
    from mhc_lightning.cli.components import build_model
    from mhc_lightning.cli.tokenizer import tokenizer_of

    path = require_checkpoint(experiment)
    module = build_model(experiment)
    checkpoint = load_fitting(path, module, experiment)
    tokenizer = tokenizer_of(experiment, checkpoint, path, module.model)
    module.start_from(checkpoint["state_dict"])
    return module, tokenizer


def _write(output: Any, text: str) -> None:
    """Write text as UTF-8, whatever the terminal's encoding, at once."""
    data = text.encode("utf-8", errors="surrogateescape")
    getattr(output, "buffer", output).write(data)
    output.flush()
