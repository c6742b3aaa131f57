"""Members of the model family, ready to take training steps outside of Lightning."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import Experiment, compose_experiment
from mhc_lightning.cli.instantiation import build
from mhc_lightning.modules import Transformer
from mhc_lightning.optimizers.recipes import OptimizerRecipe


def experiment_of(name: str, *overrides: str) -> Experiment:
    """A shipped experiment, such as ``mhc_3b``."""
    return compose_experiment(parse_arguments(["fit", "--config", name, *overrides]))


class Member:
    """An experiment's network and optimizer on a device.

    Args:
        experiment: The experiment.
        device: Where.
        drawn: Whether the initial values are the experiment's own, drawn on the CPU one by one;
            otherwise the device draws them, which takes seconds instead of minutes.
    """

    def __init__(self, experiment: Experiment, device: str, drawn: bool = True) -> None:
        values = experiment.values()
        self.length: int = values["data"]["sequence_length"]
        self.precision: str = str(values["trainer"]["precision"])
        self.recipe: OptimizerRecipe = build(experiment, "optimizer")
        with torch.device("cpu" if drawn else "meta"):
            model: Transformer = build(experiment, "model")
        self.model = model.to(device) if drawn else _drawn_on(device, model)
        if self.precision.endswith("-true") and "16" in self.precision:
            self.model.to(torch.bfloat16)
        if values["compile"]:
            self.model.compile_sublayers()
        self.optimizer = self.recipe.build_optimizer(self.model)
        self.device = device

    def batch(self, sequences: int) -> Tensor:
        """Random tokens [sequences, S + 1]."""
        shape = (sequences, self.length + 1)
        return torch.randint(0, self.model.vocab_size, shape, device=self.device)

    def step(self, *micro_batches: Tensor) -> None:
        """One optimizer step, in the order in which a trainer does it."""
        for number, batch in enumerate(micro_batches):
            mixed = self.precision == "bf16-mixed"
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=mixed):
                loss = self.model.loss(batch[:, :-1], batch[:, 1:])
            if number == 0:
                self.optimizer.zero_grad()
            loss.backward()
            del loss
        self.optimizer.step()


def _drawn_on(device: str, model: Transformer) -> Transformer:
    model.to_empty(device=device)
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None and module is not model:
            reset()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=model.init_std)
    return model
