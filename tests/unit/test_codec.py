from __future__ import annotations

import dataclasses

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.backends import codec
from broker.model import Channel, Deployment, GpuSpecification, Job, Outcome, Version

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ID = "7f0b3a52-0d47-4d9e-8a3c-3f6f1f1d2e11"
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple)


def make_job(**changes: object) -> Job:
    fields: dict[str, object] = {
        "id": ID,
        "account": "a",
        "function_id": "f",
        "version_id": "v",
        "subject": "s",
        "created_at": 1.5,
        "deadline_at": 2.0,
        "digest": "d",
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]  # fields are given by name


@given(body=st.binary(max_size=200), headers=PAIRS, assets=st.lists(st.uuids().map(str), max_size=3).map(tuple))
def test_a_job_survives_the_queue(body: bytes, headers: tuple[tuple[str, str], ...], assets: tuple[str, ...]) -> None:
    limits = {"queue_deadline_at": 1.5, "run_timeout_s": 30.0, "region": "eu"}
    job = make_job(body=body, headers=headers, assets=assets, passthrough=True, poll_s=7, **limits)
    assert codec.unpack_job(*codec.pack_job(job)) == job


def test_an_envelope_is_without_what_has_its_default_but_for_what_older_releases_need() -> None:
    job = make_job(body=b"x")
    envelope, body = codec.pack_job(job)
    needed = {"id", "account", "function_id", "version_id", "subject", "created_at", "deadline_at", "digest"}
    assert orjson.loads(envelope).keys() == needed | {"v", "headers", "assets"}
    whole = {field.name: getattr(job, field.name) for field in dataclasses.fields(Job) if field.name != "body"}
    written_before = orjson.dumps({**whole, "v": 1, "of_another_release": True})
    assert codec.unpack_job(envelope, body) == codec.unpack_job(written_before, body) == job


@given(token=TEXT, websocket=st.booleans(), body_bytes=st.integers(-1, 2**40))
def test_a_channel_survives_the_queue(token: str, websocket: bool, body_bytes: int) -> None:
    channel = Channel(url="http://10.0.0.7:9000/x", token=token, websocket=websocket, body_bytes=body_bytes)
    job = make_job(channel=channel, method="PUT", target="/a?b")
    assert codec.unpack_job(*codec.pack_job(job)) == job


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(make_job(channel=Channel(url="http://h/x", token="secret")))


@given(body=st.binary(max_size=200), headers=PAIRS, status=st.integers(100, 599))
def test_an_outcome_survives_the_store(body: bytes, headers: tuple[tuple[str, str], ...], status: int) -> None:
    outcome = Outcome(status=status, headers=headers, body=body, blob_key="k")
    assert codec.unpack_outcome(codec.pack_outcome(outcome)) == outcome


@given(garbage=st.binary(max_size=300))
def test_garbage_is_unreadable_and_nothing_worse(garbage: bytes) -> None:
    for read in (lambda: codec.unpack_job(garbage, b""), lambda: codec.unpack(Version, garbage)):
        with pytest.raises(codec.Unreadable):
            read()


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_escapes_as_another_error(at: int, bit: int) -> None:
    envelope, body = codec.pack_job(make_job(headers=(("a", "b"),), assets=(ID,)))
    flipped = bytearray(envelope)
    flipped[at % len(flipped)] ^= 1 << bit
    try:
        job = codec.unpack_job(bytes(flipped), body)
    except codec.Unreadable:
        return
    assert isinstance(job.id, str)
    assert isinstance(job.deadline_at, int | float)


def test_a_field_of_the_next_release_is_dropped_and_a_missing_one_takes_its_default() -> None:
    raw = b'{"id":"d","function_id":"f","version_id":"v","account":"a","created_at":1,"updated_at":2.0,"new":true,'
    raw += b'"specifications":[{"id":"s","gpu":"CPU","instance_type":"CPU","min_instances":0,"max_instances":1}]}'
    specification = GpuSpecification(id="s", gpu="CPU", instance_type="CPU", min_instances=0, max_instances=1)
    assert codec.unpack(Deployment, raw) == Deployment(
        id="d",
        function_id="f",
        version_id="v",
        account="a",
        created_at=1.0,
        updated_at=2.0,
        specifications=(specification,),
    )
