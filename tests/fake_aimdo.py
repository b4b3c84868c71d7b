"""What ComfyUI's dynamic VRAM calls of comfy_aimdo, for a card that is main memory (``fake_device``'s).

Written from ComfyUI's calls and comfy_aimdo's own description: lower addresses before higher ones, the model that was loaded
last before the others, and who lost a page asks for none above it until it is loaded again. What is let go of is
overwritten (with NaNs, as floats), so that a weight that is used after its time shows.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import torch
from fake_device import Elsewhere
from torch import Tensor

PAGE = 4096  # comfy_aimdo's are 32 MB; the tiny checkpoint has 2
ALIGNED = 512
GARBAGE = 0xFF
LINE = 64 * 2**20  # what may be on its way through the card at once
Alloc = tuple[Any, int, int]  # (whose memory, from where, bytes)


class Card:
    """The pages for weights, shared by all models: the last one prioritized is the first."""

    def __init__(self) -> None:
        self.room = 0
        self.models: list[weakref.ref[ModelVBAR]] = []
        self.serial = itertools.count(1)

    def alive(self) -> list[ModelVBAR]:
        self.models = [model for model in self.models if model() is not None]
        return [found for model in self.models if (found := model()) is not None]

    def resize(self, size: int) -> None:
        """Another card, empty: of so many bytes."""
        self.room = size // PAGE
        for model in self.alive():
            model.free_memory(model.max_size)

    def first(self, model: ModelVBAR) -> None:
        self.models = [weakref.ref(model), *(weakref.ref(other) for other in self.alive() if other is not model)]

    def takes(self, model: ModelVBAR, page: int) -> bool:
        """Whether there is, or can be made, place for one more page of a model."""
        models = self.alive()
        if sum(len(one.resident) for one in models) < self.room:
            return True
        for victim in reversed(models):
            if victim is model:
                return victim.drop(above=page)
            if victim.drop():
                return True
        return False


CARD = Card()


class ModelVBAR:
    """The addresses of one model's weights, of which some are backed by pages."""

    def __init__(self, size: int, device: int) -> None:
        self.max_size, self.offset = int(size), 0
        self.memory = torch.full((self.max_size,), GARBAGE, dtype=torch.uint8)
        self.resident: dict[int, int] = {}  # page -> what tells this time in memory from others
        self.pins: Counter[int] = Counter()
        self.asked: set[int] = set()  # where the weights begin that were ever asked for
        self.prioritize()

    def prioritize(self) -> None:
        self.watermark = -(-self.max_size // PAGE)
        CARD.first(self)

    def alloc(self, size: int) -> Alloc:
        start = -(-self.offset // ALIGNED) * ALIGNED
        self.offset = start + size
        if self.offset > self.max_size:
            raise MemoryError("more weights than addresses")
        return self, start, size

    def fault(self, start: int, size: int) -> tuple[int, ...] | None:
        """What tells the pages apart from former ones, which then stay until they are unpinned; ``None``: no place."""
        self.asked.add(start)
        pages = pages_of(start, size)
        if pages.stop > self.watermark:
            return None
        for page in pages:
            self.pins[page] += 1  # none of them makes place for another
        for page in pages:
            if page not in self.resident:
                if not CARD.takes(self, page):
                    self.watermark = page
                    self.unpin(start, size)
                    return None
                self.resident[page] = next(CARD.serial)
        return tuple(self.resident[page] for page in pages)

    def unpin(self, start: int, size: int) -> None:
        self.pins.subtract(pages_of(start, size))
        if min(self.pins.values(), default=0) < 0:
            raise RuntimeError("unpinned more often than pinned")

    def drop(self, above: int = -1) -> bool:
        """Lets go of the last page that nothing uses, if there is one."""
        page = max((page for page in self.resident if page > above and not self.pins[page]), default=None)
        if page is None:
            return False
        del self.resident[page]
        self.memory[page * PAGE : (page + 1) * PAGE] = GARBAGE
        self.watermark = page
        return True

    def free_memory(self, size: float) -> int:
        freed = 0
        while freed < size and self.drop():
            freed += PAGE
        return freed

    def loaded_size(self) -> int:
        return len(self.resident) * PAGE

    def holds(self, alloc: Alloc) -> bool:
        """Whether a weight is resident as a whole."""
        return all(page in self.resident for page in pages_of(*alloc[1:]))

    def pinned(self) -> int:
        return sum(self.pins.values())


def pages_of(start: int, size: int) -> range:
    return range(start // PAGE, -(-(start + size) // PAGE))


def vbar_unpin(alloc: Alloc | None) -> None:
    """ComfyUI also unpins what it forces onto the card, and what it never asked for."""
    if alloc is not None:
        alloc[0].unpin(*alloc[1:])


class VRAMBuffer:
    """The place through which weights pass that do not stay: each overwrites the one before."""

    def __init__(self, max_size: int, device: int) -> None:
        self.memory, self.used = torch.empty(LINE, dtype=torch.uint8), 0

    def size(self) -> int:
        return self.used

    def get(self, size: int, offset: int = 0) -> Alloc:
        self.used = max(self.used, offset + size)
        self.memory[offset : self.used] = GARBAGE
        return self, offset, size


def aimdo_to_tensor(alloc: Alloc, device: torch.device) -> Tensor:
    owner, start, size = alloc
    return Elsewhere(owner.memory[start : start + size])


class HostBuffer:
    """Main memory that never moves while it grows."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.memory, self.size = torch.empty(max(size, max_grow_size), dtype=torch.uint8), size

    def get_raw_address(self) -> int:
        return self.memory.data_ptr()

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > len(self.memory):
            raise RuntimeError("HostBuffer.extend failed")
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.memory[size : self.size] = GARBAGE
        self.size = size

    def read_file_slice(
        self,
        file: int,
        file_offset: int,
        size: int,
        offset: int = 0,
        stream: int = 0,
        device_ptr: int = 0,
        device: int | None = None,
    ) -> None:
        for place in (self.get_raw_address() + offset, device_ptr):
            if place:
                read_file_to_device(file, file_offset, size, stream, place, device)


def hostbuf_to_tensor(buffer: HostBuffer) -> Tensor:
    return torch.frombuffer(buffer.memory.numpy()[: buffer.size], dtype=torch.uint8)


def read_file_to_device(
    file: int, file_offset: int, size: int, stream: int, place: int, device: int | None, mark_cold: bool = True
) -> None:
    ctypes.memmove(place, os.pread(file, size, file_offset), size)


class ModelMMAP:
    """A file as main memory; what is written to it is not kept."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def get_file_handle(self) -> int:
        return self.file

    def bounce(self) -> bool:
        return True

    def __del__(self) -> None:
        os.close(self.file)


class Stream:
    """All is done at once, so there is nothing to wait for."""

    cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


def install() -> None:
    """In the place of comfy_aimdo's, whose library needs a card; ComfyUI looks all of them up as it calls them."""
    vbar = comfy_aimdo.model_vbar
    vbar.ModelVBAR = ModelVBAR
    vbar.vbar_fault = lambda alloc: alloc[0].fault(*alloc[1:])
    vbar.vbar_unpin = vbar_unpin
    vbar.vbar_signature_compare = lambda new, old: None not in (new, old) and new == old
    vbar.vbars_reset_watermark_limits = lambda: None
    vbar.vbars_analyze = lambda device=None: 0
    comfy_aimdo.vram_buffer.VRAMBuffer = VRAMBuffer
    comfy_aimdo.torch.aimdo_to_tensor = aimdo_to_tensor
    comfy_aimdo.torch.hostbuf_to_tensor = hostbuf_to_tensor
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.host_buffer.read_file_to_device = read_file_to_device
    comfy_aimdo.model_mmap.ModelMMAP = ModelMMAP
    pinning = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    torch.cuda.cudart = lambda: pinning
