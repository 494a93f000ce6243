"""Real servers for the tests. A missing one is installed, or its absence fails the test; nothing is skipped."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from broker.telemetry import logs
from infra.local import binaries
from infra.local.podman import Podman
from infra.local.process import Server
from infra.local.servers import S3, RabbitMQ, Redis
from tests import images

# How fast this machine is decides nothing.
settings.register_profile("any-machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

AnyServer = TypeVar("AnyServer", bound=Server)

SERVER_FIXTURES = {
    "rabbitmq",
    "product_rabbitmq",
    "redis_server",
    "s3",
    "new_rabbitmq",
    "new_redis",
    "new_s3",
    "podman",
    "sentries",
}
SERVER_BACKENDS = {"rabbitmq", "redis", "s3", "docker"}  # as parameters of the contract suites


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "servers: set on every test that starts a real server; `make check` goes without"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and _needs_server(item):
            item.add_marker("servers")


def _needs_server(test: pytest.Function) -> bool:
    if SERVER_FIXTURES & set(test.fixturenames):
        return True
    parameters = test.callspec.params.values() if hasattr(test, "callspec") else ()
    return any(value in SERVER_BACKENDS for value in parameters if isinstance(value, str))


@pytest.fixture(autouse=True)
def kept_logging() -> Iterator[None]:
    """A command that a test runs in its own process says where this process logs: not beyond that test."""
    root, metering = logging.getLogger(), logging.getLogger(logs.METERING)
    handlers, levels, source = root.handlers[:], (root.level, metering.level), logging._srcfile
    yield
    root.handlers, logging._srcfile = handlers, source
    root.setLevel(levels[0])
    metering.setLevel(levels[1])


@pytest.fixture(scope="session")
def programs() -> None:
    """The server programs are on this machine."""
    binaries.ensure()


@pytest.fixture(scope="session")
def rabbitmq(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A RabbitMQ for all tests: name queues uniquely, do not stop it."""
    with _starter(lambda: RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))) as start:
        yield start()


@pytest.fixture(scope="session")
def product_rabbitmq(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A RabbitMQ for all tests of the whole product: its controllers take every dead letter. With its management API,
    by which controllers make users of versions."""
    with _starter(lambda: RabbitMQ(tmp_path_factory.mktemp("product-rabbitmq"), management=True)) as start:
        yield start()


@pytest.fixture(scope="session")
def redis_server(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis for all tests: name keys uniquely, do not stop it."""
    with _starter(lambda: Redis(tmp_path_factory.mktemp("redis"))) as start:
        yield start()


@pytest.fixture(scope="session")
def s3(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server for all tests: name objects uniquely, do not stop it."""
    with _starter(lambda: S3(tmp_path_factory.mktemp("s3"))) as start:
        yield start()


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """A container engine for all tests, with the images of `tests.images`: do not stop it. It pulls without TLS from
    a registry at `REGISTRY`."""
    binaries.ensure(binaries.ENGINE)
    engine = Podman(tmp_path_factory.mktemp("podman"), insecure=[images.REGISTRY])
    try:
        engine.start()
        images.build_all(engine, tmp_path_factory.mktemp("images"))
        yield engine
    finally:
        engine.discard()


@pytest.fixture
def new_rabbitmq(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], RabbitMQ]]:
    """Starts a RabbitMQ of the test's own, to kill and restart; about seven seconds each."""
    with _starter(lambda: RabbitMQ(tmp_path_factory.mktemp("own-rabbitmq"))) as start:
        yield start


@pytest.fixture
def new_redis(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Redis]]:
    """Starts a Redis of the test's own, to kill and restart."""
    with _starter(lambda: Redis(tmp_path_factory.mktemp("own-redis"))) as start:
        yield start


@pytest.fixture
def new_s3(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3]]:
    """Starts an S3 server of the test's own, to kill and restart."""
    with _starter(lambda: S3(tmp_path_factory.mktemp("own-s3"))) as start:
        yield start


@contextlib.contextmanager
def _starter(make: Callable[[], AnyServer]) -> Iterator[Callable[[], AnyServer]]:
    with contextlib.ExitStack() as running:

        def start() -> AnyServer:
            server = make()
            running.callback(server.kill)  # its data is thrown away: no need to stop in good order
            server.start()
            return server

        yield start
