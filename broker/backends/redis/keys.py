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


def letter(request_id: str) -> str:
    return f"fnq:{{{request_id}}}:l"


def letters(account_name: str) -> str:
    return f"fnq:{{{account_name}}}:l"


def account(name: str) -> str:
    return f"fnq:{{{name}}}:a"
