"""The users of versions, and what sidecars are given to come in with."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from broker import version_users
from broker.connect import open_broker
from broker.errors import ConfigurationError
from broker.ports import NoUsers
from broker.settings import ApiSettings, ControllerSettings
from tests.contract.launchers import SPECIFICATION, VERSION
from tests.unit.launchers import Users
from tests.unit.test_reconcile import Controller, deployed, row, undeploy
from tests.unit.test_reconcile import controller as _controller
from workers.controller.removal import QUIET_S
from workers.launchers.instances import sidecar_settings, sidecar_variables

controller = _controller  # the fixture

QUEUE_URL = "amqp://fnqueue-controller:hush-queue@rabbit:5672/vhost?heartbeat=10"
STORE_URL = "redis://fnqueue-controller:hush-store@redis:6379/3"
KEY = SecretStr("k" * 32)


def settings(**given: Any) -> ControllerSettings:
    told = {
        "queue_url": SecretStr(QUEUE_URL),
        "store_url": SecretStr(STORE_URL),
        "queue_management_url": SecretStr("http://c:hush-api@rabbit:15672"),
        "secret_key": KEY,
    }
    return ControllerSettings(**{**told, **given})


def test_the_user_of_a_version_takes_the_place_of_the_urls_own() -> None:
    url = version_users.url_for(settings(), "v1", SecretStr(QUEUE_URL)).get_secret_value()
    assert re.fullmatch(r"amqp://fnqueue-v-v1:[0-9a-f]{64}@rabbit:5672/vhost\?heartbeat=10", url)


def test_every_controller_has_the_same_password_and_every_version_another() -> None:
    ours = version_users.password_of(settings(), "v1")
    assert version_users.password_of(settings(queue_url=SecretStr("amqp://elsewhere")), "v1") == ours
    assert version_users.password_of(settings(), "v2") != ours
    assert version_users.password_of(settings(secret_key=SecretStr("other" * 8)), "v1") != ours


def test_a_new_signing_key_that_signs_first_changes_no_password() -> None:
    old, new = f"old:{'0a' * 32}", f"new:{'0b' * 32}"
    behind = settings(secret_key=SecretStr(""), signing_keys=SecretStr(f"{old},{new}"))
    alone = settings(secret_key=SecretStr(""), signing_keys=SecretStr(new))
    assert version_users.password_of(behind, "v") == version_users.password_of(alone, "v")


def test_a_sidecar_is_given_nothing_that_is_the_controllers() -> None:
    told = settings(
        version_users=True,
        sidecar_store_url=SecretStr("redis://fnqueue-sidecar:theirs@redis:6379/3"),
        sidecar_blobs_url=SecretStr("s3://theirs:theirs@s3/bucket"),
        encryption_keys=SecretStr(f"hush-key:{'0c' * 32}"),
        profile="B",
    )
    given = sidecar_settings(told, "i", VERSION, SPECIFICATION, backend="b")
    values = sidecar_variables(given)
    assert not [name for name, value in values.items() if "hush" in value or "k" * 32 in value]
    assert values["FNQUEUE_QUEUE_URL"].startswith(f"amqp://fnqueue-v-{VERSION.id}:")
    assert values["FNQUEUE_STORE_URL"] == "redis://fnqueue-sidecar:theirs@redis:6379/3"
    assert values["FNQUEUE_BLOBS_URL"] == "s3://theirs:theirs@s3/bucket"
    assert (given.profile, given.profile_asserted) == ("B", True)


def test_without_users_of_their_own_sidecars_come_in_as_the_controller() -> None:
    given = sidecar_settings(settings(), "i", VERSION, SPECIFICATION, backend="b")
    assert given.queue_url.get_secret_value() == QUEUE_URL
    assert given.store_url.get_secret_value() == STORE_URL
    assert not given.profile_asserted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"queue_url": SecretStr("memory://")}, "amqp://"),
        ({"queue_management_url": SecretStr("")}, "FNQUEUE_QUEUE_MANAGEMENT_URL"),
        ({"secret_key": SecretStr("")}, "FNQUEUE_SECRET_KEY"),
    ],
)
async def test_what_is_lacking_is_said_at_the_start(given: dict[str, SecretStr], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        async with open_broker(settings(version_users=True, store_url=SecretStr("memory://"), **given)):
            pass


async def test_a_front_end_makes_no_users() -> None:
    async with open_broker(ApiSettings(secret_key=KEY)) as broker:
        assert isinstance(broker.users, NoUsers)


async def test_a_version_has_its_user_before_its_first_instance_and_until_its_queue_goes(
    controller: Controller,
) -> None:
    users = Users()
    controller.broker = replace(controller.broker, users=users)
    controller.start_over()
    users.there = False
    version = await deployed(controller.broker)
    await controller.step()
    assert controller.alive == []
    users.there = True
    await controller.step(after_s=60)
    assert len(controller.alive) == 1
    assert users.admitted == {version.id}
    users.admitted.clear()
    await controller.ensure_queues()
    assert users.admitted == {version.id}
    await undeploy(controller.broker, version)
    await controller.step()
    assert users.admitted == {version.id}
    await controller.step(after_s=QUIET_S)
    await controller.step(after_s=QUIET_S)
    assert await row(controller.broker, version) is None
    assert users.admitted == set()
