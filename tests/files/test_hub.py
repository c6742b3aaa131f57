"""What the Hugging Face hub answers, by a server in its place."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from mhc_lightning.errors import UserError
from mhc_lightning.files.hub import hub_folder, is_hub_name

COMMIT = "0" * 40
FILE = {"type": "file", "path": "config.json", "rfilename": "config.json", "size": 2, "oid": "1"}
ABOUT = {"id": "owner/gated", "sha": COMMIT, "siblings": [FILE]}
REFUSALS = {"gated": (401, "GatedRepo"), "secret": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """Everybody may read about `owner/gated`, but not its files; nobody knows `owner/secret`."""

    def do_GET(self) -> None:
        about = self.path.startswith("/api/models/owner/gated")
        self._answer("" if about else self.path)

    def do_HEAD(self) -> None:
        self._answer(self.path)

    def _answer(self, refused: str) -> None:
        about = [FILE] if "/tree/" in self.path else ABOUT
        body = b"" if refused else json.dumps(about).encode()
        status, code = next((REFUSALS[name] for name in REFUSALS if name in refused), (200, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/gated", "pretrained=owner/gated is gated on the hub; ask for access"),
        ("owner/secret", "pretrained=owner/secret is not here, nor on the hub"),
    ],
)
def test_what_the_hub_does_not_give_is_said(hub: None, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        hub_folder(name, ("config.json",), "pretrained")


def test_paths_are_no_names(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_name("gpt2") and is_hub_name("owner/name-1.5")
    for path in ("here", "./there", "/there", "a/b/c", "../gpt2", ""):
        assert not is_hub_name(path), path
