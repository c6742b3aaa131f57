"""torch's pipeline stage, with the names of its passes, and with a stream of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _batch_p2p, _wait_batch_p2p
from torch.utils._pytree import tree_leaves

from mhc_lightning.strategies.main_thread import Activity


class ScheduledStage(PipelineStage):
    """A stage that names the pass it is running.

    Args:
        arguments: Those of `PipelineStage`.
        activity: Gets the name.
        settings: Those of `PipelineStage`.
    """

    def __init__(self, *arguments: Any, activity: Activity, **settings: Any) -> None:
        self.activity = activity
        super().__init__(*arguments, **settings)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run forward."""
        with self._named("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run backward, or its half for the inputs."""
        with self._named("backward", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run backward's half for the weights."""
        with self._named("backward for the weights", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    @contextmanager
    def _named(self, pass_name: str, micro_batch: int) -> Iterator[None]:
        with self.activity.during(
            f"{pass_name} of micro-batch {micro_batch} in stage {self.stage_index}"
        ):
            yield


class StageStreams:
    """The device streams of one stage: one for its passes, and one of high priority.

    On a CPU they are torch's stand-ins, which do nothing.

    Args:
        device: The stage's device.
        backend: The device's module of torch (`torch.cuda`); tests replace it.
    """

    def __init__(self, device: torch.device, backend: Any = None) -> None:
        self.backend = backend or torch.get_device_module(device)
        self.compute = self.backend.Stream()
        self.urgent = self.backend.Stream(priority=-1)

    def on_compute(self) -> Any:
        """A context in which work goes to the stage's stream, after the work that is there."""
        return self.backend.stream(self.compute)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """`on_compute`, but also after the work of the caller's stream so far."""
        self.compute.wait_stream(self.backend.current_stream())
        with self.on_compute():
            yield

    def merge(self, unmerged: Any) -> Any:
        """`unmerged.merge()` on the stream of high priority; the caller's stream waits for it."""
        here = self.backend.current_stream()
        self.urgent.wait_stream(here)
        record_use(unmerged, self.urgent)
        with self.backend.stream(self.urgent):
            merged = unmerged.merge()
        here.wait_stream(self.urgent)
        record_use(merged, here)
        return merged

    def join(self) -> None:
        """Have the caller's stream wait for both streams."""
        here = self.backend.current_stream()
        here.wait_stream(self.compute)
        here.wait_stream(self.urgent)


class OverlappingStage(ScheduledStage):
    """A stage on a stream of its own, so that a device's stages can run at the same time.

    Under DualPipeV a device's two stages are paired for most of a step: the forward pass of one
    micro-batch in one stage, and the backward pass of another micro-batch in the other stage
    (OVERLAP_F_B). torch's runtime launches both on one stream, where the second can only follow the
    first. With a stream for each stage the device may run both. Autograd runs the backward of an
    operator on the operator's stream, so each stage's backward pass is on its stream too. Within a
    stage all micro-batches stay in order, and so do all float operations.

    A stage's stream waits for the runtime's stream, which waits for received tensors. It waits for
    the other stage's stream only if that stage's result is its input. A result is sent from the
    stage's stream as soon as its pass is launched, without waiting for the paired pass. Sends keep
    torch's order.

    `register_custom_function(OVERLAP_F_B, …)` would have to repeat the runtime's bookkeeping, and
    needs torch 2.13. Not run on a GPU yet.

    Args:
        arguments: Those of `PipelineStage`.
        streams: The streams of this device's stages, by stage.
        settings: Those of `ScheduledStage`.
    """

    def __init__(
        self, *arguments: Any, streams: Mapping[int, StageStreams], **settings: Any
    ) -> None:
        self._expected: dict[tuple[str, int], Any] = {}  # events of inputs from this device
        self._works: list[list[dist.Work]] = []
        self._all_streams = streams
        super().__init__(*arguments, **settings)
        self.streams = streams[self.stage_index]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run forward."""
        with self._turn("input", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run backward, or its half for the inputs."""
        with self._turn("gradient", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run backward's half for the weights."""
        with self.streams.turn():
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def perform_reduce_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reduce gradients; the runtime's stream then frees gathered parameters."""
        with self.streams.turn():
            super().perform_reduce_grad(*args, **kwargs)
        if isinstance(self.submod, FSDPModule):
            self.streams.join()

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take the output of the previous stage, which is on this device too."""
        self._expect("input", mb_index, prev_stage_outputs, self.stage_index - 1)
        super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of the next stage, which is on this device too."""
        self._expect("gradient", mb_index, next_stage_bwd_outputs, self.stage_index + 1)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives before forward."""
        return self._received(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives before backward."""
        return self._received(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the output of forward from this stage's stream; the runtime has nothing to send."""
        with self.streams.on_compute():
            self._works.append(_batch_p2p(super().get_fwd_send_ops(fwd_chunk_id)))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradients of backward from this stage's stream, in place of the runtime."""
        with self.streams.on_compute():
            self._works.append(_batch_p2p(super().get_bwd_send_ops(bwd_chunk_id)))
        return []

    def clear_runtime_states(self) -> None:
        """Wait for all sends, and have the caller's stream wait for this stage's stream."""
        for works in self._works:
            _wait_batch_p2p(works)
        self._works.clear()
        self.streams.join()
        super().clear_runtime_states()

    @contextmanager
    def _turn(self, kind: str, micro_batch: int) -> Iterator[None]:
        with self.streams.turn():
            event = self._expected.pop((kind, micro_batch), None)
            if event is not None:
                self.streams.compute.wait_event(event)
            yield

    def _expect(self, kind: str, micro_batch: int, tensors: Any, source: int) -> None:
        record_use(tensors, self.streams.compute)
        made = self._all_streams[source].compute.record_event()
        self._expected[kind, micro_batch] = made

    def _received(self, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        record_use([operation.tensor for operation in operations], self.streams.compute)
        return operations


def record_use(tensors: Any, stream: Any) -> None:
    """Have the allocator wait for a stream before it reuses a tensor's memory."""
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor) and not tensor.is_cpu:
            tensor.record_stream(stream)
