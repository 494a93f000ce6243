"""What the page asks for: its session, what is live, and what the API answers to a key, here to a session.

These are the page's own and change with it; programs use the API. Each handler of the API behind them checks scopes,
accounts and resources as it does for a key. What changes something has to come from our own page (`Sessions`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import Field

from api import events as sse
from api import headers, payloads
from api.auth import Guarded
from api.dashboard.board import EVERYBODY, FUNCTIONS, SCOPES, Board, View
from api.dashboard.files import Files
from api.dashboard.session import PATH, Session, Sessions
from api.front import Front, Listeners
from api.routes import dead_letters, events, queues, requests
from broker import events as happenings
from broker import invocations
from broker.accounts import ADMIN, INVOKE, acting_for, require, require_key
from broker.backends.memory.counters import MemoryCounters
from broker.errors import BadRequest, StoreUnavailable, TooManyRequests, Unauthenticated
from broker.events import Seen
from broker.model import Principal, Rate, Window
from fnqueue.wire import Wire

DATA = f"{PATH}/data"
_REQUEST, _FUNCTION, _VERSION = "{request_id:[^/]+}", "{function_id:[^/]+}", "{version_id:[^/]+}"
# Of one address: nobody types faster, and keys are too long to guess anyway, but an operator's own choice may not be.
_TRIES = Rate(limit=10, window_s=60)
_LONGEST_KEY = 512


class Login(Wire):
    """What the form sends."""

    key: str = Field(min_length=1, max_length=_LONGEST_KEY)


class Who(Wire):
    """Who is logged in, and what of. `allAccounts`: every account may be looked at, and `accounts` names some."""

    account: str
    scopes: list[str]
    csrf_token: str
    all_accounts: bool
    accounts: list[str]
    idle_seconds: float


def routes(front: Front) -> list[web.RouteDef]:
    """None, where the dashboard is switched off."""
    if not front.settings.dashboard:
        return []
    files, door = Files(), Dashboard(front)
    reads, changes = door.reading, door.changing
    letters = f"{DATA}/dead-letters"
    return [
        web.get(PATH, files.page),
        web.get(f"{PATH}/files/{{name:.+}}", files.file),
        web.post(f"{PATH}/session", door.log_in),
        web.get(f"{PATH}/session", door.who),
        web.delete(f"{PATH}/session", door.log_out),
        web.get(f"{DATA}/live", door.live),
        web.get(f"{DATA}/requests", reads(requests.list_requests, INVOKE)),
        web.get(f"{DATA}/requests/{_REQUEST}", reads(requests.get, INVOKE)),
        web.get(f"{DATA}/requests/{_REQUEST}/events", door.request_events),
        web.delete(f"{DATA}/requests/{_REQUEST}", changes(requests.cancel, INVOKE)),
        web.get(
            f"{DATA}/functions/{_FUNCTION}/versions/{_VERSION}/activity", reads(queues.activity, SCOPES[FUNCTIONS])
        ),
        web.get(letters, reads(dead_letters.list_letters, INVOKE)),
        web.get(f"{letters}/causes", reads(dead_letters.causes, INVOKE)),
        web.post(f"{letters}/redrive", changes(dead_letters.redrive_many, INVOKE)),
        web.post(f"{letters}/purge", changes(dead_letters.purge_many, INVOKE)),
        web.post(f"{letters}/{_REQUEST}/redrive", changes(dead_letters.redrive, INVOKE)),
        web.delete(f"{letters}/{_REQUEST}", changes(dead_letters.purge, INVOKE)),
    ]


class Dashboard:
    """The doors behind which sessions are let in."""

    def __init__(self, front: Front) -> None:
        secret = front.broker.settings.secret_key.get_secret_value().encode()
        self._front = front
        self._sessions = Sessions(front.settings, secret)
        self._board = Board(front.broker, front.calls, look_s=front.settings.dashboard_refresh_s)
        self._viewers = Listeners(front.settings.dashboard_viewers)
        self._tries = MemoryCounters()

    # -- sessions --------------------------------------------------------------------------------

    async def log_in(self, request: web.Request) -> web.Response:
        """The key becomes a cookie, and is not kept."""
        self._sessions.require_own_page(request, None)
        if request.content_type != "application/json":
            raise BadRequest("Content-Type must be application/json")
        await self._count_try(request)
        key = (await payloads.read(self._front, request, Login)).key
        principal = await self._front.authenticator.authenticate(key.strip())
        require_key(principal)
        session = self._sessions.begin(self._front.authenticator.stand_in(key.strip()))
        return await self._answer(request, session, principal, fresh=session)

    async def who(self, request: web.Request) -> web.Response:
        """204 for nobody. Asked for now and then by a page that is open, this keeps its session from ending."""
        try:
            session = self._sessions.of(request)
            principal = await self._front.authenticator.recall(session.key)
        except Unauthenticated:
            return web.Response(status=204, headers={"Cache-Control": "no-store"})
        return await self._answer(request, session, principal, fresh=self._sessions.renewed(session))

    async def log_out(self, request: web.Request) -> web.Response:
        self._sessions.require_own_page(request, self._sessions.of(request))
        response = web.Response(status=204, headers={"Cache-Control": "no-store"})
        self._sessions.take_away(request, response)
        return response

    async def _answer(
        self, request: web.Request, session: Session, principal: Principal, *, fresh: Session | None
    ) -> web.Response:
        sees_all = any(scope.startswith(ADMIN) for scope in principal.scopes)
        response = payloads.answer(
            Who(
                account=principal.account,
                scopes=sorted(principal.scopes),
                csrf_token=self._sessions.csrf_token(session),
                all_accounts=sees_all,
                accounts=await self._accounts() if sees_all else [],
                idle_seconds=self._front.settings.dashboard_idle_s,
            )
        )
        response.headers["Cache-Control"] = "no-store"
        if fresh is not None:
            self._sessions.give(request, response, fresh)
        return response

    async def _accounts(self) -> list[str]:
        """Those with a record, and those that have functions."""
        catalog = self._front.broker.catalog
        records, versions = await catalog.accounts.list(), await catalog.versions.list()
        return sorted({row.item.id for row in records} | {row.item.account for row in versions})

    async def _count_try(self, request: web.Request) -> None:
        """Raises TooManyRequests."""
        window = Window(counter="login", policy="login", rate=_TRIES)
        taken = await self._tries.take(request.remote or "", [window])
        if not taken.granted:
            raise TooManyRequests("too many logins from this address", retry_after_s=taken.retry_after_s)

    # -- what the API has ------------------------------------------------------------------------

    def reading(self, handler: Guarded, *scopes: str) -> Handler:
        """`handler`, for sessions of a key that holds one of `scopes`, for the account that the query names."""
        return partial(self._serve, handler, scopes, False)

    def changing(self, handler: Guarded, *scopes: str) -> Handler:
        """As `reading`, for our own page only."""
        return partial(self._serve, handler, scopes, True)

    async def _serve(
        self, handler: Guarded, scopes: tuple[str, ...], changes: bool, request: web.Request
    ) -> web.StreamResponse:
        session = self._sessions.of(request)
        if changes:
            self._sessions.require_own_page(request, session)
        principal = await self._acting(session, request, *scopes)
        await self._front.pace.keep(principal.account, about="")
        response = await handler(self._front, request, principal)
        if not response.prepared:
            response.headers["Cache-Control"] = "no-store"
        return response

    async def _acting(self, session: Session, request: web.Request, *scopes: str) -> Principal:
        """Raises Unauthenticated, Forbidden, BadRequest."""
        principal = await self._front.authenticator.recall(session.key)
        account = request.query.get("account", "") or principal.account
        if account == principal.account:
            require(principal, *scopes)
            return principal
        require(principal, *(ADMIN + scope for scope in scopes))
        return acting_for(principal, account)

    # -- what is live ----------------------------------------------------------------------------

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Events of the board: `everything`, then `changes`; `away` while the stores are."""
        session = self._sessions.of(request)

        view = await self._view(session, request)

        async def admitted() -> View:
            """A store that is away takes nothing from who was let in."""
            nonlocal view
            self._sessions.require_going_on(session)
            with suppress(StoreUnavailable):
                view = await self._view(session, request)
            return view

        with self._viewers.one_more():
            return await sse.serve(self._front, request, web.StreamResponse(), self._board.follow(admitted))

    async def _view(self, session: Session, request: web.Request) -> View:
        """Raises as `_acting`."""
        principal = await self._front.authenticator.recall(session.key)
        view = View(principal, request.query.get("account", "") or principal.account)
        if view.account != EVERYBODY:
            view.acting(view.account)
        view.require_any()
        return view

    async def request_events(self, request: web.Request) -> web.StreamResponse:
        """As the API's own, which is for keys."""
        session = self._sessions.of(request)
        principal = await self._acting(session, request, INVOKE)
        request_id = headers.uuid(request.match_info["request_id"], field="requestId")
        record = await invocations.find(self._front.broker, principal, request_id)

        async def followed() -> AsyncGenerator[bytes, None]:
            seen = Seen.parse(request.headers.get(headers.LAST_EVENT_ID, ""))
            found = happenings.follow(self._front.broker.results, self._front.places, record, seen)
            async with aclosing(found):
                async for event in found:
                    self._sessions.require_going_on(session)
                    with suppress(StoreUnavailable):
                        await self._acting(session, request, INVOKE)
                    yield await events.encoded(self._front, request, event) if event is not None else sse.KEEP_ALIVE

        with self._viewers.one_more():
            return await sse.serve(self._front, request, web.StreamResponse(), followed())
