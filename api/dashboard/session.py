"""Who is logged in, said by a cookie that any front end can read: nothing is kept here, and nothing is stored.

The cookie names the key by what stands in for it (`Authenticator.stand_in`), so that it ends with the key, opens none
of the API's own routes, and is of no use to find the key by. It is signed with a key derived from the server's secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from broker.errors import Forbidden, Unauthenticated
from broker.settings import ApiSettings

PATH = "/dashboard"
CSRF = "X-CSRF-Token"
LONGEST_S = 12 * 3600.0

# By the prefix, browsers hold that nobody but this very host has set it, over TLS (RFC 6265bis §4.1.3.2).
_SECURE_COOKIE = "__Host-fnqueue-session"
_COOKIE = "fnqueue-session"
_RENEWED_AFTER = 0.1  # of the time that it has left when it is new
_DERIVED_FOR = b"fnqueue/dashboard-session/1"
_CSRF_DERIVED_FOR = b"fnqueue/dashboard-csrf/1"
_LONGEST_COOKIE = 1024
_OVER = "the session has ended; log in again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One login. Times are unix seconds by the clock of the front ends."""

    key: str
    id: str
    began_at: float
    expires_at: float


class Sessions:
    """Begins, reads, renews and ends sessions. `now` is the clock; tests hand in their own."""

    def __init__(self, settings: ApiSettings, secret: bytes, *, now: Callable[[], float] = time.time) -> None:
        self._idle_s = settings.dashboard_idle_s
        self._public = urlsplit(settings.public_url)
        self._key = hmac.digest(secret, _DERIVED_FOR, hashlib.sha256)
        self._csrf_key = hmac.digest(secret, _CSRF_DERIVED_FOR, hashlib.sha256)
        self._now = now

    def begin(self, stand_in: str) -> Session:
        """A new one, whatever cookie the browser came with."""
        now = self._now()
        return Session(key=stand_in, id=secrets.token_urlsafe(16), began_at=now, expires_at=now + self._idle_s)

    def of(self, request: web.Request) -> Session:
        """Raises Unauthenticated: there is none, it is not ours, or it has ended."""
        session = self._read(request.cookies.get(self._name(request), ""))
        if session is None:
            raise Unauthenticated(_OVER)
        self.require_going_on(session)
        return session

    def require_going_on(self, session: Session) -> None:
        """Raises Unauthenticated: its time has passed."""
        if session.expires_at <= self._now():
            raise Unauthenticated(_OVER)

    def renewed(self, session: Session) -> Session | None:
        """The session with all of its idle time before it; None when it was renewed just now, or can be no further."""
        expires_at = min(self._now() + self._idle_s, session.began_at + LONGEST_S)
        gained_s = expires_at - session.expires_at
        return replace(session, expires_at=expires_at) if gained_s > self._idle_s * _RENEWED_AFTER else None

    def give(self, request: web.Request, response: web.Response, session: Session) -> None:
        """Have the browser keep it."""
        self._set(request, response, self._written(session), max(1, int(session.expires_at - self._now())))

    def take_away(self, request: web.Request, response: web.Response) -> None:
        """Have the browser forget it, and whatever the pages of it have left there."""
        self._set(request, response, "", 0)
        response.headers["Clear-Site-Data"] = '"cache", "storage"'

    def csrf_token(self, session: Session) -> str:
        return _text(hmac.digest(self._csrf_key, session.id.encode(), hashlib.sha256))

    def require_own_page(self, request: web.Request, session: Session | None) -> None:
        """Return if a page of ours made the browser send this: it says so, and knows the session's token where there is
        a session. Raises Forbidden."""
        if not self._is_same_origin(request):
            raise Forbidden("this was sent by a page of another site")
        if session is not None:
            token = request.headers.get(CSRF, "")
            if not hmac.compare_digest(token.encode(errors="replace"), self.csrf_token(session).encode()):
                raise Forbidden(f"the header {CSRF} is missing, or not this session's")

    def _is_same_origin(self, request: web.Request) -> bool:
        """Browsers send `Sec-Fetch-Site` over TLS and to this very machine, and `Origin` with every POST. What sends
        neither is no browser, and nobody's cookies are in it."""
        if (site := request.headers.get("Sec-Fetch-Site")) is not None:
            return site == "same-origin"
        origin = request.headers.get("Origin")
        if origin is None:
            return True
        host = urlsplit(origin).netloc  # none in `null`, which is what hides where it comes from
        return bool(host) and host in {request.host, self._public.netloc}

    def _name(self, request: web.Request) -> str:
        return _SECURE_COOKIE if self._is_tls(request) else _COOKIE

    def _is_tls(self, request: web.Request) -> bool:
        """By whom, does not matter: who lies about it gets a cookie that his own browser keeps to itself."""
        forwarded = request.headers.get("X-Forwarded-Proto", "").strip().lower()
        return request.secure or forwarded == "https" or self._public.scheme == "https"

    def _set(self, request: web.Request, response: web.Response, value: str, max_age_s: int) -> None:
        is_tls = self._is_tls(request)
        response.set_cookie(
            self._name(request),
            value,
            max_age=max_age_s,
            path="/" if is_tls else PATH,
            secure=is_tls,
            httponly=True,
            samesite="Strict",
        )

    def _written(self, session: Session) -> str:
        said = _text(orjson.dumps((session.key, session.id, session.began_at, session.expires_at)))
        return f"{said}.{self._mac(said)}"

    def _read(self, cookie: str) -> Session | None:
        said, _, mac = cookie[:_LONGEST_COOKIE].partition(".")
        if not hmac.compare_digest(mac.encode(errors="replace"), self._mac(said).encode()):
            return None
        key, session_id, began_at, expires_at = orjson.loads(base64.urlsafe_b64decode(said + "=" * (-len(said) % 4)))
        return Session(key=key, id=session_id, began_at=began_at, expires_at=expires_at)

    def _mac(self, said: str) -> str:
        return _text(hmac.digest(self._key, said.encode(errors="replace"), hashlib.sha256))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
