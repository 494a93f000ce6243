"""Stands in for a sidecar: it ends a moment after it was asked to, and says so."""

import json
import os
import signal
import sys
import threading

asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
told = {name: value for name, value in os.environ.items() if name.startswith("FNQUEUE_")}
print(json.dumps({"argv": sys.argv[1:], "environ": told}), flush=True)
asked.wait()
print("drained", flush=True)
