"""Strategies: data parallelism, FSDP2, and pipelines with FSDP2 between them."""

from mhc_lightning.strategies.data_parallel import DataParallelStrategy
from mhc_lightning.strategies.fully_sharded import FullyShardedStrategy
from mhc_lightning.strategies.layout import Layout, layout_of
from mhc_lightning.strategies.pipeline import PipelineStrategy
from mhc_lightning.strategies.pipeline_stage import PipelinedNetwork
from mhc_lightning.strategies.sharding import shard

__all__ = [
    "DataParallelStrategy",
    "FullyShardedStrategy",
    "Layout",
    "PipelineStrategy",
    "PipelinedNetwork",
    "layout_of",
    "shard",
]
