"""What ended a run is printed in one line, with its exit code, by every strategy."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from mhc_lightning.errors import NonFiniteLossError, UserError, one_line_message
from mhc_lightning.strategies.fault_watch import FaultWatch
from mhc_lightning.strategies.faults import fault_of, how_it_ended, machine_fault
from mhc_lightning.strategies.main_thread import ThreadView


class Broken(Dataset):
    """Ends the process that loads from it, or fails in it."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("chunk 3 is damaged: prepare again")


def failure_of(dataset: Dataset) -> Exception:
    with pytest.raises(Exception) as caught:
        list(DataLoader(dataset, num_workers=1))
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("use\n  another"), 2, "rank 1, at step 3, validation: use another"),
        (NonFiniteLossError("the loss became NaN", 4), 3, "rank 1: the loss became NaN at step 4"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 4, "(CUDA out of memory); use a"),
        (MemoryError(), 4, "rank 1, at step 3, validation: out of memory"),
        (RuntimeError("[enforce fail] can't allocate memory: 1 GB"), 4, "out of memory"),
        (OSError(errno.ENOSPC, "No space left", "metrics.csv"), 4, "No space left (metrics.csv); "),
        (KeyboardInterrupt(), 130, "rank 1 was interrupted at step 3, validation"),
        (RuntimeError("[gloo] Connection closed by peer"), 4, "rank 1 lost the others at step 3"),
        (dist.DistNetworkError("reset"), 4, "rank 1 lost the others at step 3"),
        (ArithmeticError("out of luck"), 1, "rank 1 failed at step 3, validation: ArithmeticError"),
        (SystemExit(5), 1, "rank 1 failed at step 3, validation: SystemExit: 5"),
    ],
)
def test_an_exception_says_whose_fault_it_was(error: BaseException, code: int, text: str) -> None:
    fault = fault_of("rank 1", "step 3, validation", error)
    assert fault.code == code
    assert text in fault.text and "\n" not in fault.text
    assert fault.follows == ("lost the others" in text)


def test_how_a_process_ended() -> None:
    assert how_it_ended(-9).startswith("was killed by signal 9 (SIGKILL: often the kernel")
    assert how_it_ended(-11) == "was killed by signal 11"
    assert how_it_ended(7) == "ended with exit code 7"


def test_what_fails_in_a_loading_process_is_printed_without_its_traceback() -> None:
    error = failure_of(Broken(ends=False))
    assert isinstance(error, UserError) and "Traceback" in str(error)
    assert one_line_message(error) == "chunk 3 is damaged: prepare again"
    assert machine_fault(error) is None


def test_a_loading_process_that_was_killed_is_no_bug() -> None:
    text = machine_fault(failure_of(Broken(ends=True)))
    assert text is not None and "a process that loads data ended" in text
    assert "DataLoader worker (pid" in text and "data.num_workers" in text


class Process:
    """A process as the watch sees it; its thread is never started, nothing is ended."""

    def __init__(self, store: dist.Store, rank: int, shared_output: str = "") -> None:
        self.ended: dict[int, int] = {}
        self.watch = FaultWatch(
            store,
            rank,
            3,
            f"rank {rank} (part {rank})",
            lambda: f"step 3, of rank {rank}",
            timeout=30.0,
            ended=lambda: self.ended,
            shared_output=shared_output,
        )


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    monkeypatch.setattr(FaultWatch, "_let_others_read", lambda watch: None)  # nobody else reads
    store = dist.HashStore()
    return [Process(store, rank) for rank in range(3)]


@pytest.fixture
def started_here(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """Processes that one launcher has started: two of one node, one of another."""
    monkeypatch.setattr(FaultWatch, "_let_others_read", lambda watch: None)
    store = dist.HashStore()
    return [Process(store, rank, f"node {rank // 2}") for rank in range(3)]


LOST = RuntimeError("[gloo] Connection closed by peer")


def test_the_end_of_a_process_is_printed_before_what_follows(processes, capsys) -> None:
    first, _, third = processes
    first.ended[1] = -9
    fault, printed = first.watch.report(LOST)
    expected = "rank 1 (part 1) was killed by signal 9 (SIGKILL: often the kernel, when memory runs"
    assert printed and fault.code == 4 and fault.text.startswith(expected)
    assert fault.text.endswith("at step 3, of rank 1")
    assert third.watch.report(LOST) == (fault, True), "and by those that could not see it"
    assert capsys.readouterr().err == f"error: {fault.text}\n" * 2


def test_a_process_that_ends_right_after_it_was_named_has_that_name(processes) -> None:
    first, second, _ = processes
    second.watch.call("rank 1 (pipeline stage 4)")
    first.ended[1] = -9
    fault, _ = first.watch.report(LOST)
    assert fault.text.startswith("rank 1 (pipeline stage 4) was killed by signal 9")


def test_processes_end_with_the_code_of_the_first_fault(processes, capsys) -> None:
    first, second, third = processes
    fault, printed = second.watch.report(UserError("chunk 3 is damaged"))
    assert (fault.code, printed) == (2, False), "it is printed by whoever handles it"
    assert first.watch.report(LOST) == (fault, True)
    assert third.watch.report(NonFiniteLossError("the loss became NaN", 4)) == (fault, True)
    line = "error: rank 1 (part 1), at step 3, of rank 1: chunk 3 is damaged\n"
    assert capsys.readouterr().err == line * 2


def test_of_two_faults_at_once_the_first_one_published_counts(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultWatch, "_look", lambda *_: None)  # neither sees the other's yet
    fault, _ = processes[0].watch.report(UserError("chunk 3 is damaged"))
    assert processes[1].watch.report(UserError("chunk 4 is damaged")) == (fault, True)


@pytest.mark.parametrize("failing", [0, 1])
def test_processes_with_one_standard_error_print_one_line(
    started_here: list[Process], failing: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, printed = started_here[failing].watch.report(UserError("chunk 3 is damaged"))
    assert printed and fault.code == 2
    assert started_here[1 - failing].watch.report(LOST) == (fault, True)
    line = f"error: {fault.text}\n"
    assert capsys.readouterr().err == line
    started_here[2].watch.report(LOST)
    assert capsys.readouterr().err == line, "another node has a standard error of its own"


def test_a_bug_keeps_its_traceback_and_another_process_prints_the_line(
    started_here: list[Process], capsys: pytest.CaptureFixture[str]
) -> None:
    fault, printed = started_here[1].watch.report(ArithmeticError("out of luck"))
    assert not printed and capsys.readouterr().err == ""
    started_here[0].watch.report(LOST)
    assert capsys.readouterr().err == f"error: {fault.text}\n"


def test_an_interrupt_of_all_blames_none(processes, capsys) -> None:
    assert processes[0].watch.report(KeyboardInterrupt())[1] is False
    assert processes[1].watch.report(KeyboardInterrupt())[1] is False
    assert processes[2].watch.report(LOST)[1] is True
    assert (
        capsys.readouterr().err == "error: rank 0 (part 0) was interrupted at step 3, of rank 0\n"
    )


def test_a_backward_pass_counts_as_a_wait_only_where_it_communicates_unseen() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            # From another thread, as the watch looks; this frame is not of the engine's.
            looking = threading.Thread(target=lambda: seen.append([v.look() for v in views]))
            looking.start()
            looking.join()
            return gradient

    views = ThreadView(), ThreadView(backward_waits=True)
    value = torch.ones(2, requires_grad=True)
    Look.apply(value).sum().backward()
    assert [sight.waits for sight in seen[0]] == [False, False], "it computes"
    frame = type("Frame", (), {})()
    engine = Path(torch.__file__).parent / "autograd" / "graph.py"
    frame.f_code = compile("0", str(engine), "exec")
    frame.f_lasti, frame.f_lineno, frame.f_back = 0, 1, None
    for view, waits in zip(views, (False, True), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys._current_frames", lambda: {view._thread: frame})  # noqa: B023
            assert view.look().waits is waits
