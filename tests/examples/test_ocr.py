"""The text recognition sample, over HTTP, with its real model."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.examples.conftest import EXAMPLES, Sample, StartSample

RECEIPT = (EXAMPLES / "ocr" / "receipt.png").read_bytes()
TIMEOUT_S = 60.0
MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def ocr(start_sample: StartSample) -> AsyncIterator[Sample]:
    async with start_sample("ocr") as sample:
        await wait_until_ready(sample)
        yield sample


async def wait_until_ready(sample: Sample) -> list[int]:
    """Asks /health until it answers 200; returns every status seen on the way."""
    statuses = [0]
    async with asyncio.timeout(TIMEOUT_S):
        while statuses[-1] != 200:
            async with sample.http.get("/health") as response:
                statuses.append(response.status)
    return statuses[1:]


async def wait_until_running(sample: Sample, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await (await sample.http.get("/health")).json())["running"] != count:
            pass


async def read_picture(sample: Sample, data: bytes, content_type: str = "image/png") -> tuple[int, dict[str, Any]]:
    async with sample.http.post("/ocr", data=data, headers={"Content-Type": content_type}) as response:
        return response.status, await response.json()


async def read_assets(sample: Sample, directory: Path, ids: str) -> tuple[int, dict[str, Any]]:
    headers = {"NVCF-ASSET-DIR": str(directory), "NVCF-FUNCTION-ASSET-IDS": ids}
    async with sample.http.post("/ocr", json={"ignored": True}, headers=headers) as response:
        return response.status, await response.json()


def picture(image: Image.Image, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


async def test_health_is_503_until_the_model_is_warm(start_sample: StartSample) -> None:
    async with start_sample("ocr") as sample:
        statuses = await wait_until_ready(sample)
        assert set(statuses[:-1]) <= {503}
        assert (await read_picture(sample, RECEIPT))[0] == 200


async def test_a_receipt_is_read_row_by_row(ocr: Sample) -> None:
    status, answer = await read_picture(ocr, RECEIPT)
    rows = answer["text"].splitlines()
    assert status == 200
    assert rows[:3] == ["CAFE AURORA", "12 Harbour Street, Bergen", "Thank you for your visit"]
    assert {"Subtotal 21.80", "VAT 15% 3.27", "TOTAL 25.07"} <= set(rows)
    assert rows[-1] == "Keep this receipt for returns within 14 days."


async def test_every_line_has_its_confidence_and_its_box_in_the_picture(ocr: Sample) -> None:
    _, answer = await read_picture(ocr, RECEIPT)
    [page] = answer["images"]
    assert (page["source"], page["width"], page["height"]) == ("body", 512, 568)
    assert all(0.5 <= line["confidence"] <= 1 for line in page["lines"])
    corners = [corner for line in page["lines"] for corner in line["box"]]
    assert len(corners) == 4 * len(page["lines"])
    assert all(0 <= x <= 512 and 0 <= y <= 568 for x, y in corners)


async def test_a_photograph_as_plain_bytes_is_read_too(ocr: Sample) -> None:
    photograph = picture(Image.open(io.BytesIO(RECEIPT)).convert("RGB").rotate(4, expand=True), "JPEG")
    status, answer = await read_picture(ocr, photograph, "application/octet-stream")
    assert status == 200
    assert "TOTAL 25.07" in answer["text"]


async def test_a_picture_without_text_has_no_lines(ocr: Sample) -> None:
    status, answer = await read_picture(ocr, picture(Image.new("RGBA", (200, 100))))
    assert (status, answer["text"]) == (200, "")
    assert answer["images"][0]["lines"] == []


async def test_assets_are_read_in_the_order_they_are_named(ocr: Sample, tmp_path: Path) -> None:
    (tmp_path / "a1").write_bytes(RECEIPT)
    (tmp_path / "b2").write_bytes(picture(Image.new("RGB", (64, 64), "white")))
    status, answer = await read_assets(ocr, tmp_path, "b2, a1")
    assert status == 200
    assert [page["source"] for page in answer["images"]] == ["b2", "a1"]
    assert "CAFE AURORA" in answer["text"]


async def test_an_asset_directory_without_assets_means_the_body(ocr: Sample, tmp_path: Path) -> None:
    headers = {"Content-Type": "image/png", "NVCF-ASSET-DIR": str(tmp_path)}
    async with ocr.http.post("/ocr", data=RECEIPT, headers=headers) as response:
        assert (await response.json())["images"][0]["source"] == "body"


@pytest.mark.parametrize("asset_id", ["../secret", "..", ".", "sub/file", "/etc/hostname", "a1,", "a1,,a1", "x" * 129])
async def test_an_asset_id_that_is_no_plain_name_is_refused(ocr: Sample, tmp_path: Path, asset_id: str) -> None:
    (tmp_path / "secret").write_bytes(RECEIPT)
    (tmp_path / "assets" / "sub").mkdir(parents=True)
    (tmp_path / "assets" / "sub" / "file").write_bytes(RECEIPT)
    (tmp_path / "assets" / "a1").write_bytes(RECEIPT)
    status, answer = await read_assets(ocr, tmp_path / "assets", asset_id)
    assert status == 400
    assert "not an asset id" in answer["error"]


async def test_a_link_out_of_the_asset_directory_is_refused(ocr: Sample, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(RECEIPT)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "link").symlink_to(tmp_path / "secret")
    assert (await read_assets(ocr, tmp_path / "assets", "link"))[0] == 400


async def test_a_missing_asset_is_named(ocr: Sample, tmp_path: Path) -> None:
    status, answer = await read_assets(ocr, tmp_path, "gone")
    assert status == 400
    assert "gone" in answer["error"]


async def test_more_assets_than_the_limit_are_refused(ocr: Sample, tmp_path: Path) -> None:
    assert (await read_assets(ocr, tmp_path, ",".join(["a"] * 17)))[0] == 400


async def test_an_asset_past_the_size_limit_is_refused(ocr: Sample, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(33 * MIB)
    assert (await read_assets(ocr, tmp_path, "huge"))[0] == 413


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        RECEIPT[:5000],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        picture(Image.new("1", (8, 400))),
        picture(Image.new("1", (20, 2000))),
        picture(Image.new("1", (7000, 7000))),
    ],
    ids=["empty", "text", "cut off", "a format that runs programs", "too thin", "too long", "too many pixels"],
)
async def test_what_is_no_readable_picture_is_refused(ocr: Sample, data: bytes) -> None:
    status, answer = await read_picture(ocr, data)
    assert status == 422
    assert answer["error"].startswith("body: ")


async def test_a_body_of_another_type_is_refused(ocr: Sample) -> None:
    assert (await read_picture(ocr, b"{}", "application/json"))[0] == 415


async def test_a_body_past_the_size_limit_is_refused(ocr: Sample) -> None:
    headers = {"Content-Type": "image/png", "Expect": "100-continue"}
    async with ocr.http.post("/ocr", data=b"x" * (33 * MIB), headers=headers) as response:
        assert response.status == 413
        assert "bytes" in (await response.json())["error"]


async def test_requests_take_turns_while_health_answers(ocr: Sample) -> None:
    reading = [asyncio.create_task(read_picture(ocr, RECEIPT)) for _ in range(3)]
    while not all(task.done() for task in reading):
        async with asyncio.timeout(TIMEOUT_S), ocr.http.get("/health") as response:
            assert response.status == 200
    assert {status for status, _ in await asyncio.gather(*reading)} == {200}


async def test_a_running_request_is_finished_after_sigterm(start_sample: StartSample) -> None:
    async with start_sample("ocr") as sample:
        await wait_until_ready(sample)
        request = asyncio.create_task(read_picture(sample, RECEIPT))
        await wait_until_running(sample, 1)
        assert await sample.terminate() == 0
        assert (await request)[0] == 200
