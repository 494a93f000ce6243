"""Files beside an answer: POST /run {"pages": 3} writes a report of so many pages. Knows nothing of queues."""

import os
from pathlib import Path

from aiohttp import web


async def run(request: web.Request) -> web.Response:
    pages = int((await request.json()).get("pages", 3))
    write_report(Path(request.headers["NVCF-LARGE-OUTPUT-DIR"]), pages)
    return web.json_response({"pages": pages})


def write_report(folder: Path, pages: int) -> None:
    """Folders are kept; what ends in `.partial` is not taken along."""
    (folder / "pages").mkdir()
    for number in range(1, pages + 1):
        (folder / "pages" / f"{number}.txt").write_text(f"page {number}\n")
    draft = folder / "summary.txt.partial"
    draft.write_text(f"{pages} pages\n")
    draft.rename(folder / "summary.txt")


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.add_routes([web.post("/run", run), web.get("/health", health)])
    web.run_app(app, host=os.environ.get("HOST", "0.0.0.0"), port=int(os.environ.get("PORT", "8000")))


if __name__ == "__main__":
    main()
