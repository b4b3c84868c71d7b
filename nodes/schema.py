"""The one place that knows the version of ComfyUI's node interface; our own socket types."""

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["CATEGORY", "ComfyExtension", "LanceContext", "LanceVitTokens", "io", "ui"]

CATEGORY = "Lance"
LanceContext = io.Custom("LANCE_CONTEXT")
LanceVitTokens = io.Custom("LANCE_VIT_TOKENS")
