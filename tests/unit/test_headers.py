from __future__ import annotations

import pytest
from multidict import CIMultiDict

from api import headers
from broker.errors import BadRequest

ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
OTHER = "5636b912-ecc0-493d-ab0c-1f702b96d75c"


def given(*pairs: tuple[str, str]) -> CIMultiDict[str]:
    return CIMultiDict(pairs)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("1", 1), ("0", 1), ("3600", 3600), ("007", 7), ("ünfzig", 60)]
)
def test_poll_seconds_are_whole_seconds_up_to_an_hour(text: str, seconds: int) -> None:
    assert headers.poll_s(given(("nvcf-poll-seconds", text))) == seconds


@pytest.mark.parametrize("text", ["3601", "-1", "1.5", "abc", "", "1e3", "+5", " 5 5", "9" * 5000])
def test_other_poll_seconds_are_refused_with_upstreams_message(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^failed to parse poll duration$") as refused:
        headers.poll_s(given(("NVCF-POLL-SECONDS", text)))
    assert refused.value.field == "NVCF-POLL-SECONDS"


@pytest.mark.parametrize(
    ("accept", "seconds"), [(None, 60), ("text/event-stream", 1200), ("text/event-stream; q=1", 60), ("*/*", 60)]
)
def test_only_an_exact_event_stream_waits_twenty_minutes_by_default(accept: str | None, seconds: int) -> None:
    assert headers.poll_s(given(*([("Accept", accept)] if accept else []))) == seconds


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], headers.Wait(seconds=60)),
        ([("Prefer", "respond-async")], headers.Wait(seconds=0, applied="respond-async")),
        ([("Prefer", "Respond-Async, wait=10")], headers.Wait(seconds=10, applied="respond-async, wait=10")),
        ([("Prefer", "wait=5")], headers.Wait(seconds=5, applied="wait=5")),
        ([("Prefer", 'wait="5"; foo=bar')], headers.Wait(seconds=5, applied="wait=5")),
        ([("Prefer", "wait=99999")], headers.Wait(seconds=3600, applied="wait=3600")),
        ([("Prefer", "wait=-1")], headers.Wait(seconds=60)),
        ([("Prefer", "wait=soon, handling=lenient")], headers.Wait(seconds=60)),
        ([("Prefer", "wait=5"), ("NVCF-POLL-SECONDS", "7")], headers.Wait(seconds=7)),
        (
            [("Prefer", "respond-async"), ("NVCF-POLL-SECONDS", "7")],
            headers.Wait(seconds=0, applied="respond-async"),
        ),
        ([("Prefer", "wait=5"), ("Prefer", "wait=6")], headers.Wait(seconds=5, applied="wait=5")),
    ],
)
def test_prefer_says_how_long_to_hold_a_call(pairs: list[tuple[str, str]], expected: headers.Wait) -> None:
    assert headers.wait(given(*pairs)) == expected


def test_asset_references_are_trimmed_and_repeats_concatenated_in_order() -> None:
    found = headers.asset_references(
        given(
            ("NVCF-INPUT-ASSET-REFERENCES", f" {ID.upper()} ,, "),
            ("nvcf-input-asset-references", f"{OTHER},{ID}"),
            ("NVCF-INPUT-ASSET-REFERENCES", ""),
        )
    )
    assert found == (ID, OTHER, ID)
    assert headers.asset_references(given()) == ()


@pytest.mark.parametrize(
    "text",
    ["x", f"{{{ID}}}", f"urn:uuid:{ID}", ID.replace("-", ""), f"{ID}0", f"{ID}\n", "\u0660" + ID[1:], "../" + ID],
)
def test_only_the_usual_spelling_of_a_uuid_is_one(text: str) -> None:
    with pytest.raises(BadRequest, match="requestId is not a UUID"):
        headers.uuid(text, field="requestId")


def test_an_asset_reference_that_is_no_uuid_is_refused() -> None:
    with pytest.raises(BadRequest, match="NVCF-INPUT-ASSET-REFERENCES is not a UUID"):
        headers.asset_references(given(("NVCF-INPUT-ASSET-REFERENCES", f"{ID}, ../{ID}")))


def test_upper_case_uuids_are_normalised() -> None:
    assert headers.uuid(ID.upper(), field="requestId") == ID


def test_an_idempotency_key_is_printable_and_given_once() -> None:
    assert headers.idempotency_key(given()) == ""
    assert headers.idempotency_key(given(("idempotency-key", "k" * 255))) == "k" * 255
    for bad in ("", "k" * 256, "a\tb", "ké"):
        with pytest.raises(BadRequest, match="Idempotency-Key"):
            headers.idempotency_key(given(("Idempotency-Key", bad)))
    with pytest.raises(BadRequest, match="Idempotency-Key"):
        headers.idempotency_key(given(("Idempotency-Key", "a"), ("Idempotency-Key", "b")))


def test_repeats_and_other_spellings_of_a_name_do_not_shift_what_is_forwarded() -> None:
    arrived = given(
        ("X-Mine", "a"), ("Cookie", "secret"), ("x-mine", "b"), ("X-Mine", "c"), ("authorization", "secret")
    )
    assert headers.forwarded(arrived) == (("X-Mine", "a"), ("x-mine", "b"), ("X-Mine", "c"))
    assert headers.forwarded(arrived, cookies=True)[1] == ("Cookie", "secret")


def raw(*pairs: tuple[str, str]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.encode(), value.encode()) for name, value in pairs)


def test_what_headers_say_is_remembered_by_all_of_them_but_the_length() -> None:
    heads = headers.Heads()
    pairs = (("Authorization", "Bearer one"), ("X-Mine", "a"))

    def said(*pairs: tuple[str, str]) -> headers.Head:
        return heads.of(given(*pairs), raw(*pairs))

    head = said(*pairs, ("Content-Length", "5"))
    assert said(*pairs, ("Content-Length", "6")) is head
    assert (head.bearer, head.forwarded) == ("one", (("X-Mine", "a"),))
    for other in (
        (("Authorization", "Bearer two"), ("X-Mine", "a")),
        (("Authorization", "Bearer one"), ("X-Mine", "b")),
        (("Authorization", "Bearer one"), ("X-Min", "ea")),
        (*pairs, ("Prefer", "respond-async")),
        pairs[:1],
    ):
        assert said(*other) is not head


def test_what_is_refused_of_headers_is_refused_each_time() -> None:
    heads, pairs = headers.Heads(), (("NVCF-POLL-SECONDS", "soon"),)
    for _ in range(2):
        head = heads.of(given(*pairs), raw(*pairs))
        assert head.bearer is None
        with pytest.raises(BadRequest, match="poll duration"):
            _ = head.wait


def test_neither_many_nor_large_headers_are_remembered() -> None:
    heads = headers.Heads()

    def remembered(value: str) -> bool:
        pairs = (("X-Mine", value),)
        return heads.of(given(*pairs), raw(*pairs)) is heads.of(given(*pairs), raw(*pairs))

    assert remembered("a")
    assert not remembered("a" * 8000)
    first = heads.of(given(), raw())
    for number in range(1000):
        remembered(str(number))
    assert heads.of(given(), raw()) is not first


@pytest.mark.parametrize("count", [1, 100])
def test_options_are_seen_among_few_and_among_many_headers(count: int) -> None:
    more = [(f"X-{number}", "") for number in range(count)]
    assert not headers.survey(given(*more)).options
    assert headers.survey(given(*more, ("idempotency-KEY", "k"))).options
    assert headers.survey(given(*more, ("Origin", "https://a.page"))).apart


def test_what_a_container_must_not_see_is_not_forwarded() -> None:
    kept = headers.forwarded(
        given(
            ("Content-Type", "image/png"),
            ("Authorization", "Bearer secret"),
            ("Cookie", "a=b"),
            ("Host", "example.com"),
            ("Content-Length", "5"),
            ("Expect", "100-continue"),
            ("Prefer", "respond-async"),
            ("Connection", "keep-alive, X-Hop"),
            ("X-Hop", "1"),
            ("Keep-Alive", "5"),
            ("TE", "trailers"),
            ("Transfer-Encoding", "chunked"),
            ("Upgrade", "h2c"),
            ("nvcf-ncaid", "victim"),
            ("nvcf_ncaid", "victim"),
            ("NVCF-SUB", "victim"),
            ("NVCF-Poll-Seconds", "5"),
            ("NVCF-Queue-Timeout-Seconds", "5"),
            ("nvcf_run_timeout_seconds", "5"),
            ("X-Mine", "a"),
            ("X-Mine", "b"),
            ("Content-Encoding", "gzip"),
        )
    )
    assert kept == (("Content-Type", "image/png"), ("X-Mine", "a"), ("X-Mine", "b"), ("Content-Encoding", "gzip"))


def test_headers_for_the_container_are_capped() -> None:
    assert len(headers.forwarded(given(*((f"x-{n}", "v") for n in range(64))))) == 64
    with pytest.raises(BadRequest, match="64 headers"):
        headers.forwarded(given(*((f"x-{n}", "v") for n in range(65))))
    with pytest.raises(BadRequest, match="32768 bytes"):
        headers.forwarded(given(*((f"x-{n}", "v" * 8000) for n in range(5))))


@pytest.mark.parametrize("name", [headers.QUEUE_TIMEOUT, headers.RUN_TIMEOUT])
def test_limits_are_whole_seconds_within_bounds(name: str) -> None:
    assert headers.timeout_s(given(), name, longest_s=86_400) == 0
    assert headers.timeout_s(given((name, "1")), name, longest_s=86_400) == 1
    assert headers.timeout_s(given((name.lower(), "86400")), name, longest_s=86_400) == 86_400
    for wrong in ("0", "-1", "1.5", "86401", "x", "", "9" * 30, "\u0663"):
        with pytest.raises(BadRequest, match=f"{name} must be given once, as 1 to 86400") as refused:
            headers.timeout_s(given((name, wrong)), name, longest_s=86_400)
        assert refused.value.field == name
    with pytest.raises(BadRequest):
        headers.timeout_s(given((name, "1"), (name, "2")), name, longest_s=86_400)


def test_server_timing_is_in_milliseconds() -> None:
    assert headers.server_timing({"queue": 0, "container": 0.0123456, "total": 100}) == (
        "queue;dur=0, container;dur=12.346, total;dur=100000"
    )


def test_a_header_that_is_not_text_is_refused() -> None:
    with pytest.raises(BadRequest, match="header X-Bad is not UTF-8"):
        headers.forwarded(given(("X-Bad", b"\xff".decode(errors="surrogateescape"))))


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER  abc", "abc"),
        ("Bearer", ""),
        ("Bearer ", ""),
        ("Basic abc", ""),
        ("Bearer a b", ""),
        ("Bearer \udcff", ""),
        ("", ""),
    ],
)
def test_the_bearer_scheme_has_no_case(text: str, token: str) -> None:
    assert headers.bearer(given(("Authorization", text))) == token


def test_no_credential_is_told_from_a_bad_one() -> None:
    assert headers.bearer(given()) is None


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], False),
        ([("Accept", "text/event-stream")], True),
        ([("Accept", "Text/Event-Stream; charset=utf-8")], True),
        ([("Accept", "application/json")], False),
        ([("nvcf-feature-disable-worker-compatibility", "true")], True),
        ([("nvcf-feature-disable-worker-compatibility", "false")], False),
    ],
)
def test_event_streams_and_the_feature_header_switch_compatibility_off(
    pairs: list[tuple[str, str]], expected: bool
) -> None:
    assert headers.passthrough(given(*pairs)) is expected


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2"), (30, "30")])
def test_retry_after_is_whole_seconds(seconds: float, text: str) -> None:
    assert headers.retry_after(seconds) == text
