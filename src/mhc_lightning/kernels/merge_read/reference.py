"""Merging and reading in plain torch."""

from functools import partial

from mhc_lightning.kernels.merge import reference as merge
from mhc_lightning.kernels.merge_read import by_parts
from mhc_lightning.kernels.read import reference as read

merge_read_forward = partial(by_parts.merge_read_forward, merge, read)
merge_read_backward = partial(by_parts.merge_read_backward, merge, read)
