"""The NVIDIA cards of this machine, as its driver's management library (NVML) tells them; and who has which."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import pynvml

from broker.errors import NoCapacity
from broker.model import Gpu

logger = logging.getLogger(__name__)

CPU = "CPU"
GIB = 1024**3

# Brands, shapes and memories of product names: "NVIDIA H100 80GB HBM3" and "NVIDIA H100 PCIe" are both H100.
_NO_PART_OF_A_NAME = re.compile(
    r"NVIDIA|Tesla|Quadro|GeForce|PCIe|PCI-E|SXM\d*|NVL\d*|HBM\d\w*|\d+GB|Generation|Server|Workstation|Edition",
    re.IGNORECASE,
)
# Upstream tells the two sizes of this one apart by name (contract/management.md §3.1).
_LARGE_A100 = "A100_80GB"
_MIG = "MIG-"
_NAMES = ("GPU-", _MIG)
_LARGE_A100_BYTES = 60 * GIB


class Memory(Protocol):
    @property
    def total(self) -> int: ...


class Nvml(Protocol):
    """What is used of the module `pynvml`. Its functions raise `pynvml.NVMLError`."""

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Memory: ...
    def nvmlDeviceGetMigMode(self, handle: Any, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card, or one MIG device of it. `index` is the card's place on the PCI bus among all, `uuid` the card's own for
    life, or that of the MIG device."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    driver_version: str

    @property
    def is_slice(self) -> bool:
        return self.uuid.startswith(_MIG)


class Cards:
    """The cards that this process may give away: all, or those that its own CUDA_VISIBLE_DEVICES names (by index in
    bus order, or by UUID). No driver means no cards, and so does one that does not answer."""

    def __init__(self, nvml: Nvml = pynvml, *, visible: str | None = None) -> None:
        """`visible` is read as CUDA_VISIBLE_DEVICES is; None means all."""
        self._nvml = nvml
        self._visible = visible
        self._open = False
        self._seen: tuple[Card, ...] = ()

    @property
    def seen(self) -> tuple[Card, ...]:
        """As of the last `read`."""
        return self._seen

    def read(self) -> tuple[Card, ...]:
        """Ask the driver. Blocks: seconds at the first call, where nothing keeps the driver loaded."""
        found = tuple(card for card in self._read() if _names(self._visible, card))
        if found != self._seen:
            logger.info("cards", extra={"cards": [f"{card.name} {card.uuid}" for card in found]})
        self._seen = found
        return found

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()
            except pynvml.NVMLError:
                return

    def _read(self) -> list[Card]:
        try:
            if not self._open:
                self._nvml.nvmlInit()
                self._open = True
            driver_version = self._nvml.nvmlSystemGetDriverVersion()
            count = self._nvml.nvmlDeviceGetCount()
        except pynvml.NVMLError:
            self.close()
            return []
        return [card for index in range(count) for card in self._at(index, driver_version)]

    def _at(self, index: int, driver_version: str) -> list[Card]:
        """The card, or its MIG devices when it is cut into those; nothing for a card that is lost ("fallen off the
        bus"): the others are still of use."""
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError:
            return []
        slices = self._slices(handle)
        found = [self._card(each, index, driver_version) for each in ([handle] if slices is None else slices)]
        return [card for card in found if card is not None]

    def _slices(self, handle: Any) -> list[Any] | None:
        """Handles of the MIG devices; None for a card that is whole, or of a kind that cannot be cut."""
        try:
            current, _ = self._nvml.nvmlDeviceGetMigMode(handle)
            if current != pynvml.NVML_DEVICE_MIG_ENABLE:
                return None
            most = self._nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except pynvml.NVMLError:
            return None
        found = []
        for index in range(most):
            with suppress(pynvml.NVMLError):  # a place where no device was made
                found.append(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        return found

    def _card(self, handle: Any, index: int, driver_version: str) -> Card | None:
        try:
            memory_bytes = self._nvml.nvmlDeviceGetMemoryInfo(handle).total
            return Card(
                uuid=self._nvml.nvmlDeviceGetUUID(handle),
                index=index,
                name=gpu_name(self._nvml.nvmlDeviceGetName(handle), memory_bytes),
                memory_bytes=memory_bytes,
                driver_version=driver_version,
            )
        except pynvml.NVMLError:
            return None


def gpu_name(product: str, memory_bytes: int) -> str:
    """NVCF's name of a product: H100 for "NVIDIA H100 80GB HBM3", A100_80GB, L40S, RTX_6000_Ada."""
    words = re.split(r"[\s-]+", product.strip())
    name = "_".join(word for word in words if word and not _NO_PART_OF_A_NAME.fullmatch(word)) or "GPU"
    return _LARGE_A100 if name == "A100" and memory_bytes > _LARGE_A100_BYTES else name


def instance_type(gpu: str, count: int) -> str:
    """As NVCF names those of a partner's cluster (contract/management.md §3.3): NCP.GPU.H100_1x."""
    return f"NCP.GPU.{gpu}_{count}x"


def inventory(cards: Sequence[Card], *, backend: str) -> list[Gpu]:
    """What can be deployed to: per GPU, types of 1, 2, 4 … cards, the default first; and `CPU`, last, whose
    capacity is advice only."""
    machine = Gpu(
        name=CPU,
        instance_type=CPU,
        backend=backend,
        capacity=os.cpu_count() or 1,
        cpu_cores=os.cpu_count() or 1,
        system_memory_bytes=psutil.virtual_memory().total,
        cpu_arch=platform.machine(),
        os=platform.system().lower(),
    )
    names = dict.fromkeys(card.name for card in cards)
    return [gpu for name in names for gpu in _types(name, cards, machine)] + [machine]


def choose(cards: Iterable[Card], specification_type: str, gpu: str, taken: Collection[str]) -> tuple[Card, ...]:
    """Free cards for one instance of the type, neighbours on the bus first. Raises NoCapacity."""
    fitting = [card for card in cards if card.name == gpu]
    free = [card for card in fitting if card.uuid not in taken]
    count = card_count(specification_type)
    if len(free) < count:
        raise NoCapacity(f"{count} {gpu} needed: {len(free)} of {len(fitting)} are free on this machine")
    return tuple(free[:count])


def device_environment(given: Sequence[Card]) -> dict[str, str]:
    """What shows a process these cards and no others. Indices, because some frameworks read nothing else; with them
    the order to which they refer. A MIG device has no index."""
    words = (card.uuid if card.is_slice else str(card.index) for card in given)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(words)}


def _types(name: str, cards: Sequence[Card], machine: Gpu) -> list[Gpu]:
    own = [card for card in cards if card.name == name]
    # CUDA shows a process one MIG device at most.
    sizes = (1,) if own[0].is_slice else (1, 2, 4, 8, 16)
    counts = [count for count in sizes if count <= len(own)]
    return [
        Gpu(
            name=name,
            instance_type=instance_type(name, count),
            backend=machine.backend,
            capacity=len(own) // count,
            gpu_count=count,
            cpu_cores=max(1, machine.cpu_cores * count // len(cards)),
            system_memory_bytes=machine.system_memory_bytes * count // len(cards),
            gpu_memory_bytes=min(card.memory_bytes for card in own),
            cpu_arch=machine.cpu_arch,
            os=machine.os,
            driver_version=own[0].driver_version,
        )
        for count in counts
    ]


def card_count(specification_type: str) -> int:
    """How many cards the type's name says; one, where it says nothing."""
    found = re.search(r"_(\d+)x$", specification_type)
    return int(found[1]) if found else 1


def _names(visible: str | None, card: Card) -> bool:
    """CUDA stops reading at the first word that names no card; so an empty list, or -1, is none at all."""
    if visible is None:
        return True
    words = [word.strip() for word in visible.split(",")]
    return any(word == str(card.index) or (word.startswith(_NAMES) and card.uuid.startswith(word)) for word in words)
