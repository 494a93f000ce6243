"""The names of the keys of requests and versions; `scripts` says what each holds."""

from __future__ import annotations


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


def minute(version_id: str, number: int) -> str:
    """What ended in one minute; scripts make the name themselves, since only they know which minute it is."""
    return f"fnq:{{{version_id}}}:m:{number}"


def letter(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:l"


def letters(account_name: str) -> str:
    return f"fnq:{{{account_name}}}:g"


def account(name: str) -> str:
    return f"fnq:{{{name}}}:a"


# What MEND does about a key, by how its name ends or begins. None is the only place of anything: sweeps and claims fill
# them again; but for the list of dead letters of an account, which are then to be had by ID alone.
_MENDED_BY_END = {":q": "zset", ":x": "zset", ":d": "zset", ":a": "zset", ":g": "zset", ":n": "ledger"}
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
