"""How much is tried, how bytes and values are damaged, and what nobody may hear of it."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, Self

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The profile of long runs (`tests.fuzz.__main__`): other cases each time, and more of them.
RANDOM = "fuzz"
MORE = 10


def fuzzed(examples: int) -> settings:
    """So many cases, the same ones each time; in a long run more, as its seed says."""
    chosen = settings.get_current_profile_name() == RANDOM
    return settings(
        max_examples=examples * (MORE if chosen else 1),
        derandomize=not chosen,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class Complaints(logging.Handler):
    """Faults of our own: what is logged with a traceback or as a fault, and what asyncio found unhandled."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info or record.getMessage() == "fault" or record.name == "asyncio":
            cause = record.exc_info[1] if record.exc_info else None
            self.heard.append(f"{record.name}: {record.getMessage()}: {cause!r}")

    def none(self) -> None:
        """Fails with what was heard since the last time."""
        heard, self.heard = self.heard, []
        assert not heard, "\n".join(heard)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, *, most: int = 3) -> bytes:
    """`whole` with bits flipped, pieces cut out, put in, or said twice."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "insert", "end", "twice", "set"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(content):
                content[at] = draw(st.sampled_from(b"\x00\r\n \t:;,/\"'\\{}[]0-\x7f\x80\xff"))
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "twice":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case _:
                del content[at:]
    return bytes(content)


# Values of types and sizes that no field expects.
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 2**31, 2**53, 2**63, -(2**63), 1e15, 1e308, -1.5, 0.5]),
    st.sampled_from(["", "x", "-1", "../../etc/passwd", "a\r\nb: c", "\x00", "é" * 300, "null", "9" * 40]),
    st.sampled_from([[], {}, [[]], [["a"]], [["a", "b", "c"]], [["a", 1]], {"a": 1}, [None], [["a\r\nb", "c"]]]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
)


async def within(seconds: float, work: Any) -> Any:
    """Fails what hangs. The bound is far beyond what anything takes."""
    async with asyncio.timeout(seconds):
        return await work
