"""Machines to plan for: kinds of devices, their memory and their peak rates."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mhc_lightning.errors import UserError

_GIB = 2**30
_HOST = 2 * 10**12
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# Version 2 and version 1: limit, use, statistics, and the entry of reclaimable bytes in them.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class DeviceKind:
    """The peak rates of a device, and the shares of them that a roofline assumes.

    Attributes:
        name: Name shown to the user.
        memory: Bytes that a process can allocate.
        low_flops: Peak of dense bfloat16 matrix products, FLOP/s.
        full_flops: Peak of float32 matrix products, FLOP/s.
        bandwidth: Bandwidth of its memory, bytes/s.
        link: Bandwidth to the devices of its node (NVLink, or PCIe where there is none), bytes/s in
            each direction.
        network: Bandwidth of its adapter to other nodes, bytes/s in each direction.
        pcie: Bandwidth to the memory of its host, bytes/s in each direction.
        host_memory: Bytes of the host's memory, for all devices of a node.
        per_node: Devices of a node.
        flops_share: Share of the peak that matrix products of a large model reach.
        bandwidth_share: Share of the bandwidth that a streaming kernel reaches.
        link_share: Share of a link that a collective reaches.
        link_latency: Seconds that a message within a node costs beside its bytes.
        network_latency: Seconds that a message to another node costs beside its bytes.
    """

    name: str
    memory: int
    low_flops: float
    full_flops: float
    bandwidth: float
    link: float
    network: float
    pcie: float
    host_memory: int
    per_node: int = 8
    flops_share: float = 0.6
    bandwidth_share: float = 0.8
    link_share: float = 0.7
    link_latency: float = 1e-6
    network_latency: float = 2e-6

    @property
    def is_gpu(self) -> bool:
        """True for a GPU."""
        return self.name != "cpu"


@dataclass(frozen=True)
class Machine:
    """Some devices of one kind.

    Attributes:
        kind: Kind of the devices.
        devices: Number of devices.
    """

    kind: DeviceKind
    devices: int

    @property
    def name(self) -> str:
        """The machine as `machine=` names it."""
        return f"{self.devices}x{self.kind.name}"

    @property
    def nodes(self) -> int:
        """Number of nodes that the devices fill."""
        return -(-self.devices // self.kind.per_node)

    def holds(self, device: int, host: int) -> bool:
        """True if a device has memory for some bytes, and the host of a node for others.

        Devices of a processor have the host's memory, of which each has an equal share.
        """
        kind = self.kind
        if kind.is_gpu:
            return device <= kind.memory and host <= kind.host_memory
        sharing = max(1, kind.host_memory // max(1, kind.memory))
        return device + -(-host // sharing) <= kind.memory


# Vendor data sheets, dense rates of the SXM forms. A link is half of NVLink's two-way figure, the
# network is one InfiniBand adapter of 400 Gb/s (A100: 200 Gb/s) per GPU, and PCIe has 16 lanes of
# generation 5 (A100 and L40S: 4). The L40S has no NVLink: within a node it talks over PCIe. The
# H800 is an H100 with 400 GB/s of NVLink. Memory is the part that CUDA leaves to programs; a host
# has 2 TB, as NVIDIA's own machines of eight have. Shares and latencies are assumptions.
_KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("a100", 79 * _GIB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, 32e9, _HOST),
        DeviceKind("h100", 79 * _GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, 64e9, _HOST),
        DeviceKind("h200", 139 * _GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9, 64e9, _HOST),
        DeviceKind("b200", 178 * _GIB, 2250e12, 75e12, 8.0e12, 900e9, 50e9, 64e9, _HOST),
        DeviceKind("h800", 79 * _GIB, 989e12, 67e12, 3.35e12, 200e9, 50e9, 64e9, _HOST),
        DeviceKind("l40s", 44 * _GIB, 362e12, 91.6e12, 0.864e12, 32e9, 25e9, 32e9, _HOST),
    )
}


def machine_of(text: str) -> Machine:
    """The machine that `machine=` names: a kind of device, or several as in `8xh200`.

    Raises:
        UserError: `text` names no machine.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d*[a-z]*)", text.strip().lower())
    kind = this_cpu() if match and match.group(2) == "cpu" else None
    if match and kind is None:
        kind = _KINDS.get(match.group(2))
    devices = int(match.group(1) or 1) if match else 0
    if kind is None or devices < 1:
        raise UserError(
            f"machine={text} is not known; give a kind of device, or a number of them as in"
            f" 8xh200; kinds: cpu, {', '.join(_KINDS)}"
        )
    return Machine(kind, devices)


def this_machine(devices: int, device: torch.device) -> Machine:
    """The machine that this process runs on, with the memory that is free now.

    Args:
        devices: Number of devices that a run uses.
        device: One of them; a GPU of an unknown kind counts as an A100, except for its memory.
    """
    if device.type != "cuda":
        kind = this_cpu()
        return Machine(replace(kind, memory=kind.memory // devices), devices)
    name = torch.cuda.get_device_name(device).lower()
    kind = next((kind for known, kind in _KINDS.items() if known in name), _KINDS["a100"])
    free, _ = torch.cuda.mem_get_info(device)
    host = int(_available_memory())
    return Machine(replace(kind, memory=free, host_memory=host), devices)


def this_cpu() -> DeviceKind:
    """This machine's processor: cores of 64 GFLOP/s (two 8-wide fused units at 2 GHz)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flops, memory = 64e9 * (cores or 1), int(_available_memory())
    rates = {"bandwidth": 20e9, "link": 5e9, "network": 1e9, "pcie": 20e9}
    return DeviceKind("cpu", memory, flops, flops, **rates, host_memory=memory, per_node=1)


def _available_memory() -> float:
    """Bytes that a process can still get, without swapping, in this container."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        available = int(match.group(1)) * 1024 if match else available
    return max(0, min(available, *(_left_in(*names) for names in _CGROUPS)))


def _left_in(limit: str, used: str, statistics: str, reclaimable: str) -> float:
    """Bytes that a control group still allows; reclaimable file pages do not count as used."""
    try:
        texts = [(_CGROUP_ROOT / name).read_text() for name in (limit, used, statistics)]
    except OSError:
        return math.inf
    if not texts[0].strip().isdigit():
        return math.inf
    match = re.search(rf"^{reclaimable} (\d+)$", texts[2], re.MULTILINE)
    return int(texts[0]) - int(texts[1]) + (int(match.group(1)) if match else 0)
