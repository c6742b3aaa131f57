"""The page from a pretrained model to mHC, followed word by word with a tiny model."""

import re

import pyarrow
import pyarrow.parquet
import pytest
from documents import DOCS
from pages import follow
from pretrained import pretrained_folder

PAGE = DOCS / "start/pretrained.md"
INSTALLING = r"venv|pip|torchvision"  # tests/test_packaging.py installs the package
SMALL = {
    "prepare": ["prepare.num_workers=1", "prepare.validation_fraction=0.2"],
    "fit": [
        *("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"),
        *("data.sequence_length=32", "data.validation_sequences=4", "trainer.accelerator=cpu"),
    ],
    "generate": ["max_new_tokens=10"],
}


@pytest.mark.slow
def test_a_stranger_gets_from_parquet_to_a_model_of_transformers(tmp_path):
    texts = [f"Once upon a time there were {n} streams, and they mixed. " * 20 for n in range(60)]
    pretrained_folder(tmp_path / "my_model", " ".join(texts[:3]))
    (tmp_path / "my_parquet").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": texts[number::2], "id": list(range(30))})
        pyarrow.parquet.write_table(table, tmp_path / f"my_parquet/{number}.parquet")
    printed = follow(PAGE, tmp_path, skip=INSTALLING, more=SMALL)
    assert len(re.findall("^Run summary", printed, re.MULTILINE)) == 4  # two scripts, two of `fit`
    assert len(re.findall("Once upon a time", printed)) >= 3  # generate, and both models
