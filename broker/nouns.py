"""How the nouns are declared that are made for every request.

To whoever checks types, which is everybody here, `noun` is `dataclass`, and a frozen one is frozen. At run time it is
not: a frozen dataclass calls a function for each of its fields, which costs a request ten microseconds in a front end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as noun
else:
    from dataclasses import dataclass

    def noun(*, frozen: bool, **options: Any) -> Any:
        """As `dataclass`, with the equality and the hash of a `frozen` one."""
        return dataclass(unsafe_hash=frozen, **options)


__all__ = ["noun"]
