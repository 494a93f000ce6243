"""A container for tests of launchers: it says what it was given, as one line of JSON, and serves its folder.

With the argument `crash` it says a lot, then `the reason`, and exits with status 3.
"""

import http.server
import json
import os
import signal
import socketserver
import sys
from pathlib import Path

if sys.argv[1:] == ["crash"]:
    print("x" * 9000)
    print("the reason", flush=True)
    raise SystemExit(3)

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # process 1 of a container has no default for it
secrets = Path(os.environ.get("NVCF_SECRETS_FILE", "/no-such-file"))
told = {
    "argv": sys.argv[1:],
    "environ": dict(os.environ),
    "secrets": secrets.read_text() if secrets.exists() else None,
    "may_write_secrets": os.access(secrets.parent, os.W_OK),
    "requests": {path.name: oct(path.stat().st_mode) for path in Path("/var/inf").glob("*")},
    "config": {str(path): path.read_text() for path in Path("/config").rglob("*") if path.is_file()},
    "shm_bytes": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
}
print(json.dumps(told), flush=True)
socketserver.TCPServer.allow_reuse_address = True
address = os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8000"))
http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
