"""Token data made elsewhere, by the real commands."""

import contextlib
import json

import numpy as np
import pytest
import token_files as write

from mhc_lightning.cli.main import main

SMALL = ("model.vocab_size=260", "callbacks=minimal", "output_dir=run")


@pytest.fixture
def tokens(command, tmp_path):
    texts = write.documents(60, vocab=250)
    write.write_llm_c(tmp_path / "tokens/x_train_0.bin", np.concatenate(texts))
    write.write_llm_c(tmp_path / "tokens/x_val_0.bin", np.concatenate(texts[:3]))
    command.data = tmp_path / "tokens"
    return command


def test_from_fit_to_generate(tokens, tmp_path, capsys):
    assert tokens.inside("fit", *SMALL, "trainer.max_steps=4") == 0
    said = capsys.readouterr().err
    assert f"{tokens.data} is taken for llm.c .bin, uint16: " in said
    assert "x_train_0.bin" in said and "x_val_0.bin" in said
    assert tokens.inside("fit", *SMALL, "ckpt_path=last", "trainer.max_steps=6") == 0
    record = json.loads((tmp_path / "run/environment.json").read_text())
    assert record["data"]["kind"] == ["llm.c .bin"] and len(record["data"]["content"][0]) == 32
    capsys.readouterr()
    assert tokens.inside("validate", *SMALL, "ckpt_path=last", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["val/loss"] < 10 and "val/bits_per_byte" not in measured
    words = (*SMALL, "ckpt_path=last", "prompt=ab", "generate.max_new_tokens=4")
    assert tokens.inside("generate", *words) == 2
    assert "does not say which tokenizer" in capsys.readouterr().err
    assert tokens.inside("generate", *words, "data.tokenizer=bytes") == 0
    capsys.readouterr()
    with contextlib.chdir(tmp_path):
        assert main(["report", "run", "--json"]) == 0
    assert "(llm.c .bin; content" in capsys.readouterr().out


def test_an_id_that_the_model_has_not(tokens, capsys):
    assert tokens.inside("fit", *SMALL[1:], "model.vocab_size=200") == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "has the id 249, and model.vocab_size=200; set it" in error
