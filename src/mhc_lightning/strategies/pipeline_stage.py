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
    """The protocol of a network that can be cut into stages, as `Transformer` can.

    A LightningModule calls `network.loss(tokens, targets)` in `training_step`, and the same or
    `network.token_losses(tokens, targets)` in `validation_step`. Without a pipeline these are the
    network's own methods. Both pass further arguments by name on to the head's methods. In a
    network without carries, a carry is None.

    Four more methods are optional:

    - `carry_like(streams)`: an uninitialised carry;
    - `head_token_losses`: like `head_loss`, with one value per target;
    - `count_targets(targets)`: the number of targets that `head_loss` is the mean over. Without it
      all micro-batches of a batch weigh the same;
    - `recall(tokens)`: what every stage needs to know of the tokens. `embed` and `run_blocks` then
      take its result as `recalled`. Submodules named by `parts_of_all_stages`, which it uses, are
      on every device; they have buffers only.

    Attributes:
        blocks: The blocks, which are shared out among the stages.
        parts_before_blocks: Names of the submodules that `embed` uses.
        parts_behind_blocks: Names of the submodules that `head_loss` uses.
    """

    blocks: nn.ModuleList
    parts_before_blocks: Sequence[str]
    parts_behind_blocks: Sequence[str]

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, ...] -> input of the first block [B, ...]; blocks keep its shape."""
        ...

    def run_blocks(
        self, streams: Tensor, carry: Tensor | None, blocks: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor | None]:
        """Run streams and their carry through some consecutive blocks."""
        ...

    def head_loss(self, streams: Tensor, carry: Tensor | None, targets: Tensor) -> Tensor:
        """The mean loss of the last block's output, a scalar."""
        ...

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the whole network, a scalar."""
        ...


class RemotePart(nn.Module):
    """Takes the place of a submodule that another device holds: names and numbers stay the same."""

    weight = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse to run.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "this part of the network is on another pipeline device; call the network's loss or"
            " token_losses, or load a checkpoint of the run without strategy=pipeline"
        )


class Stage(nn.Module):
    """Consecutive blocks; the first stage has the embedding too, the last stage the head.

    Args:
        network: The whole network, whose submodules the stage shares.
        blocks: The numbers of its blocks.
        index: The number of the stage.
        count: The number of stages in the pipeline.

    Attributes:
        task: The result of the last stage: `head_loss` as [1], or `head_token_losses`; with
            `embed` the first stage returns the input of the first block.
        options: Arguments of the task, by name.
        autocast: The context of forward passes. The schedule runs outside of it, and so do backward
            passes.
        running: (stage, micro-batch) while a forward pass runs, else None.
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
        self.running: tuple[int, int] | None = None
        self._next = 0

    def restart(self, task: str, **options: Any) -> None:
        """Set the task, and count micro-batches from 0."""
        self.task, self.options, self._next = task, options, 0

    def merge_last_with(self, merge: Callable[[Any], tuple[Tensor, Tensor | None]]) -> None:
        """Have the last block call a function for the merge of the output that this stage sends.

        Without effect in the last stage, and for blocks without `merge_last`.
        """
        block: Any = list(self.blocks.values())[-1]
        if not self.is_last and hasattr(block, "merge_last"):
            block.merge_last = merge

    def forward(
        self, *flow: Tensor, targets: Tensor | None = None, tokens: Tensor | None = None
    ) -> Any:
        """Run one micro-batch.

        Args:
            flow: Tokens [B, S] in the first stage, else streams [B, S, n, C] and their carry, if
                there is one.
            targets: [B, S], in the last stage.
            tokens: [B, S], if the network recalls something of them.

        Returns:
            Streams and their carry; in the last stage losses, [1] or [B, S].
        """
        network: Any = self._network[0]
        self.running = self.index, self._next
        self._next += 1
        try:
            with self.autocast:
                carry: Tensor | None = None
                recalled = None if tokens is None else network.recall(tokens)
                more = {"recalled": recalled} if recalled else {}
                if self.is_first:
                    streams = network.embed(*flow, **more)
                    if self.task == "embed":
                        return streams
                else:
                    streams, *rest = (_ContiguousGradient.apply(tensor) for tensor in flow)
                    carry = rest[0] if rest else None
                blocks = list(self.blocks.values())
                streams, carry = network.run_blocks(streams, carry, blocks, **more)
                if self.is_last:
                    losses = getattr(network, self.task)(streams, carry, targets, **self.options)
                    return losses.reshape(1) if losses.dim() == 0 else losses
                outputs = (streams,) if carry is None else (streams, carry)
                return tuple(_Sent.apply(tensor.contiguous()) for tensor in outputs)
        finally:
            self.running = None


class _ContiguousGradient(torch.autograd.Function):
    """The identity with a contiguous gradient: only contiguous tensors can be sent.

    Hooks on the result end with the step. The argument is a buffer that outlives the step.
    """

    @staticmethod
    def forward(ctx, tensor):  # type: ignore[no-untyped-def]
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.contiguous()


class _Sent(torch.autograd.Function):
    """The identity with a result that is no view: a schedule that splits backward detaches it."""

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
        UserError: There is no such submodule, there are several, or both ends need the same part.
    """
    networks = [m for m in root.modules() if m is not root and isinstance(m, PipelinedNetwork)]
    if len(networks) != 1:
        raise UserError(
            f"strategy=pipeline needs one network that can be cut into stages (see"
            f" mhc_lightning.strategies.PipelinedNetwork), but {type(root).__name__} has"
            f" {len(networks) or 'none'}; use strategy=fsdp for it"
        )
    network: Any = networks[0]
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
    """Put a `RemotePart` in the place of every submodule that none of the stages holds."""
    stages = list(stages)
    held = {module for stage in stages for module in stage.modules()}
    for name in (*network.parts_before_blocks, *network.parts_behind_blocks):
        if getattr(network, name) not in held:
            setattr(network, name, RemotePart())
    for index, block in enumerate(network.blocks):
        if block not in held:
            network.blocks[index] = RemotePart()
