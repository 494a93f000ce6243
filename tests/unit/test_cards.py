"""NVIDIA cards, with a stand-in for the driver's library where it is called."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack

import pynvml
import pytest

from broker.errors import NoCapacity
from broker.model import GpuSpecification, Place, Version
from broker.settings import ControllerSettings, SidecarSettings, load
from tests.eventually import eventually
from workers.launchers.cards import GIB, Cards, Nvml, choose, device_environment, gpu_name, inventory
from workers.launchers.children import Child
from workers.launchers.process import ProcessLauncher

H100 = "NVIDIA H100 80GB HBM3"


@dataclass
class FakeMemory:
    total: int


@dataclass
class FakeNvml:
    """The functions of `pynvml` that are used. `lost` cards answer nothing but an error; those in `slices` are cut into
    MIG devices of these profiles, with an empty place before each."""

    products: list[str] = field(default_factory=list)
    memory_bytes: int = 80 * GIB
    driver: bool = True
    lost: set[int] = field(default_factory=set)
    slices: dict[int, list[str]] = field(default_factory=dict)
    opened: int = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.90.07"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.products)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> int:
        if index in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetName(self, handle: int | tuple[int, int], /) -> str:
        if isinstance(handle, int):
            return self.products[handle]
        card, place = handle
        return f"{self.products[card]} MIG {self.slices[card][place]}"

    def nvmlDeviceGetUUID(self, handle: int | tuple[int, int], /) -> str:
        return f"GPU-{handle}abc" if isinstance(handle, int) else "MIG-{}-{}".format(*handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int | tuple[int, int], /) -> FakeMemory:
        return FakeMemory(self.memory_bytes if isinstance(handle, int) else self.memory_bytes // 8)

    def nvmlDeviceGetMigMode(self, handle: int, /) -> list[int]:
        if "T4" in self.products[handle]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(handle in self.slices)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int, /) -> int:
        return 2 * len(self.slices[handle])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int, /) -> tuple[int, int]:
        if index % 2 == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle, index // 2


def offered(nvml: Nvml, visible: str | None = None) -> list[tuple[str, int]]:
    return [(gpu.instance_type, gpu.capacity) for gpu in inventory(Cards(nvml, visible=visible).read(), backend="b")]


@pytest.mark.parametrize(
    ("product", "gib", "name"),
    [
        (H100, 80, "H100"),
        ("NVIDIA H100 PCIe", 80, "H100"),
        ("NVIDIA H200", 141, "H200"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100_80GB"),
        ("NVIDIA A100 80GB PCIe", 80, "A100_80GB"),
        ("Tesla V100-SXM2-16GB", 16, "V100"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX_4090"),
        ("NVIDIA RTX 6000 Ada Generation", 48, "RTX_6000_Ada"),
        ("", 1, "GPU"),
    ],
)
def test_products_have_the_names_that_users_ask_for(product: str, gib: int, name: str) -> None:
    assert gpu_name(product, gib * GIB) == name


def test_types_are_powers_of_two_and_the_first_is_the_default() -> None:
    gpus = offered(FakeNvml([H100] * 5))
    assert gpus[:-1] == [("NCP.GPU.H100_1x", 5), ("NCP.GPU.H100_2x", 2), ("NCP.GPU.H100_4x", 1)]
    assert gpus[-1][0] == "CPU"


def test_each_kind_of_card_has_its_own_types() -> None:
    gpus = inventory(Cards(FakeNvml([H100, "Tesla T4", H100])).read(), backend="b")
    assert [(gpu.name, gpu.gpu_count) for gpu in gpus] == [("H100", 1), ("H100", 2), ("T4", 1), ("CPU", 0)]
    first = gpus[0]
    assert (first.gpu_memory_bytes, first.driver_version, first.os) == (80 * GIB, "550.90.07", sys.platform)


def test_without_a_driver_there_is_the_processor_and_no_complaint(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml([H100], driver=False)
    assert [name for name, _ in offered(nvml)] == ["CPU"]
    assert not caplog.records
    assert nvml.opened == 0


def test_a_driver_that_comes_later_is_found() -> None:
    nvml = FakeNvml([H100], driver=False)
    cards = Cards(nvml)
    assert cards.read() == ()
    nvml.driver = True
    assert [card.name for card in cards.read()] == ["H100"]
    cards.close()
    assert nvml.opened == 0


def test_a_lost_card_is_not_offered_and_the_others_are() -> None:
    assert offered(FakeNvml([H100, H100], lost={0}))[0] == ("NCP.GPU.H100_1x", 1)


def test_a_card_that_is_cut_is_offered_by_its_devices_one_for_each_instance() -> None:
    nvml = FakeNvml([H100, "NVIDIA A100-SXM4-80GB", "Tesla T4"], slices={1: ["1g.10gb", "3g.40gb", "1g.10gb"]})
    assert offered(nvml)[:-1] == [
        ("NCP.GPU.H100_1x", 1),
        ("NCP.GPU.A100_MIG_1g.10gb_1x", 2),
        ("NCP.GPU.A100_MIG_3g.40gb_1x", 1),
        ("NCP.GPU.T4_1x", 1),
    ]
    cards = Cards(nvml).read()
    (first,) = choose(cards, "NCP.GPU.A100_MIG_1g.10gb_1x", "A100_MIG_1g.10gb", ())
    (second,) = choose(cards, "NCP.GPU.A100_MIG_1g.10gb_1x", "A100_MIG_1g.10gb", {first.uuid})
    assert [device_environment([card])["CUDA_VISIBLE_DEVICES"] for card in (first, second)] == ["MIG-1-0", "MIG-1-2"]
    assert (first.memory_bytes, first.index) == (10 * GIB, 1)
    with pytest.raises(NoCapacity, match="0 of 2 are free"):
        choose(cards, "NCP.GPU.A100_MIG_1g.10gb_1x", "A100_MIG_1g.10gb", {first.uuid, second.uuid})


@pytest.mark.parametrize(("visible", "count"), [("0", 3), ("MIG-0-1", 1), ("1", 1), ("MIG-0-9", 0)])
def test_mig_devices_are_left_visible_by_their_card_or_by_name(visible: str, count: int) -> None:
    nvml = FakeNvml([H100, H100], slices={0: ["1g.10gb"] * 3})
    assert len(Cards(nvml, visible=visible).read()) == count


def test_a_card_without_any_device_yet_offers_nothing() -> None:
    assert [name for name, _ in offered(FakeNvml([H100], slices={0: []}))] == ["CPU"]


@pytest.mark.parametrize(("visible", "count"), [(None, 3), ("0,2", 2), ("GPU-1abc", 1), ("", 0), ("-1", 0)])
def test_only_what_the_operator_left_visible_is_given_away(visible: str | None, count: int) -> None:
    assert len(Cards(FakeNvml([H100] * 3), visible=visible).read()) == count


# -- placing -----------------------------------------------------------------------------------


async def sidecar(settings: SidecarSettings, *, log: Path) -> Child:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    return Child.spawn(command, environment={}, folder=log.parent, log=log)


@pytest.fixture
def settings(tmp_path: Path) -> ControllerSettings:
    images = tmp_path / "images.toml"
    images.write_text('["sleeper:1"]\ncommand = ["{python}", "-c", "import time; time.sleep(600)"]\n')
    return load(ControllerSettings, images_file=images, data_dir=tmp_path / "data")


@asynccontextmanager
async def launching(settings: ControllerSettings, nvml: Nvml) -> AsyncIterator[ProcessLauncher]:
    launcher = ProcessLauncher(settings, start_sidecar=sidecar, nvml=nvml)
    try:
        yield launcher
    finally:
        for instance in await launcher.launched():
            await launcher.stop(instance.instance_id, grace_s=0.0)
        await launcher.close()


class Filters(TypedDict, total=False):
    clusters: tuple[str, ...]
    regions: tuple[str, ...]
    attributes: tuple[str, ...]


async def start(launcher: ProcessLauncher, instance_type: str, **filters: Unpack[Filters]) -> str:
    version = Version(
        id="v", function_id="f", account="a", name="n", inference_url="/", container_image="sleeper:1", created_at=0.0
    )
    gpu = "CPU" if instance_type == "CPU" else "H100"
    wanted = GpuSpecification(id="s", gpu=gpu, instance_type=instance_type, min_instances=1, max_instances=1)
    await launcher.start(instance_id := str(uuid.uuid4()), version, replace(wanted, **filters))
    return instance_id


async def shown(settings: ControllerSettings, instance_id: str) -> str:
    """CUDA_VISIBLE_DEVICES of the container of an instance that runs."""
    environment = await environment_of(settings, instance_id)
    return next(line.partition("=")[2] for line in environment if line.startswith("CUDA_VISIBLE_DEVICES="))


async def environment_of(settings: ControllerSettings, instance_id: str) -> list[str]:
    state = json.loads((settings.data_dir / "instances" / instance_id / "state.json").read_text())

    environ = Path(f"/proc/{state['container']['pid']}/environ")

    async def read() -> list[str]:
        return (await asyncio.to_thread(environ.read_bytes)).decode().split("\0")

    # A process counts as started when its program replaces ours, and its environment is there some moments later.
    return await eventually(read, any)


async def test_instances_have_their_cards_to_themselves(settings: ControllerSettings) -> None:
    async with launching(settings, FakeNvml([H100] * 4)) as launcher:
        single = await start(launcher, "NCP.GPU.H100_1x")
        pair = await start(launcher, "NCP.GPU.H100_2x")
        assert (await shown(settings, single), await shown(settings, pair)) == ("0", "1,2")
        with pytest.raises(NoCapacity, match="1 of 4"):
            await start(launcher, "NCP.GPU.H100_2x")
        await launcher.stop(single, grace_s=0.0)
        assert await shown(settings, await start(launcher, "NCP.GPU.H100_2x")) == "0,3"


async def test_processor_instances_see_no_card_and_are_not_counted(settings: ControllerSettings) -> None:
    async with launching(settings, FakeNvml([H100])) as launcher:
        ids = [await start(launcher, "CPU") for _ in range(2)]
        assert [await shown(settings, each) for each in ids] == ["", ""]
        assert await shown(settings, await start(launcher, "NCP.GPU.H100_1x")) == "0"


async def test_cards_of_instances_that_are_found_again_are_still_taken(settings: ControllerSettings) -> None:
    nvml = FakeNvml([H100])
    first = ProcessLauncher(settings, start_sidecar=sidecar, nvml=nvml)
    await start(first, "NCP.GPU.H100_1x")
    lost = await first.launched()
    await first.close()
    async with launching(settings, nvml) as second:
        await second.launched()
        with pytest.raises(NoCapacity):
            await start(second, "NCP.GPU.H100_1x")
    assert not any(instance.alive for instance in lost)  # and reaped: this process is the parent


# -- where ---------------------------------------------------------------------------------------


async def test_an_instance_is_started_only_where_it_may_be(settings: ControllerSettings) -> None:
    """Its deployment may have been placed by a controller of another region, which led before this one."""
    here = settings.model_copy(update={"cluster": "east-1", "region": "east", "attributes": " hipaa, fast "})
    async with launching(here, FakeNvml()) as launcher:
        [gpu] = await launcher.gpus()
        assert gpu.place == Place(cluster="east-1", region="east", attributes=("hipaa", "fast"))
        instance_id = await start(launcher, "CPU", clusters=("East-1",), regions=("west", "east"), attributes=("fast",))
        assert "NVCF_REGION=east" in await environment_of(settings, instance_id)
        elsewhere: list[Filters] = [
            {"clusters": ("west-1",)},
            {"regions": ("west",)},
            {"attributes": ("fast", "green")},
        ]
        for filters in elsewhere:
            with pytest.raises(NoCapacity, match=next(iter(filters))):
                await start(launcher, "CPU", **filters)
