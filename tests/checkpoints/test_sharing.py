"""Checkpoints reach a Hub, here a small server of this machine: private unless said otherwise, and in place of nothing else."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, assert_refused


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for; files are kept as they come."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def answer(self, found: Any, code: int = 200) -> None:
        text = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        repositories: dict[str, Any] = self.server.repositories  # type: ignore[attr-defined]
        name, _, more = self.path.removeprefix("/api/models/").partition("/tree/")
        own = repositories.get(name.partition("?")[0].partition("/revision/")[0])
        if own is None:
            self.answer({"error": "Repository not found"}, 404)
        elif more:
            files = [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in own["files"]]
            self.answer(files)
        else:
            siblings = [{"rfilename": path} for path in own["files"]]
            self.answer({"id": name, "private": own["private"], "siblings": siblings, "sha": "0" * 40})

    def do_POST(self) -> None:
        repositories: dict[str, Any] = self.server.repositories  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers["Authorization"] != "Bearer hf_secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            url = {"url": f"http://{self.headers['Host']}/{name}"}
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            new = repositories.setdefault(name, found := {"private": private, "files": {}, "commits": 0})
            self.answer(url, 200 if new is found else 409)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(body)["files"]]
            self.answer(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
            )
        else:
            own = repositories[self.path.removeprefix("/api/models/").partition("/commit/")[0]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    own["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del own["files"][line["value"]["path"]]
            own["commits"] += 1
            url = f"http://{self.headers['Host']}{self.path.removeprefix('/api/models')}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Serve a Hub, and return its repositories by name."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories = {}  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server.repositories  # type: ignore[attr-defined]
        server.shutdown()


WAYS = {"prune": ("--method", "magnitude", "--sparsity", "0.5"), "shrink": ("--layers", "0.5", "-n", "4")}


@pytest.mark.thorough
@pytest.mark.parametrize("command", WAYS)
def test_a_checkpoint_is_pushed_privately(
    run: Run, model: Path, data: Path, tmp_path: Path, hub: dict[str, Any], command: str
) -> None:
    common = (command, model, *WAYS[command], "--data-dir", data, "--push-to-hub", "small")
    code, out, err = run(*common, "-o", tmp_path / "out")
    assert code == 0, err
    own = hub["me/small"]
    assert (own["private"], own["commits"]) == (True, 1)
    assert "me/small" in out
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert own["files"] == written
    again = run(*common, "-o", tmp_path / "other")
    assert_refused(again, "pass --overwrite", tmp_path / "other")
    own["files"]["left.safetensors"] = b""
    code, _, err = run(*common, "-o", tmp_path / "out", "--overwrite")
    assert code == 0, err
    assert own["files"].keys() == written.keys(), "what the repository held before is gone"


@pytest.mark.thorough
def test_nothing_is_shown_to_all_by_accident(
    run: Run, model: Path, tmp_path: Path, hub: dict[str, Any]
) -> None:
    common = ("prune", model, *WAYS["prune"], "-o", tmp_path / "out")
    assert_refused(run(*common, "--public"), "--push-to-hub", tmp_path / "out")
    for private, option, words in ((False, (), "pass --public"), (True, ("--public",), "leave out --public")):
        hub["me/there"] = {"private": private, "files": {}, "commits": 0}
        outcome = run(*common, "--push-to-hub", "me/there", *option)
        assert_refused(outcome, words, tmp_path / "out")
    code, _, err = run(*common, "--push-to-hub", "me/open", "--public")
    assert code == 0, err
    assert not hub["me/open"]["private"]


def test_without_access_nothing_is_begun(
    run: Run, model: Path, tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    common = ("prune", model, *WAYS["prune"], "-o", tmp_path / "out", "--push-to-hub", "small")
    assert_refused(run(*common), "cannot make small on the Hub", tmp_path / "out")
    assert not hub


def test_a_push_that_fails_says_where_the_checkpoint_is(
    run: Run, model: Path, tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the line went dead")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    common = ("prune", model, *WAYS["prune"], "-o", tmp_path / "out", "--push-to-hub", "me/small")
    code, _, err = run(*common)
    assert code == 2
    assert f"hf upload me/small {tmp_path / 'out'}" in err
    assert (tmp_path / "out" / "model.safetensors").exists()
