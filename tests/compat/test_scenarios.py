"""Every scenario over HTTP: all of them on back ends in memory, and some on RabbitMQ, Redis and S3 too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest

from infra.local.servers import S3, RabbitMQ, Redis
from tests.compat import stages
from tests.compat.playing import play
from tests.compat.scenarios import Scenario, read_all
from tests.compat.stages import Stage

SCENARIOS = read_all()


def named(scenarios: Iterable[Scenario]) -> list[object]:
    return [pytest.param(scenario, id=scenario.id) for scenario in scenarios]


@pytest.fixture(scope="module")
async def memory(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with stages.in_memory(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="module")
async def servers(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    urls = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq.url,
        # A database of its own: what other tests store is not deployed here.
        "FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/10",
        "FNQUEUE_BLOBS_URL": s3.url,
    }
    async with stages.on_servers(tmp_path_factory.mktemp("stage"), urls) as stage:
        yield stage


@pytest.mark.parametrize("scenario", named(SCENARIOS))
async def test_in_memory(scenario: Scenario, memory: Stage) -> None:
    await play(memory, scenario)


@pytest.mark.servers
@pytest.mark.parametrize("scenario", named([scenario for scenario in SCENARIOS if scenario.stack]))
async def test_on_real_servers(scenario: Scenario, servers: Stage) -> None:
    await play(servers, scenario)


def test_no_two_scenarios_have_one_name() -> None:
    ids = [scenario.id for scenario in SCENARIOS]
    assert len(ids) == len(set(ids))
