"""A container for tests of launchers: it says what it was given, as one line of JSON, and serves its folder.

With the argument `crash` it says a lot, then `the reason`, and exits with status 3. With `swell` it takes memory, up
to 512 MiB, and exits with status 0 when it has got them.
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

if sys.argv[1:] == ["swell"]:
    taken = [b"x" * 2**20 for _ in range(512)]
    raise SystemExit(0)

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # process 1 of a container has no default for it
CPU_LIMITS = ("cpu.max", "cpu/cpu.cfs_quota_us", "cpu,cpuacct/cpu.cfs_quota_us")
cpu_limits = [path.read_text() for name in CPU_LIMITS if (path := Path("/sys/fs/cgroup") / name).exists()]
secrets = Path(os.environ.get("NVCF_SECRETS_FILE", "/no-such-file"))
told = {
    "argv": sys.argv[1:],
    "environ": dict(os.environ),
    "secrets": secrets.read_text() if secrets.exists() else None,
    "may_write_secrets": os.access(secrets.parent, os.W_OK),
    "requests": {path.name: oct(path.stat().st_mode) for path in Path("/var/inf").glob("*")},
    "config": {str(path): path.read_text() for path in Path("/config").rglob("*") if path.is_file()},
    "cpu_quota_us": cpu_limits[0].split()[0] if cpu_limits else None,
    "shm_bytes": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
}
print(json.dumps(told), flush=True)
socketserver.TCPServer.allow_reuse_address = True
address = os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8000"))
http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
