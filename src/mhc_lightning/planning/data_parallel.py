"""The devices that share a batch, and the state that each of them holds."""

from dataclasses import dataclass, field

from mhc_lightning.planning.expert_parallel import ExpertParallel

PLACEMENTS = ("device", "sharded", "host")


@dataclass(frozen=True)
class RowTraining:
    """How the tables of a memory are held and trained.

    Attributes:
        placement: Where the rows are: `device`, `sharded` or `host`.
        update: What updates the rows that have a gradient: `adam` or `rowwise`.
        step_tokens: Tokens of an optimizer step on one data-parallel device; None for those of one
            micro-batch.
        run_tokens: Tokens of the whole run, over all devices; None if they name every row.
    """

    placement: str = "device"
    update: str = "adam"
    step_tokens: int | None = None
    run_tokens: int | None = None

    def state_bytes(self, width: int, value: int) -> int:
        """Bytes that the optimizer keeps of a row that it has updated.

        They are the row's number (int64), the count of its updates (int32), and its moments.

        Args:
            width: Values of a row.
            value: Bytes of a value.
        """
        moments = 2 * width if self.update == "adam" else 1
        return 8 + 4 + moments * value


@dataclass(frozen=True)
class DataParallel:
    """Data parallelism: the number of devices, and the state that each device holds.

    Attributes:
        devices: Number of data-parallel devices.
        sharded: Whether each device holds a shard of weights, gradients and optimizer state (FSDP)
            instead of all of them (DDP, or a single device).
        copies_gradients: Whether gradients are reduced in separate buffers.
        rows: What becomes of the tables of a memory.
        pipeline_size: Devices of the pipeline that each of the devices belongs to; 1 without.
        experts: How routed experts are spread over neighbours among the devices.
    """

    devices: int = 1
    sharded: bool = False
    copies_gradients: bool = False
    rows: RowTraining = field(default_factory=RowTraining)
    pipeline_size: int = 1
    experts: ExpertParallel = field(default_factory=ExpertParallel)

    def rank(self, device: int, stage: int) -> int:
        """The rank of a device.

        Those that share experts follow each other, so that tokens stay in a node, then the devices
        of their pipelines.

        Args:
            device: Of the data-parallel devices.
            stage: Of the devices of its pipeline.
        """
        outer, inner = divmod(device, self.experts.size)
        return (outer * self.pipeline_size + stage) * self.experts.size + inner

    def in_node(self, per_node: int) -> int:
        """How many of the devices are in one node of `per_node` devices."""
        spread = self.experts.size
        if spread >= per_node:
            return min(self.devices, per_node)
        return min(self.devices, spread * max(1, per_node // (self.pipeline_size * spread)))

    @property
    def placement(self) -> str:
        """Where the rows of tables really are: devices that share weights share tables as well."""
        if self.rows.placement == "host":
            return "host"
        several = self.devices > 1 and (self.sharded or self.rows.placement == "sharded")
        return "sharded" if several else "device"
