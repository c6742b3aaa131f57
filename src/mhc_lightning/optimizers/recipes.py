"""The optimizer recipe: parameter groups, AdamW, and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.optimizers.muon import MuonAdamW
from mhc_lightning.optimizers.parameter_names import keep_names


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with a warm-up and a schedule (arXiv 2512.24880, Table 5).

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the gradient's first and second moments.
        eps: Added to the root of the second moment.
        weight_decay: For matrices; vectors (norm weights, connection biases and gates) have none.
        warmup_steps: Steps over which the learning rate rises linearly from 0 to ``lr``.
        schedule: After the warm-up, ``step`` multiplies ``lr`` by 0.316 from 80% and by 0.1 from
            90% of all steps on; ``cosine`` falls to ``final_fraction`` of ``lr``; ``constant``.
        final_fraction: Where ``cosine`` ends.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["step", "cosine", "constant"] = "step"
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Raise UserError for values that cannot be meant."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"optimizer.lr must be a positive number, not {self.lr}")
        numbers = all(isinstance(beta, int | float) for beta in self.betas)
        if len(self.betas) != 2 or not (numbers and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(
                f"optimizer.betas must be two numbers from 0 to below 1, not {list(self.betas)}"
            )
        # Without it a value that has had no gradient yet becomes 0 / 0.
        if not torch.finfo(torch.float32).tiny <= self.eps < math.inf:
            raise UserError(
                f"optimizer.eps must be a positive number that float32 holds, not {self.eps}"
            )
        for name, value in (
            ("weight_decay", self.weight_decay),
            ("final_fraction", self.final_fraction),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name} must be at least 0, not {value}")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.schedule not in ("step", "cosine", "constant"):
            raise UserError(
                f"optimizer.schedule must be step, cosine or constant, not {self.schedule!r}"
            )

    def build(self, module: nn.Module, total_steps: int) -> tuple[Optimizer, LambdaLR]:
        """The optimizer and the scheduler (to be stepped once per optimizer step).

        Warns if parameters are kept in a precision that loses updates. What the optimizer saves
        is loaded for the same parameters alone: see `keep_names`.

        Args:
            module: Whose parameters to train; frozen ones are left out.
            total_steps: Steps of the whole run.

        Raises:
            UserError: Parameters are float16.
        """
        _check_precision(module)
        optimizer = keep_names(self.build_optimizer(module), module)
        return optimizer, LambdaLR(optimizer, partial(self.factor, total_steps=total_steps))

    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """The optimizer over the parameters of ``module`` that are trained."""
        return torch.optim.AdamW(
            self.parameter_groups(module.parameters()),
            lr=self.lr,
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
            fused=True,
        )

    def parameter_groups(self, parameters: Iterable[nn.Parameter]) -> list[dict]:
        """Matrices with weight decay, vectors without."""
        trained = [p for p in parameters if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def state_per_value(self, module: nn.Module, parameter: nn.Parameter) -> int:
        """Numbers kept for each value of one of ``module``'s parameters: two moments."""
        return 2

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate over ``lr`` for the step after ``step`` completed ones."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "step":
            # Compared as integers, so that the milestones never depend on rounding.
            if 10 * step >= 9 * total_steps:
                return 0.1
            return 0.316 if 10 * step >= 8 * total_steps else 1.0
        if self.schedule == "cosine":
            span = max(1, total_steps - self.warmup_steps)
            progress = min(1.0, (step - self.warmup_steps) / span)
            swing = 0.5 * (1 + math.cos(math.pi * progress))
            return self.final_fraction + (1 - self.final_fraction) * swing
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon for matrices, AdamW for the rest, with the same schedule (arXiv 2606.19348).

    AdamW takes the embedding and the output projection, whatever module stands in their place (an
    adapter and what it wraps, say), all vectors (norm weights, biases, the connections' gates), and
    the tables and kernels of further ``nn.Embedding``, ``nn.EmbeddingBag`` and convolutions. Muon
    takes everything else, the connections' ``phi`` included.

    Attributes:
        momentum: Of Muon, with Nesterov's look-ahead.
        update_rms: Root mean square of a Muon update before the learning rate.
    """

    momentum: float = 0.95
    update_rms: float = 0.18

    def __post_init__(self) -> None:
        """Raise UserError for values that cannot be meant."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum must be from 0 to below 1, not {self.momentum}")
        if not 0 < self.update_rms < math.inf:
            raise UserError(
                f"optimizer.update_rms must be a positive number, not {self.update_rms}"
            )

    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """The optimizer over the parameters of ``module`` that are trained."""
        trained, tables = [p for p in module.parameters() if p.requires_grad], _tables(module)
        matrices = [p for p in trained if p.dim() > 1 and p not in tables]
        others = [p for p in trained if p.dim() > 1 and p in tables]
        vectors = [p for p in trained if p.dim() <= 1]
        return MuonAdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay, "muon": True},
                {"params": others, "weight_decay": self.weight_decay, "muon": False},
                {"params": vectors, "weight_decay": 0.0, "muon": False},
            ],
            lr=self.lr,
            momentum=self.momentum,
            update_rms=self.update_rms,
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
        )

    def state_per_value(self, module: nn.Module, parameter: nn.Parameter) -> int:
        """Numbers kept for each value of one of ``module``'s parameters: a momentum, or AdamW's."""
        return 1 if parameter.dim() > 1 and parameter not in _tables(module) else 2


def _tables(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that are no linear map from one hidden vector to another, as far as is known."""
    found: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, Transformer):
            found += [part.embedding, part.output]
        elif isinstance(part, nn.Embedding | nn.EmbeddingBag | _ConvNd):
            found.append(part)
    return {parameter for part in found for parameter in part.parameters()}


def _check_precision(module: nn.Module) -> None:
    """Refuse parameters that are too narrow for their moments, or warn of updates that are lost.

    Raises:
        UserError: Trained parameters are float16.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    narrow = sum(p.dtype == torch.float16 for p in trained)
    if narrow:
        # Second moments vanish there, and an eps beside them: 0 / 0.
        raise UserError(
            f"{narrow} of {len(trained)} trained parameters are float16, which does not hold the"
            " square of a gradient below 0.0002: AdamW would divide by zero; train with"
            " trainer.precision=bf16-mixed, which keeps parameters float32"
        )
    half = [p for p in trained if p.is_floating_point() and p.dtype.itemsize < 4]
    if not half:
        return
    name = str(half[0].dtype).removeprefix("torch.")
    # Half the distance to the next number below, relative to a number just above a power of two.
    part = round(4 / torch.finfo(half[0].dtype).eps)
    rank_zero_warn(
        f"{len(half)} of {len(trained)} trained parameters are {name}, and so is their optimizer"
        f" state: an update below 1/{part} of a value is lost, which usually keeps norm weights"
        " from ever moving; train with trainer.precision=bf16-mixed, which keeps parameters float32"
    )


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups of a new optimizer with a scheduler are set to."""
    return [
        {k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups
    ]


def go_on_with(
    settings: Sequence[Mapping[str, Any]], optimizer: Optimizer, scheduler: LambdaLR
) -> dict[str, tuple[Any, Any]]:
    """Give an optimizer whose state was loaded the settings of now in place of the saved ones.

    Args:
        settings: What `settings_of` gave before.
        optimizer: The optimizer.
        scheduler: Its scheduler, loaded too.

    Returns:
        Saved and present value of what differs, by name.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    # Groups that were added after `settings_of` are left as they were saved.
    for k, (group, now) in enumerate(zip(optimizer.param_groups, settings, strict=False)):
        for name, value in now.items():
            saved = group.get(name)
            if saved == value:
                continue
            changed.setdefault("lr" if name == "initial_lr" else name, (saved, value))
            group[name] = value
        scheduler.base_lrs[k] = group["initial_lr"]
        # Of the schedule of now, from the first step on: what was saved is the old one's.
        factor = scheduler.lr_lambdas[k](scheduler.last_epoch)
        saved, group["lr"] = group["lr"], group["initial_lr"] * factor
        if saved != group["lr"] and "lr" not in changed:
            changed["the next step's learning rate"] = saved, group["lr"]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return changed
