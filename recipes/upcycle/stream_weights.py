"""An instrument: with which weights sub-layers read and write each stream, and mix them."""

import torch
from torch import Tensor

from mhc_lightning.callbacks import Observation, StreamSampler


class StreamWeights(StreamSampler[dict[str, Tensor]]):
    """Logs the read and write weights of each stream by sub-layer, and how far streams keep apart.

    Tags, each with `/layer_<k>`, means over the tokens of the sampled micro-batch:
    `read/stream_<i>`, `write/stream_<i>`; `read_spread` and `write_spread`, the standard deviation
    over tokens, root mean square over streams, 0 where weights do not depend on the token; and
    `kept`, the mean of the mixing matrix's diagonal.
    """

    def reduce(self, observations: list[Observation]) -> dict[str, Tensor]:
        """The numbers by tag."""
        values: dict[str, Tensor] = {}
        for o in observations:
            for name, mapping in (("read", o.mappings.pre), ("write", o.mappings.post)):
                weights = mapping.float().flatten(0, -2)  # [tokens, n]
                for i, weight in enumerate(weights.mean(0).unbind()):
                    values[f"{name}/stream_{i}/layer_{o.layer}"] = weight
                spread = weights.var(0, correction=0).mean().sqrt()
                values[f"{name}_spread/layer_{o.layer}"] = spread
            diagonal = torch.diagonal(o.mappings.residual.float(), dim1=-2, dim2=-1)
            values[f"kept/layer_{o.layer}"] = diagonal.mean()
        return values
