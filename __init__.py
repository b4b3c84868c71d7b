"""Lance Native: ByteDance's Lance as a native citizen of ComfyUI."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
