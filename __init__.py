"""Lance Native: ByteDance's Lance as a native citizen of ComfyUI."""

from .nodes import comfy_entrypoint

# Help pages and their pictures (web/docs); there is no script in it.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
