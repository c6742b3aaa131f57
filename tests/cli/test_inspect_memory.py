"""`inspect` of a network with a memory: which n-grams of a text open its gates."""

import json

import pytest
import torch

from mhc_lightning.interchange.exported_model import load_exported

TEXT = "the gain, The gain; the\ngain"
ENGRAM = [
    *("memory=engram", "memory.layers=[0,1]", "memory.rows=101", "memory.num_heads=2"),
    *("memory.dim=8", "memory.orders=[2,3]", "memory.zero_start=false"),
]


@pytest.fixture(scope="module")
def with_memory(tmp_path_factory, command_in):
    """A command in whose folder a run with Engram and its export are."""
    command = command_in(tmp_path_factory.mktemp("engram"))
    assert command.inside("fit", "output_dir=run", "callbacks=minimal", *ENGRAM) == 0
    assert command.inside("export", "output_dir=run", "ckpt_path=last", "output=exported",
                          *ENGRAM) == 0  # fmt: skip
    yield command
    command.close()


def inspected(capfd, *words):
    from mhc_lightning.cli.main import main

    assert main(["inspect", *map(str, words)]) == 0
    return capfd.readouterr()[0]


@torch.no_grad()
def gates_by_hand(network, text):
    """By block and lower-case trigram: its positions, and the gates of each stream at these."""
    tokens = torch.tensor([list(text.encode())])
    streams, carry, recalled = network.embed(tokens), None, network.recall(tokens)
    blocks = []
    for k, block in enumerate(network.blocks):
        part = block.memory
        rows = part.table(recalled[k]).flatten(-2)
        n = streams.shape[-2]
        key = part.key(rows).unflatten(-1, (n, -1))
        score = (unit(streams) * part.gate.stream_norm.view(n, -1)
                 * unit(key) * part.gate.key_norm.view(n, -1)).sum(-1) / 4  # fmt: skip
        gate = torch.sigmoid(score.sign() * score.abs().clamp(min=1e-6).sqrt())[0]
        found: dict = {}
        for t in range(len(text)):
            ngram = text[max(0, t - 2) : t + 1].lower().replace("\n", " ")
            found.setdefault((ngram, t < 2), []).append(gate[t].tolist())
        blocks.append(found)
        streams, carry = block(streams, carry, recalled=recalled)
    return blocks


def unit(x):
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def test_the_gates_of_each_ngram(with_memory, capfd):
    network = load_exported(with_memory.folder / "exported")
    wanted = gates_by_hand(network, TEXT)
    for place in ("run/checkpoints/last", "run", "exported"):
        report = json.loads(inspected(capfd, with_memory.folder / place, f"input={TEXT}", "--json"))
        assert [block["block"] for block in report["gates"]] == [0, 1]
        for block, expected in zip(report["gates"], wanted, strict=True):
            ngrams = block["ngrams"]
            assert len(ngrams) == len(expected) < len(TEXT)
            assert [n["gate"] for n in ngrams] == sorted((n["gate"] for n in ngrams), reverse=True)
            for ngram in ngrams:
                text = ngram["text"]
                assert bytes(ngram["tokens"]).decode() == text
                key = text.lower().replace("\n", " ")
                gates = expected[key, len(text) < 3]
                assert ngram["positions"] == len(gates)
                means = torch.tensor(gates, dtype=torch.float64).mean(0)
                assert ngram["streams"] == pytest.approx(means.tolist(), rel=1e-4)
                assert ngram["gate"] == pytest.approx(float(means.mean()), rel=1e-4)
        the = {n["text"]: n["positions"] for n in report["gates"][0]["ngrams"]}
        assert the["the"] == 3 and the["he "] == 3 and the["t"] == 1


def test_the_table_has_what_opens_each_gate_most(with_memory, capfd):
    words = with_memory.folder / "run", f"input={TEXT}"
    report = json.loads(inspected(capfd, *words, "--json"))
    output = inspected(capfd, *words)
    tables = output.split("memory of block ")[1:]
    assert len(tables) == 2
    for block, table in zip(report["gates"], tables, strict=True):
        lines = table.splitlines()
        assert lines[0].endswith(f"what opens it most, of {len(block['ngrams'])} n-grams")
        assert len([line for line in lines[3:] if line]) == 10
        first = block["ngrams"][0]
        assert lines[3].startswith(json.dumps(first["text"]))
        assert f"  {first['gate']:.3f}  " in lines[3]


def test_without_gates_nothing_is_added(with_memory, trained, capfd):
    static = json.loads(inspected(capfd, with_memory.folder / "run", "--json"))
    plain = json.loads(inspected(capfd, trained.folder / "run", f"input={TEXT}", "--json"))
    assert "gates" not in static and "gates" not in plain
    assert "memory" not in inspected(capfd, trained.folder / "run", f"input={TEXT}")
