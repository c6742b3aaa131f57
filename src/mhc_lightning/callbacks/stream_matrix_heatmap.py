"""Heat maps of a model's residual mappings, and of their products over depth, in training."""

from collections.abc import Sequence
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhc_lightning.callbacks.gains import chains, mean_products
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.callbacks.watching.observations import Observation, predecessors
from mhc_lightning.callbacks.watching.stream_watcher import Extract
from mhc_lightning.errors import UserError
from mhc_lightning.loggers.trainer_loggers import log_image, takes_images
from mhc_lightning.plotting.matrix_heatmap import matrix_heatmap


class _Matrices(NamedTuple):
    spans: list[list[int]]  # sub-layers
    depth: int
    means: list[Tensor]  # one [n, n] per span


class StreamMatrixHeatmap(StreamSampler[_Matrices]):
    """Draws token-averaged stream matrices in the manner of figure 8 of arXiv 2512.24880.

    It draws one picture for each chosen sub-layer, and one for the product over the first half, the
    second half and the whole of the stack (multiplied token by token, then averaged). Row sums are
    on the right, column sums below; colours are centred on zero. Tags:
    `stream_matrices/layer_<k>` and `stream_matrices/composite_<first>_to_<last>`, sub-layers
    counted from 0 in the order of the calls. Products are taken along the streams: each forward
    pass of a step is a chain of its own (see `StreamSampler`). Where the number of streams or
    tokens changes, each stretch of equal shape is a chain.

    Pictures go to TensorBoard and to every logger with a `log_image` method; with neither,
    nothing is sampled.

    Args:
        layers: Sub-layers to draw, negative ones counted from the end; None takes the first, the
            middle and the last.
        every_n_steps: Optimizer steps between samples; None takes 50 times the trainer's
            `log_every_n_steps` (drawing takes longer than measuring), and the first step that the
            trainer logs. The last step of a run (`max_steps`) is always drawn.
        extract: `(module, args, output) -> StreamMappings | None` for foreign modules.

    Raises:
        UserError: The interval is not a positive integer or, at the first sample, a layer is out
            of range.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
    ) -> None:
        super().__init__(every_n_steps, extract, log_intervals=50, ends=True)
        self.layers = None if layers is None else list(layers)
        self._checked = False

    def reduce(self, observations: list[Observation]) -> _Matrices:
        """Average the chosen matrices and products over tokens."""
        residuals = [observation.mappings.residual for observation in observations]
        layers = [observation.layer for observation in observations]
        chosen = self._chosen_layers(self.depth)
        spans = [[k] for k, layer in enumerate(layers) if layer in chosen]
        for chain in chains(residuals, predecessors(observations)):
            middle = len(chain) // 2
            parts = (chain[:middle], chain[middle:], chain)
            # Chains that branch off one trunk may share their beginning.
            spans += [part for part in parts if len(part) > 1 and part not in spans]
        means = mean_products(residuals, spans)
        return _Matrices([[layers[k] for k in span] for span in spans], self.depth, means)

    def report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, reduced: _Matrices
    ) -> dict[str, float]:
        """Draw one sample."""
        if takes_images(trainer):
            for span, mean in zip(reduced.spans, reduced.means, strict=True):
                first, last = span[0], span[-1]
                single = len(span) == 1
                name = f"layer_{first}" if single else f"composite_{first}_to_{last}"
                title = f"Sub-layer {first} of {reduced.depth}"
                if not single:
                    among = "" if len(span) == last - first + 1 else f" ({len(span)} of one chain)"
                    title = f"Sub-layers {first} to {last}{among}, product"
                matrix = mean.to("cpu", torch.float64).numpy()
                log_image(
                    trainer, f"stream_matrices/{name}", matrix_heatmap(matrix, title, step), step
                )
        return {}

    def _chosen_layers(self, depth: int) -> list[int]:
        if self.layers is None:
            return sorted({0, depth // 2, depth - 1})
        wrong = [k for k in self.layers if not -depth <= k < depth]
        if wrong and not self._checked:
            raise UserError(
                f"StreamMatrixHeatmap: layers holds {wrong[0]}, but the model has {depth}"
                f" sub-layers; choose from 0 to {depth - 1} (or -{depth} to -1, from the end)"
            )
        self._checked = True  # a later step may run fewer
        return sorted({k % depth for k in self.layers if k not in wrong})
