"""A recipe's words: settings, overrides, and mistakes."""

import pytest
from recipe_words import chosen, of_size, read_words, seeds_of


def test_words_are_sorted_out():
    words = read_words(["size=gpu", "optimizer.lr=1e-3", "~x"], {"size": "cpu", "only": ""}, {})
    assert words.settings == {"size": "gpu", "only": ""}
    assert words.slurm is None and words.overrides == ("optimizer.lr=1e-3", "~x")
    assert words.jobs == 1 and read_words(["jobs=3"], {}, {}).jobs == 3


def test_words_that_mean_nothing_are_one_line():
    for wrong in ("0", "two", "-1"):
        with pytest.raises(SystemExit, match=f"^error: jobs={wrong} is not a number of runs"):
            read_words([f"jobs={wrong}"], {}, {})
    with pytest.raises(SystemExit, match=r"^error: fast is not understood"):
        read_words(["fast"], {}, {})
    with pytest.raises(SystemExit, match=r"^error: jobs= is for runs on this machine"):
        read_words(["jobs=2", "slurm.partition=x"], {}, {})
    with pytest.raises(SystemExit, match=r"^error: size=huge is not known; choose from cpu, gpu"):
        of_size("huge", {"cpu": 1, "gpu": 2})


def test_what_differs_between_runs_is_no_setting_of_all():
    varied = {"optimizer.lr": "rates=0.1"}
    for word in ("optimizer.lr=1", "+optimizer.lr=1", "++optimizer.lr=1"):
        with pytest.raises(SystemExit, match=r"^error: .*differs between the runs; say rates=0.1"):
            read_words([word], {}, varied)
    assert read_words(["optimizer.lr_min=1"], {}, varied).overrides == ("optimizer.lr_min=1",)


def test_help_is_the_docstring(monkeypatch, capsys):
    monkeypatch.setattr("__main__.__doc__", "What it does.\n", raising=False)
    with pytest.raises(SystemExit) as ended:
        read_words(["--help"], {}, {})
    assert ended.value.code == 0 and capsys.readouterr().out == "What it does.\n"


def test_lists():
    assert chosen("only", "", "ab") == ["a", "b"]
    assert chosen("only", "b,a,b", "ab") == ["b", "a"]
    with pytest.raises(SystemExit, match="only=c is not known; choose from a, b"):
        chosen("only", "a,c", "ab")
    assert seeds_of("3,1,3") == [3, 1]
    with pytest.raises(SystemExit, match="seeds=one is not understood"):
        seeds_of("one")
