"""Reads the checkpoint that `inspect` shows, and computes its mappings, and gates on a text."""

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.errors import UserError
from mhc_lightning.files.run_layout import CHECKPOINTS, CONFIG

if TYPE_CHECKING:
    from mhc_lightning.inspection import NgramGate, SublayerMappings
    from mhc_lightning.modules import Transformer

LITERAL_KEYS = ("input", "output")  # literal keys; everything else is the experiment's
_LONGEST = 4096  # tokens, for a model whose record does not say what it was trained on


@dataclass(frozen=True)
class InspectedCheckpoint:
    """A checkpoint with the mappings of its sub-layers.

    Attributes:
        path: Its path.
        layers: The mappings of each sub-layer.
        step: Optimizer steps that it was trained for; None if unknown.
        tokens: Number of tokens that the model ran on; None for static matrices.
        gates: The n-grams of the text and their texts, by block with a gated memory.
    """

    path: Path
    layers: "list[SublayerMappings]"
    step: int | None = None
    tokens: int | None = None
    gates: "dict[int, list[tuple[NgramGate, str]]]" = field(default_factory=dict)


def read_checkpoint(path: Path, text: str | None, arguments: Arguments) -> InspectedCheckpoint:
    """The checkpoint at `path`, with its mappings: on `text`, or of the biases alone.

    Raises:
        UserError: it is no checkpoint, or the text or a setting does not fit it.
    """
    from mhc_lightning.interchange.exported_model import has_own_record

    if path.is_dir() and (path / CONFIG).is_file():
        return _look_at_run(path / CONFIG, "last", path, text, arguments)
    if path.is_dir() and has_own_record(path):
        return _look_at_exported(path, text, arguments)
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors")):
        return _look_at_deepseek_v4(path, text, arguments)
    run = path.absolute().parent.parent
    config: str | Path | None = arguments.config
    if config is None and path.absolute().parent.name == CHECKPOINTS:
        config = run / CONFIG if (run / CONFIG).is_file() else None
    if config is None:
        raise UserError(
            f"{path} lies in no run's {CHECKPOINTS}/ beside a {CONFIG}, and is no exported model;"
            " if it is a checkpoint, name its experiment with --config"
        )
    return _look_at_run(config, str(path.absolute()), run, text, arguments)


def _look_at_run(
    config: str | Path, asked: str, run: Path, text: str | None, arguments: Arguments
) -> InspectedCheckpoint:
    """A checkpoint of a run, by the run's own configuration.

    The run may be somebody else's: no classes but networks and connections are made from it.
    """
    import torch

    from mhc_lightning.cli.checkpoints import load_fitting, require_checkpoint, trained_steps
    from mhc_lightning.cli.composition import compose_experiment
    from mhc_lightning.cli.tokenizer import tokenizer_of
    from mhc_lightning.inspection import static_mappings_of
    from mhc_lightning.interchange.exported_model import materialize
    from mhc_lightning.interchange.model_settings import build_outline, section_records

    literal = {key: typed for key, typed in arguments.literal.items() if key not in LITERAL_KEYS}
    literal |= {"ckpt_path": [asked], "output_dir": [str(run)]}
    experiment = compose_experiment(replace(arguments, config=str(config), literal=literal))
    path = require_checkpoint(experiment)
    values = experiment.values()
    settings = values["model"]
    network: Any = build_outline(section_records(settings), str(config))
    module = torch.nn.ModuleDict({"model": network})  # the names that checkpoints have
    checkpoint = load_fitting(path, module, experiment, may_run_code=False)
    step, saved = trained_steps(checkpoint), checkpoint["state_dict"]
    if text is None:
        layers = [*static_mappings_of(module, saved)]
        return InspectedCheckpoint(path, [_without_prefix(layer) for layer in layers], step)
    tokenizer = tokenizer_of(experiment, checkpoint, path, network)
    tokens = _tokens(tokenizer, text, int(values["data"]["sequence_length"]))
    materialize(network, {name: saved[f"model.{name}"] for name in network.state_dict()})
    return _on_text(path, network, tokenizer, tokens, step)


def _look_at_exported(path: Path, text: str | None, arguments: Arguments) -> InspectedCheckpoint:
    """A folder that `export` wrote."""
    import torch

    from mhc_lightning.inspection import static_mappings_of
    from mhc_lightning.interchange.exported_model import load_exported, open_exported

    _typed_settings(arguments, ())
    exported = open_exported(path)
    if text is None:
        with torch.device("meta"):
            network = exported.build()
        layers = [*static_mappings_of(network, exported.stored())]
        return InspectedCheckpoint(path, layers, exported.step)
    tokenizer = exported.tokenizer()
    tokens = _tokens(tokenizer, text, _LONGEST)
    return _on_text(path, load_exported(path), tokenizer, tokens, exported.step)


def _on_text(
    path: Path, network: "Transformer", tokenizer: Any, tokens: list[int], step: int | None
) -> InspectedCheckpoint:
    """The mappings of a network on a text, and what opens its gates."""
    import torch

    from mhc_lightning.inspection import mappings_on, ngram_gates, seen_gates

    with seen_gates(network) as seen:
        layers = mappings_on(network, torch.tensor([tokens]))
    gates = {
        block: [(n, tokenizer.decode(n.tokens)) for n in ngram_gates(network, tokens, values)]
        for block, values in seen.items()
    }
    return InspectedCheckpoint(path, layers, step, len(tokens), gates)


def _look_at_deepseek_v4(path: Path, text: str | None, arguments: Arguments) -> InspectedCheckpoint:
    """Safetensors with connections in DeepSeek-V4's layout; of each only the base is read."""
    from mhc_lightning.inspection import SublayerMappings
    from mhc_lightning.interchange.deepseek_v4 import connections_in, static_mappings
    from mhc_lightning.interchange.safetensors_files import StoredTensors

    tensors = StoredTensors(path)
    connections = connections_in(tensors)
    if not connections:
        raise UserError(
            f"{path} holds no connections in DeepSeek-V4's layout (layers.0.hc_attn_base, …); a"
            " model that `export` wrote is named by its folder"
        )
    if text is not None:
        raise UserError(
            f"{path} has connections, but no network that this package could run on input=;"
            " leave it out to see the static matrices"
        )
    settings = _deepseek_v4_settings(path, arguments)
    layers = []
    for name, parts in connections.items():
        if "base" not in parts:
            raise UserError(f"{path} is incomplete: {name}_base is missing")
        layers.append(SublayerMappings(name, static_mappings(tensors[parts["base"]], settings)))
    return InspectedCheckpoint(path, layers)


def _deepseek_v4_settings(path: Path, arguments: Arguments) -> Any:
    """The settings of the model's config.json, if there is one, and of the command line."""
    from mhc_lightning.interchange.deepseek_v4 import DeepseekV4Settings

    names = {"sinkhorn_iterations": "hc_sinkhorn_iters", "eps": "hc_eps"}
    values: dict[str, Any] = {}
    file = (path if path.is_dir() else path.parent) / "config.json"
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        values = {key: record[key] for key in names.values() if key in record}
    for key, typed in _typed_settings(arguments, tuple(names)).items():
        try:
            values[names[key]] = int(typed) if key == "sinkhorn_iterations" else float(typed)
        except ValueError as error:
            raise UserError(f"{key}={typed} is no number") from error
    settings = DeepseekV4Settings(**values)
    if settings.hc_sinkhorn_iters < 1 or not settings.hc_eps >= 0:
        raise UserError("sinkhorn_iterations must be at least 1, and eps at least 0")
    return settings


def _typed_settings(arguments: Arguments, known: tuple[str, ...]) -> dict[str, str]:
    """The settings typed for a model that has its own configuration; all must be known."""
    if arguments.config is not None:
        raise UserError("--config belongs to a checkpoint of a run; leave it out")
    typed = dict(word.partition("=")[::2] for word in arguments.overrides)
    literal = {key: v[-1] for key, v in arguments.literal.items() if key not in LITERAL_KEYS}
    typed |= literal
    for key in typed:
        if key not in known:
            takes = ", ".join([*LITERAL_KEYS, *known])
            raise UserError(f"unknown key {key!r}; inspect takes, of this model: {takes}")
    return typed


def _tokens(tokenizer: Any, text: str, most: int) -> list[int]:
    tokens = [int(token) for token in tokenizer.encode(text)]
    if not tokens:
        raise UserError("input= has no tokens; give a longer text")
    if len(tokens) > most:
        raise UserError(
            f"input= has {len(tokens)} tokens, and the model is used on {most} at most;"
            " give a shorter text"
        )
    return tokens


def _without_prefix(layer: "SublayerMappings") -> "SublayerMappings":
    return layer._replace(name=layer.name.removeprefix("model."))
