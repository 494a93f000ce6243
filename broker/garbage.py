"""How often a serving process looks for cyclic garbage."""

from __future__ import annotations

import gc

# Looking took a tenth of the CPU at Python's own 700, 10, 10, and found next to nothing: requests leave no cycles.
_THRESHOLDS = (20_000, 20, 20)


def look_seldom() -> None:
    """Call once all is loaded and open: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
