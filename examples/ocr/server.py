"""A sample function: reads the text in pictures. Knows nothing of queues.

    POST /ocr     a picture as the body (image/*, application/octet-stream), or named as assets:
                  NVCF-ASSET-DIR: a directory; NVCF-FUNCTION-ASSET-IDS: the files in it, comma separated
    GET  /health  200 {"status": "ok", "running": 0} once the model is loaded and warm, 503 before

The answer has one entry per picture, in the order asked for; `text` joins them all:

    {"text": "TOTAL 25.07",
     "images": [{"source": "body", "width": 512, "height": 568, "text": "TOTAL 25.07",
                 "lines": [{"text": "TOTAL", "confidence": 0.998, "box": [[64, 359], [149, 361], ...]}, ...]}]}

`source` is the asset's id, or "body". A box is its four corners in pixels, clockwise from the top left.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import re
import struct
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import web
from PIL import Image, ImageDraw, ImageOps
from rapidocr import RapidOCR
from rapidocr.utils.output import RapidOCROutput

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

MAX_IMAGES = 16
MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 40_000_000
MIN_SIDE_PIXELS = 16
MAX_SIDE_RATIO = 32
# Not everything Pillow opens: some of its formats start other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# The detector gets at most this many pixels a side, so that memory and time per picture are bounded.
DETECTOR_SIDE_PIXELS = 1280
# More threads than this gain nothing with models this small.
MAX_THREADS = 4
SHUTDOWN_TIMEOUT_S = 300.0
ASSET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Box = tuple[tuple[int, int], ...]


class Refused(Exception):
    """The request cannot be served as it stands; `status` and the text go to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    text: str
    confidence: float
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    source: str
    width: int
    height: int
    text: str
    lines: list[Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a picture comes from; `load` may touch the disk."""

    name: str
    load: Callable[[], bytes]


class Reader:
    """The model, loaded and warm. For one thread at a time."""

    def __init__(self) -> None:
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.limit_type": "max",
                "Det.limit_side_len": DETECTOR_SIDE_PIXELS,
            }
        )
        self._warm_up()

    def read(self, source: Source) -> Page:
        """Raises: Refused when the source holds no picture this server can read."""
        image = decode(source)
        lines = self._lines(image)
        return Page(source=source.name, width=image.width, height=image.height, text=reading(lines), lines=lines)

    def _lines(self, image: Image.Image) -> list[Line]:
        found = self._engine(image)
        if not isinstance(found, RapidOCROutput) or found.boxes is None or not found.txts:
            return []
        return [
            Line(text=text, confidence=round(float(score), 3), box=tuple((round(x), round(y)) for x, y in box))
            for text, score, box in zip(found.txts, found.scores or (), found.boxes.tolist(), strict=True)
        ]

    def _warm_up(self) -> None:
        # The engine opens each of its models at first use; a picture without text would not reach them all.
        image = Image.new("RGB", (320, 96), "white")
        ImageDraw.Draw(image).text((24, 24), "ready", fill="black", font_size=40)
        if not self._lines(image):
            raise RuntimeError("the model does not read its own test picture")


class Server:
    """The two routes, and the one thread that runs the model, so that requests take turns."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ocr")
        self._reader: Reader | None = None
        self._running = 0

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Loads the model beside the open port; a model that does not load ends the process."""
        loading = asyncio.get_running_loop().run_in_executor(self._executor, Reader)
        loading.add_done_callback(self._loaded)
        yield
        self._executor.shutdown(cancel_futures=True)

    def _loaded(self, loading: "asyncio.Future[Reader]") -> None:
        if loading.cancelled():
            return
        if error := loading.exception():
            raise SystemExit(f"the model did not load: {error}")
        self._reader = loading.result()

    async def post(self, http: web.Request) -> web.Response:
        try:
            pages = await self._read(await sources_of(http))
        except Refused as refused:
            return answer({"error": str(refused)}, status=refused.status)
        text = "\n".join(page.text for page in pages)
        return answer({"text": text, "images": [asdict(page) for page in pages]})

    async def health(self, _: web.Request) -> web.Response:
        if self._reader is None:
            return answer({"status": "loading"}, status=503)
        return answer({"status": "ok", "running": self._running})

    async def _read(self, sources: list[Source]) -> list[Page]:
        if self._reader is None:
            raise Refused(503, "the model is still loading")
        loop = asyncio.get_running_loop()
        self._running += 1
        try:
            # One picture a turn: others get theirs in between, and a client that leaves wastes one at most.
            return [await loop.run_in_executor(self._executor, self._reader.read, source) for source in sources]
        finally:
            self._running -= 1


async def sources_of(http: web.Request) -> list[Source]:
    """The pictures a request names, or the one in its body. Raises: Refused."""
    asset_ids = [part.strip() for part in http.headers.get("NVCF-FUNCTION-ASSET-IDS", "").split(",")]
    if any(asset_ids):
        return asset_sources(http.headers.get("NVCF-ASSET-DIR", ""), asset_ids)
    if not (http.content_type.startswith("image/") or http.content_type == "application/octet-stream"):
        raise Refused(415, f"Content-Type {http.content_type}: send a picture (image/*), or assets")
    body = await read_body(http)
    return [Source(name="body", load=lambda: body)]


def asset_sources(directory: str, asset_ids: list[str]) -> list[Source]:
    if not directory:
        raise Refused(400, "NVCF-FUNCTION-ASSET-IDS without NVCF-ASSET-DIR")
    if len(asset_ids) > MAX_IMAGES:
        raise Refused(400, f"NVCF-FUNCTION-ASSET-IDS: at most {MAX_IMAGES} pictures a request")
    for asset_id in asset_ids:
        if not ASSET_ID.fullmatch(asset_id):
            raise Refused(400, f"NVCF-FUNCTION-ASSET-IDS: {asset_id!r} is not an asset id")
    return [Source(name=id_, load=partial(read_asset, Path(directory), id_)) for id_ in asset_ids]


def read_asset(directory: Path, asset_id: str) -> bytes:
    path = directory / asset_id
    # A link would lead out of the directory.
    if path.is_symlink() or not path.is_file():
        raise Refused(400, f"asset {asset_id}: no such file in NVCF-ASSET-DIR")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise Refused(413, f"asset {asset_id}: larger than {MAX_IMAGE_BYTES} bytes")
    return path.read_bytes()


async def read_body(http: web.Request) -> bytes:
    """The whole body. Raises: Refused (413) past MAX_IMAGE_BYTES, unread where its length is declared."""
    if (http.content_length or 0) <= MAX_IMAGE_BYTES:
        try:
            return await http.read()
        except web.HTTPRequestEntityTooLarge:
            pass
    raise Refused(413, f"the body is larger than {MAX_IMAGE_BYTES} bytes")


def decode(source: Source) -> Image.Image:
    """The picture upright, in RGB, what is transparent in white. Raises: Refused (422)."""
    data = source.load()
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(source.name, image)
            return on_white(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise Refused(422, f"{source.name}: not a picture in {', '.join(FORMATS)}") from error


def check_size(name: str, image: Image.Image) -> None:
    short, long = sorted(image.size)
    size = f"{name}: {image.width} x {image.height} pixels"
    if short * long > MAX_PIXELS:
        raise Refused(422, f"{size}, more than {MAX_PIXELS} in all")
    if short < MIN_SIDE_PIXELS:
        raise Refused(422, f"{size}, a side of less than {MIN_SIDE_PIXELS}")
    if long > short * MAX_SIDE_RATIO:
        raise Refused(422, f"{size}, one side more than {MAX_SIDE_RATIO} times the other")


def on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def reading(lines: list[Line]) -> str:
    """The text as a person reads it: a price at the far right belongs to the row of what it pays for.

    A picture is seldom straight, so rows follow the slope of the lines themselves.
    """
    if not lines:
        return ""
    slope = math.tan(median(angle(line.box) for line in lines))
    height = median(math.dist(line.box[0], line.box[3]) for line in lines)
    rows: list[list[Line]] = []
    row_at = -math.inf
    for line in sorted(lines, key=partial(level, slope)):
        if level(slope, line) - row_at > height / 2:
            rows.append([])
            row_at = level(slope, line)
        rows[-1].append(line)
    return "\n".join(" ".join(line.text for line in sorted(row, key=left)) for row in rows)


def angle(box: Box) -> float:
    (left_x, left_y), (right_x, right_y) = box[:2]
    return math.atan2(right_y - left_y, right_x - left_x)


def level(slope: float, line: Line) -> float:
    """How far down the line's middle would lie if the picture were straight, in pixels."""
    middle_x = sum(x for x, _ in line.box) / len(line.box)
    middle_y = sum(y for _, y in line.box) / len(line.box)
    return middle_y - slope * middle_x


def left(line: Line) -> int:
    return min(x for x, _ in line.box)


def answer(body: dict[str, Any], *, status: int = 200) -> web.Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    data = json.dumps(body, ensure_ascii=False).encode()
    return web.Response(body=data, status=status, headers=headers, content_type="application/json")


def application() -> web.Application:
    server = Server()
    app = web.Application(client_max_size=MAX_IMAGE_BYTES)
    app.add_routes([web.post("/ocr", server.post), web.get("/health", server.health)])
    app.cleanup_ctx.append(server.run)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Text recognition, as an ordinary HTTP server.")
    parser.add_argument("--host", default=os.environ.get("HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    web.run_app(
        application(),
        host=options.host,
        port=options.port,
        loop=new_event_loop(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )


if __name__ == "__main__":
    main()
