"""The floating-point operations of training a network, counted from its modules."""

from torch import nn

from mhc_lightning.modules.attention import LatentAttention
from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.memory.engram import ShortConvolution
from mhc_lightning.modules.memory.over_decoding import OverDecoding
from mhc_lightning.modules.mixture_of_experts import MixtureOfExperts


def training_flops_per_token(network: nn.Module, sequence_length: int) -> int:
    """FLOPs of forward and backward per token, without recomputation.

    The count is 6 per parameter that multiplies a token (the active experts only, no embedding and
    no table of n-grams), plus causal attention with half of S keys per query.
    """
    matrix_parameters = attention_flops = 0
    for module in network.modules():
        values = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if isinstance(module, MixtureOfExperts):
            values = int(module.num_active_experts / module.num_experts * values)
        elif isinstance(module, LatentAttention):
            widths = 2 * module.head_dim + module.rope_dim
            attention_flops += sequence_length * module.num_heads * widths
        elif isinstance(module, OverDecoding):
            values = network.get_parameter("output.weight").numel()  # the head runs once more
        elif isinstance(module, ShortConvolution):
            values = module.weight.numel()
        elif isinstance(module, nn.Embedding | NgramTable):
            values = 0  # rows are read, not multiplied
        matrix_parameters += values
    return 6 * matrix_parameters + 3 * attention_flops
