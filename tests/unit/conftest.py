from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.connect import open_broker
from broker.ports import Broker
from broker.settings import Settings


@pytest.fixture
async def memory_broker(tmp_path: Path) -> AsyncIterator[Broker]:
    """All ports in this process; blobs in a folder of the test's own."""
    async with open_broker(Settings(data_dir=tmp_path)) as broker:
        yield broker
