"""Optimizer recipes: the optimizer, its parameter groups and its scheduler for a module."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mhc_lightning._moved import renamed
from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.modules.memory import Memory, NgramTable
from mhc_lightning.optimizers.adamw import RowAdamW
from mhc_lightning.optimizers.connection_rate import scale_connections
from mhc_lightning.optimizers.muon import MuonAdamW
from mhc_lightning.optimizers.parameter_names import keep_names
from mhc_lightning.optimizers.row_updates import ROWS, RowUpdate
from mhc_lightning.optimizers.schedule import Schedule, ScheduleName


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe(ABC):
    """Settings that all recipes share; a recipe builds an optimizer for a module.

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the gradient's first and second moments.
        eps: Added to the root of the second moment.
        weight_decay: For matrices; vectors (norm weights, connection biases and gates) have none.
        warmup_steps: Steps over which the learning rate rises linearly from 0 to `lr`.
        schedule: The learning rate after the warm-up: see `Schedule`.
        final_fraction: The end of the schedule `cosine`, as a fraction of `lr`.
        connection_lr_scale: Factor on the learning rate of the connections' parameters.
        memory_lr_scale: Factor on the learning rate of the tables of a memory (arXiv 2601.07372).
            They have no weight decay; a memory's other parameters are trained as all others.
        memory_update: What updates the rows of a table that have a gradient: `adam`, or `rowwise`,
            which keeps one second moment for a row and no first one: see `row_updates`.

    Raises:
        UserError: A value is out of range.
    """

    row_gradients: ClassVar[bool] = False  # see `takes_row_gradients`

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: ScheduleName = "step"
    final_fraction: float = 0.1
    connection_lr_scale: float = 1.0
    memory_lr_scale: float = 5.0
    memory_update: RowUpdate = "adam"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"optimizer.lr must be a positive number, not {self.lr}")
        numbers = all(isinstance(beta, int | float) for beta in self.betas)
        if len(self.betas) != 2 or not (numbers and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(
                f"optimizer.betas must be two numbers from 0 to below 1, not {list(self.betas)}"
            )
        # With an eps that vanishes, a value that has had no gradient yet becomes 0 / 0.
        if not torch.finfo(torch.float32).tiny <= self.eps < math.inf:
            raise UserError(
                f"optimizer.eps must be a positive number that float32 holds, not {self.eps}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optimizer.weight_decay must be at least 0, not {self.weight_decay}")
        for name in ("connection_lr_scale", "memory_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"optimizer.{name} must be a positive number, not {getattr(self, name)}"
                )
        if self.memory_update not in ("adam", "rowwise"):
            raise UserError(
                f"optimizer.memory_update must be adam or rowwise, not {self.memory_update!r}"
            )
        _ = self.learning_rate  # checks the schedule's settings

    @property
    def learning_rate(self) -> Schedule:
        """The schedule of the learning rate."""
        return Schedule(
            name=self.schedule,
            warmup_steps=self.warmup_steps,
            final_fraction=self.final_fraction,
        )

    def build(self, module: nn.Module, total_steps: int) -> tuple[Optimizer, LambdaLR]:
        """The optimizer and the scheduler (to be stepped once per optimizer step).

        The method warns of parameters kept in a precision that loses updates. The optimizer loads
        saved state of the same parameters only: see `keep_names`.

        Args:
            module: The module to train; its frozen parameters are left out.
            total_steps: Steps of the whole run.

        Raises:
            UserError: Parameters are float16.
        """
        _check_precision(module)
        optimizer = self.build_optimizer(module)
        scale_connections(optimizer, module, self.connection_lr_scale)
        keep_names(optimizer, module)
        return optimizer, self.learning_rate.scheduler(optimizer, total_steps)

    def row_groups(self, tables: Collection[nn.Parameter] | None) -> list[dict[str, Any]]:
        """The group of a memory's tables; none without a memory."""
        if tables is None:
            return []
        return [
            {
                "params": list(tables),
                "lr": self.lr * self.memory_lr_scale,
                "weight_decay": 0.0,
                ROWS: self.memory_update,
            }
        ]

    @abstractmethod
    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """The optimizer of the trained parameters of `module`."""

    @abstractmethod
    def state_per_value(self, module: nn.Module, parameter: nn.Parameter) -> int:
        """Numbers of optimizer state for each value of one of `module`'s parameters."""


@dataclass(frozen=True, kw_only=True)
class AdamWRecipe(OptimizerRecipe):
    """AdamW with a warm-up and a schedule (arXiv 2512.24880, Table 5)."""

    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """The optimizer of the trained parameters of `module`."""
        tables = memory_tables(module)
        others = [p for p in module.parameters() if p not in (tables or ())]
        optimizer = torch.optim.AdamW if tables is None else RowAdamW
        return optimizer(
            self.parameter_groups(others) + self.row_groups(tables),
            lr=self.lr,
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
            fused=True,
        )

    def parameter_groups(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """Two groups: matrices with weight decay, vectors without."""
        trained = [p for p in parameters if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def state_per_value(self, module: nn.Module, parameter: nn.Parameter) -> int:
        """Two moments for each value."""
        return 2


@dataclass(frozen=True, kw_only=True)
class MuonRecipe(OptimizerRecipe):
    """Muon for matrices and AdamW for other parameters, with one schedule (arXiv 2606.19348).

    AdamW trains the embedding and the output projection (also an adapter in their place, with the
    module that it wraps), all vectors (norm weights, biases, the connections' gates), and the
    weights of further `nn.Embedding`, `nn.EmbeddingBag` and convolutions. Muon trains all other
    parameters, the connections' `phi` included, but for a memory's tables.

    Attributes:
        momentum: Decay of Muon's momentum, with Nesterov's look-ahead.
        update_rms: Root mean square of a Muon update before the learning rate.
    """

    momentum: float = 0.95
    update_rms: float = 0.18

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum must be from 0 to below 1, not {self.momentum}")
        if not 0 < self.update_rms < math.inf:
            raise UserError(
                f"optimizer.update_rms must be a positive number, not {self.update_rms}"
            )

    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """The optimizer of the trained parameters of `module`."""
        tables, memory = _tables(module), memory_tables(module)
        trained = [p for p in module.parameters() if p.requires_grad and p not in (memory or ())]
        matrices = [p for p in trained if p.dim() > 1 and p not in tables]
        others = [p for p in trained if p.dim() > 1 and p in tables]
        vectors = [p for p in trained if p.dim() <= 1]
        return MuonAdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay, "muon": True},
                {"params": others, "weight_decay": self.weight_decay, "muon": False},
                {"params": vectors, "weight_decay": 0.0, "muon": False},
                *self.row_groups(memory),
            ],
            lr=self.lr,
            momentum=self.momentum,
            update_rms=self.update_rms,
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
        )

    def state_per_value(self, module: nn.Module, parameter: nn.Parameter) -> int:
        """One momentum for each value of a Muon parameter, two moments for others."""
        return 1 if parameter.dim() > 1 and parameter not in _tables(module) else 2


def takes_row_gradients(recipe: OptimizerRecipe) -> bool:
    """Whether a recipe's optimizer updates tables by row gradients; one of a subclass may not.

    A subclass says that its optimizer does by `row_gradients = True`.
    """
    if getattr(recipe, "row_gradients", False):
        return True
    ours = (AdamWRecipe.build_optimizer, MuonRecipe.build_optimizer)
    return getattr(type(recipe), "build_optimizer", None) in ours


def memory_tables(module: nn.Module) -> dict[nn.Parameter, None] | None:
    """The trained tables of a module's memory, in order; None if it has no memory.

    A stage of a pipeline whose tables are all in other stages has none, but a memory.
    """
    tables = [m.weight for m in module.modules() if isinstance(m, NgramTable)]
    if not tables and not any(
        isinstance(m, Memory) and m.hash is not None for m in module.modules()
    ):
        return None
    return dict.fromkeys(table for table in tables if table.requires_grad)


def _tables(module: nn.Module) -> set[nn.Parameter]:
    """Parameters of embeddings, output projection and convolutions: Muon does not train them."""
    modules: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, Transformer):
            modules += [part.embedding, part.output]
        elif isinstance(part, nn.Embedding | nn.EmbeddingBag | _ConvNd):
            modules.append(part)
    return {parameter for part in modules for parameter in part.parameters()}


def _check_precision(module: nn.Module) -> None:
    """Refuse float16 parameters, whose moments vanish; warn of narrow ones, which lose updates.

    Raises:
        UserError: Trained parameters are float16.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    narrow = sum(p.dtype == torch.float16 for p in trained)
    if narrow:
        # In float16 second moments and eps vanish: 0 / 0.
        raise UserError(
            f"{narrow} of {len(trained)} trained parameters are float16, which does not hold the"
            " square of a gradient below 0.0002: AdamW would divide by zero; train with"
            " trainer.precision=bf16-mixed, which keeps parameters float32"
        )
    half = [p for p in trained if p.is_floating_point() and p.dtype.itemsize < 4]
    if not half:
        return
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # `plan` needs no Lightning

    name = str(half[0].dtype).removeprefix("torch.")
    # Half the distance to the next number below, relative to a number just above a power of two.
    part = round(4 / torch.finfo(half[0].dtype).eps)
    rank_zero_warn(
        f"{len(half)} of {len(trained)} trained parameters are {name}, and so is their optimizer"
        f" state: an update below 1/{part} of a value is lost, which usually keeps norm weights"
        " from ever moving; train with trainer.precision=bf16-mixed, which keeps parameters float32"
    )


__getattr__ = renamed(__name__, {"AdamW": "AdamWRecipe", "Muon": "MuonRecipe"})
