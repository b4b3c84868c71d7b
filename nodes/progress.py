"""Progress: a prefill in ComfyUI's own bar, one mark a layer of every block; and what a sampler does, in words."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.utils
from server import PromptServer

from ..lance_runtime.context import Layout
from ..lance_runtime.engine import Engine
from ..lance_runtime.model.transformer import Streams
from ..lance_runtime.prefill import blocks


def with_prefill_progress(engine: Engine, layout: Layout, done: int = 0) -> Engine:
    """The same engine, for one prefill of this layout; its first ``done`` splits are not read again."""
    bar = comfy.utils.ProgressBar(len(blocks(layout, done)) * engine.model.config.num_hidden_layers)

    def advance(index: int, layer: Callable[[Streams], Streams], hidden: Streams) -> Streams:
        bar.update(1)
        return layer(hidden)

    return replace(engine, layer_hook=advance)


class Narrated:
    """A sampler's callback that also writes into the node which step is done, how long one takes, and what it runs.

    tokens: of the context that is read first. guided: for each step, whether guidance acts in it. ``text``: the last line.
    """

    def __init__(self, callback: Callable[..., None], node: str | None, tokens: int, guided: Sequence[bool]) -> None:
        self.callback, self.node, self.guided, self.marks = callback, node, guided, [time.perf_counter()]
        self._say(f"reading {tokens} tokens, then {len(guided)} steps")

    def __call__(self, step: int, *rest: Any) -> None:
        self.callback(step, *rest)
        self.marks.append(time.perf_counter())
        marks, total = self.marks, len(self.guided)
        # The first step reads the context too; from the second on a step is just a step.
        seconds = marks[-1] - marks[-2] if len(marks) == 2 else (marks[-1] - marks[1]) / (len(marks) - 2)
        if step + 1 < total:
            guidance = "on" if self.guided[step] else "off"
            self._say(f"step {step + 1} of {total}, {seconds:.2g} s a step, guidance {guidance}")
        else:
            self._say(f"{total} steps, {seconds:.2g} s each, guidance in {sum(self.guided)}")

    def _say(self, text: str) -> None:
        self.text = text
        say(self.node, text)


def node_of(cls: Any) -> str | None:
    """The page's id of the node that runs; None where somebody calls ``execute`` without ComfyUI's executor."""
    return None if cls.hidden is None else cls.hidden.unique_id


def say(node: str | None, text: str) -> None:
    """Write into a node of the page; nobody listens where the graph came through the API alone.

    A node that puts the same text into its ``ui`` has it again where it need not run again (web/kept_texts.js).
    """
    if node is not None:
        PromptServer.instance.send_progress_text(text, node)
