"""A run whose rows move between the placements of a memory is the run that stays."""

import pytest

WORDS = ("memory=engram", "memory.rows=300", "memory.num_heads=2", "memory.layers=[0,1]",
         "callbacks=minimal", "optimizer.schedule=constant", "optimizer.eps=1e-6",
         "data.micro_batch_size=2", "checkpoint.every_n_steps=1")  # fmt: skip


@pytest.mark.slow
def test_rows_move_between_processes_the_machine_and_one_device(command):
    two = ("strategy=ddp", "trainer.devices=2")
    layouts = (
        (*two, "memory.placement=sharded"),
        (*two, "memory.placement=host"),
        ("memory.placement=host",),
    )
    for steps, layout in enumerate(layouts, 1):
        resumed = ("ckpt_path=last",) if steps > 1 else ()
        command("fit", *WORDS, *layout, *resumed, f"trainer.max_steps={steps}", "output_dir=moving")
    command("validate", *WORDS, *layouts[0], "output_dir=moving", "ckpt_path=last")
    command("fit", *WORDS, "output_dir=still", "trainer.max_steps=3")
    moving, still = command.metrics("moving"), command.metrics("still")
    assert list(moving) == list(still) == [1, 2, 3]
    for step, row in still.items():
        for tag in ("train/loss", "train/grad_norm"):
            assert float(moving[step][tag]) == pytest.approx(float(row[tag]), rel=1e-4), (step, tag)
