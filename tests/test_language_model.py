"""The LightningModule under a real Trainer: what it logs, and against which step."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from mhc_lightning import LanguageModel
from mhc_lightning.errors import NonFiniteLossError, UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe


class Recorder(DummyLogger):
    """Keeps what a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, metrics))

    def series(self, tag: str) -> dict[int, float]:
        return {step: metrics[tag] for step, metrics in self.rows if tag in metrics}


Make = Callable[..., LanguageModel]


@pytest.fixture
def make(tiny_transformer: Callable[..., Transformer]) -> Make:
    """Returns a function: a model without experts unless they are asked for."""

    def build(**changes: Any) -> LanguageModel:
        network = tiny_transformer(**{"num_experts": 0, "num_streams": 2, **changes})
        return LanguageModel(network, AdamWRecipe(lr=1e-2, warmup_steps=2))

    return build


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_steps": 4,
            "accelerator": "cpu",
            "devices": 1,
            "logger": Recorder(),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            **options,
        }
    )


def loader(rows: Any, batch_size: int) -> DataLoader:
    return DataLoader(rows, batch_size=batch_size)


def batches(count: int, size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return loader(torch.randint(0, 40, (count * size, 9), generator=generator), batch_size=size)


def loss_of(model: LanguageModel, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def test_steps_count_from_one_and_loss_is_the_first_models(make: Make) -> None:
    model, loader = make(), batches(4, 2)
    with torch.no_grad():
        expected = loss_of(model, next(iter(loader)))
    run = trainer()
    run.fit(model, loader)
    assert isinstance(run.logger, Recorder)
    losses = run.logger.series("train/loss")
    assert list(losses) == [1, 2, 3, 4]
    assert losses[1] == pytest.approx(expected.item(), rel=1e-6)
    rates = run.logger.series("train/learning_rate")
    assert [rates[s] for s in (1, 2, 3, 4)] == pytest.approx([0.005, 0.01, 0.01, 0.01])


def test_accumulation_logs_the_mean_loss_and_the_norm_of_the_whole_step(make: Make) -> None:
    one, two = make(), make()
    run_one, run_two = trainer(), trainer(accumulate_grad_batches=2)
    run_one.fit(one, batches(4, 4))
    run_two.fit(two, batches(8, 2))
    assert isinstance(run_one.logger, Recorder)
    assert isinstance(run_two.logger, Recorder)
    for tag in ("train/loss", "train/grad_norm"):
        whole, halves = run_one.logger.series(tag), run_two.logger.series(tag)
        assert list(halves) == [1, 2, 3, 4]
        for step in whole:
            assert halves[step] == pytest.approx(whole[step], rel=1e-4)


def test_validation_metrics_cover_all_tokens_and_share_the_axis(make: Make) -> None:
    model, run = make(), trainer(val_check_interval=2, check_val_every_n_epoch=None)
    validation = batches(3, 2)
    run.fit(model, batches(4, 2), validation)
    assert isinstance(run.logger, Recorder)
    losses = run.logger.series("val/loss")
    assert list(losses) == [2, 4]
    model.eval()
    with torch.no_grad():
        expected = torch.stack([loss_of(model, batch) for batch in validation]).mean()
    assert losses[4] == pytest.approx(expected.item(), rel=1e-5)
    reference = Perplexity()
    with torch.no_grad():
        for batch in validation:
            reference.update(model(batch[:, :-1]), batch[:, 1:])
    perplexity = run.logger.series("val/perplexity")[4]
    assert perplexity == pytest.approx(reference.compute().item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_validation_sums_do_not_saturate_and_leave_padding_out(
    make: Make, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any precision: bfloat16 cannot count to 4,000. An empty sequence and batch are nothing."""
    model = make()
    losses = torch.rand(300, 8) + torch.arange(300.0)[:, None] / 100
    tokens = torch.zeros(300, 8, 2, dtype=torch.long)
    padded = torch.rand(300, 8) < 0.3
    padded[7] = True
    tokens[padded] = -100
    parts = iter(losses.masked_fill(padded, 0)[..., None])
    monkeypatch.setattr(model.model, "token_losses", lambda inputs, targets: next(parts))
    run = trainer(precision=precision)
    run.validate(model, loader(tokens.flatten(0, 1), batch_size=8), verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    mean = losses[~padded].double().mean()
    assert found["val/tokens"] == (~padded).sum()
    assert found["val/loss"] == pytest.approx(mean.item(), rel=1e-12)
    assert found["val/perplexity"] == pytest.approx(mean.exp().item(), rel=1e-12)


def test_padding_changes_neither_training_nor_validation(make: Make) -> None:
    """A batch of sequences of unequal length, against each of them alone."""
    model, lengths = make().double(), [9, 5, 2, 1, 0]
    rows = [torch.randint(0, 40, (length,)) for length in lengths]
    batch = torch.full((5, 9), -100)
    for row, tokens in zip(batch, rows, strict=True):
        row[: len(tokens)] = tokens
    with torch.no_grad():
        sums = [float(loss_of(model, row[None])) * (len(row) - 1) for row in rows if len(row) > 1]
    expected = pytest.approx(sum(sums) / (8 + 4 + 1), rel=1e-12)
    run = trainer(max_steps=1)
    before = copy.deepcopy(model)
    run.fit(model, loader(batch, batch_size=5))
    assert isinstance(run.logger, Recorder)
    assert run.logger.series("train/loss")[1] == expected
    run.validate(before, loader(batch, batch_size=2), verbose=False)
    assert float(run.callback_metrics["val/loss"]) == expected


@pytest.mark.parametrize("row", [[-100, 1, 2], [1, -100, 2], [1, -100, -100, 2, -100]])
def test_tokens_behind_padding_are_refused(make: Make, row: list[int]) -> None:
    batch = torch.tensor([[3] * len(row), row])
    for call in (make().training_step, make().validation_step):
        with pytest.raises(UserError, match="tokens behind -100, which may only pad the end"):
            call(batch, 0)


@pytest.mark.parametrize("kind", [AdamWRecipe, MuonRecipe])
def test_a_run_goes_on_with_the_settings_of_now(
    make: Make, kind: type[OptimizerRecipe], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As from the start of a run with them; what differs from the saved ones is said, once."""

    def run(
        steps: int, recipe: OptimizerRecipe, resume: Path | None = None
    ) -> tuple[Any, list[str]]:
        model, fit = make(), trainer(max_steps=steps)
        model.optimizer = recipe
        recwarn.clear()
        fit.fit(model, batches(4, 2), ckpt_path=resume, weights_only=False)
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        said = [str(w.message) for w in recwarn.list if "other settings" in str(w.message)]
        return fit, said

    first = kind(lr=1e-2, schedule="constant")
    run(2, first)
    same, said = run(3, first, tmp_path / "2.ckpt")
    assert not said and same.optimizers[0].param_groups[0]["lr"] == 1e-2
    second = kind(lr=2e-3, schedule="constant", betas=(0.8, 0.95), weight_decay=0.3)
    changed, said = run(4, second, tmp_path / "3.ckpt")
    assert len(said) == 1
    for words in ("lr=0.002 (saved: 0.01)", "betas=(0.8, 0.95) (saved: (0.9, 0.95))",
                  "weight_decay=0.3 (saved: 0.1)"):  # fmt: skip
        assert words in said[0]
    for group, fresh in zip(changed.optimizers[0].param_groups,
                            second.build_optimizer(make()).param_groups, strict=True):  # fmt: skip
        wanted = {name: value for name, value in fresh.items() if name != "params"}
        assert {name: group[name] for name in wanted} == wanted
    assert changed.logger.series("train/learning_rate")[4] == pytest.approx(2e-3)
    other = {AdamWRecipe: MuonRecipe, MuonRecipe: AdamWRecipe}[kind](lr=1e-2)
    with pytest.raises(
        UserError, match=f"optimizer is {kind.__name__.removesuffix('Recipe')}, not "
    ):
        run(6, other, tmp_path / "4.ckpt")


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_limit_that_turns_gradients_round_is_refused(
    make: Make, limit: float, algorithm: str
) -> None:
    run = trainer(gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    with pytest.raises(UserError, match="gradient_clip_val must be at least 0"):
        run.fit(make(), batches(4, 2))


def test_scaled_gradients_are_refused(make: Make) -> None:
    """A fused optimizer unscales them itself, after they were clipped."""
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match=r"16-mixed is not supported.*use bf16-mixed"):
        trainer(plugins=[scaled], gradient_clip_val=1.0).fit(make(), batches(4, 2))


def test_gradient_norm_is_before_clipping(make: Make) -> None:
    model, run = make(), trainer(max_steps=1, gradient_clip_val=1e-3)
    loader = batches(1, 2)
    batch = next(iter(loader))
    reference = make()
    loss_of(reference, batch).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    run.fit(model, loader)
    assert isinstance(run.logger, Recorder)
    assert run.logger.series("train/grad_norm")[1] == pytest.approx(norm.item(), rel=1e-4)


def test_non_finite_loss_stops_before_the_step(make: Make) -> None:
    model = make()
    with torch.no_grad():
        model.model.output.weight[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="the loss became NaN at step 1") as caught:
        trainer().fit(model, batches(4, 2))
    assert caught.value.step == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_experts_are_rebalanced_once_per_optimizer_step(make: Make) -> None:
    model = make(num_experts=4, num_active_experts=1, num_shared_experts=1)
    balance = model.model.blocks[1].feed_forward.body.balance
    run = trainer(max_steps=3, accumulate_grad_batches=2)
    run.fit(model, batches(6, 2))
    assert balance.load.sum() == 0
    assert isinstance(run.logger, Recorder)
    violations = run.logger.series("experts/max_violation")
    assert list(violations) == [1, 2, 3]
    assert all(0 < violation <= 3 for violation in violations.values())
    speeds = balance.bias / 0.001
    assert balance.bias.abs().max() > 0
    assert speeds.abs().max() <= 3 + 1e-4
    assert (speeds - speeds.round()).abs().max() < 1e-3


def test_no_steps_at_all_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"trainer.max_steps must be at least 1"):
        trainer(max_steps=0).fit(make(), batches(2, 2))


def test_a_recipe_with_a_schedule_of_its_own_needs_max_steps(make: Make) -> None:
    class Own(AdamWRecipe):
        def build(self, module: Any, total_steps: int) -> Any:
            return super().build(module, total_steps)

    model = LanguageModel(make().model, Own(lr=1e-2))
    with pytest.raises(UserError, match=r"Own builds a schedule of its own.*max_steps"):
        trainer(max_steps=-1, max_epochs=1).fit(model, batches(2, 2))
    trainer().fit(model, batches(4, 2))


@pytest.mark.parametrize("row", [[1, 2, 40], [-141, 2, 3], [40, 2, -100]])
def test_tokens_that_the_model_does_not_know_are_refused(make: Make, row: list[int]) -> None:
    """The model has tokens 0 to 39; -141 is token 40, read and not predicted."""
    model = make()
    assert model.model.vocab_size == 40
    with pytest.raises(UserError, match="tokens that are not below the model's vocabulary of 40"):
        trainer().validate(model, loader(torch.tensor([[39, -140, 3], row]), batch_size=2))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.zeros(4, 9), r"not float32 \[2, 9\]"),
        (torch.zeros(4, dtype=torch.long), r"int64 \[2\]"),
    ],
)
def test_a_batch_of_another_kind_is_refused(make: Make, rows: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=r"a batch must be a tensor of int64 tokens .*" + said):
        trainer().fit(make(), loader(rows, batch_size=2))
