"""A tracking server of a few dozen lines that asks for a login and remembers what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class FakeServer:
    """``login`` as ``user:password``. At the call ``fails_at``, after ``spared`` of them, it goes away for good.
    Artifacts land in ``folder``.

    ``trouble(call, number)`` may return what happens instead of a call: "500", "silence" (it accepts and never
    answers) or "lost" (it is taken, but the answer does not arrive); ``number`` counts the calls.
    """

    def __init__(
        self, folder: Path, login: str | None = None, fails_at: str | None = None, spared: int = 0,
        trouble: Callable[[str, int], str | None] = lambda call, number: None,
    ) -> None:  # fmt: skip
        self.trouble, self.calls, self.is_over = trouble, 0, threading.Event()
        self.points: dict[str, list[dict[str, Any]]] = {}
        self.folder, self.login, self.fails_at, self.spared = folder, login, fails_at, spared
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.refused = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                given = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
                server.answer(self, urlsplit(self.path).path, given)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.answer(self, urlsplit(self.path).path, json.loads(body or "{}"))

            do_PATCH = do_POST

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.is_over.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, path: str, given: dict[str, Any]) -> None:
        self.spared -= bool(self.fails_at) and self.fails_at in path
        if self.spared < 0:
            threading.Thread(target=self.close, daemon=True).start()
            handler.connection.close()
            return
        if self.login is not None:
            wanted = "Basic " + base64.b64encode(self.login.encode()).decode()
            if handler.headers.get("Authorization") != wanted:
                self.refused += 1
                _send(handler, 401, {"error_code": "UNAUTHENTICATED", "message": "log in"})
                return
        call, self.calls = path.rpartition("/mlflow/")[2], self.calls + 1
        trouble = self.trouble(call, self.calls)
        if trouble == "silence":
            self.is_over.wait(60)
        if trouble in ("silence", "500"):
            _send(handler, 500, {"error_code": "INTERNAL_ERROR", "message": "out of order"})
            return
        self.requests.append((path, given))
        status, body = self._body(call, given)
        if trouble == "lost":
            handler.connection.close()
            return
        _send(handler, status, body)

    def _body(self, call: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if call == "experiments/get-by-name" and given["experiment_name"] in self.experiments:
            return 200, {"experiment": self.experiments[given["experiment_name"]]}
        if call == "experiments/create":
            number = str(len(self.experiments) + 1)
            known = {"experiment_id": number, "name": given["name"], "lifecycle_stage": "active"}
            self.experiments[given["name"]] = known
            return 200, {"experiment_id": number}
        if call == "runs/create":
            run_id = f"{len(self.runs):032x}"
            place = (self.folder / run_id / "artifacts").as_uri()
            info = {
                "run_id": run_id,
                "experiment_id": given["experiment_id"],
                "status": "RUNNING",
                "lifecycle_stage": "active",
                "artifact_uri": place,
            }
            self.runs[run_id] = {"info": info, "data": {"tags": given.get("tags", [])}}
            self.points[run_id] = []
            return 200, {"run": self.runs[run_id]}
        if call == "metrics/get-history":
            found = [point for point in self.points[given["run_id"]] if point["key"] == given["metric_key"]]
            return 200, {"metrics": found}
        if call == "runs/set-tag":
            self.runs[given["run_id"]]["data"]["tags"].append({"key": given["key"], "value": given["value"]})
            return 200, {}
        if call == "runs/get":
            run = self.runs[given["run_id"]]
            run["data"]["metrics"] = list(self._newest(given["run_id"]).values())
            return 200, {"run": run}
        if call == "runs/update":
            self.runs[given["run_id"]]["info"]["status"] = given["status"]
            return 200, {"run_info": self.runs[given["run_id"]]["info"]}
        if call == "runs/log-batch":
            self.points[given["run_id"]] += given.get("metrics", [])
            return 200, {}
        return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": call}

    def _newest(self, run_id: str) -> dict[str, dict[str, Any]]:
        newest: dict[str, dict[str, Any]] = {}
        for point in self.points[run_id]:
            if int(point["step"]) >= int(newest.get(point["key"], point)["step"]):
                newest[point["key"]] = point
        return newest

    def steps(self, run_id: str, key: str) -> list[int]:
        """Of the points of a metric, as often as it was given each."""
        return sorted(int(point["step"]) for point in self.points[run_id] if point["key"] == key)

    def statuses(self) -> list[str]:
        return sorted(run["info"]["status"] for run in self.runs.values())


def _send(handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)
