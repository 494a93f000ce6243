"""A web application: notes, by any method and path. Knows nothing of queues.

PUT /notes/{name} keeps the body (201 with its Location), GET gives it back, DELETE forgets it; GET / redirects.
"""

import os

from aiohttp import web

MAX_NOTE_BYTES = 16 * 1024 * 1024

notes: dict[str, bytes] = {}


async def put(request: web.Request) -> web.Response:
    notes[request.match_info["name"]] = await request.read()
    return web.Response(status=201, headers={"Location": request.path})


async def get(request: web.Request) -> web.Response:
    note = notes.get(request.match_info["name"])
    if note is None:
        return web.Response(status=404, text="no such note\n")
    return web.Response(body=note, content_type="text/plain")


async def delete(request: web.Request) -> web.Response:
    notes.pop(request.match_info["name"], None)
    return web.Response(status=204)


async def listing(request: web.Request) -> web.Response:
    beginning = request.query.get("beginning", "")
    return web.json_response(sorted(name for name in notes if name.startswith(beginning)))


async def index(_: web.Request) -> web.Response:
    raise web.HTTPFound("/notes")


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application(client_max_size=MAX_NOTE_BYTES)
    app.add_routes(
        [
            web.get("/", index),
            web.get("/notes", listing),
            web.put("/notes/{name}", put),
            web.get("/notes/{name}", get),
            web.delete("/notes/{name}", delete),
            web.get("/health", health),
        ]
    )
    web.run_app(app, host=os.environ.get("HOST", "0.0.0.0"), port=int(os.environ.get("PORT", "8000")))


if __name__ == "__main__":
    main()
