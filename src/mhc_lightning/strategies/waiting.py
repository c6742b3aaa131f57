"""Waiting for a communication that was begun before, where the watch over processes sees it.

`Work.wait` is no Python: a thread that is in it seems to be in its caller. Wait here, and
`main_thread.ThreadView` knows that the process waits for others.
"""

import torch.distributed as dist


def wait_for(work: dist.Work) -> None:
    """Wait until a communication is done; on a GPU the stream waits, not the host."""
    work.wait()
