"""Parameter counts: all, those active for one token, connections, vocabulary."""

from typing import NamedTuple

from mhc_lightning.modules import Connection, MixtureOfExperts, Transformer


class ParameterCounts(NamedTuple):
    """Numbers of parameters, counted as in Table 5 of arXiv 2512.24880.

    Attributes:
        total: All parameters, both vocabulary matrices included.
        active: Parameters that multiply a token: the head but not the embedding, and of the routed
            experts the share that a token chooses.
        connections: Parameters of the residual connections.
        vocabulary: Embedding and head.
    """

    total: int
    active: int
    connections: int
    vocabulary: int


def count_parameters(model: Transformer) -> ParameterCounts:
    """Count a model's parameters; it may be on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    embedding = model.embedding.weight.numel()
    idle = 0
    connections = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            routed = module.gate_up.numel() + module.down.numel()
            idle += routed * (module.num_experts - module.num_active_experts) // module.num_experts
        elif isinstance(module, Connection):
            connections += sum(p.numel() for p in module.parameters())
    return ParameterCounts(
        total=total,
        active=total - embedding - idle,
        connections=connections,
        vocabulary=embedding + model.output.weight.numel(),
    )
