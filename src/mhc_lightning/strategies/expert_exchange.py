"""Token copies sent to experts on other processes by all-to-all, and their results sent back.

Shapes: N processes share the experts; R copies of this process, A copies that arrive here; H
experts of each process; C width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mhc_lightning.strategies.waiting import wait_for


class ExpertExchange:
    """A `TokenExchange` between processes that hold H experts each, in the order of the processes.

    All processes call it at the same time. Every copy is sent, and nothing is padded. Sizes are
    exchanged once for a forward and a backward pass: the host waits for the device once a layer.

    An expert's gradient comes out as the mean over the processes of each one's own, as that of all
    other parameters is once FSDP2 has reduced it: a result's gradient is divided by N on its way
    to the expert, and a copy's is multiplied by N on its way back.

    Args:
        mesh: One-dimensional, the processes that share the experts.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.size, self.group = mesh, mesh.size(), mesh.get_group()

    @torch.compiler.disable
    def begin(self, rows: Tensor, counts: Tensor) -> "ExpertVisit":
        """Send copies [R, C], sorted by expert, to their experts; `counts` is [N · H], int64."""
        by_process = counts.view(self.size, -1)
        theirs = torch.empty_like(by_process)  # [process that sends, H]
        dist.all_to_all_single(theirs, by_process, group=self.group)
        sent, received = torch.stack([by_process.sum(1), theirs.sum(1)]).tolist()
        return ExpertVisit(rows, theirs, _Way(self.group, sent, received), self.size)

    @torch.compiler.disable
    def held(self, weights: Tensor) -> Tensor:
        """This process's part of experts [N · H, ...] that are sharded over the mesh."""
        return weights.to_local() if isinstance(weights, DTensor) else weights


class ExpertVisit:
    """A `Visit` of experts on several processes.

    Args:
        rows: Copies [R, C], sorted by expert.
        theirs: The number of copies that arrive here, [process that sends, H].
        way: The way to the experts.
        size: N.
    """

    def __init__(self, rows: Tensor, theirs: Tensor, way: "_Way", size: int) -> None:
        self._theirs, self._way, self._size = theirs, way, size
        self._begun: Any = _Begin.apply(rows, way, float(size))
        self._order: Tensor | None = None
        self._way_back = way.reversed()

    @torch.compiler.disable
    def arrive(self) -> tuple[Tensor, Tensor]:
        """Copies [A, C] sorted by expert, and the end of each expert's run [H], int32."""
        arrived = _Wait.apply(self._begun, self._way)  # sorted by the process that sent
        experts = torch.arange(self._theirs.shape[1], device=arrived.device).repeat(self._size)
        number = torch.repeat_interleave(experts, self._theirs.flatten(), output_size=len(arrived))
        self._order = number.argsort(stable=True)
        return arrived[self._order], self._theirs.sum(0).cumsum(0).to(torch.int32)

    @torch.compiler.disable
    def begin_return(self, rows: Tensor) -> None:
        """Send results [A, C] back, in the order in which the copies have arrived."""
        assert self._order is not None
        by_process = rows[self._order.argsort()]
        self._begun = _Begin.apply(by_process, self._way_back, 1 / self._size)

    @torch.compiler.disable
    def returned(self) -> Tensor:
        """The results [R, C] of this process's copies, in their order."""
        return _Wait.apply(self._begun, self._way_back)


class _Way:
    """Rows sent by one all-to-all, and their gradients by another in the opposite direction.

    Args:
        group: The processes.
        sent: The number of rows to each process.
        received: The number of rows from each process.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        self._group, self._sent, self._received = group, sent, received
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def reversed(self) -> "_Way":
        return _Way(self._group, self._received, self._sent)

    def begin(self, rows: Tensor, backward: bool = False) -> None:
        """Start to send rows, or gradients of rows that were received."""
        sent, received = self._sent, self._received
        if backward:
            sent, received = received, sent
        rows = rows.contiguous()
        result = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(result, rows, received, sent, self._group, async_op=True)
        self._under_way = work, result, rows  # what is sent stays in memory until then

    def wait(self) -> Tensor:
        """What was begun last, once it has arrived."""
        assert self._under_way is not None
        work, result, _ = self._under_way
        wait_for(work)
        self._under_way = None
        return result


class _Begin(torch.autograd.Function):
    """Begins to send rows; backward ends the way of their gradients, and scales them.

    An empty tensor leads to the end of the way, since the rows have not arrived yet.
    """

    @staticmethod
    def forward(ctx, rows, way, scale):  # type: ignore[no-untyped-def]
        ctx.way, ctx.scale = way, scale
        way.begin(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return ctx.way.wait() * ctx.scale, None, None


class _Wait(torch.autograd.Function):
    """Waits for rows; backward begins to send their gradients."""

    @staticmethod
    def forward(ctx, begun, way):  # type: ignore[no-untyped-def]
        ctx.way = way
        return way.wait()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.way.begin(grad, backward=True)
        return grad.new_empty(0), None
