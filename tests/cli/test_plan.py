"""`plan`, and what `fit` refuses for want of memory."""

import json
import os
import subprocess
import sys

import pytest
from in_process import run_main

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.experiments import shipped_experiments
from mhc_lightning.cli.main import main
from mhc_lightning.cli.plan import check_room, plan
from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_bytes
from mhc_lightning.planning import activations

PAPER = [f"{c}_{size}" for c in ("baseline", "hc", "mhc") for size in ("3b", "9b", "27b", "3b_1t")]
# Total and active parameters of the models with mHC.
COUNTS = {
    "3b": (2_972_931_976, 612_325_256),
    "9b": (9_178_455_372, 1_660_656_972),
    "27b": (27_048_293_460, 4_138_873_940),
    "3b_1t": (2_972_931_976, 612_325_256),
}
# Of 9B in stages of 8 to 10 sub-layers and 27B in such of 6 to 8; 3B is in one piece.
BLOCKS = {"3b": 4, "9b": 5, "27b": 8, "3b_1t": 4}
TOKENS = {"3b": 39.3e9, "9b": 104.9e9, "27b": 262.1e9, "3b_1t": 1.049e12}


def arguments_of(name, *words, command="plan"):
    return parse_arguments([command, "--config", name, *words])


def planned(capsys, name, *words):
    arguments = arguments_of(name, "--json", *words)
    plan(compose_experiment(arguments), arguments)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PAPER)
def test_every_model_of_the_paper_is_planned_from_a_few_passes(name, capsys, monkeypatch):
    passes, kept_by = [], activations.kept_by
    monkeypatch.setattr(activations, "_known", {})
    monkeypatch.setattr(activations, "kept_by", lambda *given: passes.append(1) or kept_by(*given))
    record = planned(capsys, name, "machine=8xh200")
    assert len(passes) <= 40  # of up to 30 blocks under five schedules, whole and in stages
    connection, _, size = name.partition("_")
    total, active = record["parameters"]["total"], record["parameters"]["active"]
    assert record["tokens"] == pytest.approx(TOKENS[size], rel=1e-3)
    if connection == "mhc":
        assert (total, active) == COUNTS[size]
    elif connection == "baseline":
        assert record["parameters"]["connections"] == 0
        assert total < COUNTS[size][0]
    if connection != "baseline":
        assert record["recompute_block"] == BLOCKS[size]
    memory = dict(record["memory_bytes_per_device"])
    assert memory.pop("total") == sum(memory.values())
    kinds = "weights gradients optimizer activations logits rebuilt communication row_update"
    assert set(memory) == set(kinds.split())
    assert record["fits"] and record["tokens_per_second"] > 0


def test_recompute_is_planned(capsys):
    off, on, two = (
        planned(capsys, "mhc_3b", "machine=8xh200", f"recompute={setting}")
        for setting in ("off", "auto", 2)
    )
    assert (off["recompute_block"], on["recompute_block"], two["recompute_block"]) == (4, 4, 2)
    memory = [record["memory_bytes_per_device"]["total"] for record in (on, two, off)]
    assert memory[0] < memory[1] < memory[2]
    kept = on["activation_bytes_per_device"]
    assert kept["without_recompute"] == off["memory_bytes_per_device"]["activations"]
    residual = planned(capsys, "baseline_3b", "machine=8xh200", "recompute=auto")
    assert residual["recompute_block"] == 0


@pytest.mark.parametrize("name", sorted(set(shipped_experiments()) - {*PAPER, "mhc_upcycle"}))
def test_every_other_experiment_is_planned_too(name, capsys):
    record = planned(capsys, name, "trainer.accelerator=cpu")
    assert record["machine"] == "1xcpu"
    assert record["parameters"]["total"] > record["parameters"]["active"] > 0
    assert record["memory_bytes_available_per_device"] > 0


def test_the_command_answers_with_nothing_but_json(tmp_path):
    output, errors = run_main("plan", "--config", "mhc_27b", "--json", folder=tmp_path)
    assert json.loads(output)["parameters"]["total"] == COUNTS["27b"][0]
    assert errors == "strategy: fsdp, not pipeline, since there is one device\n"
    assert os.listdir(tmp_path) == []


def test_the_report_tells_people_the_same(capsys):
    assert main(["plan", "--config", "mhc_27b", "machine=8xh200", "strategy=fsdp"]) == 0
    text = capsys.readouterr().out
    for expected in ("27.05B", "4.139B", "fits in 139.0 GiB", "blocks of 6", "262.1B tokens"):
        assert expected in text
    assert "each with a share of the weights" in text
    assert max(map(len, text.splitlines())) <= 100


def test_settings_change_the_plan(capsys):
    words = ["machine=4xh100"]
    before = planned(capsys, "mhc_3b", *words)
    longer = planned(capsys, "mhc_3b", *words, "data.sequence_length=8192")
    assert longer["memory_bytes_per_device"]["activations"] > (
        1.5 * before["memory_bytes_per_device"]["activations"]
        - before["activation_bytes_per_device"]["weight_copies"]
    )
    sharded = planned(capsys, "mhc_3b", *words, "strategy=fsdp")
    replicas = planned(capsys, "mhc_3b", *words, "strategy=ddp")
    ratio = (
        replicas["memory_bytes_per_device"]["optimizer"]
        / sharded["memory_bytes_per_device"]["optimizer"]
    )
    assert ratio == pytest.approx(4, rel=1e-6)
    assert replicas["memory_bytes_per_device"]["communication"] == 0
    # What Lightning picks by itself keeps buckets beside the gradients.
    assert (
        before["memory_bytes_per_device"]["communication"]
        == before["memory_bytes_per_device"]["gradients"]
    )


def test_devices_come_from_the_trainer_without_a_machine(capsys):
    words = ["trainer.accelerator=cpu", "strategy=ddp"]
    assert planned(capsys, "mhc_quickstart", *words)["devices"] == 1
    words += ["trainer.devices=2", "trainer.num_nodes=2"]
    record = planned(capsys, "mhc_quickstart", *words)
    assert record["devices"] == 4 and record["machine"] == "4xcpu"
    assert planned(capsys, "mhc_quickstart", "trainer.devices=auto", words[0])["devices"] == 1
    assert planned(capsys, "mhc_quickstart", "trainer.devices=[0,1]", words[0])["devices"] == 2


def refused(capsys, *words):
    assert main(list(words)) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return output.out, line


def test_a_machine_that_is_too_small_is_refused_after_the_numbers(capsys):
    output, line = refused(
        capsys, "plan", "--config", "mhc_9b", "machine=8xh100", "strategy=ddp", "--json"
    )
    record = json.loads(output)
    assert not record["fits"]
    assert "GiB" in line and "(8xh100)" in line and "optimizer" in line
    assert "strategy=fsdp trainer.devices=8" in line
    # What it says helps.
    changed = planned(capsys, "mhc_9b", "machine=8xh100", "strategy=fsdp", "trainer.devices=8")
    assert changed["fits"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["machine=9xg5"], "machine=9xg5 is not known"),
        (["machine=3xh200"], "data.batch_size=8 cannot be shared evenly by 3 devices"),
        (
            ["machine=2xh200", "data.micro_batch_size=3"],
            "data.batch_size=8 is not a multiple of data.micro_batch_size=3",
        ),
        (["data.micro_batch_size=0"], "data.micro_batch_size is 0; it must be at least 1"),
        (["trainer.precision=8-true"], "trainer.precision=8-true cannot be planned for"),
        (["optimizer._target_=torch.optim.SGD"], "optimizer"),
    ],
)
def test_mistakes_end_in_one_line(words, expected, capsys):
    output, line = refused(capsys, "plan", "--config", "mhc_quickstart", *words)
    assert expected in line
    assert output == ""


def test_top_k_above_the_number_of_experts_is_refused(capsys):
    _, line = refused(capsys, "plan", "--config", "mhc_3b", "model.num_active_experts=65")
    assert "model.num_active_experts must be between 1 and model.num_experts (64)" in line


def test_fit_refuses_what_cannot_fit_and_allocates_nothing(command):
    _, errors = command.run(
        "fit", "output_dir=run", "machine=h100", "model.dim=200000", "model.num_layers=50", code=2
    )
    last = errors.splitlines()[-1]
    assert last.startswith("error: a device needs ") and "has 79.0 GiB (1xh100)" in last
    assert "what would make it fit: " in last
    assert os.listdir(command.folder / "run") == []


def test_a_host_that_is_too_small_is_refused_by_name(capsys):
    words = ["plan", "--config", "mhc_quickstart", "machine=8xh200", "memory=engram"]
    tables = ["memory.rows=500000000", "memory.placement=host", "memory.dim=512"]
    output, line = refused(capsys, *words, *tables)
    assert "DOES NOT FIT" in output
    assert "the rows of the memory and their optimizer's state need" in line
    assert f"on each host but there are {format_bytes(2 * 10**12)} (8xh200)" in line


def test_a_table_that_a_device_cannot_hold_is_refused_with_where_it_would_fit(capsys):
    words = ["plan", "--config", "mhc_quickstart", "machine=8xh200", "memory=engram"]
    tables = ["memory.rows=40000000", "memory.dim=512"]
    _, line = refused(capsys, *words, *tables)
    assert "a device needs" in line
    for placement in ("sharded", "host"):
        setting = f"memory.placement={placement}"
        assert setting in line
        record = planned(capsys, *words[2:], *tables, setting)
        assert record["fits"] and record["memory_rows"]["placement"] == placement


def test_memory_is_planned_in_every_place(capsys):
    assert main(["plan", "--config", "engram_27b", "machine=64xh200", "strategy=fsdp"]) == 0
    text = capsys.readouterr().out
    for expected in ("5.792B  rows that n-grams can name", "sharded*", "host", "20.5 KiB"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 110


def test_fit_looks_at_the_memory_that_is_free(monkeypatch):
    import torch

    experiment = compose_experiment(arguments_of("mhc_quickstart", command="fit"))
    cpu = torch.device("cpu")
    check_room(experiment, 1, cpu)
    monkeypatch.setattr("mhc_lightning.planning.machine._available_memory", lambda: 100 * 2**20)
    with pytest.raises(UserError, match=r"has 100.0 MiB \(1xcpu\).*data.micro_batch_size=4"):
        check_room(experiment, 1, cpu)


def test_fit_lets_through_what_cannot_be_planned(monkeypatch):
    import torch

    experiment = compose_experiment(
        arguments_of("mhc_quickstart", "trainer.precision=transformer-engine", command="fit")
    )
    monkeypatch.setattr("mhc_lightning.planning.machine._available_memory", lambda: 1)
    check_room(experiment, 1, torch.device("cpu"))


def test_a_reader_that_has_had_enough_is_no_mistake():
    """As in `fit --print-config … | head -1`."""
    words = (sys.executable, "-m", "mhc_lightning", "fit", "--config", "mhc_10m", "--print-config")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_planning_imports_no_lightning():
    code = (
        "import sys\n"
        "import mhc_lightning.cli.plan, mhc_lightning.optimizers.recipes, mhc_lightning.planning\n"
        "slow = {'lightning', 'litdata', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
