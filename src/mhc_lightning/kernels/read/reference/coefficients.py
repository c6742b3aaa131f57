"""From raw coefficients to mappings (arXiv 2512.24880, eqs. 16–19) and back.

Coefficients are stored [coefficient, tokens] here, mappings per token.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads, MappingRule, StreamMappings
from mhc_lightning.kernels.sinkhorn.reference import sinkhorn_backward, sinkhorn_forward


def coefficients_forward(
    raw: Tensor, inverse_rms: Tensor, alpha: Tensor, bias: Tensor, n: int, rule: MappingRule
) -> StreamMappings:
    """Mappings for raw coefficients [K, tokens] and inverse norms [tokens].

    K is n² + 2n. Under the rule `"gates"` K is any number m + 2n, and the last of the mappings is
    the logits [tokens, m].
    """
    logits = _logits(raw, inverse_rms, alpha, bias, n)
    pre = logits[:n].sigmoid().t().contiguous()
    post = logits[n : 2 * n].sigmoid().mul(2).t().contiguous()
    if rule.name == "gates":
        return StreamMappings(pre, post, logits[2 * n :].t().contiguous())
    matrices = sinkhorn_forward(logits[2 * n :].reshape(n, n, -1), rule.num_iterations)
    return StreamMappings(pre, post, matrices.permute(2, 0, 1).contiguous())


def coefficients_backward(
    grads: MappingGrads,
    raw: Tensor,
    inverse_rms: Tensor,
    alpha: Tensor,
    bias: Tensor,
    n: int,
    width: int,
    rule: MappingRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through eqs. 19 to 15, in this order.

    Args:
        grads: Gradients of the mappings, None for a mapping without gradient.
        raw: [K, tokens].
        inverse_rms: [tokens].
        alpha: [3].
        bias: [K].
        n: Number of streams.
        width: Number of squares in the mean of the norm, n·C.
        rule: As in `coefficients_forward`.

    Returns:
        Gradients of `raw` [K, tokens], of the norm [tokens] (as the factor of x that it adds to the
        streams' gradient), of alpha [3] and of bias [K].
    """
    tokens = raw.shape[1]
    logits = _logits(raw, inverse_rms, alpha, bias, n)
    logit_grad = torch.zeros_like(raw)
    if grads.pre is not None:
        gate = logits[:n].sigmoid()
        torch.mul(grads.pre.t(), gate * (1 - gate), out=logit_grad[:n])
    if grads.post is not None:
        gate = logits[n : 2 * n].sigmoid()
        torch.mul(grads.post.t(), 2 * gate * (1 - gate), out=logit_grad[n : 2 * n])
    if grads.residual is not None and rule.name == "gates":
        logit_grad[2 * n :] = grads.residual.t()
    elif grads.residual is not None:
        matrix_grad = grads.residual.permute(1, 2, 0).contiguous()
        residual_grad = sinkhorn_backward(
            matrix_grad, logits[2 * n :].reshape(n, n, tokens), rule.num_iterations
        )
        logit_grad[2 * n :] = residual_grad.reshape(n * n, tokens)
    per_coefficient = _per_coefficient(alpha, n, len(raw))
    normed_grad = logit_grad * per_coefficient[:, None]
    alpha_terms = (logit_grad * raw) @ inverse_rms
    alpha_grad = torch.stack([part.sum() for part in alpha_terms.tensor_split([n, 2 * n])])
    inverse_rms_grad = (normed_grad * raw).sum(0)
    scale = inverse_rms.pow(3) * inverse_rms_grad / -width
    return normed_grad.mul_(inverse_rms), scale, alpha_grad, logit_grad.sum(1)


def _logits(raw: Tensor, inverse_rms: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Tensor:
    """Eq. 16: coefficients [K, tokens] before σ, 2σ and Sinkhorn."""
    gates = _per_coefficient(alpha, n, len(raw))
    return torch.addcmul(bias[:, None], raw * gates[:, None], inverse_rms)


def _per_coefficient(alpha: Tensor, n: int, count: int) -> Tensor:
    return torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(count - 2 * n)])
