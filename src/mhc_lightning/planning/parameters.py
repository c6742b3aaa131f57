"""Parameter counts: all, those active for one token, connections, vocabulary, n-gram memory."""

from typing import NamedTuple

from mhc_lightning.modules import Connection, MixtureOfExperts, Transformer
from mhc_lightning.planning.tables import rows_per_token, tables_of


class ParameterCounts(NamedTuple):
    """Numbers of parameters, counted as in Table 5 of arXiv 2512.24880.

    Attributes:
        total: All parameters, both vocabulary matrices included, but no rows that only pad a table
            of n-grams.
        active: Parameters that one token uses: the head but not the embedding, of the routed
            experts the share that a token chooses, and of a table of n-grams the rows that it
            reads.
        connections: Parameters of the residual connections.
        vocabulary: Embedding and head.
        memory: Rows that n-grams can name, as arXiv 2601.07372 counts a memory. Its projections,
            gates and convolutions are in `total` and `active` only.
    """

    total: int
    active: int
    connections: int
    vocabulary: int
    memory: int


def count_parameters(model: Transformer) -> ParameterCounts:
    """Count a model's parameters; it may be on the meta device."""
    tables = tables_of(model)
    memory = sum(each.used_values for each in tables)
    total = sum(p.numel() for p in model.parameters())
    total -= sum(each.padding_values for each in tables)
    embedding = model.embedding.weight.numel()
    idle = memory - sum(rows_per_token(each.table) * each.table.width for each in tables)
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
        memory=memory,
    )
