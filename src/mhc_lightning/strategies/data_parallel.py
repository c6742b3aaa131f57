"""Data parallelism: each device holds the model and takes its share of every batch."""

from lightning.pytorch.strategies import DDPStrategy

from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class DataParallelStrategy(WatchedStrategy, DDPStrategy):
    """Lightning's DDPStrategy, whose processes watch over each other.

    Args:
        timeout_seconds: Seconds that a process waits for another before that one counts as hung.
        gradient_as_bucket_view: True to make gradients views of the buckets that are sent, which
            saves copies.
    """

    _backward_waits = True

    def __init__(
        self, timeout_seconds: float = 1800, gradient_as_bucket_view: bool = False
    ) -> None:
        super().__init__(timeout_seconds, gradient_as_bucket_view=gradient_as_bucket_view)
