"""Lance in a bare Python: understands, generates and edits images and video with one network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .guidance import Guidance

if TYPE_CHECKING:
    from .files import NANO
    from .pipeline import LancePipeline, Output

__all__ = ["NANO", "Guidance", "LancePipeline", "Output"]


def __getattr__(name: str) -> Any:
    # ComfyUI imports parts of this package without the pipeline's libraries (diffusers, accelerate).
    if name in ("LancePipeline", "Output"):
        from . import pipeline

        return getattr(pipeline, name)
    if name == "NANO":
        from .files import NANO

        return NANO
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
