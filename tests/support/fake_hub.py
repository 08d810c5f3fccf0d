"""A small server on this machine that speaks a part of the Hub's API, and holds one repository.

Its fixture `hub` is taken into a folder's conftest.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE = "model.safetensors"


@dataclass
class Hub:
    """One model, `org/toy`, and what was sent of it."""

    files: dict[str, bytes] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    ignores_ranges: bool = False
    lies_about_size: int = 0
    endpoint: str = ""

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"/(?:api/models/)?(org/[\w-]+)(/.*)?", path)
        if not match or match[1] not in ("org/toy", "org/gated"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if match[1] == "org/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        rest = match[2] or "/revision/main"
        action, revision, *name = rest[1:].split("/", 2)
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if action == "revision":
            return 200, {}, json.dumps(self.info()).encode()
        if action == "tree":
            return 200, {}, json.dumps(self.tree()).encode()
        if not name or name[0] not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return self.file(name[0], wanted)

    def info(self) -> dict[str, object]:
        siblings = [{"rfilename": n, "size": self.size(n)} for n in self.files]
        return {"id": "org/toy", "sha": COMMIT, "siblings": siblings}

    def tree(self) -> list[dict[str, object]]:
        oid = {n: hashlib.sha1(c).hexdigest() for n, c in self.files.items()}
        return [
            {"type": "file", "path": n, "size": len(c), "oid": oid[n]}
            for n, c in self.files.items()
        ]

    def size(self, name: str) -> int:
        return len(self.files[name]) + (self.lies_about_size if name == SINGLE else 0)

    def file(self, name: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        content, status = self.files[name], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wanted and not self.ignores_ranges:
            begin, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            content, status = content[begin : end + 1], 206
        return status, headers, content


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = hub.answer(path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                name = path.rpartition("/")[2]
                hub.sent[name] = hub.sent.get(name, 0) + len(body)
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has heard enough hangs up; that is no reason for a traceback."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    server = Server(("127.0.0.1", 0), handler_of(served))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    disable_progress_bars()
    huggingface_hub.close_session()
    yield served
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
