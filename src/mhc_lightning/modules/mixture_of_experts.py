"""Mixture of experts, sigmoid router, loss-free balancing (arXiv 2412.19437, 2408.15664)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.grouped_product import grouped_product
from mhc_lightning.kernels.precision import compute_dtype, full_precision, widened
from mhc_lightning.kernels.transforms import transforming
from mhc_lightning.modules.feed_forward import SwiGLU
from mhc_lightning.modules.precision import KeepsFloat32
from mhc_lightning.modules.token_exchange import AtHome, TokenExchange, Visit


class LoadBalance(KeepsFloat32):
    """Routing biases that even out the experts' loads, without an auxiliary loss.

    Args:
        num_experts: Routed experts.
        update_speed: Step of a bias in one `update`.

    Attributes:
        bias: [num_experts], float32; added to the affinities for the choice of experts only.
        load: [num_experts]; tokens routed to each expert since the last `update`.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, num_experts: int, update_speed: float) -> None:
        super().__init__()
        self.update_speed = update_speed
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer(
            "load", torch.zeros(num_experts, dtype=torch.float32), persistent=False
        )

    def reset_parameters(self) -> None:
        """Set bias and load to zero."""
        self.bias.zero_()
        self.load.zero_()

    def count(self, tokens: Tensor) -> None:
        """Add to the load: `tokens` [num_experts].

        Within a transform of `torch.func` this method does nothing: a transform may change no
        outside tensor.
        """
        if transforming():
            return
        self._follow_bias()
        self.load += tokens

    def _follow_bias(self) -> None:
        """Put the load on the bias's device: loaders of a meta network do not know the load."""
        if self.load.is_meta and not self.bias.is_meta:
            self.load = torch.zeros_like(self.bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_bias()

    def update(self) -> None:
        """Raise the bias of underloaded experts and lower that of overloaded ones; reset the load.

        The caller sums `load` over data-parallel ranks, and calls this once per optimizer step.
        """
        self._follow_bias()
        self.bias += self.update_speed * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Router(nn.Linear):
    """A projection in float32 (float64 for float64), whatever the network's precision."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., num_experts]."""
        dtype = compute_dtype(input, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        with full_precision(input):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, and the `num_active_experts` best of many routed ones.

    A token's affinity to an expert is `s = σ(u · e)`. Experts are chosen by `s + bias` and weighted
    by `s` over the sum of the chosen `s`. No token is dropped. The bias is no parameter:
    `balance.update` moves it against the load since its last call.

    With several groups of experts (one for each node, say) a token goes to experts of a few groups
    only: those with the largest sums of their `num_active_experts / num_active_expert_groups`
    highest `s + bias` (node-limited routing, section 2.1.2 of arXiv 2412.19437).

    Args:
        dim: Width C of input and output.
        expert_dim: Width between an expert's projections.
        num_experts: Routed experts.
        num_active_experts: Routed experts per token.
        num_shared_experts: Experts for every token, as one SwiGLU of their joint width.
        bias_update_speed: Step of a bias in one update.
        num_expert_groups: Groups of as many neighbouring routed experts each.
        num_active_expert_groups: Groups that a token's experts come from, at most.

    Attributes:
        matrices: Names of the parameters that hold the routed experts.
        exchange: The way of token copies to the experts, which a strategy may replace.

    Raises:
        UserError: More experts are active than exist, or the groups do not divide them.
    """

    matrices: ClassVar = ("gate_up", "down")
    exchange: TokenExchange = AtHome()

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_experts: int,
        num_active_experts: int,
        num_shared_experts: int,
        bias_update_speed: float = 0.001,
        num_expert_groups: int = 1,
        num_active_expert_groups: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= num_active_experts <= num_experts:
            raise UserError(
                f"model.num_active_experts must be between 1 and model.num_experts ({num_experts}),"
                f" not {num_active_experts}"
            )
        _check_groups(num_experts, num_active_experts, num_expert_groups, num_active_expert_groups)
        self.num_experts = num_experts
        self.num_active_experts = num_active_experts
        self.num_expert_groups = num_expert_groups
        self.num_active_expert_groups = num_active_expert_groups
        self.router = Router(dim, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * expert_dim))
        self.down = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.shared = (
            SwiGLU(dim, num_shared_experts * expert_dim) if num_shared_experts > 0 else None
        )
        self.balance = LoadBalance(num_experts, bias_update_speed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts as `nn.Linear` does; a Transformer draws them in its own way."""
        with torch.no_grad():
            for matrix in (self.gate_up, self.down):
                bound = matrix.shape[1] ** -0.5
                matrix.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        tokens = x.reshape(-1, x.shape[-1])
        gates, experts = self.route(tokens)
        visit, order = self._send(tokens, experts)
        shared = None if self.shared is None else self.shared(x)  # while copies travel
        rows, ends = visit.arrive()
        visit.begin_return(self._apply_experts(rows, ends))
        routed = _gathered(visit.returned(), order, gates).view(x.shape)
        return routed if shared is None else shared + routed

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [tokens, num_active_experts] of the chosen experts.

        The weights are float32, or float64 in a network of float64.
        """
        scores = widened(self.router(tokens)).sigmoid()
        choice = self._limit_to_groups(scores.detach() + self.balance.bias)
        experts = choice.topk(self.num_active_experts, sorted=False).indices
        if self.training:
            self.balance.count(_count(experts, self.num_experts))
        gates = scores.gather(1, experts)
        # 1e-20, as in the reference code: the sum of affinities may vanish in float32.
        return gates / (gates.sum(1, keepdim=True) + 1e-20), experts

    def _limit_to_groups(self, choice: Tensor) -> Tensor:
        """[T, num_experts], with -inf for the experts of groups that a token does not go to."""
        if self.num_expert_groups == self.num_active_expert_groups:
            return choice
        grouped = choice.unflatten(1, (self.num_expert_groups, -1))
        highest = self.num_active_experts // self.num_active_expert_groups
        sums = grouped.topk(highest, sorted=False).values.sum(-1)
        groups = sums.topk(self.num_active_expert_groups, sorted=False).indices
        closed = torch.ones_like(sums, dtype=torch.bool).scatter(1, groups, False)
        return grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)

    def _send(self, tokens: Tensor, experts: Tensor) -> tuple[Visit, Tensor]:
        """Sort token copies by expert and send them; the visit, and the order of the sorting."""
        order = experts.flatten().argsort(stable=True)
        counts = _count(experts, self.num_experts)
        return self.exchange.begin(tokens[order // self.num_active_experts], counts), order

    def _apply_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply each expert at home to its run of rows."""
        hidden = grouped_product(rows, self.exchange.held(self.gate_up), ends)
        gate, up = hidden.chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.exchange.held(self.down), ends)


def _gathered(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    """The sum over each token's copies, which `order` has sorted by expert, by their gates."""
    by_token = rows[order.argsort()].view(*gates.shape, rows.shape[-1])
    return torch.einsum("tk,tkc->tc", gates.to(rows.dtype), by_token)


def _check_groups(num_experts: int, num_active_experts: int, groups: int, active: int) -> None:
    if groups < 1 or num_experts % groups:
        raise UserError(
            f"model.num_expert_groups must divide model.num_experts ({num_experts}),"
            f" not be {groups}"
        )
    if not 1 <= active <= groups:
        raise UserError(
            "model.num_active_expert_groups must be between 1 and model.num_expert_groups"
            f" ({groups}), not {active}"
        )
    if num_active_experts % active:
        raise UserError(
            f"model.num_active_expert_groups must divide model.num_active_experts"
            f" ({num_active_experts}), not be {active}"
        )
    if num_active_experts > active * (num_experts // groups):
        raise UserError(
            f"model.num_active_expert_groups={active} groups of {num_experts // groups} experts"
            f" have fewer than model.num_active_experts={num_active_experts}: choose more groups"
        )


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """The number of entries of each expert [num_experts], int64, without a device sync."""
    chosen = experts.flatten()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
