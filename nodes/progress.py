"""Progress of a prefill in ComfyUI's own bar: one mark a layer of every block."""

from collections.abc import Callable
from dataclasses import replace

import comfy.utils

from ..lance_runtime.context import Layout
from ..lance_runtime.engine import Engine
from ..lance_runtime.model.transformer import Streams
from ..lance_runtime.prefill import blocks


def with_prefill_progress(engine: Engine, layout: Layout) -> Engine:
    """The same engine, for one prefill of this layout."""
    bar = comfy.utils.ProgressBar(len(blocks(layout)) * engine.model.config.num_hidden_layers)

    def around(index: int, layer: Callable[[Streams], Streams], hidden: Streams) -> Streams:
        bar.update(1)
        return layer(hidden)

    return replace(engine, around=around)
