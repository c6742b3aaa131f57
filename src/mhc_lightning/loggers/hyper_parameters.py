"""Hyper-parameters in TensorBoard's tab HPARAMS."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

METRICS = ("val/loss", "train/loss")


def declare(writer: Any, values: Mapping[str, Any] | Namespace) -> None:
    """Write the hyper-parameters of a run, and which of its scalars are its metrics.

    TensorBoard shows the last value of each metric's scalars.

    Args:
        writer: A `SummaryWriter`.
        values: Hyper-parameters; sections may be nested.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = vars(values) if isinstance(values, Namespace) else values
    for summary in hparams(_flat(plain), dict.fromkeys(METRICS)):
        writer._get_file_writer().add_summary(summary)


def is_declaration(event: Any) -> bool:
    """True for an `Event` that `declare` has written."""
    return any(v.metadata.plugin_data.plugin_name == "hparams" for v in event.summary.value)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by flat names, such as `model/dim`; what is no number is a text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if str(key).startswith("_"):  # of LightningCLI
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}/")
        else:
            flat[f"{above}{key}"] = value if isinstance(value, int | float | str) else str(value)
    return flat
