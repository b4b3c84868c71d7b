"""Where the tokenizer comes from: the file's metadata, files beside it, or ComfyUI's own Qwen2.5 files."""

from pathlib import Path

import comfy.text_encoders.qwen_image

from ..lance_runtime.checkpoint import TensorFile
from ..lance_runtime.tokenizer import LanceTokenizer

BUNDLED = "qwen25_tokenizer"


def find_tokenizer(file: TensorFile) -> LanceTokenizer:
    """In that order; the checkpoint's own files always win, since a checkpoint may have other ids."""
    found = LanceTokenizer.from_metadata(file.metadata)
    if found is not None:
        return found
    try:
        return LanceTokenizer.from_folder(file.path.parent)
    except FileNotFoundError:
        return LanceTokenizer.from_folder(Path(comfy.text_encoders.qwen_image.__file__).parent / BUNDLED)
