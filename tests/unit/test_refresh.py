"""The controller opens secrets: at an instance's start, and again whenever they change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from broker import deployments, functions, secrets
from broker.connect import open_broker
from broker.errors import ConfigurationError
from broker.functions import Definition
from broker.keyring import Keyring
from broker.model import FunctionStatus, GpuSpecification, Principal, Version
from broker.ports import Broker
from broker.secrets import Plain
from broker.settings import ControllerSettings
from tests.unit.launchers import CPU, KNOWN_IMAGE, FakeLauncher
from workers.controller.chores import Chores
from workers.controller.reconcile import Reconciler
from workers.controller.secrets import Refresher

OURS = Principal(account="ours", subject="me", scopes=frozenset())
SERVER = Definition(name="server", inference_url="/", container_image=KNOWN_IMAGE)
ONE = GpuSpecification(id="", gpu="CPU", instance_type="", min_instances=1, max_instances=1)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    settings = ControllerSettings(data_dir=tmp_path, encryption_keys=SecretStr(f"k:{'1a' * 32}"))
    async with open_broker(settings) as broker:
        await broker.catalog.offer([CPU], ttl_s=60)
        yield broker


async def deployed(broker: Broker, *names: str) -> Version:
    plains = tuple(Plain(name=name, value='"one"') for name in names)
    version = await functions.create(broker, OURS, replace(SERVER, secrets=plains))
    await deployments.deploy(broker, OURS, version.function_id, version.id, [ONE])
    return version


async def reconcile(broker: Broker, launcher: FakeLauncher) -> None:
    async with asyncio.TaskGroup() as group:
        await Reconciler(broker, ControllerSettings(), launcher, Chores(group)).step()


async def put(broker: Broker, version: Version, name: str, value: str) -> None:
    plain = Plain(name=name, value=json.dumps(value))
    await secrets.put(broker, OURS, version.function_id, version.id, [plain])


def held(launcher: FakeLauncher, version: Version) -> Any:
    (instance,) = [item for item in launcher.instances.values() if item.version_id == version.id]
    return None if instance.secrets is None else json.loads(instance.secrets)


async def test_an_instance_starts_with_its_secrets_and_gets_every_change(broker: Broker) -> None:
    launcher = FakeLauncher()
    version, other, bare = await deployed(broker, "A"), await deployed(broker, "A"), await deployed(broker)
    await reconcile(broker, launcher)
    assert [held(launcher, item) for item in (version, other, bare)] == [{"A": "one"}, {"A": "one"}, None]
    refresher = Refresher(broker, launcher)
    await put(broker, version, "B", "two")
    await refresher.step()
    assert held(launcher, version) == {"A": "one", "B": "two"}
    await put(broker, version, "A", "three")
    await refresher.step()
    assert [held(launcher, item) for item in (version, other)] == [{"A": "three", "B": "two"}, {"A": "one"}]


async def test_a_controller_without_the_key_says_so_in_the_deployment(broker: Broker) -> None:
    launcher, keyless = FakeLauncher(), replace(broker, keyring=Keyring({}))
    version = await deployed(broker, "A")
    await reconcile(keyless, launcher)
    await reconcile(keyless, launcher)
    assert launcher.instances == {}
    stored = await functions.get(broker, OURS, version.function_id, version.id)
    _, deployment = await deployments.get(broker, OURS, version.function_id, version.id)
    assert stored.status is FunctionStatus.ERROR
    assert "FNQUEUE_ENCRYPTION_KEYS" in deployment.health[0].error


async def test_secrets_that_do_not_open_keep_no_others_from_being_refreshed(broker: Broker) -> None:
    launcher = FakeLauncher()
    versions = [await deployed(broker, "A") for _ in range(3)]
    await reconcile(broker, launcher)
    lost = sorted(versions, key=lambda version: version.id)[1]
    for version in versions:
        writer = replace(broker, keyring=Keyring.parse(f"lost:{'2b' * 32}")) if version is lost else broker
        await put(writer, version, "A", "two")
    with pytest.raises(ConfigurationError, match="lost"):
        await Refresher(broker, launcher).step()
    assert [held(launcher, version)["A"] for version in versions] == [
        "one" if version is lost else "two" for version in versions
    ]
