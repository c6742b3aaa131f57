"""The number of sub-layers in a recompute block."""

from collections.abc import Sequence

from mhc_lightning.errors import UserError


def best_recompute_size(num_sublayers: int | Sequence[int], num_streams: int) -> int:
    """The L_r that keeps the fewest values (arXiv 2512.24880, eq. 20); the smallest of equals.

    L_r minimises `n·Σ⌈L_s / L_r⌉ + (n + 2)·L_r`. The sum runs over pipeline stages of L_s
    sub-layers; no recompute block reaches into another stage.

    Args:
        num_sublayers: Number of sub-layers of the network or of each stage, two per Transformer
            block.
        num_streams: n.
    """
    stages = [num_sublayers] if isinstance(num_sublayers, int) else num_sublayers

    def widths_kept(size: int) -> int:
        return num_streams * sum(-(-stage // size) for stage in stages) + (num_streams + 2) * size

    return min(range(1, max(stages) + 1), key=widths_kept)


def resolve_recompute(
    setting: str | int | None, num_sublayers: int | Sequence[int], num_streams: int
) -> int:
    """The number of sub-layers per recompute block for `recompute=auto|off|<L_r>`.

    Args:
        setting: `"auto"`, `"off"` (False and None are the same), or sub-layers per block.
        num_sublayers: Number of sub-layers of the network, or of each pipeline stage.
        num_streams: n.

    Returns:
        Sub-layers per recompute block; 0 for none.

    Raises:
        UserError: The setting has another value.
    """
    if setting is None or setting is False or setting == "off":
        return 0
    if setting == "auto":
        return best_recompute_size(num_sublayers, num_streams)
    if isinstance(setting, int) and not isinstance(setting, bool) and setting >= 1:
        return setting
    raise UserError(
        f"recompute={setting}: use auto, off, or the number of sub-layers per block, at least 1"
    )
