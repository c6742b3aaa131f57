"""The stability dashboard: a layout of TensorBoard's Custom Scalars page."""

import lightning.pytorch as pl

from mhc_lightning.loggers.trainer_loggers import is_tensorboard


def _chart(*tags: str) -> list[object]:
    # TensorBoard matches tags by regular expression from the start; `$` keeps layers out.
    return ["Multiline", [f"{tag}$" for tag in tags]]


LAYOUT = {
    "Stability": {
        "loss": _chart("train/loss", "val/loss"),
        "composite Amax gain": _chart(
            "amax_gain/composite/forward", "amax_gain/composite/backward"
        ),
        "single-layer Amax gain": _chart("amax_gain/single/forward", "amax_gain/single/backward"),
        "gradient norm": _chart("train/grad_norm"),
        "stream diversity": _chart("stream_diversity/mean", "stream_diversity/min"),
        "Sinkhorn residual": _chart("sinkhorn_residual/row", "sinkhorn_residual/column"),
    },
    "By sub-layer": {
        "composite gain, backward": _chart(r"amax_gain/composite/backward/layer_\d+"),
        "composite gain, forward": _chart(r"amax_gain/composite/forward/layer_\d+"),
        "stream diversity": _chart(r"stream_diversity/layer_\d+"),
    },
    "Memory": {
        "gate": _chart(r"memory/gate/layer_\d+"),
        "norm of what memory adds": _chart(r"memory/added_norm/(input|layer_\d+)"),
        "rows touched": _chart("memory/rows_touched"),
        "collisions": _chart("memory/collisions"),
    },
    "Speed and schedule": {
        "tokens per second": _chart("train/tokens_per_second"),
        "model-FLOPs utilisation": _chart("train/mfu"),
        "learning rate": _chart("train/learning_rate"),
    },
}
"""Categories, their charts, and the tags in each, as regular expressions."""


class StabilityDashboard(pl.Callback):
    """Writes the dashboard's layout to every TensorBoard logger as training starts.

    It is TensorBoard's *Custom Scalars* page (`http://localhost:6006/#custom_scalars`): loss,
    composite and single-layer gain forward and backward, gradient norm, stream diversity and
    Sinkhorn residual on one page, then the same by sub-layer, the use of a memory, speed and
    learning rate. A chart whose tags a run does not log stays empty.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the layout, on rank zero."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if is_tensorboard(logger):
                logger.experiment.add_custom_scalars(LAYOUT)
