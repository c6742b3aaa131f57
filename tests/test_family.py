"""The paper's models: every published count and hyper-parameter, on the meta device."""

from functools import cache

import pytest
import torch

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import Experiment, compose_experiment
from mhc_lightning.cli.instantiation import build
from mhc_lightning.modules import Connection, MixtureOfExperts, Transformer

# arXiv 2512.24880, Table 5, as printed: total and active parameters of the models with mHC.
PUBLISHED = {
    "3b": ("2.97B", "612M"),
    "9b": ("9.18B", "1.66B"),
    "27b": ("27.0B", "4.14B"),
}
# The same architecture with one stream (a reconstruction: the paper does not print these).
BASELINE = {
    "3b": ("2.9700B", "609.4M"),
    "9b": ("9.1718B", "1.6540B"),
    "27b": ("27.034B", "4.1241B"),
}
# blocks, width, heads, expert width, experts, batch, steps, learning rate
TABLE_5 = {
    "3b": (12, 1280, 16, 896, 64, 320, 30_000, 8.6e-4),
    "9b": (18, 1920, 24, 1280, 64, 512, 50_000, 5.9e-4),
    "27b": (30, 2560, 32, 1536, 72, 1280, 50_000, 4.0e-4),
    "3b_1t": (12, 1280, 16, 896, 64, 2560, 100_000, 9.0e-4),
}
SMALL = {"10m": 10e6, "50m": 50e6, "150m": 150e6, "500m": 500e6}


@cache
def experiment(name: str) -> Experiment:
    return compose_experiment(parse_arguments(["fit", "--config", name]))


@cache
def model_of(name: str) -> Transformer:
    with torch.device("meta"):
        return build(experiment(name), "model")


def count(model: Transformer) -> tuple[int, int]:
    """Total and active parameters; active ones count the head, but no embedding."""
    total = sum(p.numel() for p in model.parameters())
    idle = model.embedding.weight.numel()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            experts = module.gate_up.numel() + module.down.numel()
            idle += experts * (module.num_experts - module.num_active_experts) // module.num_experts
    return total, total - idle


def as_printed(value: int, like: str) -> str:
    unit = {"B": 1e9, "M": 1e6}[like[-1]]
    decimals = len(like[:-1].partition(".")[2])
    return f"{value / unit:.{decimals}f}{like[-1]}"


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts(size: str) -> None:
    for prefix, table in (("mhc", PUBLISHED), ("baseline", BASELINE)):
        total, active = count(model_of(f"{prefix}_{size}"))
        assert as_printed(total, table[size][0]) == table[size][0]
        assert as_printed(active, table[size][1]) == table[size][1]
    blocks, width = TABLE_5[size][:2]
    total, _ = count(model_of(f"hc_{size}"))
    baseline, _ = count(model_of(f"baseline_{size}"))
    assert total == baseline + 2 * blocks * (width * 6 + 4 * 6 + 2)


@pytest.mark.parametrize("size", TABLE_5)
@pytest.mark.parametrize("prefix", ["mhc", "hc", "baseline"])
def test_hyper_parameters_are_the_papers(prefix: str, size: str) -> None:
    values = experiment(f"{prefix}_{size}").values()
    model, data, optimizer = values["model"], values["data"], values["optimizer"]
    blocks, width, heads, ffn, experts, batch, steps, lr = TABLE_5[size]
    assert (model["num_layers"], model["dim"], model["num_heads"]) == (blocks, width, heads)
    assert (model["ffn_dim"], model["num_experts"]) == (ffn, experts)
    assert (model["num_active_experts"], model["num_shared_experts"]) == (6, 2)
    assert model["num_dense_layers"] == 1
    assert (model["head_dim"], model["rope_dim"], model["kv_rank"]) == (128, 64, 512)
    assert (model["rope_theta"], model["norm_eps"]) == (10000.0, 1e-20)
    assert (model["vocab_size"], model["num_streams"]) == (129280, 4)
    assert (data["batch_size"], data["sequence_length"]) == (batch, 4096)
    assert values["trainer"]["max_steps"] == steps
    assert (optimizer["lr"], optimizer["warmup_steps"]) == (lr, 2000)
    assert (optimizer["betas"], optimizer["eps"]) == ([0.9, 0.95], 1e-20)
    assert (optimizer["weight_decay"], optimizer["schedule"]) == (0.1, "step")
    if prefix == "mhc":
        assert values["connection"]["sinkhorn_iterations"] == 20


def test_the_papers_models_have_mhc() -> None:
    connection = next(m for m in model_of("mhc_3b").modules() if isinstance(m, Connection))
    assert connection.alpha.shape == (3,)


@pytest.mark.parametrize("size", SMALL)
def test_small_members_keep_the_familys_ratios(size: str) -> None:
    model = model_of(f"mhc_{size}")
    total, _ = count(model)
    assert abs(total / SMALL[size] - 1) < 0.05
    values = experiment(f"mhc_{size}").values()["model"]
    width = values["dim"]
    assert values["num_heads"] * values["head_dim"] == pytest.approx(1.6 * width)
    assert values["kv_rank"] == pytest.approx(0.4 * width)
    assert values["ffn_dim"] == pytest.approx(0.7 * width)
    assert values["rope_dim"] * 2 == values["head_dim"]
    assert (values["num_experts"], values["num_active_experts"]) == (64, 6)
    for prefix in ("baseline", "hc"):
        assert experiment(f"{prefix}_{size}").values()["model"]["dim"] == width
