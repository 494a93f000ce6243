"""The NVIDIA cards of a cluster, by the labels that GPU feature discovery puts on its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightkube.resources.core_v1 import Node

from broker.model import Gpu
from workers.launchers.cards import CPU, gpu_name, instance_type
from workers.launchers.kubernetes.objects import GPU_RESOURCE, PRODUCT

MIB = 1024**2

_COUNTS = (1, 2, 4, 8, 16)
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def inventory(nodes: Sequence[Node], *, backend: str) -> list[Gpu]:
    """Types of 1, 2, 4 … cards per name, as many as fit on one node, the default first; and `CPU`, last."""
    usable = [node for node in nodes if not (node.spec and node.spec.unschedulable)]
    names = dict.fromkeys(name for node in usable if (name := _name(node)))
    return [gpu for name in names for gpu in _types(name, usable, backend)] + [_cpu(usable, backend)]


def products_of(nodes: Iterable[Node]) -> dict[str, frozenset[str]]:
    """What the nodes' labels call the cards of each name: several forms of a card go by one."""
    found: dict[str, set[str]] = {}
    for node in nodes:
        if name := _name(node):
            found.setdefault(name, set()).add(_labels(node)[PRODUCT])
    return {name: frozenset(products) for name, products in found.items()}


def _types(name: str, nodes: Sequence[Node], backend: str) -> list[Gpu]:
    own = [node for node in nodes if _name(node) == name]
    counts = [count for count in _COUNTS if any(_cards(node) >= count for node in own)]
    return [
        Gpu(
            name=name,
            instance_type=instance_type(name, count),
            backend=backend,
            capacity=sum(_cards(node) // count for node in own),
            gpu_count=count,
            cpu_cores=max(1, min(_cores(node) * count // _cards(node) for node in own if _cards(node) >= count)),
            system_memory_bytes=min(_memory(node) * count // _cards(node) for node in own if _cards(node) >= count),
            gpu_memory_bytes=min(_card_bytes(node) for node in own),
            cpu_arch=_info(own[0], "architecture"),
            os=_info(own[0], "operatingSystem"),
            driver_version=_labels(own[0]).get("nvidia.com/cuda.driver-version.full", ""),
        )
        for count in counts
    ]


def _cpu(nodes: Sequence[Node], backend: str) -> Gpu:
    return Gpu(
        name=CPU,
        instance_type=CPU,
        backend=backend,
        capacity=sum(_cores(node) for node in nodes),
        cpu_arch=_info(nodes[0], "architecture") if nodes else "",
        os=_info(nodes[0], "operatingSystem") if nodes else "",
    )


def _name(node: Node) -> str:
    product = _labels(node).get(PRODUCT, "")
    return gpu_name(product, _card_bytes(node)) if product and _cards(node) else ""


def _labels(node: Node) -> dict[str, str]:
    return (node.metadata.labels or {}) if node.metadata else {}


def _allocatable(node: Node) -> dict[str, Any]:
    return dict(node.status.allocatable or {}) if node.status else {}


def _cards(node: Node) -> int:
    return int(_quantity(_allocatable(node).get(GPU_RESOURCE, "0")))


def _cores(node: Node) -> int:
    return int(_quantity(_allocatable(node).get("cpu", "0")))


def _memory(node: Node) -> int:
    return int(_quantity(_allocatable(node).get("memory", "0")))


def _card_bytes(node: Node) -> int:
    memory = _labels(node).get("nvidia.com/gpu.memory", "0")
    return int(memory) * MIB if memory.isdigit() else 0


def _info(node: Node, name: str) -> str:
    info = node.status.nodeInfo if node.status else None
    return str(getattr(info, name, "") or "")


def _quantity(text: str) -> float:
    """A Kubernetes quantity (`15890m`, `65Gi`); 0 where it is none."""
    found = re.fullmatch(r"([0-9.]+)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(text))
    if not found:
        return 0.0
    number, unit = float(found[1]), found[2]
    return number / 1000 if unit == "m" else number * _UNITS.get(unit, 1)
