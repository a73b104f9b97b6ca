"""Where a model is to run, as a plan sees it: a device of the catalogue, or this machine as it was measured."""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from edgewise.devices.catalogue import Device
from edgewise.devices.host import Host
from edgewise.models.outline import Outline
from edgewise.plan import kernels
from edgewise.plan.fit import Estimate
from edgewise.plan.memory import GIB, Room, room_of
from edgewise.plan.precision import Precision
from edgewise.plan.speed import READ_SHARE, Kind, Machine, Part, Runtime, completed, machine_of, runtime_of, unit_of

NPU_RUNTIMES: Final = {  # by the maker of the device; others run no language models that we know of
    "Qualcomm": "genie",
    "Intel": "openvino",
    "AMD": "fastflowlm",
    "Rockchip": "rkllm",
    "Hailo": "hailort",
}


class Asked(msgspec.Struct, frozen=True):
    """A model at a precision (None: as its file has it) on a part of a site, under a runtime."""

    outline: Outline
    precision: Precision | None
    part: Part
    runtime: str
    context: int
    prompt: int


class Site(Protocol):
    name: str
    kind: Kind

    def parts(self) -> list[tuple[Part, str]]:
        """Those that language models run on, each with its usual runtime."""
        ...

    def machine(self, part: Part, runtime: str) -> Machine: ...

    def ways(self, part: Part, runtime: str) -> Runtime: ...

    def room(self, part: Part) -> Room: ...

    def limits(self, part: Part) -> tuple[str, ...]:
        """What else is known to stand in the way there."""
        ...

    def power_w(self, part: Part) -> float | None:
        """Of the part while it computes, or of the whole device where only that is known."""
        ...

    def measured(self, asked: Asked) -> tuple[Estimate, Estimate] | None:
        """Decode and prefill by the site's own measured kernels; None where the fitted speeds are to tell."""
        ...


class Catalogued:
    """A device of the catalogue; memory and bandwidth of the very one may be given. `own`: there are measurements of
    it, and what is odd about it is to be learned from them and not from others of its name."""

    def __init__(
        self,
        id: str,
        device: Device,
        *,
        memory_gib: float | None = None,
        bandwidth_gb_s: float | None = None,
        own: bool = False,
    ) -> None:
        self.name, self.id = device.name, f"{id}, own" if own else id
        self._device, self._memory_gib, self._bandwidth_gb_s = device, memory_gib, bandwidth_gb_s
        self.kind: Kind = self.machine("cpu", "").kind

    def parts(self) -> list[tuple[Part, str]]:
        found: list[tuple[Part, str]] = []
        for unit in self._device.units:
            if unit.unit == "npu" and self._device.vendor in NPU_RUNTIMES:
                found.append(("npu", NPU_RUNTIMES[self._device.vendor]))
            elif unit.unit == "gpu":
                found.append(("gpu", "vllm" if self._device.kind == "server gpu" else "llama.cpp"))
            elif unit.unit == "cpu":
                found.append(("cpu", "llama.cpp"))
        if not found:  # its memory may still say why not
            found = [("npu", "no runtime for language models")] if self._device.units else []
        return found

    def machine(self, part: Part, runtime: str) -> Machine:
        return machine_of(self.id, self._device, part, runtime, bandwidth_gb_s=self._bandwidth_gb_s)

    def ways(self, part: Part, runtime: str) -> Runtime:
        vendor = self._device.vendor
        return runtime_of(runtime, unit_of(part, nvidia=vendor == "NVIDIA", apple=vendor == "Apple"))

    def room(self, part: Part) -> Room:
        return room_of(self._device, self.kind, part, self._memory_gib)

    def limits(self, part: Part) -> tuple[str, ...]:
        units = [limit for unit in self._device.units if unit.unit == part for limit in unit.limits]
        return (*units, *self._device.notes)

    def power_w(self, part: Part) -> float | None:
        units = [unit.power_w.most for unit in self._device.units if unit.unit == part and unit.power_w]
        modes = [mode.power_w for mode in self._device.power_modes]
        whole = [self._device.power_w.most] if self._device.power_w else []
        return next(iter(units or whole), max(modes, default=None))

    def measured(self, asked: Asked) -> None:
        return None


class ThisMachine:
    """The CPU that `devices.host` measured. Our own runtime is predicted from what its own kernels reached there."""

    name = "host"
    kind: Kind = "server"

    def __init__(self, host: Host, *, memory_gib: float | None = None) -> None:
        self._host, self._memory_gib = host, memory_gib

    def parts(self) -> list[tuple[Part, str]]:
        return [("cpu", "edgewise")]

    def machine(self, part: Part, runtime: str) -> Machine:
        rate = self._host.rate
        read = rate("read_bytes_per_s")
        int8 = rate("native_q4_prefill_mac_per_s") or rate("onnxruntime_int8_mac_per_s") or rate("fp32_mac_per_s")
        tops = None if int8 is None else 2 * int8.median / 1e12
        bandwidth = None if read is None else read.median / 1e9 / READ_SHARE
        return completed(self.name, self.kind, "cpu", bandwidth_gb_s=bandwidth, decode_tops=tops, prefill_tops=tops)

    def ways(self, part: Part, runtime: str) -> Runtime:
        return runtime_of(runtime, "cpu")

    def room(self, part: Part) -> Room:
        if self._memory_gib is not None:
            return Room(round(self._memory_gib * GIB), "as given")
        free = self._host.machine.available_bytes
        if free is None:
            return Room(None, "the system does not tell how much memory is free")
        return Room(free, "what a program can have now without swapping")

    def limits(self, part: Part) -> tuple[str, ...]:
        return ()

    def power_w(self, part: Part) -> None:
        return None

    def measured(self, asked: Asked) -> tuple[Estimate, Estimate] | None:
        if self.ways(asked.part, asked.runtime).name != "edgewise":
            return None
        return kernels.predict(self._host, asked.outline, asked.precision, asked.context, asked.prompt)
