"""Compiles the kernels for GPUs that are not there, and reads what they will use.

A launching function is called with CPU tensors; its launches are noted instead of run, and each
kernel is compiled as Triton's just-in-time compiler would specialise it for those arguments:

    python benchmarks/compiled_kernels.py --targets sm_90 --streams 4 --widths 2560

prints a table (``--json`` a list of objects): registers per thread, spills, shared memory, and how
many bytes of global memory an access takes. Not for Triton's interpreter (TRITON_INTERPRET unset).
"""

import argparse
import functools
import inspect
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mhc_lightning.kernels.triton_support.launch import Launch, intercept
from mhc_lightning.kernels.triton_support.target import Target, assume
from mhc_lightning.kernels.triton_support.workloads import Workload, workloads

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most bytes of shared memory that a program may have, and registers of all its threads.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTER_LIMIT = {"sm_80": 65_536, "sm_90": 65_536, "sm_100": 65_536, "gfx942": 131_072}


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel.

    Attributes:
        kernel: The kernel's name.
        registers: Registers of a thread (vector registers on AMD).
        spills: Instructions that spill registers to memory, or fetch them back.
        stack: Bytes of stack of a thread.
        shared: Bytes of shared memory of a program.
        loads: Number of load instructions from global memory, by bytes per thread.
        stores: Number of stores, likewise.
        atomics: Number of atomic instructions on global memory.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
    """

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    atomics: int
    num_warps: int
    num_stages: int


def recorded_launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call`` makes, none of which runs: what it returns is arbitrary."""
    launches: list[Launch] = []
    with intercept(launches.append):
        call()
    return launches


def _kind(target: GPUTarget) -> Target:
    return Target(target.backend, target.arch if isinstance(target.arch, int) else 0)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a recorded launch for a GPU and read what it uses.

    Args:
        launch: The launch, of a kernel that was defined without Triton's interpreter.
        target: One of `TARGETS`.
    """
    return _compile(_Specialised(launch, TARGETS[target]), TARGETS[target])


class _Specialised:
    """A kernel and all that its binary depends on; equal ones are compiled once."""

    def __init__(self, launch: Launch, target: GPUTarget) -> None:
        backend = make_backend(target)
        kernel, self.options = launch.kernel, launch.options
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*launch.args, **launch.constants, **self.options)
        _, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, options
        )
        self.source = ASTSource(kernel, signature, constants, attributes)
        self._key = (self.source.hash(), *self.options.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Specialised) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.cache
def _compile(kernel: _Specialised, target: GPUTarget) -> Resources:
    compiled = triton.compile(kernel.source, target=target, options=kernel.options)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return Resources(
        kernel=kernel.source.name,
        shared=compiled.metadata.shared,
        num_warps=kernel.options["num_warps"],
        num_stages=kernel.options["num_stages"],
        **read(compiled.asm),
    )


def _read_nvidia(asm: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "--print-code", str(cubin))
    (numbers,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    loads = re.findall(r"\b(LDG|LDGSTS)\b((?:\.\w+)*)", code)
    stores = re.findall(r"\b(STG)\b((?:\.\w+)*)", code)
    return {
        "registers": int(numbers[0]),
        "stack": int(numbers[1]),
        "spills": spills,
        "loads": _widths(modifiers for _, modifiers in loads),
        "stores": _widths(modifiers for _, modifiers in stores),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\.", code)),
    }


def _widths(instructions: Any) -> dict[int, int]:
    def width(modifiers: str) -> int:
        for name in modifiers.split("."):
            if name in ("64", "128", "256"):
                return int(name) // 8
            if name in ("U8", "S8", "U16", "S16"):
                return int(name[1:]) // 8
        return 4

    return dict(sorted(Counter(map(width, instructions)).items()))


def _read_amd(asm: Any) -> dict[str, Any]:
    code = asm["amdgcn"]

    def number(name: str) -> int:
        (value,) = set(re.findall(rf"\.{name}:\s+(\d+)", code))
        return int(value)

    def widths(kind: str) -> dict[int, int]:
        sizes = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
        sizes |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        pattern = rf"\b(?:global|buffer)_{kind}_([us]?(?:byte|short)|dword(?:x\d)?)"
        found = re.findall(pattern, code)
        return dict(sorted(Counter(sizes[name] for name in found).items()))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar ones go to lanes of vector registers
        "loads": widths("load"),
        "stores": widths("store"),
        "atomics": len(re.findall(r"\b(?:global|buffer)_atomic", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    path = Path(inspect.getfile(nvidia)).parent / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def compiled_workloads(
    n: int, width: int, dtype: torch.dtype, target: str, only: str = ""
) -> Iterator[tuple[str, Workload, Resources]]:
    """The resources of every launch of every workload at one shape, by name.

    Args:
        n: Number of streams.
        width: C.
        dtype: Dtype of the streams.
        target: One of `TARGETS`.
        only: Part of the names to keep.
    """
    for name, workload in workloads(4096, n, width, dtype, random=False).items():
        if only in name:
            with assume(_kind(TARGETS[target])):
                launches = recorded_launches(workload.run)
            for launch in launches:
                yield name, workload, compile_launch(launch, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--streams", nargs="+", type=int, default=[4])
    parser.add_argument("--widths", nargs="+", type=int, default=[1280, 2560, 4096, 7168])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--only", default="", help="part of a workload's name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    columns = ["workload", "n", "width", "dtype", "target", "registers", "spills", "shared"]
    columns += ["loads", "stores"]
    if not args.json:
        print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    shapes = itertools.product(args.targets, args.streams, args.widths, args.dtypes)
    for target, n, width, dtype in shapes:
        kind = getattr(torch, dtype)
        for name, workload, used in compiled_workloads(n, width, kind, target, args.only):
            shape = {"workload": name, "n": n, "width": width, "dtype": dtype, "target": target}
            rows.append(shape | {"elements": workload.elements} | asdict(used))
            if not args.json:
                print("|", " | ".join(str(rows[-1][name]) for name in columns), "|", flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
