"""A pretrained model goes into a run with its tokenizer and chat template, and out of it again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import run_main
from model_tokenizers import llama_like
from pretrained import tiny_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mhc_lightning.huggingface  # noqa: F401  (registers the models)
from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.data import load_tokenizer
from mhc_lightning.modules import ManifoldHyperConnection
from mhc_lightning.upcycling import PretrainedNetwork

pytestmark = pytest.mark.slow

SMALL = """
--config mhc_upcycle model.pretrained=chat data.path=tokens data.batch_size=4
data.sequence_length=16 data.validation_sequences=4 trainer.accelerator=cpu trainer.max_steps=2
trainer.val_check_interval=2 optimizer.lr=1e-2 optimizer.warmup_steps=0 callbacks=minimal
logger=csv output_dir=run
""".split()  # noqa: SIM905
LAST = ("ckpt_path=last",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model, prepared conversations, a run, and its export."""
    folder = tmp_path_factory.mktemp("upcycle")
    tokenizer = AutoTokenizer.from_pretrained(llama_like(folder / "chat"))
    model = tiny_pretrained(vocab_size=len(tokenizer))
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder / "chat")
    chats = [
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a bird"}],
        [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "the bird"}],
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats * 40]
    (folder / "chats.jsonl").write_text("".join(lines))
    more = ("input=chats.jsonl", "num_workers=1", "conversations=true", "end_of_document=<unk>")
    run_main("prepare", *SMALL, *more, folder=folder)
    run_main("fit", *SMALL, folder=folder)
    run_main("export", *SMALL, *LAST, "output=hf", "form=huggingface", folder=folder)
    return folder


@pytest.fixture(scope="module")
def network(folder: Path) -> PretrainedNetwork:
    """The network of the run."""
    network = PretrainedNetwork(pretrained=str(folder / "chat"), connection=ManifoldHyperConnection)
    saved: Any = load_checkpoint((folder / "run/checkpoints/last").resolve(), trusted=True)
    weights = {name.removeprefix("model."): t for name, t in saved["state_dict"].items()}
    network.load_state_dict(weights)
    return network.eval()


@pytest.fixture(scope="module")
def exported(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "hf")


def test_the_exported_model_computes_what_the_run_does(
    folder: Path, network: PretrainedNetwork, exported: Any
) -> None:
    tokens = torch.randint(3, network.vocab_size, (2, 12))
    with torch.no_grad():
        expected, found = network(tokens), exported(tokens).logits
    assert torch.equal(found, expected)
    before = tiny_pretrained(vocab_size=network.vocab_size)(tokens).logits
    assert (found - before).abs().max() > 1e-2, "the run has learnt something"


def test_the_tokenizer_comes_along(folder: Path, exported: Any) -> None:
    given, found = (AutoTokenizer.from_pretrained(folder / name) for name in ("chat", "hf"))
    assert found("the cat")["input_ids"] == given("the cat")["input_ids"]
    assert found("the cat")["input_ids"][0] == found.bos_token_id == 1
    chat = [{"role": "user", "content": "the cat"}]
    assert found.apply_chat_template(chat) == given.apply_chat_template(chat)
    settings = exported.generation_config
    assert settings.temperature == 0.5 and settings.do_sample
    assert settings.eos_token_id == [2, 0], "its own, and the one that ends the conversations"


def test_what_works_on_models_of_transformers_works_on_it(
    folder: Path, exported: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 6, "do_sample": False}
    ids = exported.generate(prompt, **greedy, eos_token_id=0)[0]
    words = ("prompt=the cat", "max_new_tokens=6", "temperature=0")
    said, _ = run_main("generate", *SMALL, *LAST, *words, folder=folder)
    # Text of ids one by one: what are no characters together may be some alone.
    stream = load_tokenizer(folder / "hf").stream(ids[:2].tolist())
    pieces = [stream.push(token) for token in ids[2:].tolist()]
    assert said == "".join(["the cat", *pieces, stream.flush()]) + "\n"
    write: Any = pipeline("text-generation", model=str(folder / "hf"), device="cpu")
    [written] = write("the cat", **greedy, eos_token_id=0, return_tensors=True)
    assert written["generated_token_ids"] == ids.tolist()
    assert "not supported" not in capfd.readouterr().err
    harness = HFLM(pretrained=exported, tokenizer=tokenizer, max_length=16, add_bos_token=True)
    [(score, _)] = harness._loglikelihood_tokens([(None, ids[:3].tolist(), ids[3:].tolist())])
    with torch.no_grad():
        likely = exported(ids[None]).logits[0, 2:-1].log_softmax(-1)
    assert score == pytest.approx(float(likely.gather(1, ids[3:, None]).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", *LAST, "output=never"], "made from a pretrained model; export it with form=hu"),
        (["export", *LAST, "output=hf", "form=huggingface"], "hf already holds a model"),
        (["generate", "ckpt_path=hf", "prompt=a"], "hf is an upcycled LlamaForCausalLM"),
        (["fit", "model.pretrained=hf", "output_dir=again"], "this package has written it"),
    ],
)
def test_what_is_not_possible_is_one_line(folder: Path, words: list[str], expected: str) -> None:
    command, *more = words
    _, errors = run_main(command, *SMALL, *more, folder=folder, code=2)
    assert expected in errors.splitlines()[-1]


def test_data_of_another_tokenizer_end_in_one_line(folder: Path) -> None:
    (folder / "a.txt").write_text("the cat and the bird\n" * 200)
    more = ("input=a.txt", "output=bytes", "tokenizer=bytes", "num_workers=1")
    run_main("prepare", *SMALL, *more, folder=folder)
    words = ("data.path=bytes", "output_dir=never")
    _, errors = run_main("fit", *SMALL, *words, folder=folder, code=2)
    last = errors.splitlines()[-1]
    assert last.startswith("error: the tokens of bytes were made with another tokenizer than that")
    assert last.endswith("prepare them again with prepare.tokenizer=chat")
    assert not list((folder / "never").glob("*.*"))
