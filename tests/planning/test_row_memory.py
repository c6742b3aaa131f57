"""The bytes of a memory's tables, against real training, and by placement."""

from dataclasses import replace
from functools import partial
from math import ceil

import pytest

from mhc_lightning.modules import Engram, NgramTable, OverEncoding
from mhc_lightning.optimizers import AdamWRecipe, MuonRecipe
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel, RowTraining
from mhc_lightning.planning.memory import device_memory
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.row_memory import row_memory
from mhc_lightning.planning.tables import dense_values
from mhc_lightning.strategies.layout import Layout
from mhc_lightning.strategies.row_stores import install_row_stores

SIZES = {"dim": 128, "num_layers": 3, "num_heads": 4, "head_dim": 32, "rope_dim": 16, "kv_rank": 64}
WIDE = partial(Engram, zero_start=False, rows=20_000, layers=[0, 2], num_heads=2, dim=256)
NARROW = partial(Engram, zero_start=False, rows=30_000, layers=[1], num_heads=8, dim=64)
INPUT = partial(OverEncoding, rows=30_001, dim=512)

# Memory, precision, sequences, length, micro-batches, optimizer. In the first ones the fullest
# moment is a forward pass, in the last ones the update of the rows.
CASES = [
    (NARROW, "32-true", 4, 256, 2, AdamWRecipe(lr=1e-3)),
    (WIDE, "bf16-mixed", 2, 256, 1, AdamWRecipe(lr=1e-3)),
    (INPUT, "bf16-true", 2, 256, 2, MuonRecipe(lr=1e-3)),
    (WIDE, "32-true", 1, 128, 16, AdamWRecipe(lr=1e-3)),
    (WIDE, "32-true", 1, 128, 16, AdamWRecipe(lr=1e-3, memory_update="rowwise")),
]


@pytest.mark.parametrize(
    ("memory", "precision", "sequences", "length", "micro_batches", "recipe"), CASES
)
def test_the_fullest_moment_of_training_tables_is_predicted(
    memory, precision, sequences, length, micro_batches, recipe, build, loss, peak
):
    model = build("mhc", precision, **SIZES, vocab_size=2000, memory=memory)
    install_row_stores(model, Layout())
    batch = MicroBatch(sequences, length, precision_of(precision), fused_norm=False)
    tokens = batch.tokens * micro_batches
    rows = RowTraining(update=recipe.memory_update, step_tokens=tokens, run_tokens=2 * tokens)
    predicted = device_memory(model, batch, DataParallel(rows=rows), recipe.state_per_value)
    optimizer = recipe.build_optimizer(model)

    def two_steps():
        for _ in range(2):
            for number in range(micro_batches):
                value = loss(model, sequences, length, precision)
                if number == 0:
                    optimizer.zero_grad()
                value.backward()
                del value
            optimizer.step()

    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert predicted.weights == weights
    assert predicted.total == pytest.approx(weights + peak("cpu", two_steps), rel=0.1), predicted


HEADS, WIDTH, PAIR = 4, 128, 8 + 4 * 128  # of WIDE: a row's number and gradient


@pytest.fixture
def batch():
    return MicroBatch(2, 64, precision_of("bf16-mixed"), fused_norm=True)


def of_tables(build, batch, replicas=DataParallel(), **rows):  # noqa: B008
    model = build("mhc", **SIZES, memory=WIDE)
    (num_rows,) = {m.num_rows for m in model.modules() if isinstance(m, NgramTable)}
    return row_memory(model, batch, replace(replicas, rows=RowTraining(**rows))), num_rows


def test_state_grows_with_the_rows_touched_up_to_the_whole_table(build, batch):
    few, num_rows = of_tables(build, batch, run_tokens=1000)
    assert few.optimizer == 2 * (1000 * HEADS * (8 + 4 + 2 * 4 * WIDTH) + 4 * num_rows)
    whole, _ = of_tables(build, batch, run_tokens=10**9)
    assert whole.optimizer == 2 * num_rows * (8 + 4 + 2 * 4 * WIDTH + 4)
    assert of_tables(build, batch)[0].optimizer == whole.optimizer
    one_moment, _ = of_tables(build, batch, update="rowwise")
    assert one_moment.optimizer == 2 * num_rows * (8 + 4 + 4 + 4)


def test_only_rows_that_a_step_looks_up_have_gradients(build, batch):
    for tokens in (None, 1000, 3000):
        found, num_rows = of_tables(build, batch, step_tokens=tokens)
        assert found.gradients == 2 * (tokens or 128) * HEADS * PAIR
        assert found.weights == 2 * num_rows * WIDTH * 4
        assert found.host == found.fetched == 0


def test_copies_hold_everything_and_get_the_rows_of_all(build, batch):
    replicas = DataParallel(4, copies_gradients=True)
    alone, _ = of_tables(build, batch, step_tokens=1000)
    copy, _ = of_tables(build, batch, replicas, step_tokens=1000)
    assert (copy.weights, copy.optimizer) == (alone.weights, alone.optimizer)
    assert copy.gradients == 4 * alone.gradients
    assert copy.update >= 4 * alone.update
    # DDP has no buffers for tables: their stores exchange the gradients.
    model = build("mhc", **SIZES, memory=WIDE)
    memory = device_memory(model, batch, replicas, lambda model, parameter: 2)
    assert memory.communication == 4 * dense_values(model)


@pytest.mark.parametrize(
    ("sharded", "placement"), [(False, "sharded"), (True, "sharded"), (True, "device")]
)
def test_shares_of_a_table_are_equal_and_those_that_share_weights_share_it(
    sharded, placement, build, batch
):
    alone, num_rows = of_tables(build, batch, step_tokens=1000)
    replicas = DataParallel(3, sharded=sharded)
    share, _ = of_tables(build, batch, replicas, placement=placement, step_tokens=1000)
    held = ceil(num_rows / 3)
    assert share.weights == 2 * held * WIDTH * 4
    assert share.optimizer == 2 * held * (8 + 4 + 2 * 4 * WIDTH + 4)
    assert share.gradients == alone.gradients
    # FSDP never gathers a table.
    small = build("mhc", **SIZES, memory=partial(WIDE, rows=100))
    large = build("mhc", **SIZES, memory=WIDE)
    shards = replace(DataParallel(3, sharded=True), rows=RowTraining(placement))
    gathered = {
        device_memory(model, batch, shards, lambda model, parameter: 2).communication
        for model in (small, large)
    }
    assert len(gathered) == 1


def test_a_host_holds_the_table_once_and_a_device_the_rows_of_two_micro_batches(build, batch):
    alone, _ = of_tables(build, batch, step_tokens=1000)
    hosted, _ = of_tables(build, batch, DataParallel(4), placement="host", step_tokens=1000)
    looked_up = 2 * 128 * HEADS
    assert (hosted.weights, hosted.optimizer) == (0, 0)
    assert hosted.fetched == 2 * looked_up * WIDTH * 4
    assert hosted.gradients == looked_up * PAIR
    gradients_of_all = 2 * 4 * 1000 * HEADS * (PAIR + 24)
    assert hosted.host == alone.weights + alone.optimizer + gradients_of_all


def test_tables_stay_float32(build):
    model = build("mhc", **SIZES, memory=WIDE)
    found = {
        row_memory(model, MicroBatch(1, 8, precision_of(name), True), DataParallel()).weights
        for name in ("32-true", "bf16-mixed", "bf16-true")
    }
    assert len(found) == 1
    double = MicroBatch(1, 8, precision_of("64-true"), True)
    assert row_memory(model, double, DataParallel()).weights == 2 * found.pop()
