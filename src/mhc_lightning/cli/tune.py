"""`tune`: finds the kernels' best block sizes for an experiment's shape on this machine's GPU."""

from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from mhc_lightning.kernels.triton_support.tuning import Choice
    from mhc_lightning.modules import Connection
    from mhc_lightning.modules.memory.engram import EngramBlock

# Workloads of every connection.
_STREAMS = ["expand_backward", "aggregate_forward", "merge_forward", "merge_backward"]
_GATES = ["context_gate_forward", "context_gate_backward"]
_WRITES = ["gated_write_forward", "gated_write_backward"]


def tune(experiment: Experiment, arguments: Arguments) -> None:
    """Measure, print times before and after, and enter the choices in the user's table.

    Raises:
        UserError: there is no GPU, Triton does not work on it, or the experiment runs none of the
            kernels.
    """
    import torch

    from mhc_lightning.cli.instantiation import build
    from mhc_lightning.modules import ResidualConnection
    from mhc_lightning.modules.memory.engram import EngramBlock
    from mhc_lightning.planning import ShapesOnly, precision_of
    from mhc_lightning.planning.sub_layers import sub_layers

    if not torch.cuda.is_available():
        raise UserError(
            "tune measures on a GPU, and torch finds none on this machine; run it where you train"
        )
    values = experiment.values()
    with ShapesOnly():
        model = build(experiment, "model")
    connection = sub_layers(model)[0][0]
    if isinstance(connection, ResidualConnection):
        raise UserError(
            "connection=residual runs none of the kernels, so there is nothing to tune;"
            " say connection=mhc, or take another experiment"
        )
    setting = values["trainer"].get("precision")
    low = torch.float16 if setting == "16-true" else torch.bfloat16
    dtype = low if precision_of(setting).activation == 2 else torch.float32
    data = values["data"]
    tokens = (data["micro_batch_size"] or data["batch_size"]) * data["sequence_length"]
    engram = next((m for m in model.modules() if isinstance(m, EngramBlock)), None)
    names = workloads_of(connection, model.set_recompute(values["recompute"]), engram)
    try:
        _tune(connection, names, model.recompute_block_size, tokens, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"this GPU cannot hold the streams of {tokens:,} tokens several times over;"
            " say data.micro_batch_size=1, or a smaller data.sequence_length"
        ) from error


def _tune(
    connection: "Connection", names: list[str], recompute_block: int, tokens: int, dtype: Any
) -> None:
    import torch

    from mhc_lightning.kernels.triton_support.availability import trouble_with_triton

    trouble = trouble_with_triton(torch.device("cuda", torch.cuda.current_device()))
    if trouble is not None:
        raise UserError(f"tune measures Triton's kernels, but {trouble}")
    import triton
    from triton.testing import do_bench

    from mhc_lightning.kernels.triton_support.block_sizes import (
        add_to_table,
        forget_tables,
        user_table,
    )
    from mhc_lightning.kernels.triton_support.tuning import tune as tune_kernels
    from mhc_lightning.kernels.triton_support.workloads import workloads

    device = torch.cuda.get_device_name()
    path = user_table(device)
    measured_on = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    n, width = connection.num_streams, connection.dim
    kind = str(dtype).removeprefix("torch.")
    print(f"{device}: n = {n}, C = {width}, {kind}, {tokens:,} tokens")
    work = workloads(tokens, n, width, dtype, "cuda", sub_layers=max(recompute_block, 1))
    for choice in tune_kernels(
        work, names, lambda call: do_bench(call, return_mode="median") / 1e3
    ):
        print(line(choice), flush=True)
        lookup = choice.lookup
        add_to_table(path, lookup.kernel, lookup.key, choice.config, measured_on)
    forget_tables()
    print(f"written to {path}, where every run on this machine finds it")


def workloads_of(
    connection: "Connection", recompute_block: int, engram: "EngramBlock | None" = None
) -> list[str]:
    """Names of the workloads of training with a connection, and of `sinkhorn_knopp` beside mHC.

    Args:
        connection: One of the network's, none of which is a residual one.
        recompute_block: Sub-layers per recompute block; 0 if nothing is recomputed.
        engram: The memory of a block, if there is one: all of a network's are alike.
    """
    from mhc_lightning.kernels.backend import MOST_FUSED_STREAMS
    from mhc_lightning.modules import (
        HyperConnection,
        ManifoldHyperConnection,
        SinglePassHyperConnection,
    )

    single_pass = isinstance(connection, SinglePassHyperConnection)
    fused = connection.num_streams <= MOST_FUSED_STREAMS
    # A network of single-pass connections is read out with weights of its last one.
    names = [*_STREAMS, "aggregate_backward" if single_pass else "mean_forward"]
    if not (single_pass and fused):
        names += ["aggregate_backward_of_pre"]
    if recompute_block:
        names += ["replay_forward"]
    if engram is not None:
        end = "" if engram.conv is None else "_convolved"
        names += [*_GATES, *(f"{name}{end}" for name in _WRITES)]
    if isinstance(connection, HyperConnection):
        names += ["project_per_stream", "project_backward_per_stream"]
        return [*names, "hyper_coefficients_forward", "hyper_coefficients_backward"]
    if fused:
        end = "_single_pass" if single_pass else ""
        names += [f"merge_project{end}", f"merge_project_backward{end}"]
    names += ["project", "project_backward"]
    if isinstance(connection, ManifoldHyperConnection):  # its variants mix in torch
        names += ["coefficients_forward", "coefficients_backward"]
        names += ["sinkhorn_forward", "sinkhorn_backward"]
    return names


def line(choice: "Choice") -> str:
    """The times of one kernel, and the block sizes chosen."""
    before, after = choice.before * 1e6, choice.after * 1e6
    name, config = choice.lookup.kernel, choice.config
    blocks = f"{config.block_tokens} tokens x {config.block_width}"
    how = f"{blocks}, {config.num_warps} warps, {config.num_stages} stages"
    kept = "kept" if config == choice.lookup.config else how
    return f"{name:<34} {before:9.1f} us -> {after:9.1f} us  {kept} ({choice.tried} tried)"
