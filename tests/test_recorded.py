"""Steps and tokens as CUDA graphs: the same numbers where a graph is stood in for, and refusals where there can be none.

The stand-in does again what a graph would: it calls the function with the same tensors, and writes the same result.
``fake_device.py`` shows that nothing in it reaches the host. No test here has a card.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import goldens
import pytest
import tasks
import torch

from lance_runtime import Guidance, LancePipeline, decode, recorded
from lance_runtime.recorded import Recorded


class Replayed:
    """A graph's stand-in; ``all`` holds those that were made."""

    all: list[Replayed] = []  # noqa: RUF012

    def __init__(self, run, inputs):
        self.run, self.inputs, self.replays = run, inputs, 0
        self.output = run(*inputs)
        Replayed.all.append(self)

    def replay(self):
        self.replays += 1
        self.output.copy_(self.run(*self.inputs))


@pytest.fixture
def pipes(load_pipeline, monkeypatch):
    """By variant: a pipeline that records, and the same without."""
    monkeypatch.setattr(recorded, "capture", lambda run, inputs: ((made := Replayed(run, inputs)), made.output))
    Replayed.all.clear()

    def both(variant):
        plain = load_pipeline(variant)
        recording = copy.copy(plain)
        recording.components = replace(plain.components, cuda_graphs=True)
        return recording, plain

    return both


def test_a_function_is_run_then_recorded_then_replayed(monkeypatch):
    monkeypatch.setattr(recorded, "capture", lambda run, inputs: ((made := Replayed(run, inputs)), made.output))
    Replayed.all.clear()
    double = Recorded(lambda x: 2 * x)
    found = [double(torch.full((2,), float(value))) for value in range(4)]
    assert [x.tolist() for x in found] == [[0.0, 0.0], [2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]
    (graph,) = Replayed.all
    assert graph.replays == 3


@pytest.mark.parametrize(
    ("task", "more", "sets"),
    [
        ("t2i", {"steps": 6, "guidance": Guidance(scale=4.0, interval=(0.0, 1.0))}, 1),
        ("t2i", {"steps": 9, "guidance": Guidance(scale=4.0, interval=(0.5, 1.0))}, 2),  # both branches, then one
        ("image_edit", {"steps": 4, "guidance": Guidance(scale=4.0, interval=(0.0, 1.0), visual_scale=2.0)}, 1),
        ("t2i", {"steps": 3, "batch": 2}, 1),
        ("i2v", {"steps": 4}, 1),
    ],
)
def test_steps_are_the_same(pipes, task, more, sets):
    recording, plain = pipes("video" if task == "i2v" else "image")
    arguments = tasks.arguments(task) | more
    found, expected = (list(pipe.stream(**arguments)) for pipe in (recording, plain))
    for mine, theirs in zip(found, expected, strict=True):  # earlier ones too: no memory is written again
        assert torch.equal(mine.latents, theirs.latents)
    graphs = [graph for graph in Replayed.all if graph.replays > 0]
    assert len(graphs) == len(Replayed.all) >= sets
    assert sum(graph.replays for graph in graphs) == arguments["steps"] - sets


def test_many_tokens_are_not_recorded(pipes, monkeypatch):
    monkeypatch.setattr("lance_runtime.denoise.BATCHED_TOKENS", 0)
    recording, plain = pipes("image")
    arguments = tasks.arguments("t2i") | {"steps": 3}
    assert torch.equal(recording(**arguments).latents, plain(**arguments).latents)
    assert Replayed.all == []


@pytest.mark.parametrize("task", ["x2t_image", "x2t_video"])
@pytest.mark.parametrize("room", [1024, 5])
def test_answers_are_the_same(pipes, monkeypatch, task, room):
    """A cache that grows has other memory, and another recording."""
    monkeypatch.setattr(decode, "LEAST_RECORDED", 4)
    monkeypatch.setattr(decode, "ANSWER_ROOM", room)
    recording, plain = pipes("video" if task == "x2t_video" else "image")
    arguments = tasks.arguments(task) | {"max_new_tokens": 13}
    expected = plain(**arguments).token_ids
    assert recording(**arguments).token_ids == expected
    assert len(expected) == 13
    # Of each room's tokens the first is run as it is, and the last of all is not read.
    assert [graph.replays for graph in Replayed.all] == ([11] if room == 1024 else [4, 4])


@pytest.mark.parametrize(("name", "value"), [("LEAST_RECORDED", 14), ("MOST_KEYS_RECORDED", 20)])
def test_short_answers_and_long_contexts_are_not_recorded(pipes, monkeypatch, name, value):
    monkeypatch.setattr(decode, "LEAST_RECORDED", 4)
    monkeypatch.setattr(decode, name, value)
    recording, plain = pipes("image")
    arguments = tasks.arguments("x2t_image") | {"max_new_tokens": 13}
    assert recording(**arguments).token_ids == plain(**arguments).token_ids
    assert Replayed.all == []


@pytest.mark.parametrize(("offload", "words"), [("none", "need a CUDA device, and this one is cpu"), ("model", "need a CUDA")])
def test_there_are_none_without_cuda(offload, words):
    with pytest.raises(ValueError, match=words) as error:
        LancePipeline.from_pretrained(goldens.CHECKPOINT, "image", device="cpu", offload=offload, cuda_graphs=True)
    assert str(error.value).count("\n") == 1


def test_weights_that_move_and_graphs_of_others_cannot_be_recorded():
    from lance_runtime.memory import check_recording

    check_recording(True, torch.device("cuda"), "none")
    for offload in ("model", "layer"):
        with pytest.raises(ValueError, match=f"offload='{offload}'"):
            check_recording(True, torch.device("cuda"), offload)
    check_recording(True, torch.device("cuda"), "none", mode=True)
    with pytest.raises(ValueError, match="compile='reduce-overhead'"):
        check_recording(True, torch.device("cuda"), "none", mode="reduce-overhead")
