"""What a pass of the controller reads of the catalog, without letting one damaged row end it for all deployments."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker.errors import RecordDamaged
from broker.model import Deployment, Version
from broker.ports import Broker


async def with_versions(broker: Broker, wanted: Sequence[Deployment]) -> list[tuple[Deployment, Version | None]]:
    """Each deployment with its version, None where there is none any more. Those whose version cannot be read are left
    out: they must not be taken for ones without. Asked together, so that a store can answer in few round trips.

    Raises StoreUnavailable."""

    async def look(deployment: Deployment) -> tuple[Deployment, Version | None] | None:
        try:
            row = await broker.catalog.versions.get(deployment.version_id)
        except RecordDamaged:
            return None
        return deployment, row.item if row else None

    return [found for found in await asyncio.gather(*(look(each) for each in wanted)) if found is not None]
