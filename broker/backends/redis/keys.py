"""The names of the keys of requests and versions; `scripts` says what each holds."""

from __future__ import annotations

import re
from functools import lru_cache

_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UUID_BYTES = 16
_MOST_KNOWN = 4096


@lru_cache(_MOST_KNOWN)
def packed(known_id: str) -> str | bytes:
    """The ID of a function or version as records have it: a UUID in less than half of what its text takes.
    Any other text stays as it is; none may be of 16 bytes."""
    return bytes.fromhex(known_id.replace("-", "")) if _CANONICAL.fullmatch(known_id) else known_id


@lru_cache(_MOST_KNOWN)
def unpacked(raw: bytes) -> str:
    """Of the text, too, that older releases left. Raises ValueError."""
    if len(raw) != _UUID_BYTES:
        return raw.decode()
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def record(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:r"


def body(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:b"


def updates(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:p"


def stream(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:s"


def waiting(version_id: str) -> str:
    return f"fnq:{{{version_id}}}:q"


def running(version_id: str) -> str:
    return f"fnq:{{{version_id}}}:x"


def due(version_id: str) -> str:
    return f"fnq:{{{version_id}}}:d"


def ledger(whose: str) -> str:
    """Of a version or an account."""
    return f"fnq:{{{whose}}}:n"


def ledger_page(whose: str, number: int) -> str:
    return f"fnq:{{{whose}}}:n:{number:03x}"


def minute(version_id: str, number: int) -> str:
    """What ended in one minute; scripts make the name themselves, since only they know which minute it is."""
    return f"fnq:{{{version_id}}}:m:{number}"


def hour(version_id: str, number: int) -> str:
    """What ended in one hour and is not counted by minutes yet."""
    return f"fnq:{{{version_id}}}:e:{number}"


def letter(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:l"


def letters(account_name: str) -> str:
    return f"fnq:{{{account_name}}}:g"


def delivery(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:h"


def deliveries(account_name: str) -> str:
    return f"fnq:{{{account_name}}}:o"


WEBHOOKS = "fnq:{webhooks}:w"
LOOKS = "fnq:{logs}:w"


def logs(version_id: str) -> str:
    return f"fnq:{{{version_id}}}:y"


def log_positions(version_id: str) -> str:
    return f"fnq:{{{version_id}}}:z"


def account(name: str) -> str:
    return f"fnq:{{{name}}}:a"


# What MEND does about a key, by how its name ends or begins. None is the only place of anything: sweeps and claims fill
# them again, and the auditor that of webhooks that are due; but for the lists of dead letters and of deliveries of an
# account, which are then to be had by ID alone.
_MENDED_BY_END = {
    **dict.fromkeys((":q", ":x", ":d", ":a", ":g", ":o", ":w"), "zset"),
    ":n": "ledger",
    ":z": "hash",
}
_MENDED_BY_BEGIN = {
    "fnq:l:": "numbers",
    "fnq:i:": "hash",
    "fnq:gpus": "string",
    "fnq:leader": "string",
    "fnq:epoch": "string",
}


def rebuildable(key: str) -> str:
    """The kind of key by `scripts.MEND`; "" for those that hold what is nowhere else."""
    if key.startswith("fnq:{"):
        return _MENDED_BY_END.get(key[-2:], "")
    return next((kind for begin, kind in _MENDED_BY_BEGIN.items() if key.startswith(begin)), "")
