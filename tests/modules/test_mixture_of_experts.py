"""Mixture of experts against a token-by-token computation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import MixtureOfExperts


def make(
    num_experts: int = 6, active: int = 2, shared: int = 1, expert_dim: int = 12
) -> MixtureOfExperts:
    moe = MixtureOfExperts(
        dim=8,
        expert_dim=expert_dim,
        num_experts=num_experts,
        num_active_experts=active,
        num_shared_experts=shared,
    )
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def token_by_token(moe: MixtureOfExperts, tokens: Tensor) -> Tensor:
    """arXiv 2412.19437, eqs. 12 to 16."""
    rows = []
    for token in tokens:
        scores = (moe.router.weight @ token).sigmoid()
        chosen = sorted(
            range(moe.num_experts), key=lambda e: float((scores[e] + moe.balance.bias[e]).detach())
        )[-moe.num_active_experts :]
        total = sum(scores[e] for e in chosen)
        out = moe.shared(token) if moe.shared is not None else torch.zeros_like(token)
        for e in chosen:
            gate, up = (token @ moe.gate_up[e]).chunk(2)
            out = out + scores[e] / total * ((F.silu(gate) * up) @ moe.down[e])
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("expert_dim", [12, 10])  # 10: rows that are no multiple of 16 bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(shared: int, expert_dim: int, dtype: torch.dtype) -> None:
    moe = make(shared=shared, expert_dim=expert_dim).to(dtype)
    moe.balance.bias.copy_(torch.randn(6) * 0.3)
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    inputs = [x, *moe.parameters()]
    ours = moe(x).flatten(0, 1)
    expected = token_by_token(moe, x.flatten(0, 1))
    assert (ours - expected).abs().max() < 1e-4
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-3 * b.abs().max().clamp(min=1)


def test_experts_without_tokens_get_zero_gradients() -> None:
    moe = make()
    moe.balance.bias[:4] = -10
    moe(torch.randn(7, 8)).square().sum().backward()
    assert moe.gate_up.grad is not None
    assert moe.gate_up.grad[:4].abs().sum() == 0
    assert moe.gate_up.grad[4:].abs().sum() > 0


def test_load_counts_choices_while_training_only() -> None:
    moe = make()
    moe(torch.randn(3, 5, 8))
    moe(torch.randn(2, 8))
    assert moe.balance.load.sum() == 2 * 17
    moe.eval()
    moe(torch.randn(3, 5, 8))
    assert moe.balance.load.sum() == 2 * 17


def test_bias_moves_against_the_load_and_balances() -> None:
    moe = make(num_experts=8, active=2, shared=0)
    moe.balance.update_speed = 0.02
    tokens = torch.randn(512, 8) + 1.5  # a shared direction, so that some experts are popular

    def violation() -> float:
        moe(tokens)
        load = moe.balance.load
        result = float(load.max() / load.mean() - 1)
        moe.balance.update()
        return result

    first = violation()
    assert set((moe.balance.bias / 0.02).round().tolist()) <= {-1.0, 0.0, 1.0}
    for _ in range(200):
        last = violation()
    assert first > 1.0
    assert last < 0.2
    assert moe.balance.load.sum() == 0


def test_bias_stays_float32() -> None:
    moe = make().bfloat16()
    assert moe.balance.bias.dtype == torch.float32
    assert moe.gate_up.dtype == torch.bfloat16
    assert moe(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16


def test_more_active_experts_than_experts() -> None:
    with pytest.raises(UserError, match=r"num_active_experts must be between 1 .*\(4\), not 5"):
        make(num_experts=4, active=5)


@pytest.mark.parametrize("logit", [-40.0, -70.0, -110.0, -1000.0])
def test_affinities_too_small_for_float32(logit: float) -> None:
    """As in DeepSeek-V3's code, 1e-20 is added to the sum: small affinities fade out."""
    moe = make(shared=0)
    nn.init.constant_(moe.router.weight, logit / 8)
    x = torch.ones(3, 8, requires_grad=True)
    gates, _ = moe.route(x)
    affinity = torch.tensor(logit).sigmoid().double()  # rounded as float32 is
    assert torch.allclose(gates.double(), affinity / (2 * affinity + 1e-20), rtol=1e-5)
    out = moe(x)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), [x, *moe.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    moe = make().to(dtype)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    moe(x).sum().backward()
    assert x.grad.shape == shape
    assert all((parameter.grad == 0).all() for parameter in moe.parameters())
    assert (moe.balance.load == 0).all()
    moe.balance.update()
    assert (moe.balance.bias == 0).all()


@pytest.mark.parametrize("expert_dim", [12, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_compiled(dtype: torch.dtype, expert_dim: int) -> None:
    moe = make(expert_dim=expert_dim).to(dtype)
    x = torch.randn(3, 5, 8).to(dtype).requires_grad_()
    inputs, weights = [x, *moe.parameters()], torch.randn(3, 5, 8).to(dtype)
    results = []
    for call in (moe, torch.compile(moe, backend="aot_eager")):
        out = call(x)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, weights)])
    tolerance = 4 * torch.finfo(dtype).eps
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def limited_choice(affinities: list[float], groups: int, active_groups: int, active: int) -> set:
    """Section 2.1.2 of arXiv 2412.19437, for one token."""
    size = len(affinities) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]

    def strength(group: range) -> float:
        return sum(sorted(affinities[e] for e in group)[-(active // active_groups) :])

    best = sorted(members, key=strength)[-active_groups:]
    allowed = [e for group in best for e in group]
    return set(sorted(allowed, key=lambda e: affinities[e])[-active:])


@pytest.mark.parametrize(("groups", "active_groups"), [(6, 1), (12, 2), (3, 2), (6, 4), (4, 4)])
def test_experts_of_few_groups(groups: int, active_groups: int) -> None:
    moe = MixtureOfExperts(
        8, 4, 24, 4, 0, num_expert_groups=groups, num_active_expert_groups=active_groups
    ).double()
    moe.balance.bias.copy_(torch.randn(24) * 0.3)  # moves groups, and is in no weight
    tokens = torch.randn(50, 8, dtype=torch.float64)
    gates, experts = moe.route(tokens)
    affinities = (tokens @ moe.router.weight.T).sigmoid()
    outside = 0
    for token, chosen, gate in zip(affinities, experts, gates, strict=True):
        choice = (token + moe.balance.bias).tolist()
        assert set(chosen.tolist()) == limited_choice(choice, groups, active_groups, 4)
        assert torch.allclose(gate, token[chosen] / token[chosen].sum())
        outside += set(chosen.tolist()) != limited_choice(choice, 1, 1, 4)
    assert bool(outside) == (active_groups < min(groups, 4))  # 4 experts are in 4 groups anyhow
    assert moe.balance.load.sum() == 4 * 50


def test_groups_against_transformers() -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=8, n_routed_experts=32, num_experts_per_tok=8, n_group=8, topk_group=4,
            routed_scaling_factor=1.0,
        )
    )  # fmt: skip
    ours = MixtureOfExperts(8, 4, 32, 8, 0, num_expert_groups=8, num_active_expert_groups=4)
    with torch.no_grad():
        theirs.weight.copy_(ours.router.weight)
        theirs.e_score_correction_bias.copy_(ours.balance.bias.uniform_(0, 0.2))
    tokens = torch.randn(200, 8)
    gates, experts = ours.route(tokens)
    _, weights, indices = theirs(tokens)
    mine, other = (
        torch.zeros(200, 32).scatter(1, index, weight)
        for index, weight in ((experts, gates), (indices, weights))
    )
    assert (mine - other).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("groups", "active", "message"),
    [
        (5, 1, r"num_expert_groups must divide model.num_experts \(24\), not be 5"),
        (0, 1, r"num_expert_groups must divide model.num_experts \(24\), not be 0"),
        (4, 5, r"must be between 1 and model.num_expert_groups \(4\), not 5"),
        (4, 3, r"must divide model.num_active_experts \(4\), not be 3"),
        (12, 1, r"1 groups of 2 experts have fewer than model.num_active_experts=4"),
    ],
)
def test_groups_that_do_not_fit(groups: int, active: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixtureOfExperts(8, 4, 24, 4, 0, num_expert_groups=groups, num_active_expert_groups=active)
