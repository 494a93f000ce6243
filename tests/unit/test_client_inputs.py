"""What an input becomes on the wire."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnqueue import inputs
from fnqueue.inputs import File, Opened, outsized

ASSET = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"


def sent(value: Any, *, max_body_bytes: int = inputs.MAX_BODY_BYTES) -> tuple[bytes, str, list[str]]:
    """The body, its type, and the names of what is uploaded; every asset gets the same ID."""
    with inputs.opened(value, max_body_bytes=max_body_bytes) as given_:
        body, content_type = given_.body(dict.fromkeys(given_.to_upload, ASSET))
        return body, content_type, [file.name for file in given_.to_upload.values()]


def test_plain_values_are_json() -> None:
    body, content_type, uploads = sent({"message": "grüße", "list": (1, None, True)})
    assert json.loads(body) == {"message": "grüße", "list": [1, None, True]}
    assert (content_type, uploads) == ("application/json", [])


@pytest.mark.parametrize("value", [float("nan"), {"x": {1, 2}}, {"x": object()}])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        sent(value)


def test_a_small_file_inside_json_is_a_data_url(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    body, _, uploads = sent({"pages": [{"image": picture}, {"image": b"raw"}]})
    first, second = (page["image"] for page in json.loads(body)["pages"])
    assert first == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert second == "data:application/octet-stream;base64," + base64.b64encode(b"raw").decode()
    assert uploads == []


def test_a_large_file_inside_json_is_uploaded_and_named(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"v" * 5000)
    body, _, uploads = sent({"video": video, "thumbnail": File(b"t", "image/png")}, max_body_bytes=1000)
    assert json.loads(body) == {
        "video": f"data:video/mp4;asset_id,{ASSET}",
        "thumbnail": "data:image/png;base64," + base64.b64encode(b"t").decode(),
    }
    assert uploads == ["a.mp4"]


def test_a_file_in_place_of_json_is_the_body(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x" * 1000)
    assert sent(picture, max_body_bytes=1000) == (b"x" * 1000, "image/png", [])
    assert sent(picture, max_body_bytes=999) == (b"", "application/json", ["a.png"])


def test_a_file_can_be_made_an_asset_however_small(tmp_path: Path) -> None:
    assert sent(File(b"x", name="x.bin", upload=True))[2] == ["x.bin"]


def test_a_file_object_is_read_from_where_it_stands_and_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"headbody")
    with path.open("rb") as stream:
        stream.read(4)
        assert sent(stream) == (b"body", "audio/x-wav", [])
        assert not stream.closed


def test_a_file_object_of_text_is_refused() -> None:
    with pytest.raises(TypeError, match="binary mode"):
        sent(io.StringIO("text"))


def test_a_missing_file_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sent({"image": tmp_path / "missing"})


def test_a_string_is_no_path(tmp_path: Path) -> None:
    assert json.loads(sent({"image": str(tmp_path)})[0]) == {"image": str(tmp_path)}


def test_the_description_of_an_asset_can_be_a_header(tmp_path: Path) -> None:
    path = tmp_path / "größe\n.png"
    path.write_bytes(b"")
    with inputs.opened(File(path, upload=True)) as given_:
        [file] = given_.to_upload.values()
        assert file.description == "gr_e_.png"
    with inputs.opened(File(b"", upload=True)) as given_:
        assert [file.description for file in given_.to_upload.values()] == ["input"]


async def test_an_upload_begins_anew_each_time_and_tells_how_far_it_is(tmp_path: Path) -> None:
    content = bytes(2 * inputs.CHUNK_BYTES + 5)
    path = tmp_path / "a"
    path.write_bytes(content)
    with inputs.opened(File(path, upload=True)) as given_:
        [file] = given_.to_upload.values()
        for _ in range(2):
            told: list[int] = []
            assert b"".join([chunk async for chunk in file.chunks(told.append)]) == content
            assert told == [inputs.CHUNK_BYTES, 2 * inputs.CHUNK_BYTES, len(content)]
        assert file.sha256() == hashlib.sha256(content).hexdigest()


async def test_a_file_that_gets_shorter_under_an_upload_is_an_error() -> None:
    file = Opened(io.BytesIO(b"short"), 0, 10, File(b"", name="a"))
    with pytest.raises(OSError, match="ended 5 bytes before"):
        [chunk async for chunk in file.chunks(lambda _: None)]


@given(sizes=st.lists(st.integers(0, 1000), max_size=20), room=st.integers(-100, 5000))
def test_the_fewest_files_go_so_that_the_others_fit(sizes: list[int], room: int) -> None:
    named = dict(enumerate(sizes))
    gone = outsized(named, room)
    left = [size for at, size in named.items() if at not in gone]
    assert not left or sum(left) <= room
    assert not gone or sum(left) + named[gone[-1]] > room
    assert all(named[at] >= size for at in gone for size in left)
