from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fuzz.fuzzing import RANDOM, Complaints

settings.register_profile(RANDOM)  # before the tests are imported: their settings depend on it


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    """What this process logs and raises meanwhile."""
    with Complaints() as found:
        yield found
