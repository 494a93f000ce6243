"""Every header of the contract by name, parsed and formatted (contract/invocation.md §2).

Functions take the request's headers as aiohttp gives them: names in any case, values without outer blanks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import compress

from multidict import MultiMapping

from broker.errors import BadRequest
from broker.estimates import Estimate
from broker.model import EVENT_STREAM, Quota
from broker.nouns import noun

REQUEST_ID = "NVCF-REQID"
STATUS = "NVCF-STATUS"
PERCENT_COMPLETE = "NVCF-PERCENT-COMPLETE"
ETA = "NVCF-ETA"
POLL_SECONDS = "NVCF-POLL-SECONDS"
INPUT_ASSETS = "NVCF-INPUT-ASSET-REFERENCES"
QUEUE_TIMEOUT = "NVCF-QUEUE-TIMEOUT-SECONDS"
RUN_TIMEOUT = "NVCF-RUN-TIMEOUT-SECONDS"
CALLBACK_URL = "NVCF-CALLBACK-URL"
CALLBACK_EVENTS = "NVCF-CALLBACK-EVENTS"
ENABLE_GATEWAY_TIMEOUT = "nvcf-feature-enable-gateway-timeout"
DISABLE_COMPATIBILITY = "nvcf-feature-disable-worker-compatibility"
STREAM_FULL_REQUEST = "nvcf-feature-enable-only-stream-full-request"
FUNCTION_ID = "function-id"
FUNCTION_VERSION_ID = "function-version-id"
IDEMPOTENCY_KEY = "Idempotency-Key"
PREFER = "Prefer"
PREFERENCE_APPLIED = "Preference-Applied"
EXPOSE_HEADERS = "Access-Control-Expose-Headers"
RATE_LIMIT = "RateLimit"
RATE_LIMIT_POLICY = "RateLimit-Policy"
LAST_EVENT_ID = "Last-Event-ID"
SERVER_TIMING = "Server-Timing"
# What the script of a page may read beside what browsers show anyway. Of errors too, so not only what results carry.
EXPOSED = (
    REQUEST_ID.lower(),
    STATUS.lower(),
    PERCENT_COMPLETE.lower(),
    ETA.lower(),
    RATE_LIMIT.lower(),
    RATE_LIMIT_POLICY.lower(),
    PREFERENCE_APPLIED.lower(),
    "retry-after",
    "location",
)

NO_CALLBACK = "none"
"""In the place of a URL: not even where the function has one."""

POLL_DEFAULT_S = 60
POLL_STREAM_S = 1200
POLL_MAX_S = 3600
FORWARDED_MAX_COUNT = 64
FORWARDED_MAX_BYTES = 32 * 1024
IDEMPOTENCY_KEY_MAX = 255

HOP_BY_HOP = frozenset(
    {
        "connection",
        "proxy-connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# What the sidecar says to a container (contract/invocation.md §8.2), so what no client may say in its place.
_WORKER_OWNED = frozenset(
    {
        "nvcf-reqid",
        "nvcf-status",
        "nvcf-percent-complete",
        "nvcf-sub",
        "nvcf-ncaid",
        "nvcf-function-name",
        "nvcf-function-id",
        "nvcf-function-version-id",
        "nvcf-function-asset-ids",
        "nvcf-asset-dir",
        "nvcf-large-output-dir",
        "nvcf-max-response-size-bytes",
        "nvcf-nspectid",
        "nvcf-backend",
        "nvcf-instancetype",
        "nvcf-region",
        "nvcf-env",
        "nvcf-invocation-region",
    }
)
# Spoken to this server and answered by it. `Prefer` too: a container that heard `respond-async` could answer 202.
_OURS = frozenset(
    {
        "authorization",
        "cookie",
        "host",
        "content-length",
        "expect",
        "prefer",
        "nvcf-poll-seconds",
        "nvcf-queue-timeout-seconds",
        "nvcf-run-timeout-seconds",
        "nvcf-callback-url",
        "nvcf-callback-events",
    }
)
_NEVER_FORWARDED = HOP_BY_HOP | _WORKER_OWNED | _OURS
# What few invocations ask for.
_OPTIONS = frozenset(
    {
        name.lower()
        for name in (
            INPUT_ASSETS,
            QUEUE_TIMEOUT,
            RUN_TIMEOUT,
            CALLBACK_URL,
            CALLBACK_EVENTS,
            DISABLE_COMPATIBILITY,
            IDEMPOTENCY_KEY,
        )
    }
)
# With these a request is more than an invocation of a function that its path names, or comes from a page.
_APART = frozenset({"origin", "expect", "transfer-encoding", "upgrade", FUNCTION_ID})
_SURVEYED_MAX_COUNT = 24
# How much is remembered of what headers say.
_HEADS_MAX_COUNT = 256
_HEAD_MAX_BYTES = 4096
# Says nothing that is remembered, and differs from request to request.
_LENGTHS = frozenset({b"Content-Length", b"content-length"})

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


@noun(frozen=True, slots=True, kw_only=True)
class Wait:
    """How long a call may be held, and what `Preference-Applied` says about it ('' when nothing)."""

    seconds: float
    applied: str = ""


@noun(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the names of a request's headers tell, without their values: whether `options` of an invocation are asked
    for, whether it is to be treated `apart`, and which headers a container may see (`kept`, in order; if they are its
    own, cookies too)."""

    options: bool
    apart: bool
    kept: tuple[bool, ...]
    kept_with_cookies: tuple[bool, ...]


def survey(headers: MultiMapping[str]) -> Survey:
    """Clients of one kind send the same names in the same order, so that it is seldom done."""
    names = tuple([name for name, _ in headers.items()])  # keys() leaves repeats out
    return _survey(names) if len(names) <= _SURVEYED_MAX_COUNT else _survey.__wrapped__(names)


@lru_cache(maxsize=128)
def _survey(names: tuple[str, ...]) -> Survey:
    lowered = [name.lower() for name in names]
    kept = tuple(name.replace("_", "-") not in _NEVER_FORWARDED for name in lowered)
    return Survey(
        options=not _OPTIONS.isdisjoint(lowered),
        apart=not _APART.isdisjoint(lowered),
        kept=kept,
        kept_with_cookies=tuple(keeps or name == "cookie" for keeps, name in zip(kept, lowered, strict=True)),
    )


class Head:
    """What the headers of a request say. Each property is read when it is asked for, and raises what the function that
    it is named after raises."""

    def __init__(self, arrived: MultiMapping[str]) -> None:
        self._arrived = arrived

    @cached_property
    def survey(self) -> Survey:
        return survey(self._arrived)

    @cached_property
    def bearer(self) -> str | None:
        return bearer(self._arrived)

    @cached_property
    def wait(self) -> Wait:
        return wait(self._arrived)

    @cached_property
    def wants_events(self) -> bool:
        return wants_events(self._arrived)

    @cached_property
    def forwarded(self) -> tuple[tuple[str, str], ...]:
        return forwarded(self._arrived, self.survey)


class Heads:
    """What was read of headers is remembered: clients send the same ones with every request, but for its length."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def of(self, arrived: MultiMapping[str], raw: Sequence[tuple[bytes, bytes]]) -> Head:
        """`raw` are the same headers as they came."""
        said = b"\n".join([part for each in raw if each[0] not in _LENGTHS for part in each])
        known = self._known.get(said)
        if known is not None:
            return known
        head = Head(arrived)
        if len(said) <= _HEAD_MAX_BYTES:
            if len(self._known) >= _HEADS_MAX_COUNT:
                self._known.clear()
            self._known[said] = head
        return head


def uuid(text: str, *, field: str) -> str:
    """The canonical form of an ID in the usual 8-4-4-4-12 spelling, any case.

    Raises:
        BadRequest: braces, `urn:uuid:` and everything else; `field` names the part at fault.
    """
    if _UUID.fullmatch(text) is None:
        raise BadRequest(f"{field} is not a UUID", field=field)
    return text.lower()


def poll_s(headers: MultiMapping[str], *, transparent: bool = False) -> int:
    """`NVCF-POLL-SECONDS`: 1 to 3600, 0 meaning 1; absent or not ASCII, 60, or 1200 for an event stream that is not
    `transparent`.

    Raises:
        BadRequest: any other value, always with upstream's one message.
    """
    text = headers.get(POLL_SECONDS)
    if text is None or not text.isascii():
        return POLL_STREAM_S if headers.get("Accept") == EVENT_STREAM and not transparent else POLL_DEFAULT_S
    if not text.isdigit() or len(text) > 18 or int(text) > POLL_MAX_S:
        raise BadRequest("failed to parse poll duration", field=POLL_SECONDS)
    return max(1, int(text))


def wait(headers: MultiMapping[str], *, transparent: bool = False) -> Wait:
    """How long to hold this call: `NVCF-POLL-SECONDS`, or what `Prefer` says where that is silent.

    RFC 7240: `respond-async` alone asks for an answer at once, with `wait=N` after N seconds; preferences that
    cannot be read are ignored.
    """
    poll = poll_s(headers, transparent=transparent)
    if PREFER not in headers:
        return Wait(seconds=poll)
    preferences = _preferences(",".join(headers.getall(PREFER)))
    asked = preferences.get("wait", "")
    wished_s = min(int(asked), POLL_MAX_S) if asked.isascii() and asked.isdigit() and len(asked) <= 18 else None
    if POLL_SECONDS in headers and "respond-async" not in preferences:
        return Wait(seconds=poll)
    applied = ["respond-async"] if "respond-async" in preferences else []
    if wished_s is not None:
        return Wait(seconds=wished_s, applied=", ".join([*applied, f"wait={wished_s}"]))
    return Wait(seconds=0 if applied else poll, applied="".join(applied))


def timeout_s(headers: MultiMapping[str], name: str, *, longest_s: float) -> float:
    """`NVCF-QUEUE-TIMEOUT-SECONDS` or `NVCF-RUN-TIMEOUT-SECONDS`: whole seconds, 1 to `longest_s`; 0 when absent.

    Raises:
        BadRequest: any other value, or several; names the header and its limits.
    """
    if name not in headers:
        return 0.0
    values = headers.getall(name)
    text, longest = values[0], int(longest_s)
    good = len(values) == 1 and text.isascii() and text.isdigit() and len(text) <= 18
    if not good or not 1 <= int(text) <= longest:
        raise BadRequest(f"{name} must be given once, as 1 to {longest} whole seconds", field=name)
    return float(text)


@lru_cache(maxsize=128)
def _preferences(values: str) -> Mapping[str, str]:
    """Name to value; of a preference that comes twice the first counts (RFC 7240 §2)."""
    found: dict[str, str] = {}
    for part in values.split(","):
        name, _, value = part.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def asset_references(headers: MultiMapping[str]) -> tuple[str, ...]:
    """IDs of `NVCF-INPUT-ASSET-REFERENCES` in order: repeats of the header concatenated, empty items dropped.

    Raises:
        BadRequest: an item that is not a UUID.
    """
    if INPUT_ASSETS not in headers:
        return ()
    items = (item.strip() for value in headers.getall(INPUT_ASSETS) for item in value.split(","))
    return tuple(uuid(item, field=INPUT_ASSETS) for item in items if item)


def idempotency_key(headers: MultiMapping[str]) -> str:
    """'' when there is none.

    Raises:
        BadRequest: empty, longer than 255, several, or not printable ASCII.
    """
    if IDEMPOTENCY_KEY not in headers:
        return ""
    values = headers.getall(IDEMPOTENCY_KEY)
    key = values[0]
    if len(values) > 1 or not 0 < len(key) <= IDEMPOTENCY_KEY_MAX or not (key.isascii() and key.isprintable()):
        raise BadRequest(
            f"{IDEMPOTENCY_KEY} must be given once, with 1 to {IDEMPOTENCY_KEY_MAX} printable ASCII characters",
            field=IDEMPOTENCY_KEY,
        )
    return key


def callback(headers: MultiMapping[str]) -> tuple[str, tuple[str, ...]] | None:
    """`NVCF-CALLBACK-URL`, which is still to be checked, and the words of `NVCF-CALLBACK-EVENTS`; None without both.

    Raises:
        BadRequest: several URLs, or events without one.
    """
    if CALLBACK_URL not in headers and CALLBACK_EVENTS not in headers:
        return None
    urls = headers.getall(CALLBACK_URL, [])
    if len(urls) != 1:
        raise BadRequest(f"{CALLBACK_URL} must be given once", field=CALLBACK_URL)
    words = (word.strip().lower() for value in headers.getall(CALLBACK_EVENTS, []) for word in value.split(","))
    return urls[0], tuple(word for word in words if word)


def passthrough(headers: MultiMapping[str]) -> bool:
    """Whether the container's answers reach the caller as they are (contract/invocation.md §8.4)."""
    return _says_true(headers, DISABLE_COMPATIBILITY) or wants_events(headers)


def wants_events(headers: MultiMapping[str]) -> bool:
    """Whether the caller wants the answer while it comes."""
    accepted = headers.get("Accept")
    if accepted is None or "event" not in accepted.lower():
        return False
    return accepted.partition(";")[0].strip().lower() == EVENT_STREAM


def gateway_timeout(headers: MultiMapping[str]) -> bool:
    """Whether the caller asked for 504 and removal when its request is still queued at the end of the wait."""
    return _says_true(headers, ENABLE_GATEWAY_TIMEOUT)


def streams_full_request(headers: MultiMapping[str]) -> bool:
    """Whether the caller means to send and read at the same time (contract/invocation.md §2.1)."""
    return _says_true(headers, STREAM_FULL_REQUEST)


def _says_true(headers: MultiMapping[str], name: str) -> bool:
    return headers.get(name, "").lower() == "true"


def forwarded(
    headers: MultiMapping[str], surveyed: Survey | None = None, *, cookies: bool = False
) -> tuple[tuple[str, str], ...]:
    """The client's headers that a container may see, in order.

    Left out: hop-by-hop headers and what `Connection` names, credentials, what is spoken to this server, and
    the names that the sidecar owns, also when spelled with underscores. Cookies too, unless they are the container's.

    Raises:
        BadRequest: more than 64 of them, or 32 KiB, or one that is not UTF-8.
    """
    named: frozenset[str] = frozenset()
    if "Connection" in headers:
        named = frozenset(name.strip().lower() for value in headers.getall("Connection") for name in value.split(","))
    surveyed = surveyed or survey(headers)
    kept: list[tuple[str, str]] = []
    size_bytes = 0
    for name, value in compress(headers.items(), surveyed.kept_with_cookies if cookies else surveyed.kept):
        if named and name.lower() in named:
            continue
        if not value.isascii() and not _is_text(value):
            raise BadRequest(f"header {name} is not UTF-8", field=name)
        kept.append((name, value))
        size_bytes += len(name) + len(value) + 4
    if len(kept) > FORWARDED_MAX_COUNT or size_bytes > FORWARDED_MAX_BYTES:
        raise BadRequest(
            f"more than {FORWARDED_MAX_COUNT} headers or {FORWARDED_MAX_BYTES} bytes of them for the function"
        )
    return tuple(kept)


def _is_text(value: str) -> bool:
    """Bytes that are not UTF-8 arrive as lone surrogates, which nothing can store."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def bearer(headers: MultiMapping[str]) -> str | None:
    """The bearer token, '' for another scheme or a malformed one, None without an Authorization header."""
    text = headers.get("Authorization")
    return None if text is None else _bearer(text)


@lru_cache(maxsize=1024)
def _bearer(text: str) -> str:
    scheme, _, token = text.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.isascii() or not token.isprintable() or " " in token:
        return ""
    return token


def retry_after(seconds: float) -> str:
    """Whole seconds, at least 1, rounded up."""
    return str(max(1, math.ceil(seconds)))


def eta(estimate: Estimate) -> str:
    """Seconds until the result, as a dictionary of decimals (RFC 9651)."""
    return f"p50={_decimal(estimate.p50_s)}, p90={_decimal(estimate.p90_s)}"


def _decimal(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def server_timing(phases: Mapping[str, float]) -> str:
    """Name and seconds of each phase, as `name;dur=milliseconds` (W3C Server Timing)."""
    return ", ".join([f"{name};dur={_milliseconds(round(seconds * 1_000_000))}" for name, seconds in phases.items()])


@lru_cache(maxsize=4096)
def _milliseconds(microseconds: int) -> str:
    return f"{microseconds / 1000:.3f}".rstrip("0") if microseconds % 1000 else str(microseconds // 1000)


def rate_limit(quotas: Sequence[Quota]) -> dict[str, str]:
    """What `RateLimit` and `RateLimit-Policy` say of these (draft-ietf-httpapi-ratelimit-headers-10); q requests in w
    seconds are the policy, r are left, and more come in t seconds."""
    if not quotas:
        return {}
    return {
        RATE_LIMIT_POLICY: ", ".join(f'"{each.policy}";q={each.rate.limit};w={each.rate.window_s}' for each in quotas),
        RATE_LIMIT: ", ".join(f'"{each.policy}";r={each.remaining};t={math.ceil(each.reset_s)}' for each in quotas),
    }


def exposed(named: Iterable[str]) -> list[str]:
    """What a page may read: the names that an answer gives, then ours, each once."""
    return list(dict.fromkeys(name for name in (*(name.strip().lower() for name in named), *EXPOSED) if name))
