"""RMSNorm that follows its input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with the weight cast to the input's dtype.

    Under autocast the input has a lower precision than the weight. Without the cast torch would not
    use its fused kernel, and the output would be float32.
    """

    def reset_parameters(self) -> None:
        """Fill the weights with one, also while `torch.nn.init` is disabled."""
        with torch.no_grad():
            self.weight.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the input's dtype; the mean square is float32."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
