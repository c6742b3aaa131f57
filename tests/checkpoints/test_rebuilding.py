"""`load_from_checkpoint` needs the checkpoint alone, and calls nothing that a stranger names."""

import copy
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from networks import CONNECTIONS, MEMORIES, tiny_transformer
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.checkpoints import RunCheckpoint
from mhc_lightning.errors import UserError
from mhc_lightning.modules import HyperConnection, ManifoldHyperConnection, Transformer
from mhc_lightning.modules.construction import plain
from mhc_lightning.optimizers import AdamWRecipe, MuonRecipe

ROWS: Any = torch.randint(0, 40, (16, 9), generator=torch.Generator().manual_seed(0))


class WideTransformer(Transformer):
    """With an argument of its own, and a positional one."""

    def __init__(self, factor: int, *, label: str = "wide", **settings: Any) -> None:
        super().__init__(ffn_dim=4 * factor, **settings)
        self.label = label


class OwnConnection(HyperConnection):
    """A connection outside the package."""


def thorough(dim: int, num_streams: int, layer_index: int) -> ManifoldHyperConnection:
    return ManifoldHyperConnection(dim, num_streams, layer_index, sinkhorn_iterations=50)


def batches() -> DataLoader:
    return DataLoader(ROWS, batch_size=4)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 4, "enable_checkpointing": bool(callbacks), **options},
    )


def fit(module: LanguageModel, folder: Path, *, sharded: bool | None = None) -> Path:
    """A checkpoint of four steps: Lightning's own by default, else of one of our forms."""
    if sharded is None:
        saver = pl.callbacks.ModelCheckpoint(folder, monitor="val/loss")
        trainer(saver).fit(module, batches(), batches())
        return Path(saver.best_model_path)
    trainer(RunCheckpoint(folder, sharded=sharded)).fit(module, batches(), batches())
    return folder / ("step_00000004" if sharded else "step_00000004.ckpt")


def saved(network: Transformer, path: Path, connection: Any = None, **more: Any) -> Path:
    """A checkpoint without a fit, with this record of its connection, and more in it."""
    module = LanguageModel(network, AdamWRecipe(lr=1e-2))
    content: dict[str, Any] = {"state_dict": module.state_dict(), **more}
    content["hyper_parameters"] = dict(module.hparams)
    module.on_save_checkpoint(content)
    if connection is not None:
        content["hyper_parameters"]["model"]["init_args"]["connection"] = connection
    torch.save(content, path)
    return path


def assert_same(loaded: LanguageModel, module: LanguageModel) -> None:
    ours, theirs = module.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.optimizer == module.optimizer
    assert loaded.hparams == module.hparams
    assert torch.equal(loaded(ROWS), module(ROWS))


@pytest.mark.parametrize("sharded", [None, False, True], ids=["lightning", "file", "folder"])
def test_a_checkpoint_is_enough(tmp_path, sharded):
    network = tiny_transformer(
        partial(ManifoldHyperConnection, sinkhorn_iterations=5),
        memory=MEMORIES["engram"],
        num_streams=3,
    )
    module = LanguageModel(network, MuonRecipe(lr=1e-2, warmup_steps=2), recompute=2)
    path = fit(module, tmp_path, sharded=sharded)
    state = torch.get_rng_state()
    loaded = LanguageModel.load_from_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(loaded, module)
    assert loaded.model.recompute_block_size == 2
    assert loaded.model.blocks[0].attention_connection.sinkhorn_iterations == 5
    assert loaded.model.memory.hash.constants().keys() == network.memory.hash.constants().keys()
    for name, value in network.memory.hash.constants().items():
        assert (loaded.model.memory.hash.constants()[name] == value).all()
    assert loaded.model.memory.is_bound


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("memory", [None, "over_encoding"])
def test_every_connection_is_rebuilt(tmp_path, connection, memory):
    more = {} if memory is None else {"memory": MEMORIES[memory]}
    network = tiny_transformer(connection, **more)
    loaded = LanguageModel.load_from_checkpoint(saved(network, tmp_path / "a.ckpt"))
    assert loaded.model.construction == network.construction
    assert torch.equal(loaded(ROWS), network(ROWS))


@pytest.mark.parametrize("sharded", [None, True], ids=["lightning", "folder"])
def test_a_loaded_module_trains_on_as_the_first_would(tmp_path, sharded):
    """Under a trainer without any checkpoint callback of ours."""
    recipe = AdamWRecipe(lr=1e-2, schedule="constant")
    path = fit(LanguageModel(tiny_transformer(), recipe), tmp_path, sharded=sharded)
    whole = LanguageModel(tiny_transformer(), recipe)
    trainer(max_steps=6).fit(whole, batches(), batches())
    loaded = LanguageModel.load_from_checkpoint(path)
    before = trainer().validate(loaded, batches(), verbose=False)
    trainer(max_steps=6).fit(loaded, batches(), batches(), ckpt_path=str(path))
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    again = trainer().validate(loaded, batches(), ckpt_path=str(path), verbose=False)
    assert again == before


def test_documents_stay_apart(tmp_path):
    network = tiny_transformer()
    network.mask_documents(7)
    tokens = ROWS.clone()
    tokens[:, 4] = 7
    loaded = LanguageModel.load_from_checkpoint(saved(network, tmp_path / "a.ckpt"))
    assert torch.equal(loaded(tokens), network(tokens))
    loaded.model.mask_documents(None)
    assert not torch.equal(loaded(tokens), network(tokens))


def test_arguments_may_be_given_in_place_of_saved_ones(tmp_path):
    path = saved(tiny_transformer(), tmp_path / "a.ckpt")
    recipe = AdamWRecipe(lr=3.0)
    loaded = LanguageModel.load_from_checkpoint(path, optimizer=recipe, recompute="auto")
    assert loaded.optimizer is recipe and loaded.model.recompute == "auto"
    network = tiny_transformer("mhc")
    assert LanguageModel.load_from_checkpoint(path, model=network).model is network
    with pytest.raises(UserError, match=r"takes no lr; what may be given .* model, optimizer"):
        LanguageModel.load_from_checkpoint(path, lr=1.0)


def test_a_learning_rate_that_was_found_is_saved(tmp_path):
    module = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1e-2))
    module.lr = 0.25
    loaded = LanguageModel.load_from_checkpoint(fit(module, tmp_path))
    assert loaded.lr == 0.25


def test_open_files_and_devices(tmp_path):
    network = tiny_transformer()
    path = saved(network, tmp_path / "a.ckpt")
    with open(path, "rb") as file:
        loaded = LanguageModel.load_from_checkpoint(file)
    assert torch.equal(loaded(ROWS), network(ROWS))
    assert torch.equal(LanguageModel.load_from_checkpoint(f"file://{path}")(ROWS), network(ROWS))
    for where in ("cpu", torch.device("cpu"), lambda storage, place: storage, {"cuda:0": "cpu"}):
        loaded = LanguageModel.load_from_checkpoint(path, map_location=where)
        assert loaded.device == torch.device("cpu")
    meta = LanguageModel.load_from_checkpoint(path, map_location="meta")
    assert meta.device == torch.device("meta")


def test_strict_false_loads_what_fits(tmp_path):
    network = tiny_transformer()
    path = saved(network, tmp_path / "a.ckpt")
    content = torch.load(path)
    content["state_dict"]["more"] = content["state_dict"].pop("model.norm.weight") * 3
    torch.save(content, path)
    with pytest.raises(UserError, match=r"Missing key.*model.norm.weight.*strict=False"):
        LanguageModel.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match="more") as warned:
        loaded = LanguageModel.load_from_checkpoint(path, strict=False)
    assert any("model.norm.weight" in str(warning.message) for warning in warned)
    assert torch.equal(loaded.model.output.weight, network.output.weight)


def test_an_older_checkpoint_says_what_to_pass(tmp_path):
    network = tiny_transformer()
    path = saved(network, tmp_path / "a.ckpt")
    content = torch.load(path)
    del content["hyper_parameters"]["optimizer"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"does not say .*; pass optimizer=… to"):
        LanguageModel.load_from_checkpoint(path)
    del content["hyper_parameters"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"a\.ckpt does not say .* pass model=…, optimizer=… to"):
        LanguageModel.load_from_checkpoint(path)
    recipe = AdamWRecipe(lr=1.0)
    loaded = LanguageModel.load_from_checkpoint(path, model=tiny_transformer(), optimizer=recipe)
    assert torch.equal(loaded(ROWS), network(ROWS))


def test_networks_of_ones_own(tmp_path):
    settings = tiny_transformer().construction["model"]
    settings = {k: v for k, v in settings.items() if k not in ("class", "ffn_dim")}
    network = WideTransformer(5, connection=OwnConnection, **settings)
    path = saved(network, tmp_path / "a.ckpt")
    loaded = LanguageModel.load_from_checkpoint(path)
    assert type(loaded.model) is WideTransformer and loaded.model.label == "wide"
    assert type(loaded.model.blocks[0].attention_connection) is OwnConnection
    assert torch.equal(loaded(ROWS), network(ROWS))


def test_functions_of_ones_own_have_to_be_allowed(tmp_path):
    network = tiny_transformer(thorough)
    path = saved(network, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"thorough as its Connection.*pass allow=\[thorough\]"):
        LanguageModel.load_from_checkpoint(path)
    loaded = LanguageModel.load_from_checkpoint(path, allow=[thorough])
    assert torch.equal(loaded(ROWS), network(ROWS))
    with pytest.raises(UserError, match="allow takes classes and functions, not"):
        LanguageModel.load_from_checkpoint(path, allow=[partial(thorough)])


def test_names_of_a_script_are_found_from_another(tmp_path):
    name = {"class_path": f"__main__.{OwnConnection.__qualname__}"}
    path = saved(tiny_transformer(OwnConnection), tmp_path / "a.ckpt", name)
    with pytest.raises(UserError, match=r"__main__.OwnConnection .*allow=\[OwnConnection\]"):
        LanguageModel.load_from_checkpoint(path)
    assert LanguageModel.load_from_checkpoint(path, allow=[OwnConnection])


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "unseen_module.Connection",
        "mhc_lightning.modules.norm.RMSNorm",
        "builtins.eval",
        "x",
    ],
)
def test_strangers_names_are_not_called(tmp_path, monkeypatch, name):
    (tmp_path / "unseen_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = saved(tiny_transformer(), tmp_path / "a.ckpt", name)
    with pytest.raises(UserError, match=f"names {name} as its Connection"):
        LanguageModel.load_from_checkpoint(path)
    assert "unseen_module" not in sys.modules


def test_pickles_are_refused_unless_trusted(tmp_path):
    path = saved(tiny_transformer(), tmp_path / "a.ckpt", mine=partial(print))
    with pytest.raises(UserError, match=r"pickled Python objects.*weights_only=False"):
        LanguageModel.load_from_checkpoint(path)
    assert LanguageModel.load_from_checkpoint(path, weights_only=False)


def test_what_is_no_plain_data_is_said_when_it_is_loaded(tmp_path):
    eps: Any = torch.tensor(1e-20)
    for connection, reason in (
        (lambda **sizes: HyperConnection(**sizes), "lambda"),
        (partial(ManifoldHyperConnection, eps=eps), "tensor.* is no plain data"),
    ):
        path = saved(tiny_transformer(connection), tmp_path / "a.ckpt")
        words = rf"its model, a mhc_lightning\.modules\.Transformer, .*{reason}.*pass model=…"
        with pytest.raises(UserError, match=words):
            LanguageModel.load_from_checkpoint(path)


def test_a_module_is_copied_and_pickled_with_its_hyper_parameters():
    module = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1e-2))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.hparams == module.hparams
        assert twin.model.construction == module.model.construction


class Named(LanguageModel):
    """A subclass that saves its hyper-parameters as most modules do."""

    def __init__(self, model: Transformer, optimizer: AdamWRecipe, name: str = "none") -> None:
        super().__init__(model, optimizer)
        self.save_hyperparameters()
        self.configured = False

    def configure_model(self) -> None:
        super().configure_model()
        self.configured = True


class Complete(LanguageModel):
    """A subclass that makes its own network."""

    def __init__(self, streams: int) -> None:
        super().__init__(tiny_transformer(num_streams=streams), AdamWRecipe(lr=1e-2))
        self.save_hyperparameters("streams")


@pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of")
def test_subclasses_are_rebuilt_with_their_arguments(tmp_path):
    module = Named(tiny_transformer(), AdamWRecipe(lr=1e-2), name="mine")
    loaded = Named.load_from_checkpoint(fit(module, tmp_path / "a"))
    assert loaded.hparams["name"] == "mine" and loaded.configured
    assert torch.equal(loaded(ROWS), module(ROWS))
    complete = Complete(streams=2)
    again = Complete.load_from_checkpoint(fit(complete, tmp_path / "b"))
    assert again.model.num_streams == 2
    assert torch.equal(again(ROWS), complete(ROWS))


def test_hyper_parameters_are_those_of_a_file_of_lightnings_loggers(tmp_path):
    module = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1e-2))
    logger = pl.loggers.CSVLogger(tmp_path)
    logger.log_hyperparams(dict(module.hparams_initial))
    logger.save()
    path = saved(module.model, tmp_path / "a.ckpt")
    content = torch.load(path)
    del content["hyper_parameters"]
    torch.save(content, path)
    file = Path(logger.log_dir) / "hparams.yaml"
    assert_same(LanguageModel.load_from_checkpoint(path, hparams_file=file), module)
    with pytest.raises(UserError, match=r"hparams_file=.* cannot be read"):
        LanguageModel.load_from_checkpoint(path, hparams_file=tmp_path / "none.yaml")


def test_plain_data():
    value = {"a": (1, 2.5, None), 3: [Path("x"), True], "t": torch.tensor([1])[0].item()}
    assert plain(value) == {"a": [1, 2.5, None], "3": ["x", True], "t": 1}
    with pytest.raises(TypeError, match="no plain data"):
        plain({"a": torch.zeros(1)})


def test_what_is_no_checkpoint(tmp_path):
    for path, words in (
        (tmp_path / "none.ckpt", "no checkpoint at"),
        ("", "no checkpoint at ''"),
        (tmp_path, "is no checkpoint; name a file"),
    ):
        with pytest.raises(UserError, match=words):
            LanguageModel.load_from_checkpoint(path)
