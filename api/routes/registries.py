"""Registry credentials and recognized registries (contract/management.md §6.3)."""

from __future__ import annotations

from aiohttp import web

from api import headers, payloads, queries
from api.definitions import instant
from api.front import Front
from broker import registries
from broker.model import Principal, RegistryCredential
from broker.registries import ARTIFACT_TYPES, Change, Draft
from fnqueue import wire


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    asked = await payloads.read(front, request, wire.CreateRegistryCredential)
    draft = Draft(
        name=asked.secret.name,
        hostname=asked.registry_hostname,
        artifact_types=tuple(asked.artifact_types),
        secret=asked.secret.value.get_secret_value(),
        tags=tuple(asked.tags),
        description=asked.description,
    )
    return _one(principal, await registries.add(front.broker, principal, draft, known=front.registries))


async def list_credentials(front: Front, request: web.Request, principal: Principal) -> web.Response:
    found = await registries.list_credentials(
        front.broker,
        principal,
        artifact_types=queries.words(request.query, "artifactType"),
        provisioned_by=queries.words(request.query, "provisionedBy"),
    )
    return payloads.answer(
        wire.RegistryCredentialList(registry_credentials=[present(principal.account, one) for one in found])
    )


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    return _one(principal, await registries.get(front.broker, principal, _id(request)))


async def update(front: Front, request: web.Request, principal: Principal) -> web.Response:
    credential_id = _id(request)
    asked = await payloads.read(front, request, wire.UpdateRegistryCredential)
    change = Change(
        name=asked.secret.name if asked.secret else None,
        secret=asked.secret.value.get_secret_value() if asked.secret else None,
        artifact_types=(*asked.artifact_types, *asked.artifact_type_enums),
        tags=None if asked.tags is None else tuple(asked.tags),
        description=asked.description,
    )
    return _one(
        principal, await registries.update(front.broker, principal, credential_id, change, known=front.registries)
    )


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    await registries.delete(front.broker, principal, _id(request))
    return web.Response(status=204)


async def list_recognized(front: Front, request: web.Request, principal: Principal) -> web.Response:
    by_type = {
        artifact_type: [
            wire.RecognizedRegistry(name=registry.name, hostname=registry.hostname)
            for registry in front.registries
            if artifact_type in registry.artifact_types
        ]
        for artifact_type in ARTIFACT_TYPES
    }
    return payloads.answer(wire.RecognizedRegistries(recognized_registries=by_type))


def _id(request: web.Request) -> str:
    return headers.uuid(request.match_info["credential_id"], field="registryCredentialId")


def _one(principal: Principal, credential: RegistryCredential) -> web.Response:
    return payloads.answer(wire.RegistryCredentialAnswer(registry_credential=present(principal.account, credential)))


def present(account: str, credential: RegistryCredential) -> wire.RegistryCredential:
    return wire.RegistryCredential(
        registry_credential_id=credential.id,
        nca_id=account,
        registry_credential_name=credential.name,
        registry_name=credential.registry,
        registry_hostname=credential.hostname,
        artifact_types=list(credential.artifact_types),
        tags=list(credential.tags) or None,
        description=credential.description or None,
        provisioned_by=credential.provisioned_by,
        last_updated_at=instant(credential.updated_at),
        created_at=instant(credential.created_at),
    )
