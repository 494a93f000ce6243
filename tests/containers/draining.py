"""Stands in for a sidecar: it says what it was told, and when it reaches its container; it ends a moment after it was
asked to, and says so."""

import json
import os
import signal
import socket
import sys
import threading

asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
told = {name: value for name, value in os.environ.items() if name.startswith("FNQUEUE_")}
print(json.dumps({"argv": sys.argv[1:], "environ": told}), flush=True)
while not asked.wait(0.1):
    try:
        socket.create_connection((told["FNQUEUE_INFERENCE_HOST"], int(told["FNQUEUE_INFERENCE_PORT"])), 1).close()
    except OSError:
        continue
    print("reached", flush=True)
    asked.wait()
print("drained", flush=True)
