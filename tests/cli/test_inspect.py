"""`inspect` against direct computation, for every form that a checkpoint comes in."""

import json
import shutil
import weakref
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import save_file
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mhc_lightning.cli.main import main
from mhc_lightning.inspection import inspect_mappings, static_mappings_of
from mhc_lightning.interchange.deepseek_v4 import to_deepseek_v4
from mhc_lightning.interchange.exported_model import load_exported
from mhc_lightning.interchange.safetensors_files import StoredTensors
from mhc_lightning.modules import (
    HyperConnection,
    ManifoldHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
)

TEXT = "It's ${x}, def f(x): = {1}"


@pytest.fixture(scope="module")
def exported(trained):
    """What `export` makes of the run: the folder, and the network."""
    assert trained.inside("export", "output_dir=run", "ckpt_path=last", "output=exported") == 0
    folder = trained.folder / "exported"
    return folder, load_exported(folder)


@pytest.fixture
def inspect(capfd):
    """Runs the command; the JSON it prints, or (with an exit code) its last line of errors."""

    def run(*words, code=None):
        returned = main(["inspect", *map(str, words), *([] if code else ["--json"])])
        output, errors = capfd.readouterr()
        assert returned == (code or 0), errors
        assert "Traceback" not in errors
        if code:
            assert output == ""
            return errors.splitlines()[-1]
        return json.loads(output)

    return run


def assert_numbers_follow(report, layers):
    """Every number of a report from matrices [L, tokens, n, n], by products written out."""

    def gain(matrices, axis):
        return np.abs(matrices.sum(axis)).max(-1).mean()

    def product(matrices):
        return reduce(np.matmul, matrices[::-1])  # the last is applied last

    for k, row in enumerate(report["sub_layers"]):
        forward, backward = product(layers[: k + 1]), product(layers[k:])
        assert row["single"]["forward"] == pytest.approx(gain(layers[k], -1), rel=1e-5)
        assert row["single"]["backward"] == pytest.approx(gain(layers[k], -2), rel=1e-5)
        assert row["composite"]["forward"] == pytest.approx(gain(forward, -1), rel=1e-5)
        assert row["composite"]["backward"] == pytest.approx(gain(backward, -2), rel=1e-5)
        assert row["residual"] == pytest.approx(layers[k].mean(0), rel=1e-5, abs=1e-7)
        error = np.abs(layers[k].sum(-2) - 1).max()
        assert row["column_error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
        diagonal = np.diagonal(layers[k], axis1=-2, axis2=-1).mean()
        assert row["diagonal_mean"] == pytest.approx(diagonal, rel=1e-5)
    (composite,) = report["composites"]
    assert (composite["first"], composite["last"]) == (0, len(layers) - 1)
    assert composite["residual"] == pytest.approx(product(layers).mean(0), rel=1e-5, abs=1e-7)


def connections(network):
    for block in network.blocks:
        yield from (block.attention_connection, block.feed_forward_connection)


def test_static_matrices_are_those_of_the_biases(trained, exported, inspect):
    folder, network = exported
    wanted = [c.mappings(torch.zeros(1, 4, 16)) for c in connections(network)]
    matrices = np.stack([m.residual.detach().double().numpy() for m in wanted])
    run = trained.folder / "run"
    for place in (run / "checkpoints/last", run, folder):
        report = inspect(place)
        assert report["matrices"] == "static" and report["tokens"] is None
        assert report["step"] == 6
        names = [row["name"] for row in report["sub_layers"]]
        assert names[:2] == ["blocks.0.attention", "blocks.0.feed_forward"] and len(names) == 4
        assert_numbers_follow(report, matrices)
        for row, mappings in zip(report["sub_layers"], wanted, strict=True):
            assert row["read"] == pytest.approx(mappings.pre[0].tolist(), rel=1e-5)
            assert row["write"] == pytest.approx(mappings.post[0].tolist(), rel=1e-5)


def test_matrices_on_a_text_are_those_of_its_tokens(trained, exported, inspect):
    folder, network = exported
    seen = []
    hooks = [
        c.window.register_forward_hook(lambda _m, _a, out: seen.append(out))
        for c in connections(network)
    ]
    with torch.no_grad():
        network(torch.tensor([list(TEXT.encode())]))
    for hook in hooks:
        hook.remove()
    matrices = np.stack([m.residual[0].double().numpy() for m in seen])
    for place in (trained.folder / "run/checkpoints/last", folder):
        report = inspect(place, f"input={TEXT}")
        assert (report["matrices"], report["tokens"]) == ("text", len(TEXT))
        assert_numbers_follow(report, matrices)
    assert report["sub_layers"] != inspect(folder)["sub_layers"]


def test_the_table_says_what_it_shows_and_pictures_are_drawn(trained, capfd, tmp_path):
    run = trained.folder / "run"
    assert main(["inspect", str(run), f"output={tmp_path / 'pictures'}"]) == 0
    output, errors = capfd.readouterr()
    lines = output.splitlines()
    assert "step 6: static matrices, of the biases alone" in lines[0]
    rows = {line.split()[1]: line.split() for line in lines[3:7]}
    assert rows["blocks.1.feed_forward"][:3] == ["3", "blocks.1.feed_forward", "1"]
    assert lines[-1].startswith("largest composite gain of sub-layers 0 to 3: forward 1 (sub-layer")
    assert "drew 6 pictures" in errors
    names = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert names == ["composite_0_to_3.png", "gains.png", *(f"layer_{k}.png" for k in range(4))]
    assert all(imread(file).shape[0] > 300 for file in (tmp_path / "pictures").iterdir())
    assert main(["inspect", str(run / "checkpoints/best"), "input=the gain"]) == 0
    assert "matrices on 8 tokens of the text" in capfd.readouterr()[0]


@pytest.mark.parametrize(
    "connection",
    [HyperConnection, ManifoldHyperConnection, ResidualConnection, SinglePassHyperConnection],
)
def test_every_connection_a_layer_at_a_time(connection, tiny_transformer):
    """Only connections are read, each tensor once, and never two sub-layers' at a time."""
    streams = 1 if connection is ResidualConnection else 4
    network = tiny_transformer(connection=connection, num_streams=streams)
    with torch.no_grad():
        for part in connections(network):
            for parameter in part.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = network.state_dict()
    read: list[str] = []
    alive: list[tuple[str, weakref.ref]] = []
    most = 0

    class Stored(dict):
        def __getitem__(self, name):
            nonlocal most
            alive[:] = [(n, r) for n, r in alive if r() is not None]
            read.append(name)
            tensor = super().__getitem__(name).clone()
            alive.append((name, weakref.ref(tensor)))
            most = max(most, len({n.rpartition(".")[0] for n, _ in alive}))
            return tensor

    layers = list(static_mappings_of(network.to("meta"), Stored(state)))
    assert len(layers) == 4 and len(read) == len(set(read)) and most <= 1
    assert all("_connection." in name for name in read)
    assert len(read) == sum(len(list(c.parameters())) for c in connections(network))
    pre = None
    for k, (layer, part) in enumerate(zip(layers, connections(network), strict=True)):
        prefix = f"blocks.{k // 2}.{'attention' if k % 2 == 0 else 'feed_forward'}"
        assert layer.name == prefix
        whole = type(part)(part.dim, part.num_streams, part.layer_index)
        own = {name: state[f"{prefix}_connection.{name}"] for name in whole.state_dict()}
        whole.load_state_dict(own)
        wanted = whole.mappings(torch.zeros(1, streams, part.dim))
        assert torch.allclose(layer.mappings.residual, wanted.residual, atol=1e-6)
        assert torch.allclose(layer.mappings.post, wanted.post, atol=1e-6)
        if connection is not SinglePassHyperConnection or k > 0:  # which reads by the one before
            shown = pre if connection is SinglePassHyperConnection else wanted.pre
            assert shown is not None
            assert torch.allclose(layer.mappings.pre, shown, atol=1e-6)
        pre = wanted.pre
    assert inspect_mappings(layers).gains


@pytest.fixture
def deepseek(exported, tmp_path):
    """A model in V4's layout: one file, its connections and something else."""
    _, network = exported
    tensors, _ = to_deepseek_v4(network)
    save_file({**tensors, "layers.0.attn.wq_a.weight": torch.zeros(9, 9)}, tmp_path / "v4.st")
    (tmp_path / "v4.st").rename(tmp_path / "v4.safetensors")
    return tmp_path / "v4.safetensors"


def test_a_deepseek_v4_file_has_the_models_own_matrices(exported, deepseek, inspect, monkeypatch):
    folder, _ = exported
    read = []
    take = StoredTensors.__getitem__

    def noted(self, name):
        read.append(name)
        return take(self, name)

    monkeypatch.setattr(StoredTensors, "__getitem__", noted)
    report = inspect(deepseek, "eps=0")
    assert read == [f"layers.{k}.hc_{part}_base" for k in range(2) for part in ("attn", "ffn")]
    monkeypatch.undo()
    ours = inspect(folder)
    assert [row["name"] for row in report["sub_layers"]][:2] == [
        "layers.0.hc_attn",
        "layers.0.hc_ffn",
    ]
    for theirs, own in zip(report["sub_layers"], ours["sub_layers"], strict=True):
        assert theirs["residual"] == pytest.approx(np.array(own["residual"]), abs=1e-6)
        assert theirs["residual"] != pytest.approx(np.array(own["residual"]).T, abs=1e-6)
        assert theirs["read"] == pytest.approx(own["read"], abs=1e-6)
        assert theirs["write"] == pytest.approx(own["write"], abs=1e-6)
        assert theirs["composite"]["backward"] == pytest.approx(
            own["composite"]["backward"], rel=1e-4
        )


def test_a_deepseek_v4_model_computes_as_transformers_does(deepseek, inspect):
    """With its epsilon and iterations, from config.json or as typed; one file or a folder."""
    config = {"hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "model_type": "deepseek_v4"}
    tensors = StoredTensors(deepseek)
    theirs = DeepseekV4HyperConnection(
        DeepseekV4Config(hidden_size=16, hc_mult=4, hc_sinkhorn_iters=3, hc_eps=1e-3)
    )
    base = tensors["layers.1.hc_attn_base"]
    theirs.load_state_dict(
        {"fn": torch.zeros(24, 64), "base": base, "scale": tensors["layers.1.hc_attn_scale"]}
    )
    post, comb, _ = theirs(torch.randn(1, 1, 4, 16))
    typed = inspect(deepseek, "sinkhorn_iterations=3", "eps=1e-3")
    folder = deepseek.parent / "model"
    folder.mkdir()
    shutil.copy(deepseek, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for report in (typed, inspect(folder), inspect(folder / "model.safetensors")):
        row = report["sub_layers"][2]
        assert row["residual"] == pytest.approx(comb[0, 0].mT.detach().numpy(), rel=1e-4)
        assert row["write"] == pytest.approx(post.flatten().tolist(), rel=1e-4)
        assert report["step"] is None


def test_what_cannot_be_inspected_is_one_line(trained, exported, deepseek, inspect, tmp_path):
    folder, _ = exported
    run = trained.folder / "run"
    last = run / "checkpoints/last"
    (tmp_path / "a.txt").write_text("no checkpoint")
    shutil.copy(last, tmp_path / "away.ckpt")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/checkpoints").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "torn")
    (tmp_path / "torn/checkpoints/cut.ckpt").write_bytes(last.read_bytes()[:500])
    save_file({"w": torch.zeros(2)}, tmp_path / "torn/plain.safetensors")
    for words, message in (
        ([], "inspect needs a checkpoint"),
        (["input=x"], "inspect needs a checkpoint"),
        (["nowhere"], "no checkpoint at nowhere"),
        ([tmp_path / "a.txt"], "lies in no run's checkpoints/"),
        ([tmp_path / "torn/checkpoints"], "lies in no run's checkpoints/"),
        ([tmp_path / "away.ckpt"], "name its experiment with --config"),
        ([tmp_path / "torn/checkpoints/cut.ckpt"], "is not a complete checkpoint"),
        ([tmp_path / "torn/plain.safetensors"], "no connections in DeepSeek-V4's layout"),
        ([last, "input= "], "input= is empty"),
        ([last, f"input={'x' * 33}"], "33 tokens, and the model is used on 32"),
        ([last, "model.dim=24"], "not those of the model"),
        ([folder, "seed=1"], "unknown key 'seed'"),
        ([folder, "--config", "mhc_quickstart"], "--config belongs to"),
        ([deepseek, "input=x"], "no network"),
        ([deepseek, "eps=x"], "eps=x is no number"),
        ([deepseek, "sinkhorn_iterations=0"], "at least 1"),
        ([last, "output=/dev/null/x"], "cannot write to /dev/null/x"),
    ):
        error = inspect(*words, code=2)
        assert error.startswith("error: ") and message in error, (words, error)
    vocabulary = {chr(97 + k): k for k in range(26)} | {"[UNK]": 26, "<eos>": 27}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    other.save(str(tmp_path / "tokenizer.json"))
    told = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    assert "tokenizer mismatch" in inspect(last, "input=x", told, code=2)


def test_a_checkpoint_away_from_its_run_and_one_that_could_run_code(trained, inspect, tmp_path):
    run = trained.folder / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    away = ["--config", run / "config.yaml"]
    shutil.copy(run / "checkpoints/last", tmp_path / "away.ckpt")
    assert inspect(tmp_path / "away.ckpt", *away)["step"] == config["trainer"]["max_steps"]
    theirs = tmp_path / "theirs/checkpoints"
    theirs.mkdir(parents=True)
    checkpoint = torch.load(tmp_path / "away.ckpt", weights_only=True)
    torch.save({**checkpoint, "more": Path("x")}, theirs / "step_00000006.ckpt")
    (theirs.parent / "config.yaml").write_text(yaml.safe_dump(config))
    assert "could run code" in inspect(theirs / "step_00000006.ckpt", code=2)
    config["model"]["_target_"] = "builtins.print"
    (theirs.parent / "config.yaml").write_text(yaml.safe_dump(config))
    assert "is no network" in inspect(theirs / "step_00000006.ckpt", code=2)
