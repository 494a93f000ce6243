"""Every operation that names something of an account, as the route table has it: what is another account's answers a
stranger as what never was, to the byte, and what cannot be an ID answers everybody alike."""

from __future__ import annotations

import re
import uuid
from typing import Any, cast

import pytest

from api.app import operations
from api.front import Front
from api.operations import Operation
from broker.model import WebhookSecret, WebhookSecrets
from tests.unit.test_server import NOBODYS
from tests.unit.test_tenants import DEFINITION, PARTIES, PARTNER, RATE_LIMIT, RIGHTS, SPECIFICATIONS, Tenants, ask
from tests.unit.test_tenants import tenants as _tenants

tenants = _tenants  # the fixture

SPECIFICATION = {"gpu": "CPU", "minInstances": 0, "maxInstances": 1}
# By operation, what its body has to be for the IDs of the path to be looked up.
BODIES: dict[str, Any] = {
    "invocations_invoke": {},
    "invocations_invoke_version": {},
    "envelopes_invoke": {"requestBody": {}},
    "envelopes_invoke_version": {"requestBody": {}},
    "tokens_create": {"clientId": "c"},
    "tokens_create_for_version": {"clientId": "c"},
    "functions_add_version": DEFINITION,
    "functions_update": {"tags": ["t"]},
    "functions_update_metadata": {"tags": ["t"]},
    "rollouts_put": {"weights": [{"functionVersionId": NOBODYS, "weight": 100}]},
    "limits_replace": RATE_LIMIT,
    "deployments_create": SPECIFICATIONS,
    "deployments_update": SPECIFICATIONS,
    "deployments_patch": SPECIFICATION,
    "secrets_put": {"secrets": [{"name": "n", "value": "v"}]},
    "authorizations_replace_all": PARTIES,
    "authorizations_replace_all_of_version": PARTIES,
    "authorizations_add": PARTNER,
    "authorizations_add_of_version": PARTNER,
    "authorizations_remove": PARTNER,
    "authorizations_remove_of_version": PARTNER,
    "dead_letters_redrive": {},
    "webhooks_redeliver": {},
    "webhooks_set_default": {"url": "https://example.com/"},
    "keys_authorize": RIGHTS,
    "keys_set_status": {"status": "SUSPENDED"},
}
IDS = {"function_id": "f", "version_id": "v", "request_id": "r", "asset_id": "a", "key_id": "k"}
# A path that names an account is refused by that name (403, tests/unit/test_tenants.py); clusters and instances are the
# operators'; a registry credential cannot be stored without a key to seal it.
ELSEWHERE = {"nca_id", "cluster_id", "instance_id", "credential_id"}


def parameters(operation: Operation) -> set[str]:
    return set(re.findall(r"{(\w+)", operation.path))


ROWS = [each for each in operations(cast("Front", None)) if parameters(each) and not parameters(each) & ELSEWHERE]


@pytest.mark.parametrize("operation", ROWS, ids=lambda operation: operation.name)
async def test_foreign_is_as_random_to_the_byte_and_malformed_is_the_same_for_all(
    tenants: Tenants, operation: Operation
) -> None:
    template, body = re.sub(r":[^{}]*", "", operation.path), BODIES.get(operation.name)
    [deployment] = await tenants.house.broker.catalog.deployments.list()
    item = deployment.item
    theirs = {name: tenants.ids[short] for name, short in IDS.items()}
    secret = WebhookSecret(id=str(uuid.uuid4()), sealed="", created_at=0.0)
    await tenants.house.broker.catalog.webhook_secrets.put(WebhookSecrets(account=item.account, secrets=(secret,)))
    theirs |= {"secret_id": secret.id, "deployment_id": item.id, "gpu_specification_id": item.specifications[0].id}
    answers = []
    for ids in (theirs, {name: str(uuid.uuid4()) for name in theirs}):
        status, told, said = await ask(tenants.foreign, operation.method, template.format(**ids), body)
        for at, name in enumerate(sorted(ids)):
            said = said.replace(ids[name].encode(), b"<%d>" % at)
        answers.append((status, told, said))
    foreign, random = answers
    assert foreign == random
    assert foreign[0] == 404
    malformed = template.format(**dict.fromkeys(theirs, "x"))
    own = await ask(tenants.own, operation.method, malformed, body)
    assert own == await ask(tenants.foreign, operation.method, malformed, body)
    assert own[0] in (400, 404)


def test_every_body_is_of_an_operation() -> None:
    assert BODIES.keys() <= {operation.name for operation in ROWS}
