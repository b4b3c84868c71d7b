"""Lance Native: ByteDance's Lance as a native citizen of ComfyUI."""

from .nodes import comfy_entrypoint

# Help pages and their pictures (web/docs), and one small script.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
