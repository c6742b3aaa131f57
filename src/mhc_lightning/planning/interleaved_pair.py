"""A forward and a backward pass, interleaved layer by layer so that each hides the other's experts.

The order is that of arXiv 2512.24880, figure 4 (DualPipe's, arXiv 2412.19437, section 3.2.1): while
tokens of one pass travel to experts or back, the other pass computes attention or experts. One lane
computes and one communicates, each in the order of `COMPUTED` and `SENT`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mhc_lightning.planning.simulation import StageTimes


class Op(StrEnum):
    """An operation of one layer; F forward, B for gradients of inputs, W for those of weights."""

    ATTENTION_F = "attention_f"
    ATTENTION_B = "attention_b"
    ATTENTION_W = "attention_w"
    EXPERTS_F = "experts_f"
    EXPERTS_B = "experts_b"
    EXPERTS_W = "experts_w"
    DISPATCH_F = "dispatch_f"
    DISPATCH_B = "dispatch_b"
    COMBINE_F = "combine_f"
    COMBINE_B = "combine_b"


COMPUTED = (
    *(Op.ATTENTION_F, Op.EXPERTS_B, Op.EXPERTS_W),
    *(Op.EXPERTS_F, Op.ATTENTION_B, Op.ATTENTION_W),
)
"""Operations of a layer on the device, in order."""

SENT = (Op.COMBINE_B, Op.DISPATCH_F, Op.DISPATCH_B, Op.COMBINE_F)
"""All-to-alls of a layer, in order."""

_NEEDS = {
    Op.DISPATCH_F: (Op.ATTENTION_F, 0),
    Op.EXPERTS_F: (Op.DISPATCH_F, 0),
    Op.COMBINE_F: (Op.EXPERTS_F, 0),
    Op.ATTENTION_F: (Op.COMBINE_F, -1),
    Op.EXPERTS_B: (Op.COMBINE_B, 0),
    Op.DISPATCH_B: (Op.EXPERTS_B, 0),
    Op.ATTENTION_B: (Op.DISPATCH_B, 0),
    Op.COMBINE_B: (Op.ATTENTION_B, -1),
}
"""For each operation the one whose result it needs, in this layer or (-1) in the layer before."""

# The order in which a layer can be followed: every operation after those that it waits for.
_FOLLOWED = (
    *(Op.COMBINE_B, Op.ATTENTION_F, Op.DISPATCH_F, Op.EXPERTS_B, Op.DISPATCH_B, Op.EXPERTS_W),
    *(Op.EXPERTS_F, Op.COMBINE_F, Op.ATTENTION_B, Op.ATTENTION_W),
)


class OpSpan(NamedTuple):
    """A span of time of one operation.

    Attributes:
        op: The operation.
        layer: Turn of the layer, from 0: forward from the first layer, backward from the last.
        start: Seconds after the pair begins.
        end: Seconds after the pair begins.
    """

    op: Op
    layer: int
    start: float
    end: float

    @property
    def forward(self) -> bool:
        """True if it belongs to the forward pass."""
        return self.op.endswith("_f")


@dataclass(frozen=True)
class InterleavedPair:
    """A pair of passes, layer by layer.

    Attributes:
        spans: Spans of all operations that take time.
    """

    spans: tuple[OpSpan, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the pair."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def exchanges(self) -> list[OpSpan]:
        """The all-to-alls."""
        return [span for span in self.spans if span.op in SENT]


def interleave(forward: "StageTimes", backward: "StageTimes") -> InterleavedPair:
    """Interleave a forward pass through one stage with a whole backward pass through another.

    Merges of feed-forward sub-layers are left out: they run beside both lanes. Layers of a stage
    take equally long. A pass with fewer layers ends earlier.

    Args:
        forward: Times of the stage that runs forward.
        backward: Times of the stage that runs backward.
    """
    sent = forward.dispatch + forward.combine + backward.dispatch + backward.combine
    if not sent:
        return InterleavedPair(())
    weight = backward.backward_weight or 0.0
    to_input = max(0.0, backward.backward - weight - backward.merge_backward)
    computed = max(0.0, forward.forward - forward.merge_forward)
    times = {
        Op.ATTENTION_F: (1 - forward.feed_forward) * computed,
        Op.EXPERTS_F: forward.feed_forward * computed,
        Op.ATTENTION_B: (1 - backward.feed_forward) * to_input,
        Op.EXPERTS_B: backward.feed_forward * to_input,
        Op.ATTENTION_W: (1 - backward.feed_forward) * weight,
        Op.EXPERTS_W: backward.feed_forward * weight,
        Op.DISPATCH_F: forward.dispatch,
        Op.COMBINE_F: forward.combine,
        Op.DISPATCH_B: backward.dispatch,
        Op.COMBINE_B: backward.combine,
    }
    layers_forward, layers_backward = forward.expert_layers, backward.expert_layers
    ended = dict.fromkeys(Op, 0.0)  # in the layer before, until it is followed in this one
    free = {True: 0.0, False: 0.0}  # the lane that computes, and the one that communicates
    spans = []
    for layer in range(max(layers_forward, layers_backward)):
        for op in _FOLLOWED:
            layers = layers_forward if op.endswith("_f") else layers_backward
            if layer >= layers:
                continue
            needed = ended[_NEEDS[op][0]] if op in _NEEDS else 0.0
            lane = op in COMPUTED
            start = max(free[lane], needed)
            end = start + times[op] / layers
            ended[op], free[lane] = end, end
            if end > start:
                spans.append(OpSpan(op, layer, start, end))
    return InterleavedPair(tuple(spans))
