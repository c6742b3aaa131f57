"""How a model is spread over devices."""

from mhc_lightning.strategies.data_parallel import DataParallelStrategy
from mhc_lightning.strategies.fully_sharded import FullyShardedStrategy
from mhc_lightning.strategies.pipeline import PipelineStrategy
from mhc_lightning.strategies.pipeline_stage import PipelinedNetwork
from mhc_lightning.strategies.sharding import shard

__all__ = [
    "DataParallelStrategy",
    "FullyShardedStrategy",
    "PipelineStrategy",
    "PipelinedNetwork",
    "shard",
]
