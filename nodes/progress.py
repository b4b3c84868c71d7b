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


def narrated(callback: Callable[..., None], node: str | None, tokens: int, guided: Sequence[bool]) -> Callable[..., None]:
    """A sampler's callback that also writes into the node which step is done, how long one takes, and what it runs.

    tokens: of the context that is read first. guided: for each step, whether guidance acts in it.
    """
    total, marks = len(guided), [time.perf_counter()]
    say(node, f"reading {tokens} tokens, then {total} steps")

    def called(step: int, *rest: Any) -> None:
        callback(step, *rest)
        marks.append(time.perf_counter())
        # The first step reads the context too; from the second on a step is just a step.
        seconds = marks[-1] - marks[-2] if len(marks) == 2 else (marks[-1] - marks[1]) / (len(marks) - 2)
        if step + 1 < total:
            say(node, f"step {step + 1} of {total}, {seconds:.2g} s a step, guidance {'on' if guided[step] else 'off'}")
        else:
            say(node, f"{total} steps, {seconds:.2g} s each, guidance in {sum(guided)}")

    return called


def node_of(cls: Any) -> str | None:
    """The page's id of the node that runs; None where somebody calls ``execute`` without ComfyUI's executor."""
    return None if cls.hidden is None else cls.hidden.unique_id


def say(node: str | None, text: str) -> None:
    """Write into a node of the page; nobody listens where the graph came through the API alone.

    A node that puts the same text into its ``ui`` has it again where it need not run again (web/kept_texts.js).
    """
    if node is not None:
        PromptServer.instance.send_progress_text(text, node)
