"""RMSNorm that follows its input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with the weight taken to the input's dtype.

    Under autocast the input is of lower precision than the weight; without this the fused kernel
    is not used and the output is float32.
    """

    def reset_parameters(self) -> None:
        """Weights of one, also where ``torch.nn.init`` is told to do nothing."""
        with torch.no_grad():
            self.weight.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the input's dtype; the mean square is float32."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
