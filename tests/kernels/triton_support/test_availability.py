"""Where Triton is missing or broken: one clear line, and plain torch unless told otherwise."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.build import compile_module_from_src

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import backend
from mhc_lightning.kernels.merge import reference
from mhc_lightning.kernels.triton_support import availability, probe

CPU = torch.device("cpu")


def trouble():
    return availability.trouble_with_triton.__wrapped__(CPU)


def test_where_a_kernel_runs_there_is_no_trouble():
    assert trouble() is None


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert trouble().startswith("Triton is not installed: pip install triton")


def test_triton_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "mhc_lightning.kernels.triton_support.probe", None)
    line = trouble()
    assert line.startswith("Triton does not work here (ModuleNotFoundError: import of")
    assert "pip install --force-reinstall triton" in line


@pytest.fixture
def building(monkeypatch, tmp_path):
    """The first launch builds Triton's launcher with the machine's C compiler, as on a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(
        probe,
        "launch_something",
        lambda device: compile_module_from_src("#include <Python.h>\nint it;", "launcher", [], []),
    )


def test_no_c_compiler(building, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert trouble() == (
        "Triton does not work here (there is no C compiler): install gcc, or name a compiler in CC"
    )


def test_a_c_compiler_that_fails(building, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert "(false failed): fix this C compiler" in trouble()
    monkeypatch.setattr(availability.sysconfig, "get_path", lambda name: "/nowhere")
    assert "(Python.h is missing): install this Python's headers, such as python3." in trouble()


def test_no_driver():
    """For real: this machine has none that Triton knows, or else it has, and a kernel runs."""
    code = (
        "import torch; from mhc_lightning.kernels.triton_support import availability;"
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu');"
        "print(availability.trouble_with_triton(device))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    expected = "None" if torch.cuda.is_available() else "(it finds no driver of a GPU)"
    assert expected in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr


def test_auto_goes_on_in_torch_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "trouble_with_triton", lambda device: "it is broken: mend it")
    monkeypatch.setattr(backend, "ordinary", lambda tensor: True)
    backend._warn_once.cache_clear()
    on_gpu: Any = SimpleNamespace(
        is_meta=False,
        is_cuda=True,
        dtype=torch.bfloat16,
        shape=(2, 4, 8),
        numel=lambda: 64,
        device=torch.device("cuda", 0),
    )
    monkeypatch.setenv(backend.VARIABLE, "auto")
    with pytest.warns(
        UserWarning, match=r"^it is broken: mend it\. Until then .* plain torch"
    ) as w:
        for _ in range(3):
            assert backend.implementation("merge", on_gpu) is reference
    assert len(w) == 1 and "\n" not in str(w[0].message)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(UserError, match=r"^MHC_LIGHTNING_KERNELS=triton, but .* broken: mend"):
        backend.implementation("merge", on_gpu)
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.implementation("merge", on_gpu) is reference


def test_nothing_is_found_out_about_triton_on_fake_tensors(monkeypatch):
    """What a launch under a tracer says would be remembered, and hold for real tensors."""
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    availability.trouble_with_triton.cache_clear()
    with FakeTensorMode():
        assert backend.fuses_seams(torch.empty(2, 4, 8))
    assert availability.trouble_with_triton.cache_info().currsize == 0
    assert backend.implementation("merge", torch.empty(2, 4, 8)) is not reference
