"""Python's own library as text to train on."""

import library_text
import pytest


def test_a_standard_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(library_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: .*PYTHON="):
        library_text.standard_library()
