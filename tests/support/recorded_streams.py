"""Device streams for a CPU that keep account of what has to happen before what."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from mhc_lightning.modules.connection import Unmerged
from mhc_lightning.strategies import scheduled_stage
from mhc_lightning.strategies.pipeline_engine import PipelineEngine
from mhc_lightning.strategies.scheduled_stage import ScheduledStage, StageStreams


class Operation(NamedTuple):
    """Something that was given to a stream.

    Attributes:
        kind: ``forward``, ``backward``, ``weights``, ``send`` or ``merge``.
        stage: Whose.
        part: The micro-batch.
        stream: Number of the stream.
        number: Of this operation on its stream, from 1.
        behind: Stream -> how many operations of it have to be done before.
    """

    kind: str
    stage: int
    part: int
    stream: int
    number: int
    behind: dict[int, int]

    def follows(self, other: "Operation") -> bool:
        """Whether it cannot begin before another is done."""
        return self.behind.get(other.stream, 0) >= other.number


class Stream:
    made = 0

    def __init__(self, priority: int = 0) -> None:
        self.id, Stream.made = Stream.made, Stream.made + 1
        self.behind: dict[int, int] = {}
        self.is_urgent = priority < 0

    def wait_event(self, event: dict[int, int]) -> None:
        for stream, number in event.items():
            self.behind[stream] = max(number, self.behind.get(stream, 0))

    def record_event(self) -> dict[int, int]:
        return dict(self.behind)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Backend:
    """As much of ``torch.cuda`` as is used."""

    def __init__(self) -> None:
        self.Stream = Stream
        self.main = self.current = Stream()

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, kind: str, stage: int, part: int) -> Operation:
        here = self.current
        before = dict(here.behind)
        here.behind[here.id] = number = before.get(here.id, 0) + 1
        return Operation(kind, stage, part, here.id, number, before)


@contextmanager
def recorded(strategy: Any) -> Iterator[dict[str, Any]]:
    """Record what overlapping stages do, the schedule's pairs, and the end of each schedule.

    Yields:
        ``operations`` in the order in which they are launched; ``pairs``, the halves of the
        schedule's OVERLAP_F_B actions as (stage, micro-batch); ``ends``, how many operations there
        were when results were used, and what the main stream was behind by then.
    """
    backend = Backend()
    found: list[Operation] = []
    record: dict[str, Any] = {"operations": found, "pairs": [], "ends": []}

    def launching(kind: str, plain: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Streams are merged on a compute stream, too, where the next sub-layer reads them.
            if (
                backend.current is not backend.main
                and (kind == "merge") == backend.current.is_urgent
            ):
                place = (
                    (self.stage_index, args[0]) if isinstance(self, ScheduledStage) else (-1, -1)
                )
                found.append(backend.launch(kind, *place))
            return plain(self, *args, **kwargs)

        return run

    def starting(plain: Any) -> Any:
        return lambda self, device: plain(self, device, backend)

    def ending(plain: Any) -> Any:
        def end(self: Any, tensor: Any) -> None:
            record["ends"].append((len(found), dict(backend.main.behind)))
            plain(self, tensor)

        return end

    with ExitStack() as stack:
        for owner, name, wrapped in (
            (ScheduledStage, "forward_one_chunk", partial(launching, "forward")),
            (ScheduledStage, "backward_one_chunk", partial(launching, "backward")),
            (ScheduledStage, "backward_weight_one_chunk", partial(launching, "weights")),
            (scheduled_stage, "_batch_p2p", partial(launching, "send")),
            (Unmerged, "merge", partial(launching, "merge")),
            (StageStreams, "__init__", starting),
            (PipelineEngine, "_broadcast", ending),
        ):
            new = wrapped(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, new))
        yield record
    rank = strategy.device_mesh["pipeline"].get_local_rank()
    for (purpose, *_), schedule in strategy._engine._schedules.items():
        if purpose == "train":
            record["pairs"] += [
                [(half.stage_index, half.microbatch_index) for half in action.sub_actions]
                for action in schedule.pipeline_order[rank]
                if action is not None and action.sub_actions
            ]
