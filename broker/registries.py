"""Registry credentials of an account: add, list, get, update, delete; and which one pulls an image.

A credential's secret is the base64 of `user:password`; it is sealed at rest and opened for launchers only
(contract/management.md §6.3). Docker Hub is `docker.io`, by whatever of its names it is called.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from broker.errors import AlreadyExists, BadRequest, ConfigurationError, NotFound, StateConflict
from broker.keyring import Rotation, Sealed
from broker.model import Login, Principal, RegistryCredential, RegistryCredentials
from broker.ports import Broker
from broker.revisions import edit

CONTAINER = "CONTAINER"
ARTIFACT_TYPES = (CONTAINER, "HELM", "MODEL", "RESOURCE")
PROVISIONERS = ("SYSTEM", "USER")
UNKNOWN = "no such registry credential"

_DOCKER_HUB = "docker.io"
_DOCKER_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A registry that credentials may be for; `*` in `hostname` stands for any part of one."""

    name: str
    hostname: str
    artifact_types: tuple[str, ...] = ARTIFACT_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A credential as its owner gives it; `secret` is the base64 of `user:password`, and never shown."""

    name: str
    hostname: str
    artifact_types: tuple[str, ...]
    secret: str = field(repr=False)
    tags: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to change; None leaves a thing as it is. `artifact_types` are added to those that are there."""

    name: str | None = None
    secret: str | None = field(default=None, repr=False)
    artifact_types: tuple[str, ...] = ()
    tags: tuple[str, ...] | None = None
    description: str | None = None


def recognized(registries: str, custom: str) -> list[Registry]:
    """The settings `recognized_registries` and `custom_registries`, read. Raises ConfigurationError."""
    named = [_registry(part) for part in _parts(registries)]
    return named + [Registry(name=hostname, hostname=hostname.lower()) for hostname in _parts(custom)]


async def add(broker: Broker, principal: Principal, draft: Draft, *, known: Sequence[Registry]) -> RegistryCredential:
    """Store a credential for one of the `known` registries, if the account has less than it may.

    Raises:
        BadRequest: an unknown hostname, a secret that is none, no key to seal it with, or one too many.
        AlreadyExists: the account has one of this name for this hostname.
    """
    hostname = _canonical(draft.hostname)
    registry = _recognize(known, hostname, draft.artifact_types)
    record = await broker.catalog.accounts.get(principal.account)
    allowed = record.item.max_registry_credentials if record else broker.settings.max_registry_credentials
    now = time.time()
    credential_id = str(uuid.uuid4())
    credential = RegistryCredential(
        id=credential_id,
        name=draft.name,
        registry=hostname if "*" in registry.name else registry.name,
        hostname=hostname,
        artifact_types=tuple(sorted(set(draft.artifact_types))),
        sealed=_seal(broker, principal.account, credential_id, hostname, draft.secret),
        created_at=now,
        updated_at=now,
        tags=draft.tags,
        description=draft.description,
    )

    def added(stored: Sequence[RegistryCredential]) -> list[RegistryCredential]:
        _refuse_duplicate(stored, credential)
        if len(stored) >= allowed:
            raise BadRequest(f"the account has {len(stored)} registry credentials, and may have {allowed}")
        return [*stored, credential]

    await _edit(broker, principal.account, added)
    return credential


async def list_credentials(
    broker: Broker, principal: Principal, *, artifact_types: Collection[str] = (), provisioned_by: Collection[str] = ()
) -> list[RegistryCredential]:
    """In the order in which they were added. A filter that is empty keeps all; else, those with any of its words.
    Raises BadRequest for an unknown word."""
    types = _words(artifact_types, ARTIFACT_TYPES, field="artifactType")
    provisioners = _words(provisioned_by, PROVISIONERS, field="provisionedBy")
    return [
        credential
        for credential in await _stored(broker, principal.account)
        if types & set(credential.artifact_types) and credential.provisioned_by in provisioners
    ]


async def get(broker: Broker, principal: Principal, credential_id: str) -> RegistryCredential:
    """Raises NotFound."""
    return _find(await _stored(broker, principal.account), credential_id)


async def update(
    broker: Broker, principal: Principal, credential_id: str, change: Change, *, known: Sequence[Registry]
) -> RegistryCredential:
    """The hostname stays. Raises NotFound, BadRequest, AlreadyExists."""

    def changed(stored: Sequence[RegistryCredential]) -> list[RegistryCredential]:
        old = _find(stored, credential_id)
        if change.artifact_types:
            _recognize(known, old.hostname, change.artifact_types)
        new = replace(
            old,
            name=old.name if change.name is None else change.name,
            artifact_types=tuple(sorted({*old.artifact_types, *change.artifact_types})),
            tags=old.tags if change.tags is None else change.tags,
            description=old.description if change.description is None else change.description,
            updated_at=time.time(),
        )
        if change.secret is not None:
            new = replace(new, sealed=_seal(broker, principal.account, old.id, old.hostname, change.secret))
        _refuse_duplicate([item for item in stored if item.id != old.id], new)
        return [new if item.id == old.id else item for item in stored]

    return _find(await _edit(broker, principal.account, changed), credential_id)


async def delete(broker: Broker, principal: Principal, credential_id: str) -> None:
    """Raises NotFound; StateConflict when it is the system's, or the only one that pulls a deployed image."""
    hosts_in_use = await _deployed_hosts(broker, principal.account)

    def removed(stored: Sequence[RegistryCredential]) -> list[RegistryCredential]:
        gone = _find(stored, credential_id)
        if gone.provisioned_by == "SYSTEM":
            raise StateConflict("the registry credential was provisioned by the system and cannot be deleted")
        left = [item for item in stored if item.id != credential_id]
        pulls = {item.hostname for item in left if CONTAINER in item.artifact_types}
        if CONTAINER in gone.artifact_types and gone.hostname in hosts_in_use - pulls:
            raise StateConflict(
                f"the registry credential is in use: a deployed function has an image on {gone.hostname}"
            )
        return left

    await _edit(broker, principal.account, removed)


async def credential_for(broker: Broker, account: str, image: str) -> Login | None:
    """What logs in to pull `image`: the account's newest container credential for its host, None without one.
    Raises ConfigurationError when it does not open."""
    host = registry_host(image)
    usable = [
        credential
        for credential in await _stored(broker, account)
        if credential.hostname == host and CONTAINER in credential.artifact_types
    ]
    if not usable:
        return None
    newest = max(usable, key=lambda credential: credential.updated_at)
    plain = broker.keyring.open(newest.sealed, *_bound(account, newest.id, host)).decode()
    username, _, password = plain.partition(":")
    return Login(hostname=host, username=username, password=password)


def registry_host(image: str) -> str:
    """The host that an image reference names, as container engines read it: without a dot, a colon or `localhost`
    before the first slash, it is Docker Hub's."""
    first, slash, _ = image.rpartition("://")[2].partition("/")
    named = bool(slash) and ("." in first or ":" in first or first == "localhost")
    return _canonical(first) if named else _DOCKER_HUB


async def rotate(broker: Broker) -> Rotation:
    """As `secrets.rotate`, for registry credentials."""
    total = Rotation()
    for row in await broker.catalog.registry_credentials.list():
        total += await _rotate(broker, row.item.account)
    return total


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _registry(text: str) -> Registry:
    name, _, rest = text.partition("=")
    hostname, slash, words = rest.partition("/")
    types = tuple(word.strip().upper() for word in words.split("+")) if slash else ARTIFACT_TYPES
    if not name.strip() or not hostname.strip() or not set(types) <= set(ARTIFACT_TYPES):
        raise ConfigurationError(f"FNQUEUE_RECOGNIZED_REGISTRIES: {text!r} is not of the form name=hostname/TYPE+TYPE")
    return Registry(name=name.strip(), hostname=hostname.strip().lower(), artifact_types=types)


def _canonical(hostname: str) -> str:
    lower = hostname.lower()
    return _DOCKER_HUB if lower in _DOCKER_HUB_NAMES else lower


def _recognize(known: Sequence[Registry], hostname: str, artifact_types: Collection[str]) -> Registry:
    found = [registry for registry in known if fnmatchcase(hostname, registry.hostname)]
    if not found:
        raise BadRequest(
            f"registryHostname: {hostname} is no recognized registry; GET /v2/nvcf/recognized-registries lists them",
            field="registryHostname",
        )
    missing = set(artifact_types).difference(*(registry.artifact_types for registry in found))
    if missing:
        raise BadRequest(f"artifactTypes: {hostname} serves no {', '.join(sorted(missing))}", field="artifactTypes")
    return found[0]


def _refuse_duplicate(stored: Sequence[RegistryCredential], new: RegistryCredential) -> None:
    if any((item.hostname, item.name) == (new.hostname, new.name) for item in stored):
        raise AlreadyExists(f"there is a registry credential of this name for {new.hostname}")


def _words(given: Collection[str], known: tuple[str, ...], *, field: str) -> set[str]:
    words = {word.strip().upper() for word in given if word.strip()}
    if not words <= set(known):
        raise BadRequest(f"{field}: must be of {', '.join(known)}", field=field)
    return words or set(known)


def _find(stored: Sequence[RegistryCredential], credential_id: str) -> RegistryCredential:
    for credential in stored:
        if credential.id == credential_id:
            return credential
    raise NotFound(UNKNOWN)


def _seal(broker: Broker, account: str, credential_id: str, hostname: str, secret: str) -> str:
    return broker.keyring.seal(_user_and_password(secret), *_bound(account, credential_id, hostname))


def _user_and_password(secret: str) -> bytes:
    """Decoded; says nothing of what it was. Line breaks, as `base64` makes them, are no matter."""
    try:
        plain = base64.b64decode("".join(secret.split()), validate=True).decode()
    except (binascii.Error, ValueError):
        plain = ""
    username, _, password = plain.partition(":")
    if not username or not password or not plain.isprintable():
        raise BadRequest("secret.value: must be the base64 of user:password", field="secret.value")
    return plain.encode()


def _bound(account: str, credential_id: str, hostname: str) -> tuple[str, ...]:
    return ("registry-credential", account, credential_id, hostname)


async def _stored(broker: Broker, account: str) -> tuple[RegistryCredential, ...]:
    row = await broker.catalog.registry_credentials.get(account)
    return row.item.credentials if row else ()


async def _edit(
    broker: Broker, account: str, change: Callable[[Sequence[RegistryCredential]], Sequence[RegistryCredential]]
) -> Sequence[RegistryCredential]:
    def changed(stored: RegistryCredentials) -> RegistryCredentials:
        return replace(stored, credentials=tuple(change(stored.credentials)))

    none_yet = RegistryCredentials(account=account, credentials=())
    stored = await edit(broker.catalog.registry_credentials, account, changed, missing=none_yet)
    return stored.credentials if stored else ()


async def _deployed_hosts(broker: Broker, account: str) -> set[str]:
    hosts = set()
    for row in await broker.catalog.deployments.list("account", account):
        version = await broker.catalog.versions.get(row.item.version_id)
        if version is not None and not row.item.undeployed:
            hosts.add(registry_host(version.item.container_image))
    return hosts


async def _rotate(broker: Broker, account: str) -> Rotation:
    counted = Rotation()

    def reseal(stored: RegistryCredentials) -> RegistryCredentials:
        nonlocal counted
        texts, counted = broker.keyring.rotate(
            Sealed(
                label=f"registry credential {item.id}", text=item.sealed, bound=_bound(account, item.id, item.hostname)
            )
            for item in stored.credentials
        )
        resealed = [replace(item, sealed=text) for item, text in zip(stored.credentials, texts, strict=True)]
        return replace(stored, credentials=tuple(resealed))

    await edit(broker.catalog.registry_credentials, account, reseal)
    return counted
