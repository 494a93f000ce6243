from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from broker import request_ids

SECRET = b"s" * 64


@given(account=st.text(min_size=1, max_size=64), epoch=st.integers(0, 255))
def test_an_id_is_a_version_4_uuid_that_knows_its_account_and_epoch(account: str, epoch: int) -> None:
    minted = request_ids.mint(SECRET, account, epoch)
    assert uuid.UUID(minted).version == 4
    assert str(uuid.UUID(minted)) == minted
    assert request_ids.belongs(SECRET, account, minted)
    assert request_ids.epoch_of(minted) == epoch


def test_an_id_belongs_to_no_other_account_and_no_other_secret() -> None:
    minted = request_ids.mint(SECRET, "t1", 7)
    assert not request_ids.belongs(SECRET, "t10", minted)
    assert not request_ids.belongs(b"other", "t1", minted)


def test_guesses_do_not_belong() -> None:
    assert not any(request_ids.belongs(SECRET, "t1", str(uuid.uuid4())) for _ in range(10_000))


def test_ids_do_not_repeat() -> None:
    assert len({request_ids.mint(SECRET, "t1", 0) for _ in range(10_000)}) == 10_000
