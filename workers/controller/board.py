"""Where the auditor of the controller that leads can be seen from outside."""

from __future__ import annotations

from dataclasses import asdict

from workers.controller.auditor import Auditor


class Board:
    """`auditor` is set while this controller leads."""

    def __init__(self) -> None:
        self.auditor: Auditor | None = None

    def facts(self) -> dict[str, object]:
        """For JSON. `conservation` is None until all was counted once, and both are where another controller leads."""
        auditor = self.auditor
        counted = auditor.conservation if auditor else None
        return {
            "leads": auditor is not None,
            "conservation": asdict(counted) | {"balanced": counted.balanced} if counted else None,
            "mended": asdict(auditor.mended) if auditor else None,
        }
