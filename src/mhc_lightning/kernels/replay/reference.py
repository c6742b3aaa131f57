"""A stretch of sub-layers' stream operations with known mappings, one after the other."""

from functools import partial

from mhc_lightning.kernels.aggregate import reference as aggregate
from mhc_lightning.kernels.merge import reference as merge
from mhc_lightning.kernels.replay import by_parts

replay_forward = partial(by_parts.replay_forward, merge, aggregate)
