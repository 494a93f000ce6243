"""The page itself: files that lie in this package, read once. They say nothing of what is stored here, and are open."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "files"
PAGE = "index.html"
# Nothing but our own files runs or is shown, no other page holds ours in a frame, and no form leaves it.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " + (
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
_MEDIA = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
}


class Files:
    """By their path below the folder; what is not among them when this is made is not served."""

    def __init__(self, folder: Path = FOLDER) -> None:
        found = [path for path in folder.rglob("*") if path.suffix in _MEDIA]
        self._files = {path.relative_to(folder).as_posix(): (path.read_bytes(), _MEDIA[path.suffix]) for path in found}
        self._tags = {name: hashlib.sha256(content).hexdigest()[:32] for name, (content, _) in self._files.items()}

    async def page(self, request: web.Request) -> web.Response:
        return self._answer(request, PAGE)

    async def file(self, request: web.Request) -> web.Response:
        return self._answer(request, request.match_info["name"])

    def _answer(self, request: web.Request, name: str) -> web.Response:
        if name not in self._files:
            raise web.HTTPNotFound
        content, media = self._files[name]
        if any(each.value == self._tags[name] for each in request.if_none_match or ()):
            response = web.Response(status=304, headers=HEADERS)
        else:
            response = web.Response(body=content, content_type=media, charset="utf-8", headers=HEADERS)
        response.etag = self._tags[name]
        return response
