"""Writing a checkpoint folder: all processes at once, in the background if asked, atomically."""

import contextlib
import copy
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mhc_lightning.checkpoints.file_writing import keeping_errors, write_checkpoint
from mhc_lightning.checkpoints.folder_index import RUN, missing_bytes
from mhc_lightning.files.atomic import ASIDE, put_in_place, sync_folder


def save_folder(
    tensors: dict[str, Any],
    content: Mapping[str, Any],
    path: Path,
    commit: Callable[[], None],
    *,
    group: dist.ProcessGroup | None,
    asynchronous: bool,
) -> "Future[Any]":
    """Write a checkpoint folder; every process of the run calls this with its own tensors.

    All files go to a temporary folder and reach the disk (fsync). Only then does the folder take
    the checkpoint's name.

    Args:
        tensors: Nested dicts of tensors, DTensors among them.
        content: The content that is no tensor; that of the first process is written.
        path: The checkpoint; replaced if it exists.
        commit: Called in the first process once the checkpoint has its name.
        group: All processes, over gloo; None for a single process.
        asynchronous: True to return once everything is copied to CPU memory, and to write the copy
            while the run goes on.

    Returns:
        A future that is done after `commit`, or fails alike on every process. It fails with an
        OSError if any process met one, and then no temporary folder is left.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    writer = _Writer(path, copy.deepcopy(content) if asynchronous else content, commit)
    written: Future[Any] = Future()
    if asynchronous:
        started: Any = dcp.async_save(tensors, storage_writer=writer, process_group=group)
        started.add_done_callback(lambda done: writer.pass_on(done.exception(), written))
        return written
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        writer.pass_on(error, written)
    else:
        writer.pass_on(None, written)
    return written


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, content: Mapping[str, Any], commit: Callable[[], None]) -> None:
        self._aside = path.parent / f"{ASIDE}{path.name}"
        super().__init__(self._aside, sync_files=True)
        self.fs = _Files()
        self._name, self._content, self._commit = path, content, commit
        self._is_first = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._is_first = is_coordinator
        if is_coordinator:  # before any process may write
            shutil.rmtree(self._aside, ignore_errors=True)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the tensors to CPU memory, before the run goes on."""
        self.per_thread_copy_ahead = 0  # nothing is left to be copied from a GPU
        return _copied(state_dict)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()  # a checkpoint does not depend on where and when it was written

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Complete the folder in the first process, once every process has written."""
        write_checkpoint(self._content, self._aside / RUN)
        super().finish(metadata, results)
        missing = missing_bytes(self._aside, metadata)
        if missing:
            raise OSError(f"{missing}; all nodes must share the file system of output_dir")
        sync_folder(self._aside)
        put_in_place(self._aside, self._name)
        sync_folder(self._name.parent)
        self._commit()

    def pass_on(self, error: BaseException | None, to: "Future[Any]") -> None:
        """Complete a future as DCP ended; an OSError of any process becomes its exception."""
        if error is None:
            to.set_result(None)
            return
        if isinstance(error, dcp.CheckpointException):
            causes = [cause for cause, _ in error.failures.values()]
            others = [cause for cause in causes if not isinstance(cause, OSError)]
            if others:
                error = RuntimeError(f"could not write {self._name}: {others[0]!r}")
            else:
                error = causes[0]
                if self._is_first:
                    shutil.rmtree(self._aside, ignore_errors=True)
        to.set_exception(error)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    # DCP's own copying of DTensors (2.13) fails for some that an optimizer has loaded.
    return value.detach().to("cpu", copy=True)


class _Files(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if mode == "rb":
                yield file
            else:
                stream: IO[bytes] = file  # type: ignore[assignment]
                with keeping_errors(stream) as kept:
                    yield kept
