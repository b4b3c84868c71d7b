"""The pack's nodes: a static list, so that registries can read it."""

from .context import LanceNativeContext, LanceNativeEdit, LanceNativeSubject, LanceNativeVAEEncode, LanceNativeViTEncode
from .inspector import LanceNativeContextInspector
from .latents import LanceNativeEmptyLatent, LanceNativeVideoStart
from .loaders import LanceNativeLoader
from .lora import LanceNativeLoraLoader
from .sampling import (
    LanceNativeConditioning,
    LanceNativeGuidance,
    LanceNativeNoise,
    LanceNativeSampler,
    LanceNativeScheduler,
)
from .schema import ComfyExtension, io
from .understand import LanceNativeAsk, LanceNativeEnhancePrompt


class LanceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LanceNativeLoader,
            LanceNativeLoraLoader,
            LanceNativeEmptyLatent,
            LanceNativeVideoStart,
            LanceNativeViTEncode,
            LanceNativeVAEEncode,
            LanceNativeContext,
            LanceNativeEdit,
            LanceNativeSubject,
            LanceNativeConditioning,
            LanceNativeGuidance,
            LanceNativeScheduler,
            LanceNativeNoise,
            LanceNativeSampler,
            LanceNativeAsk,
            LanceNativeEnhancePrompt,
            LanceNativeContextInspector,
        ]


async def comfy_entrypoint() -> LanceExtension:
    return LanceExtension()
