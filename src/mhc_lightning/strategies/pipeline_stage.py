"""One stage of a pipelined network, and the network whose other stages are elsewhere."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mhc_lightning.errors import UserError


@runtime_checkable
class PipelinedNetwork(Protocol):
    """What a network needs to be cut into stages; ``Transformer`` has it.

    A LightningModule calls ``network.loss(tokens, targets)`` in ``training_step``, and that or
    ``network.token_losses(tokens, targets)`` in ``validation_step``; both are the network's own
    without a pipeline. A network that hands nothing on but one tensor leaves carries alone (None).
    It may have ``carry_like(streams)`` (an uninitialised carry), ``head_token_losses`` (as
    ``head_loss``, one value per target) and ``count_targets(targets)`` (over how many targets the
    mean of ``head_loss`` is; without it all micro-batches of a batch weigh the same) beside these.
    What else ``loss`` and ``token_losses`` are given by name, these get too.

    Attributes:
        blocks: What is cut.
        parts_before_blocks: Names of the submodules that ``embed`` uses.
        parts_behind_blocks: Names of those that ``head_loss`` uses.
    """

    blocks: nn.ModuleList
    parts_before_blocks: Sequence[str]
    parts_behind_blocks: Sequence[str]

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, ...] -> what enters the first block [B, ...]; blocks keep its shape."""
        ...

    def run_blocks(
        self, streams: Tensor, carry: Tensor | None, blocks: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor | None]:
        """Take streams and their carry through some consecutive blocks."""
        ...

    def head_loss(self, streams: Tensor, carry: Tensor | None, targets: Tensor) -> Tensor:
        """The mean loss of what leaves the last block, a scalar."""
        ...

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss from end to end."""
        ...


class Elsewhere(nn.Module):
    """Stands where a submodule was that another device holds: names and numbers stay the same."""

    weight = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is nothing to run.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "this part of the network is on another pipeline device; call the network's loss or"
            " token_losses, or load a checkpoint of the run without strategy=pipeline"
        )


class Stage(nn.Module):
    """Consecutive blocks, with the embedding before the first and the head behind the last.

    Args:
        network: The whole network, whose submodules it shares.
        blocks: Which blocks.
        index: Number of the stage.
        count: Stages of the pipeline.

    Attributes:
        task: What the last stage returns: ``head_loss`` as [1], or ``head_token_losses``; with
            ``embed`` the first stage returns what it would hand to the first block.
        options: What the task is given by name.
        autocast: Makes the context that forward passes run in. The schedule runs outside of it, so
            that backward passes do.
        place: (stage, micro-batch) while a forward pass runs, else None.
    """

    def __init__(
        self, network: PipelinedNetwork, blocks: Iterable[int], index: int, count: int
    ) -> None:
        super().__init__()
        self._network = [network]  # in a list, because it is no submodule
        self.index = index
        self.is_first, self.is_last = index == 0, index == count - 1
        self.blocks = nn.ModuleDict({str(k): network.blocks[k] for k in blocks})
        names = [
            *(network.parts_before_blocks if self.is_first else ()),
            *(network.parts_behind_blocks if self.is_last else ()),
        ]
        self.parts = nn.ModuleDict({name: getattr(network, name) for name in names})
        self.task = "head_loss"
        self.options: dict[str, Any] = {}
        self.autocast: AbstractContextManager[Any] = nullcontext()
        self.place: tuple[int, int] | None = None
        self._seen = 0

    def restart(self, task: str, **options: Any) -> None:
        """Begin to count micro-batches anew."""
        self.task, self.options, self._seen = task, options, 0

    def merge_last_with(self, merge: Callable[[Any], tuple[Tensor, Tensor | None]]) -> None:
        """Have blocks that know how leave the merge of what this stage sends to a function."""
        block: Any = list(self.blocks.values())[-1]
        if not self.is_last and hasattr(block, "merge_last"):
            block.merge_last = merge

    def forward(self, *flow: Tensor, targets: Tensor | None = None) -> Any:
        """Tokens, or streams and their carry -> streams and their carry, or losses."""
        network: Any = self._network[0]
        self.place = self.index, self._seen
        self._seen += 1
        try:
            with self.autocast:
                carry: Tensor | None = None
                if self.is_first:
                    streams = network.embed(*flow)
                    if self.task == "embed":
                        return streams
                else:
                    streams, *rest = (_ContiguousGradient.apply(tensor) for tensor in flow)
                    carry = rest[0] if rest else None
                blocks = list(self.blocks.values())
                streams, carry = network.run_blocks(streams, carry, blocks)
                if self.is_last:
                    losses = getattr(network, self.task)(streams, carry, targets, **self.options)
                    return losses.reshape(1) if losses.dim() == 0 else losses
                handed_on = (streams,) if carry is None else (streams, carry)
                return tuple(_Sent.apply(tensor.contiguous()) for tensor in handed_on)
        finally:
            self.place = None


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous: only such tensors can be sent.

    Also, hooks put on its result do not outlive the step; its argument is a buffer that does.
    """

    @staticmethod
    def forward(ctx, tensor):  # type: ignore[no-untyped-def]
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.contiguous()


class _Sent(torch.autograd.Function):
    """The identity, whose result is no view: a schedule that splits backward detaches it."""

    @staticmethod
    def forward(ctx, tensor):  # type: ignore[no-untyped-def]
        return tensor.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


def find_network(root: nn.Module) -> nn.Module:
    """The one submodule of a LightningModule that can be cut into stages.

    Raises:
        UserError: There is none, or more than one, or one part is needed at both ends.
    """
    found = [m for m in root.modules() if m is not root and isinstance(m, PipelinedNetwork)]
    if len(found) != 1:
        raise UserError(
            f"strategy=pipeline needs one network that can be cut into stages (see"
            f" mhc_lightning.strategies.PipelinedNetwork), but {type(root).__name__} has"
            f" {len(found) or 'none'}; use strategy=fsdp for it"
        )
    network: Any = found[0]
    shared = set(network.parts_before_blocks) & set(network.parts_behind_blocks)
    ends = [getattr(network, name) for name in network.parts_before_blocks]
    heads = [getattr(network, name) for name in network.parts_behind_blocks]
    tied = {id(p) for m in ends for p in m.parameters()} & {
        id(p) for m in heads for p in m.parameters()
    }
    if shared or tied:
        raise UserError(
            "strategy=pipeline cannot share weights between the embedding and the head, which are"
            " on different stages; use separate ones, or strategy=fsdp"
        )
    return network


def leave_out(network: Any, stages: Iterable[Stage]) -> None:
    """Put ``Elsewhere`` in the place of what none of the stages holds."""
    stages = list(stages)
    held = {module for stage in stages for module in stage.modules()}
    for name in (*network.parts_before_blocks, *network.parts_behind_blocks):
        if getattr(network, name) not in held:
            setattr(network, name, Elsewhere())
    for index, block in enumerate(network.blocks):
        if block not in held:
            network.blocks[index] = Elsewhere()
