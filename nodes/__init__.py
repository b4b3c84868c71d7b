"""The pack's nodes: a static list, so that registries can read it."""

from .loaders import LanceNativeLoader
from .schema import ComfyExtension, io


class LanceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LanceNativeLoader]


async def comfy_entrypoint() -> LanceExtension:
    return LanceExtension()
