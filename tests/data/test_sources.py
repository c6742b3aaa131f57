"""The values of `data.path`."""

from pathlib import Path

import pytest

from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.data.sources import Source, open_sources, parse_sources
from mhc_lightning.errors import UserError


def test_every_form_of_a_path() -> None:
    assert parse_sources("a=b c") == [Source("a=b c")]
    assert parse_sources(Path("/x")) == [Source("/x")]
    assert parse_sources(["a", "b"]) == [Source("a"), Source("b")]
    assert parse_sources({"path": "a", "weight": 2}) == [Source("a", 2.0)]
    weighted = [Source("a", 1.0), Source("b", 0.5)]
    assert parse_sources([{"path": "a", "weight": 1}, {"path": "b", "weight": 0.5}]) == weighted
    named = {"web": {"path": "a", "weight": 1}, "code": {"path": "b", "weight": 0.5}}
    assert parse_sources(named) == weighted
    assert parse_sources({"web": "a", "code": "b"}) == [Source("a"), Source("b")]


def test_hydra_containers_are_taken() -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"list": [{"path": "a", "weight": 1}], "map": {"x": {"path": "b"}}})
    assert parse_sources(config["list"]) == [Source("a", 1.0)]
    assert parse_sources(config["map"]) == [Source("b")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "names no source"),
        ("", "source ''"),
        (None, "source None"),
        ([["a"]], "source \\['a'\\]"),
        ([{"path": "a", "wieght": 1}], "keys path, wieght; it takes path and weight"),
        ([{"path": "a", "weight": 0}], "weight of a is 0"),
        ([{"path": "a", "weight": "much"}], "weight of a is much"),
        ([{"path": "a", "weight": 1}, "b"], "weights for some sources only"),
        ([{"path": p, "weight": 1e308} for p in "ab"], "too large to add"),
    ],
)
def test_wrong_paths_are_refused(path: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(path)


def test_sources_weigh_as_much_as_they_hold(prepared_path: Path, other_prepared_path: Path) -> None:
    paths = [Source(str(prepared_path)), Source(str(other_prepared_path))]
    opened, weights = open_sources(paths, 64)
    assert weights == [
        float(PreparedData(path.path).record.counts["train"].tokens) for path in paths
    ]
    assert [data.num_tokens("train") for data in opened] == weights
    _, weights = open_sources([Source(path.path, 2.0) for path in paths], 64)
    assert weights == [2.0, 2.0]


def test_sequences_longer_than_the_chunks(prepared_path: Path) -> None:
    source = [Source(str(prepared_path))]
    longest = max(chunk.tokens for chunk in open_sources(source, 64)[0][0].chunks("train"))
    open_sources(source, longest - 1)
    with pytest.raises(UserError, match=rf"sequence_length={longest} is longer .* {longest - 1};"):
        open_sources(source, longest)


def test_tokenizers_must_agree(prepared_path: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat and the dog\n" * 500)
    prepare(tmp_path / "a.txt", tmp_path / "bpe", tokenizer=tokenizer_file, progress=False)
    byte, bpe = Source(str(prepared_path)), Source(str(tmp_path / "bpe"))
    with pytest.raises(UserError, match=r"\(bytes, 257 ids\) and .*different tokenizers"):
        open_sources([byte, bpe], 16)
    with pytest.raises(UserError, match=r"prepared with another tokenizer \(bytes, 257 ids\)"):
        open_sources([byte], 16, tokenizer=str(tokenizer_file))
    with pytest.raises(UserError, match=r"than data\.tokenizer=bytes"):
        open_sources([bpe], 16, tokenizer="bytes")
    open_sources([bpe], 16, tokenizer=str(tokenizer_file))
    open_sources([byte], 16, tokenizer="bytes")
