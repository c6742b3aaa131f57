"""Losses of the pretrained model on the batches that runs train on, and on held-out text."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from commands import command
from provenance import write_json
from torch import Tensor


@dataclass(frozen=True)
class Untouched:
    """Losses of the model as it was pretrained, in nats per token.

    Attributes:
        training: Of the batch of each step, in the order of training.
        held_out: Of the held-out sequences.
    """

    training: list[float]
    held_out: float


def untouched(config: str, overrides: Sequence[str], folder: Path) -> Untouched:
    """Measure it, unless that was done before.

    Args:
        config: The experiment.
        overrides: Settings of a run, its seed among them.
        folder: Where the result is kept, by its settings.

    Raises:
        SystemExit: `fit` refuses the settings; with its exit code.
    """
    words = command("fit", "--config", config, *overrides, "--print-config")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    values: dict[str, Any] = yaml.safe_load(done.stdout)
    asked = {
        "pretrained": values["model"]["pretrained"],
        "data": {key: value for key, value in values["data"].items() if key != "_target_"},
        "steps": values["trainer"]["max_steps"],
    }
    file = folder / "untouched" / f"seed_{values['seed']}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] == asked:
            return Untouched(**kept["losses"])
    found = measure_untouched(**asked)
    write_json({"settings": asked, "losses": asdict(found)}, file)
    return found


@torch.no_grad()
def measure_untouched(pretrained: str, data: dict[str, Any], steps: int) -> Untouched:
    """The losses of a model on the first batches of its training data, and on held-out text.

    Args:
        pretrained: The model.
        data: Arguments of `TextDataModule`.
        steps: Batches.
    """
    import lightning.pytorch as pl

    from mhc_lightning import TextDataModule
    from mhc_lightning.held_out_steps import inputs_and_targets
    from mhc_lightning.modules import ResidualConnection
    from mhc_lightning.upcycling import PretrainedNetwork

    network = PretrainedNetwork(pretrained=pretrained, connection=ResidualConnection).eval()

    def mean_loss(batches: Sequence[Tensor]) -> float:
        pairs = [inputs_and_targets(batch) for batch in batches]
        total = sum(float(network.token_losses(*pair).double().sum()) for pair in pairs)
        return total / sum(int(network.count_targets(targets)) for _, targets in pairs)

    text = TextDataModule(**data)
    text.trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    text.prepare_data()
    text.setup("fit")
    training = [mean_loss([batch]) for batch in text.train_dataloader()]
    return Untouched(training[:steps], mean_loss(list(text.val_dataloader())))
