"""Keeps the secrets files of running instances as the catalog has them. Only the controller opens secrets: the
sidecar, which runs beside its user's code, is given neither them nor a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from broker import secrets
from broker.errors import ConfigurationError
from broker.ports import Broker, Launched, Launcher

REFRESH_S = 2.0
SWEEP_S = 600.0


@dataclass(slots=True)
class Refresher:
    """`step` is one look. It remembers which revision each instance has; a new leader delivers once more."""

    broker: Broker
    launcher: Launcher
    _delivered: dict[str, int] = field(default_factory=dict)

    async def step(self) -> None:
        """Raises StoreUnavailable; ConfigurationError, after all the others were seen to, when some do not open."""
        launched = await self.launcher.launched()
        fault: ConfigurationError | None = None
        for version_id in sorted({instance.version_id for instance in launched}):
            try:
                await self._refresh(version_id, [item for item in launched if item.version_id == version_id])
            except ConfigurationError as exc:
                fault = exc
        ids = {instance.instance_id for instance in launched}
        self._delivered = {key: kept for key, kept in self._delivered.items() if key in ids}
        if fault is not None:
            raise fault

    async def _refresh(self, version_id: str, instances: Sequence[Launched]) -> None:
        row = await self.broker.catalog.secrets.get(version_id)
        if row is None:
            return
        late = [item for item in instances if item.alive and self._delivered.get(item.instance_id) != row.revision]
        if not late:
            return
        content = secrets.reveal(self.broker, row.item)
        for instance in late:
            await self.launcher.deliver(instance.instance_id, content)
            self._delivered[instance.instance_id] = row.revision
