"""The attention backend that ComfyUI chose, as the runtime's attention function."""

import comfy.model_management
from comfy.ldm.modules.attention import (
    attention_pytorch,
    get_attention_function,
    optimized_attention,
    optimized_attention_for_device,
)
from torch import Tensor

from ..lance_runtime.types import AttentionFunction

EIGHT_BITS = get_attention_function("comfy_kitchen_int8", None)  # of ComfyUI 0.33 with --use-ck-attention


def comfy_attention(options: dict | None = None) -> AttentionFunction:
    """options: ComfyUI's transformer_options, in which another node may override attention; None for what is read once.

    What is read once (contexts, questions, pictures) goes in full precision: SageAttention and Comfy Kitchen would make
    8 bits of it, to little gain, and every step and every token would see that.
    """
    precise = {} if options is not None else {"low_precision_attention": False}
    options = {} if options is None else options

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        # The choice was made for ComfyUI's own device; a CLIP that is sent to the CPU needs one that works there.
        own = q.device.type == comfy.model_management.get_torch_device().type
        backend = optimized_attention if own else optimized_attention_for_device(q.device)
        if precise and backend is EIGHT_BITS:
            backend = attention_pytorch
        return backend(q, k, v, heads, skip_reshape=True, skip_output_reshape=True, transformer_options=options, **precise)

    return attention
