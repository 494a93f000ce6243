"""Server-sent events that go on behind the last one when a connection breaks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from fnqueue import errors
from fnqueue.errors import ConnectionFailed, FnqueueError
from fnqueue.retries import Failures
from fnqueue.transport import Call, Event, Stream, Transport, limited

ACCEPT = "text/event-stream"
# Between two connections, where the server does not say otherwise.
AGAIN_S = 1.0


async def listen(
    transport: Transport, path: str, headers: Mapping[str, str], *, give_up_at: float, end_tells: bool
) -> AsyncGenerator[Event, None]:
    """Each event once, in order. `end_tells`: an answer that ends in good order is complete; else it was cut off.

    An answer that is no event stream is one event with all of it. Raises as `Transport.call`, and RequestFailed.
    """
    last_id, again_s, failures = "", AGAIN_S, Failures()
    while True:
        error: FnqueueError = ConnectionFailed("the events ended too early")
        behind = {"Accept": ACCEPT, **headers} | ({"Last-Event-ID": last_id} if last_id else {})
        async with transport.answered(Call(method="GET", path=path, headers=behind), give_up_at=give_up_at) as stream:
            if stream.status == 204:
                return
            if stream.status == 202:
                pause_s = errors.retry_after_s(stream.headers) or AGAIN_S
                async with limited(give_up_at):
                    await transport.sleep(pause_s)
                continue
            if not stream.is_events:
                yield await _whole(stream, give_up_at)
                return
            try:
                async with aclosing(stream.events()) as source:
                    while True:
                        # Not around the loop: a time limit must not stay open while a caller has the event.
                        async with limited(give_up_at):
                            event = await anext(source, None)
                        if event is None:
                            break
                        last_id, again_s, failures = event.id or last_id, event.retry_s or again_s, Failures()
                        if event.data:
                            yield event
                if end_tells:
                    return
            except ConnectionFailed as exc:
                error = exc
        failures = failures.one_more(transport.now())
        await transport.wait_after(error, failures, give_up_at=give_up_at, least_s=again_s)


async def _whole(stream: Stream, give_up_at: float) -> Event:
    async with limited(give_up_at):
        content = await stream.read()
    if stream.status >= 400:
        raise errors.of_answer(stream.status, stream.headers, content)
    return Event("message", content.decode(errors="replace"), "", None)
