"""The attention backend that ComfyUI chose, as the runtime's attention function."""

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..lance_runtime.types import AttentionFunction


def comfy_attention(options: dict) -> AttentionFunction:
    """options: ComfyUI's transformer_options, in which another node may override attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        return optimized_attention(q, k, v, heads, skip_reshape=True, skip_output_reshape=True, transformer_options=options)

    return attention
