"""The build of the CPU kernels: once, by one process of many; and one line where it fails."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import backend, merge_streams
from mhc_lightning.kernels.compiled_support import build, library
from mhc_lightning.kernels.merge import compiled, reference

STREAMS = torch.ones(2, 4, 8)
# A build that only takes its time: it notes that it ran, and "links" a copy of what is there.
SLOW_BUILD = """
import os, pathlib, shutil, sys, time
from mhc_lightning.kernels.compiled_support import build
here = build.built_library()  # the real one
os.environ["TORCH_EXTENSIONS_DIR"] = sys.argv[1]

def make(folder, library):
    with open(folder / "builds", "a") as file:
        file.write("one\\n")
    time.sleep(1)
    shutil.copy(here, library.with_suffix(".part"))
    os.replace(library.with_suffix(".part"), library)

build._build = make
print(build.built_library())
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension cache without our library, and a process that has not looked yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    monkeypatch.setattr(backend, "trouble_with_compiled", library.trouble_with_compiled.__wrapped__)
    return tmp_path


@pytest.mark.parametrize("choice", ["auto", "compiled"])
def test_a_machine_with_a_compiler_runs_them(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.trouble_with_compiled() is None
    monkeypatch.setenv(backend.VARIABLE, choice)
    assert backend.implementation("merge", STREAMS) is compiled
    assert backend.fuses_seams(STREAMS)
    assert backend.implementation("merge", STREAMS[:0]) is reference


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [
        ("no-such-compiler", "there is no C++ compiler 'no-such-compiler': install g++, or name"),
        ("false", r"the C++ compiler 'false' fails (exit code 1): mend it, or name another one"),
    ],
)
def test_without_a_compiler_one_line_says_so_and_auto_goes_on_in_torch(
    compiler: str, cause: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv(backend.VARIABLE, "compiled")
    with pytest.raises(UserError, match=r"^MHC_LIGHTNING_KERNELS=compiled, but ") as raised:
        backend.implementation("merge", STREAMS)
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)
    backend._warn_once.cache_clear()
    monkeypatch.setenv(backend.VARIABLE, "auto")
    with pytest.warns(UserWarning, match="run in plain torch") as warned:
        assert backend.implementation("merge", STREAMS) is reference
        assert not backend.fuses_seams(STREAMS)
    (line,) = (str(warning.message) for warning in warned)
    assert cause in line and "\n" not in line
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.implementation("merge", STREAMS) is reference
    assert not list(empty_cache.rglob("*.so"))


def test_nothing_is_built_for_shapes_alone(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` and tracers run operators on tensors without numbers."""
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("it builds"))
    monkeypatch.setenv(backend.VARIABLE, "auto")
    with FakeTensorMode():
        traced = torch.ones(2, 4, 8)
    for streams in (traced, STREAMS.to("meta")):
        backend.fuses_seams(streams)
        assert backend.implementation("merge", streams) is reference
    assert not list(empty_cache.iterdir())


def test_the_kernels_can_be_built_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an image, say; without a compiler with exit code 2 and one line."""
    command = "mhc_lightning.kernels.compiled_support"
    runpy.run_module(command, run_name="__main__")
    assert Path(capsys.readouterr().out.strip()) == build.built_library()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as raised:
        runpy.run_module(command, run_name="__main__")
    assert raised.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: there is no C++ compiler")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_worker_processes_of_loaders_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a pool of threads that forks do not have
    try:
        streams, output = torch.randn(4096, 4, 8), torch.randn(4096, 8)
        mixing, post = torch.rand(4096, 4, 4), torch.rand(4096, 4)
        here = merge_streams(streams, output, mixing, post)
        examples: Any = range(2)
        loader = DataLoader(
            examples,
            num_workers=1,
            collate_fn=lambda _: merge_streams(streams, output, mixing, post),
        )
        for there in loader:
            assert torch.equal(here, there)
    finally:
        torch.set_num_threads(before)


def test_a_cache_that_cannot_be_written_is_named(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_cache / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(empty_cache / "file"))
    with pytest.raises(build.BuildError, match=r"cannot be kept in .* TORCH_EXTENSIONS_DIR$"):
        build.built_library()


def test_a_library_that_cannot_be_loaded_is_no_library(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = empty_cache / f"mhc_lightning_kernels_{build._key()}" / "kernels.so"
    broken.parent.mkdir()
    broken.write_bytes(b"no library")
    line = library.trouble_with_compiled.__wrapped__()
    assert line is not None and "cannot be loaded" in line and str(broken) in line


def test_several_processes_build_once(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", SLOW_BUILD, str(tmp_path)]] * 3
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in running}
    (answer,) = answers
    assert Path(answer).is_file()
    assert (Path(answer).parent / "builds").read_text() == "one\n"


def test_the_library_is_that_of_these_sources_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build._key()
    assert key == build._key()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert build._key() != key


def test_a_failed_build_leaves_nothing_behind(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError):
        build.built_library()
    assert [path.name for path in empty_cache.rglob("*") if path.is_file()] in ([], ["lock"])
    assert capfd.readouterr().err.startswith("compiling CPU kernels once, about ")


def test_results_are_those_of_torch_for_operands_that_no_kernel_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "compiled")
    for streams in (torch.randn(3, 9, 4), torch.randn(3, 4, 8).half()):
        n, width = streams.shape[1:]
        residual, post = torch.rand(3, n, n), torch.rand(3, n)
        output = torch.randn(3, width).to(streams.dtype)
        assert backend.implementation("merge", streams, residual, post) is reference
        ours = merge_streams(streams, output, residual, post)
        assert torch.equal(ours, reference.merge_forward(streams, output, residual, post))
