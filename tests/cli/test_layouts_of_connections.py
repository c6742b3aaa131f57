"""mHC's variants are sharded, and go through pipeline stages, as mHC does."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("connection", "strategy"), [("krom", "fsdp"), ("mhc_lite", "pipeline")])
def test_variants_train_on_two_devices_as_on_one(command, connection, strategy):
    common = (f"connection={connection}", "trainer.max_steps=3", "recompute=auto",
              "callbacks=minimal")  # fmt: skip
    assert command.inside("fit", *common, "output_dir=one") == 0
    command("fit", *common, f"strategy={strategy}", "trainer.devices=2", "output_dir=two")
    one, two = command.metrics("one"), command.metrics("two")
    assert list(one) == list(two) == [1, 2, 3]
    for step, row in one.items():
        for tag in ("train/loss", "train/grad_norm"):
            assert float(two[step][tag]) == pytest.approx(float(row[tag]), rel=1e-4), (step, tag)
