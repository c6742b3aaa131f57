"""Composing an experiment: overrides, literals, mistakes, and where values come from."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.components import build_trainer
from mhc_lightning.cli.composition import compose_experiment, escaped
from mhc_lightning.cli.overrides import nearest_key
from mhc_lightning.cli.print_config import show_config
from mhc_lightning.errors import UserError

LITERALS = [
    "Hello, world",
    "def f(x):",
    "It's",
    'say "hi"',
    "epoch=0-step=10.ckpt",
    "a b, {c} [d] ${output_dir} \\${x} \\",
    "${",
    "???",
    "null",
    "# no comment",
    " leading and trailing ",
    "naïve ✓\nnewline",
    "*glob?",
    "",
]


def compose(*words, command="fit", config="mhc_quickstart"):
    return compose_experiment(parse_arguments([command, "--config", str(config), *words]))


@pytest.mark.parametrize("text", LITERALS)
def test_prompts_and_paths_are_the_characters_typed(text):
    keys = ["prompt", "input", "output", "ckpt_path", "data.path", "output_dir"]
    values = compose(*(f"{key}={text}" for key in keys), command="generate").values()
    assert values["prompt"] == values["output"] == values["output_dir"] == text
    assert values["data"]["path"] == text
    assert values["input"] == [text]
    assert values["ckpt_path"] == (None if text in ("", "null") else text)


def test_output_dir_is_literal_where_other_values_use_it():
    text = "my runs/${seed} = {1}, It's"
    values = compose(f"output_dir={text}").values()
    assert values["output_dir"] == text
    assert values["checkpoint"]["folder"] == f"{text}/checkpoints"
    assert values["logger"]["csv"]["folder"] == text


@given(st.text(alphabet="\\${}a.:,' ", max_size=12))
def test_escaped_text_is_read_back_unchanged(text):
    config = OmegaConf.create({"a": escaped(text), "b": "${a}/x"})
    assert config.a == text
    assert config.b == f"{text}/x"


# Hydra's grammar makes nothing of these, or several runs.
TEXTS = ["run#3", "ü", "It's", "'x", '"x', "{x}", "[a", "a]", "a=b", "a;b!", "日本", "<x>", "(x)",
         "~x", "a\\#", "x'y'z", "a\nb", "a,b", "range(1,3)", "[ü]", "{a: ü}"]  # fmt: skip


def test_a_value_without_a_meaning_is_the_characters_typed():
    added = compose(*(f"+new.k{k}={text}" for k, text in enumerate(TEXTS))).values()["new"]
    assert list(added.values()) == TEXTS
    for text in TEXTS[:3]:
        words = f"text_field={text}", f"trainer.accelerator={text}", f"generate.top_p={text}"
        values = compose(*words, command="prepare").values()  # the last has null as its default
        assert values["prepare"]["text_field"] == values["trainer"]["accelerator"] == text
        assert values["generate"]["top_p"] == text


def test_a_value_with_a_meaning_keeps_it(monkeypatch):
    monkeypatch.setenv("HERE", "a#{ü}")
    meant = {
        "null": None, "'a#b'": "a#b", '"null"': "null", "a b": "a b", "1e3": 1000.0, "": "",
        "${oc.env:HERE}": "a#{ü}", "${oc.env:HERE}/#${oc.env:HERE}": "a#{ü}/#a#{ü}",
        "\\${x}#": "${x}#", "${seed}#": "1#", "[*.py,'a#b']": ["*.py", "a#b"],
        "{a: [1,null]}": {"a": [1, None]},
    }  # fmt: skip
    added = compose(*(f"+new.k{k}={text}" for k, text in enumerate(meant))).values()["new"]
    assert list(added.values()) == list(meant.values())


def test_input_may_be_given_several_times():
    assert compose("input=a, b", "input=c", command="prepare").values()["input"] == ["a, b", "c"]


def test_a_command_takes_its_own_settings_without_their_section():
    values = compose("temperature=0", "top_k=5", "generate.top_p=0.5", command="generate").values()
    assert values["generate"]["temperature"] == 0
    assert values["generate"]["top_k"] == 5
    assert values["generate"]["top_p"] == 0.5
    with pytest.raises(UserError, match=r"did you mean 'generate.temperature'"):
        compose("temperature=0", command="fit")


def test_whole_numbers_may_be_written_as_powers_of_ten():
    steps = compose("trainer.max_steps=1e3").values()["trainer"]["max_steps"]
    assert steps == 1000 and isinstance(steps, int)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.max_stepz=3"], "did you mean 'trainer.max_steps'"),
        (["max_steps=3"], "did you mean 'trainer.max_steps'"),
        (["model.num_stream=3"], "did you mean 'model.num_streams'"),
        (["optimiser.lr=3"], "did you mean 'optimizer.lr'"),
        (["conection=hc"], "did you mean 'connection'"),
        (["memory.rows=9"], "it is a setting of memory=engram|longcat|over_encoding, which"),
        (["trainer.max_steps=abc"], "trainer.max_steps must be a whole number, not 'abc'"),
        (["model.dim=1.5"], "model.dim must be a whole number, not 1.5"),
        (["model.dim=true"], "model.dim must be a whole number, not True"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, not 'fast'"),
        (["compile=maybe"], "compile must be true or false, not 'maybe'"),
        (["model.dim=[1]"], "model.dim must be a whole number"),
        (["trainer=5"], "available for trainer: default"),
        (["strategy=teleport"], "available for strategy: auto, ddp"),
        (["connection=mch"], "available for connection: hc, hc_linear, hc_static, identity, krom"),
        (["optimizer.lr=a, b("], "optimizer.lr must be a number, not 'a, b('"),
        (["prepare.include=a,b"], "'prepare.include=a,b': it stands for several values"),
        (["prepare.include=[a#b]"], '\'key=["a#b","c"]\''),
        (["generate={a"], "cannot read the value of 'generate={a'"),
        (["connection=mhc,hc"], "connection=mhc,hc: there is no such choice"),
        (["prepare.text_field=a${b"], "write '\\${'"),
        (["prepare.text_field=${oc.env:NO_SUCH_VARIABLE}"], "'NO_SUCH_VARIABLE' not found"),
        (["=5"], "'' is no key"),
        (["+=5"], "'+' is no key"),
        (["seed@here=5"], "'seed@here' is no key"),
        (
            ["seed=18446744073709551616"],
            "seed must be a whole number, not 18446744073709551616 (too large)",
        ),
        (["compile=18446744073709551616"], "not 18446744073709551616 (a whole number)"),
        (["seed=-1"], "seed must be a whole number, at least 0 and below 2**32, not -1"),
        (["seed=null"], "seed must be a whole number, at least 0 and below 2**32, not null"),
        (["optimizer.lr=${nope}"], "nope"),
        (
            ["data.batch_size=???"],
            "config mhc_quickstart needs data.batch_size=…: sequences per optimizer step",
        ),
        (["model=paper"], "config mhc_quickstart needs model.dim=…: width C of a stream"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(words, expected):
    with pytest.raises(UserError) as error:
        compose(*words)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mhc_quikstart", "did you mean mhc_quickstart"),
        ("configs/nothing.yaml", "shipped experiments: "),
        ("/", "no config '/'"),
    ],
)
def test_a_missing_config_names_those_that_exist(config, expected):
    with pytest.raises(UserError, match=expected):
        compose(config=config)


@pytest.fixture
def own(tmp_path):
    """A user's folder (with an awkward name) that adds a connection to the shipped groups."""
    folder = tmp_path / "my configs, = {1}"
    (folder / "connection").mkdir(parents=True)
    (folder / "connection/mine.yaml").write_text(
        "_target_: mhc_lightning.modules.HyperConnection\n_partial_: true\ndynamic: false\n"
    )
    (folder / "mine.yaml").write_text(
        "defaults: [mhc_quickstart, {override connection: mine}, _self_]\n"
        "data: {path: [{path: a b, weight: 3}, {path: c, weight: 1}]}\n"
        "optimizer: {lr: 0.25}\n"
    )
    return folder / "mine.yaml"


def test_a_config_anywhere_builds_on_the_shipped_ones(own):
    values = compose("optimizer.eps=1e-8", config=own).values()
    assert values["connection"]["dynamic"] is False
    assert values["data"]["path"] == [{"path": "a b", "weight": 3}, {"path": "c", "weight": 1}]
    assert values["optimizer"]["lr"] == 0.25 and values["optimizer"]["eps"] == 1e-8
    assert "sinkhorn_iterations" in compose("connection=mhc", config=own).values()["connection"]
    available = "available for connection: hc, .* mhc, mhc_lite, mhc_single_pass, mine, residual"
    with pytest.raises(UserError, match=available):
        compose("connection=other", config=own)


@pytest.mark.parametrize(
    "text",
    ["model: [", "defaults:\n  - model: nothing_like_it\n", "a: ${b}\n", "just text\n"],
)
def test_a_broken_config_file_is_one_line(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        compose(config=tmp_path / "broken.yaml")
    assert "broken" in str(error.value) and "\n" not in str(error.value)


def sources(text):
    """Key -> source, by the indentation of printed YAML."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in text.splitlines()[1:]:
        head, _, source = line.partition("  # ")
        depth = (len(head) - len(head.lstrip())) // 2
        path = [*path[:depth], head.strip().partition(":")[0]]
        found[".".join(path)] = source
    return found


def test_the_printed_config_is_yaml_and_says_where_values_come_from(own):
    experiment = compose("trainer.max_steps=7", "output_dir=a ${b}", "model=moe_tiny", config=own)
    text = show_config(experiment)
    where = sources(text)
    assert where["trainer.max_steps"] == "command line"
    assert where["output_dir"] == "command line"
    assert where["optimizer.lr"] == "mine.yaml"
    assert where["optimizer.eps"] == "optimizer/adamw.yaml"
    assert where["connection.dynamic"] == "connection/mine.yaml"
    assert where["model.num_experts"] == "model/moe_tiny.yaml"
    assert where["model.rope_theta"] == "model/small.yaml"
    assert where["seed"] == "run/default.yaml"
    assert where["data.seed"] == "data/text.yaml: ${seed}"
    assert where["checkpoint.folder"].startswith("checkpoint/default.yaml: ${output_dir}")
    again = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text)), resolve=True)
    assert again == experiment.values()


def test_the_nearest_key_needs_some_likeness():
    assert nearest_key("zzzzqq", ["model.dim", "seed"]) is None


def test_help_and_argument_errors_come_without_torch():
    code = (
        "import sys\n"
        "from mhc_lightning.cli.main import main\n"
        "for words in (['--help'], ['fit', '--help'], ['generate', '-h'], ['--version'],\n"
        "              ['fit', '--config', 'mhc_quickstart', '--print-config']):\n"
        "    assert main(words) == 0, words\n"
        "for words in ([], ['fitt'], ['fit'], ['fit', '--confg'], ['fit', '--config', 'nope'],\n"
        "              ['fit', '--config', 'mhc_quickstart', 'model.dim=1.5'],\n"
        "              ['fit', '--config', 'mhc_quickstart', 'word'],\n"
        "              ['fit', '--json', '--config', 'mhc_quickstart']):\n"
        "    assert main(words) == 2, words\n"
        "heavy = {'torch', 'lightning', 'litdata', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 7 and all(line.startswith("error: ") for line in lines)
    assert "mhc_quickstart" in done.stdout and "prompt=TEXT" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 3\n".encode("utf-16"), "not text in UTF-8"),
        ("prompt: ü\n".encode("latin-1"), "not text in UTF-8"),
        (bytes(range(256)), "not text in UTF-8"),
        (b"model:\n\tdim: 8\n", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "duplicate key seed"),
        (b"defaults: [mine, _self_]\n", "names itself"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content: bytes, message: str):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"config mine.yaml.* {message}"):
        compose(config=tmp_path / "mine.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_any_text_in_utf8_is_read(tmp_path, encoding: str, newline: str):
    file = tmp_path / "a = ü.y.yaml"
    text = "defaults: [mhc_quickstart, _self_]\nseed: 77\nprompt: ü\n"
    file.write_bytes(text.replace("\n", newline).encode(encoding))
    values = compose(config=file).values()
    assert (values["seed"], values["prompt"]) == (77, "ü")


@pytest.mark.parametrize(
    ("lines", "meant"),
    [
        ("modle: {dim: 8}", "model"),
        ("max_steps: 8", "trainer.max_steps"),
        ("dim: 8\nmodel: {dim: '${dim}'}", None),  # for the file's own use
        ("note: the first attempt", None),
    ],
)
def test_a_key_that_nothing_reads_and_looks_like_another_is_told(tmp_path, capsys, lines, meant):
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: [mhc_quickstart, _self_]\n{lines}\n")
    compose(config=file)
    key = lines.partition(":")[0]
    expected = f"warning: config mine.yaml: nothing reads {key!r}; did you mean {meant!r}?\n"
    assert capsys.readouterr().err == (expected if meant else "")


def test_a_trainer_that_is_missing_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [mhc_quickstart, _self_]\ntrainer: null\n")
    with pytest.raises(UserError, match="has no section 'trainer'"):
        build_trainer(compose(config=file))
