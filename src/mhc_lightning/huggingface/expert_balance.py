"""Loss-free balancing of experts in transformers' `Trainer`."""

from typing import Any

import torch.distributed
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mhc_lightning.modules.mixture_of_experts import LoadBalance


class BalanceExperts(TrainerCallback):
    """Moves the routing biases after each optimizer step, as `LanguageModel` does.

    Without it, experts train with the biases that the model has. Loads are summed over all
    processes, which are data-parallel in `Trainer`.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer."""
        for module in model.modules() if model is not None else ():
            if isinstance(module, LoadBalance):
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(module.load)
                module.update()
