"""A stand-in of the Hugging Face hub on localhost: the part of its HTTP interface that an upload speaks.

Tokens: "writer" may write below me/, "reader" below nothing, and others are unknown. Large files (LFS) go to an address
of their own, as on the hub. What is committed to a model's branch lies in ``files``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any]]


@dataclass
class Hub:
    """The hub's memory; ``large``: endings of files that go to the storage of large files."""

    large: tuple[str, ...] = ()
    private: dict[str, bool] = field(default_factory=dict)  # by model
    branches: dict[str, set[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # by model and branch
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by hash
    asked: list[str] = field(default_factory=list)  # the requests, in their order
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> Answer:
        """The status and the JSON of one request."""
        self.asked.append(f"{method} {path}")
        if method == "PUT":
            self.stored[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if token not in ("reader", "writer"):
            return 401, {"error": "Invalid username or password."}
        for wanted, respond in self._routes().items():
            found = re.fullmatch(wanted, f"{method} {path}")
            if found:
                return respond(body, token, *found.groups())
        return 404, {"error": f"no such address: {method} {path}"}

    def _routes(self) -> dict[str, Callable[..., Answer]]:
        model = r"([\w.-]+/[\w.-]+)"
        return {
            "POST /api/repos/create": self._create,
            "POST /api/validate-yaml": lambda body, token: (200, {"errors": [], "warnings": []}),
            f"GET /api/models/{model}": self._model,
            f"POST /api/models/{model}/branch/(.+)": self._branch,
            f"POST /api/models/{model}/preupload/(.+)": self._preupload,
            f"POST /{model}.git/info/lfs/objects/batch": self._batch,
            f"POST /api/models/{model}/commit/(.+)": self._commit,
        }

    def _create(self, body: bytes, token: str) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if token != "writer" or asked["organization"] != "me":
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        answer = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.private:
            return 409, answer | {"error": "You already created this model repo"}
        self.private[name], self.branches[name] = asked.get("visibility") == "private", {"main"}
        return 200, answer

    def _model(self, body: bytes, token: str, name: str) -> Answer:
        if name not in self.private:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": self.private[name], "sha": "0" * 40, "siblings": []}

    def _branch(self, body: bytes, token: str, name: str, branch: str) -> Answer:
        self.branches[name].add(branch)
        return 200, {}

    def _preupload(self, body: bytes, token: str, name: str, branch: str) -> Answer:
        if branch not in self.branches.get(name, ()):
            return 404, {"error": "Revision not found"}
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if self.large and path.endswith(self.large) else "regular" for path in paths}
        return 200, {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]}

    def _batch(self, body: bytes, token: str, name: str) -> Answer:
        objects = [
            item | {"actions": {"upload": {"href": f"{self.endpoint}/storage/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, body: bytes, token: str, name: str, branch: str) -> Answer:
        files = self.files.setdefault((name, branch), {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.stored[line["value"]["oid"]]
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer requests at ``hub.endpoint`` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, self.path.partition("?")[0], body, token)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _respond

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
