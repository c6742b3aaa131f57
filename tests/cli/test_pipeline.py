"""`strategy=pipeline` on the command line, and one run that changes its layout as it goes on."""

import json

import pytest

COMMON = ("model.num_layers=4", "model.num_experts=4", "model.num_active_experts=2",
          "model.num_shared_experts=1", "optimizer.eps=1e-8",
          "optimizer.schedule=constant")  # fmt: skip
PIPELINE = ("strategy=pipeline", "trainer.devices=2")


def test_wrong_layouts_end_with_one_line(command, capsys):
    for words, reason in (
        (("strategy.schedule=zbv",), "model.num_layers=2"),
        (("strategy.microbatches=3",), "use a divisor of 2"),
        (("strategy.schedule=chimera",), "must be one of gpipe"),
        (("strategy.pipeline_size=3",), "use a divisor of 2"),
        (("trainer.precision=16-true",), "use bf16-mixed"),
    ):
        assert command.inside("fit", *PIPELINE, *words, "output_dir=refused") == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not list(command.folder.glob("refused/*.yaml"))


@pytest.mark.slow
def test_a_run_goes_on_in_any_layout(command):
    """Two stages, one device, two sharded pipelines, four stages; optimizer state and all.

    One device saves a file, the others folders of shards.
    """
    layouts = {
        2: (*PIPELINE, "strategy.schedule=zbv"),
        3: (),
        4: ("strategy=pipeline", "trainer.devices=4", "strategy.pipeline_size=2",
            "data.micro_batch_size=2"),
        5: ("strategy=pipeline", "trainer.devices=4", "strategy.schedule=gpipe"),
        6: ("strategy=fsdp", "trainer.devices=2"),
    }  # fmt: skip
    for last, words in layouts.items():
        resume = ("ckpt_path=last",) if last > 2 else ()
        command("fit", *COMMON, *words, *resume, "output_dir=moving", f"trainer.max_steps={last}",
                "trainer.val_check_interval=2", "checkpoint.every_n_steps=1")  # fmt: skip
    command("fit", *COMMON, "output_dir=still", "trainer.max_steps=6",
            "trainer.val_check_interval=2")  # fmt: skip
    moving, still = command.metrics("moving"), command.metrics("still")
    assert list(moving) == list(still) == [1, 2, 3, 4, 5, 6]
    for step, row in still.items():
        for tag in ("train/loss", "train/grad_norm", "val/loss", "experts/max_violation"):
            if row.get(tag):
                assert float(moving[step][tag]) == pytest.approx(float(row[tag]), rel=1e-4), tag
        assert sum("amax_gain/composite" in tag for tag in moving[step]) > 16

    measured = []
    for words in ((), (*PIPELINE, "strategy.schedule=zbv")):
        output, _ = command("validate", *COMMON, *words, "output_dir=moving", "ckpt_path=last",
                            "--json")  # fmt: skip
        measured.append(json.loads(output)["val/loss"])
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    output, _ = command("generate", *COMMON, "output_dir=moving", "ckpt_path=last", "prompt=the")
    assert output
    assert command.inside("export", *COMMON, "output_dir=moving", "ckpt_path=last",
                          "output=exported") == 0  # fmt: skip
    output = json.loads((command.folder / "exported/config.json").read_text())
    assert output["step"] == 6
