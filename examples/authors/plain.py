"""A function on the standard library alone, which stops when nobody wants its answer. Knows nothing of queues.

POST /run {"steps": 50} takes a tenth of a second a step. SIGTERM lets what runs finish.
"""

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

STEP_S = 0.1


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            steps = int(json.loads(body).get("steps", 50))
        except (ValueError, AttributeError, TypeError):
            self._answer(422, {"error": "steps: must be a number"})
            return
        name = self.headers["NVCF-REQID"]
        print(f"{name}: {steps} steps", flush=True)
        for step in range(steps):
            if hung_up(self.connection):
                print(f"{name}: nobody wants it any more, stopped at step {step}", flush=True)
                return
            time.sleep(STEP_S)
        self._answer(200, {"steps": steps})

    def _answer(self, status: int, said: Mapping[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for what runs


def hung_up(connection: socket.socket) -> bool:
    """There is something to read, and it is the end."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def main() -> None:
    address = (os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8000")))
    with Server(address, Handler) as server:

        def stop(number: int, frame: FrameType | None) -> None:
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, stop)
        print(f"Running on http://{address[0]}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
