"""Where a body may be cut."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from broker.model import Chunk
from workers.events import Events, EventTooLarge, Pieces

LIMIT_BYTES = 1024
STREAM = (
    b"\xef\xbb\xbf: welcome\n\n"
    b"data: one\n\n"
    b"id: a\rdata: two\r\r"
    b"event: three\r\ndata: 1\r\ndata: 2\r\n\r\n"
    b"retry: 10\n\n"
    b"data\n\n"
    b":\n\r\n"
    b"\n\n"
    b"data: mixed\r\n\n"
    b"id: a\ndata: again\n\n"
)
BLOCKS = [
    b"\xef\xbb\xbf: welcome\n\n",
    b"data: one\n\n",
    b"id: a\rdata: two\r\r",
    b"event: three\r\ndata: 1\r\ndata: 2\r\n\r\n",
    b"retry: 10\n\n",
    b"data\n\n",
    b":\n\r\n",
    b"\n\n",
    b"data: mixed\r\n\n",
    b"id: a\ndata: again\n\n",
]


def cut(*pieces: bytes) -> list[Chunk]:
    events = Events(limit_bytes=LIMIT_BYTES)
    return [chunk for piece in pieces for chunk in events.feed(piece)] + events.end()


def one(block: bytes) -> Chunk:
    [chunk] = cut(block)
    return chunk


def test_every_kind_of_line_end_ends_an_event() -> None:
    assert [chunk.data for chunk in cut(STREAM)] == BLOCKS


@pytest.mark.parametrize("at", range(len(STREAM)))
def test_it_does_not_matter_where_the_network_cuts(at: int) -> None:
    chunks = cut(STREAM[:at], STREAM[at:])
    assert b"".join(chunk.data for chunk in chunks) == STREAM
    events = [chunk.data.strip() for chunk in chunks if chunk.event]
    assert events == [chunk.data.strip() for chunk in cut(STREAM) if chunk.event]


def test_bytes_one_by_one_make_the_same_events() -> None:
    chunks = cut(*(STREAM[at : at + 1] for at in range(len(STREAM))))
    assert b"".join(chunk.data for chunk in chunks) == STREAM
    assert [(chunk.data.strip(), chunk.event_id) for chunk in chunks if chunk.event] == [
        (chunk.data.strip(), chunk.event_id) for chunk in cut(STREAM) if chunk.event
    ]


def test_random_cuts_lose_nothing() -> None:
    chosen = random.Random(7)
    for _ in range(200):
        places = sorted(chosen.sample(range(len(STREAM)), 8))
        pieces = [STREAM[begin:end] for begin, end in pairwise([0, *places, len(STREAM)])]
        assert b"".join(chunk.data for chunk in cut(*pieces)) == STREAM


def test_an_event_is_handed_on_as_soon_as_it_is_whole() -> None:
    events = Events(limit_bytes=LIMIT_BYTES)
    assert events.feed(b"data: 1") == []
    assert events.feed(b"\r") == []
    assert [chunk.data for chunk in events.feed(b"\r")] == [b"data: 1\r\r"]
    assert [chunk.data for chunk in events.feed(b"\ndata: 2\n\n")] == [b"\ndata: 2\n\n"]


def test_chunks_know_their_place() -> None:
    chunks = cut(STREAM)
    assert chunks[0].start == 0
    assert all(before.end == after.start for before, after in pairwise(chunks))
    assert chunks[-1].end == len(STREAM)


@pytest.mark.parametrize("block", [b": comment\n\n", b"\n\n", b"retry: 5\n\n", b"id: 7\n\n", b"xdata: 1\n\n"])
def test_a_block_without_data_is_no_event(block: bytes) -> None:
    assert one(block) == Chunk(data=block, end=len(block))


@pytest.mark.parametrize("block", [b"data: 1\n\n", b"data\n\n", b"id: 1\ndata:\n\n", b"\xef\xbb\xbfdata: 1\n\n"])
def test_a_block_with_data_is_an_event(block: bytes) -> None:
    assert one(block).event


@pytest.mark.parametrize(
    ("lines", "event_id"),
    [
        (b"id: 7", "7"),
        (b"id:7", "7"),
        (b"id: a b", "a b"),
        (b"id: 1\nid: 2", "2"),
        ("id: é".encode(), "é"),
        (b"id", ""),
        (b"id:", ""),
        (b"id:  7", ""),
        (b"id: a\x00b", ""),
        (b"id: \xff", ""),
        (b"id: " + b"x" * 257, ""),
        (b"xid: 7", ""),
        (b"idx: 7", ""),
        (b": id: 7", ""),
    ],
)
def test_the_containers_id_is_found(lines: bytes, event_id: str) -> None:
    for end in (b"\n", b"\r", b"\r\n"):
        assert one(lines + end + b"data: 1" + end + end).event_id == event_id
        assert one(b"data: 1" + end + lines + end + end).event_id == event_id


def test_an_id_that_is_repeated_tells_nothing() -> None:
    chunks = cut(b"id: 1\ndata: a\n\nid: 1\ndata: b\n\nid: 2\ndata: c\n\n")
    assert [chunk.event_id for chunk in chunks] == ["1", "", "2"]


def test_what_comes_behind_the_last_empty_line_is_no_event() -> None:
    first, rest = cut(b"data: 1\n\ndata: cut off")
    assert (first.event, rest.event, rest.data, rest.end) == (True, False, b"data: cut off", 22)


def test_an_event_may_be_as_large_as_the_limit() -> None:
    largest = b"data: " + b"x" * (LIMIT_BYTES - 8) + b"\n\n"
    assert one(largest).data == largest
    with pytest.raises(EventTooLarge):
        cut(b"x" + largest)


def test_what_came_before_an_event_beyond_the_limit_is_not_lost() -> None:
    with pytest.raises(EventTooLarge) as caught:
        cut(b"data: 1\n\n" + b"x" * LIMIT_BYTES + b"\n\ndata: 2\n\n")
    assert [chunk.data for chunk in caught.value.before] == [b"data: 1\n\n"]


def test_an_event_that_never_ends_is_given_up_at_the_limit() -> None:
    events = Events(limit_bytes=LIMIT_BYTES)
    events.feed(b"x" * LIMIT_BYTES)
    with pytest.raises(EventTooLarge):
        events.feed(b"x")


def test_other_bodies_are_cut_anywhere() -> None:
    pieces = Pieces(limit_bytes=LIMIT_BYTES)
    body = bytes(range(256)) * 1024
    chunks = [*pieces.feed(b"a"), *pieces.feed(body), *pieces.end()]
    assert b"".join(chunk.data for chunk in chunks) == b"a" + body
    assert max(len(chunk.data) for chunk in chunks) <= LIMIT_BYTES
    assert not any(chunk.event for chunk in chunks)
    assert chunks[-1].end == 1 + len(body)
