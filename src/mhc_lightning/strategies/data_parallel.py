"""Data parallelism: each device holds the model and takes its share of every batch."""

from lightning.pytorch.strategies import DDPStrategy

from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class DataParallelStrategy(WatchedStrategy, DDPStrategy):
    """Lightning's DDPStrategy, whose processes watch over each other.

    Args:
        timeout_seconds: How long a process may wait for another; one that it waits for longer
            counts as hung.
        gradient_as_bucket_view: Let gradients be views of what is sent, which saves their copies.
    """

    _backward_waits = True

    def __init__(
        self, timeout_seconds: float = 1800, gradient_as_bucket_view: bool = False
    ) -> None:
        super().__init__(timeout_seconds, gradient_as_bucket_view=gradient_as_bucket_view)
