"""Looks at the servers that the settings name: for `fnqueue doctor`, and before a process relies on a profile."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from broker import profiles
from broker.backends import files, s3
from broker.backends.rabbitmq import facts as rabbitmq
from broker.backends.redis import facts as redis
from broker.backends.redis.pools import SCHEMES
from broker.errors import BlobsUnavailable, ConfigurationError, NotFound
from broker.facts import BlobFacts, Facts, QueueFacts, StoreFacts
from broker.ports import Blobs
from broker.settings import SecretSettings, Settings, SidecarSettings
from broker.tasks import beside

logger = logging.getLogger(__name__)

AGAIN_S = 5.0
_PROBE_S = 10.0
_PROBE = b"fnqueue doctor"


async def examine(settings: Settings, *, probe: bool) -> Facts:
    """What can be found out now; takes seconds at most, and a server that is away is a fact. `probe` also tries out
    what leaves a trace: a message that goes nowhere, an object by signed URL, and a question about Redis' users.

    Raises:
        ConfigurationError: a URL cannot be read.
    """
    store, queue, blobs = await asyncio.gather(
        _store(settings, users=probe), _queue(settings, probe=probe), _blobs(settings, probe=probe)
    )
    return Facts(store=store, queue=queue, blobs=blobs)


@asynccontextmanager
async def profile_kept(settings: Settings, stop: asyncio.Event, *, again_s: float = AGAIN_S) -> AsyncIterator[None]:
    """Around the life of a process: its servers are configured as the profile needs, as far as they can tell. Those
    that are away are looked at again every `again_s` seconds; if they turn out to be wrong, `stop` is set, and this
    raises at the end.

    Raises:
        ConfigurationError: names each wrong setting, and how to mend it.
    """
    if settings.profile == "A":
        yield
        return
    fault: ConfigurationError | None = None

    async def until_known() -> None:
        nonlocal fault
        known = False
        while not known:
            await asyncio.sleep(again_s)
            try:
                known = await _verify(settings)
            except ConfigurationError as exc:
                logger.error("profile_refused", extra={"profile": settings.profile, "cause": str(exc)})
                fault = exc
                stop.set()
                return
        logger.info("profile_verified", extra={"profile": settings.profile})

    if await _verify(settings):
        logger.info("profile_verified", extra={"profile": settings.profile})
        yield
    else:
        logger.warning("profile_unverified", extra={"profile": settings.profile})
        async with beside(until_known()):
            yield
    if fault is not None:
        raise fault


async def _verify(settings: Settings) -> bool:
    """Whether all that has to be known was told. A sidecar relies on the store alone: the others are seen to by those
    who accept requests, and it is not given the means.

    Raises:
        ConfigurationError: something is wrong for certain.
    """
    store = await _store(settings)
    if isinstance(settings, SidecarSettings):
        profiles.refuse(tuple(profiles.store(store, settings)), settings)
        return not store.fault
    facts = Facts(
        store=store, queue=await _queue(settings, probe=False), blobs=await _blobs(settings, probe=False, ask=False)
    )
    findings = profiles.judge(facts, settings, run_timeout_s=0.0)
    silent = bool(_management_url(settings) and facts.queue.management)
    if silent:
        findings = tuple(finding for finding in findings if not (finding.unknown and finding.server == "rabbitmq"))
    profiles.refuse(findings, settings)
    return not (facts.store.fault or facts.queue.fault or silent)


async def _store(settings: Settings, *, users: bool = False) -> StoreFacts:
    url = settings.store_url.get_secret_value()
    if url.partition("://")[0] in SCHEMES:
        return await redis.look(url, settings, users=users)
    return StoreFacts(kind=url.partition(":")[0])


async def _queue(settings: Settings, *, probe: bool) -> QueueFacts:
    url = settings.queue_url.get_secret_value()
    if not url.startswith(("amqp://", "amqps://")):
        return QueueFacts(kind=url.partition(":")[0])
    return await rabbitmq.look(url, settings, management_url=_management_url(settings), probe=probe)


def _management_url(settings: Settings) -> str:
    return settings.queue_management_url.get_secret_value() if isinstance(settings, SecretSettings) else ""


async def _blobs(settings: Settings, *, probe: bool, ask: bool = True) -> BlobFacts:
    """Where they lie follows from the URL; more is only found out by who asks."""
    url = settings.blobs_url.get_secret_value()
    kind = "s3" if url.startswith("s3:") else "file"
    if not ask:
        return BlobFacts(kind=kind, address="" if kind == "s3" else url)
    if kind == "s3":
        async with s3.open_blobs(url, settings, make=False) as bucket:
            return await _bucket(bucket, probe=probe)
    return await asyncio.to_thread(_folder, files.folder_of(url, settings))


def _folder(folder: Path) -> BlobFacts:
    if not folder.is_dir():
        return BlobFacts(kind="file", address=str(folder), missing=True)
    fault = "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{folder} may not be written"
    return BlobFacts(kind="file", address=str(folder), fault=fault, free_bytes=shutil.disk_usage(folder).free)


async def _bucket(bucket: s3.S3Blobs, *, probe: bool) -> BlobFacts:
    try:
        server, skew_s = await bucket.look()
    except NotFound:
        return BlobFacts(kind="s3", address=bucket.endpoint, missing=True)
    except BlobsUnavailable as exc:
        return BlobFacts(kind="s3", address=bucket.endpoint, fault=str(exc))
    signed_url = await _signed_url(bucket) if probe else None
    return BlobFacts(kind="s3", address=bucket.endpoint, server=server, skew_s=skew_s, signed_url=signed_url)


async def _signed_url(blobs: Blobs) -> str:
    """ "" when an object went there and back as a client's does; else what went wrong, without any URL."""
    key = f"doctor/{uuid.uuid4()}"
    headers = {"Content-Type": "text/plain", "x-amz-meta-nvcf-asset-description": "doctor"}
    try:
        upload = blobs.upload_url(key, content_type="text/plain", description="doctor", expires_s=60)
        download = blobs.download_url(key, filename="doctor.txt", expires_s=60)
        return await asyncio.to_thread(_there_and_back, upload, download, headers)
    finally:
        with suppress(BlobsUnavailable):
            await blobs.delete(key)


def _there_and_back(upload: str, download: str, headers: dict[str, str]) -> str:
    sending = urllib.request.Request(upload, data=_PROBE, headers=headers, method="PUT")  # noqa: S310  ours
    try:
        with urllib.request.urlopen(sending, timeout=_PROBE_S):  # noqa: S310
            pass
        with urllib.request.urlopen(download, timeout=_PROBE_S) as answer:  # noqa: S310
            return "" if answer.read(len(_PROBE) + 1) == _PROBE else "the download is not what was uploaded"
    except urllib.error.HTTPError as exc:
        return f"refused with {exc.code}"
    except (OSError, ValueError) as exc:
        return f"not reached from here ({type(exc).__name__})"
