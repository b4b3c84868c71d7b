"""Compiled layers: the same numbers, whole graphs, and none made anew between steps or for a size seen before."""

from __future__ import annotations

import goldens
import pytest
import tasks
import torch
from torch._dynamo.utils import counters

from lance_runtime import Guidance, LancePipeline
from lance_runtime.model import layers as layers_room
from lance_runtime.model.layers import Linear, RMSNorm, row_product
from lance_runtime.model.transformer import Lance


@pytest.fixture
def compiled():
    """A pipeline whose layers dynamo traces; the traced graphs are run as they are, which takes no compiler."""
    torch._dynamo.reset()
    counters.clear()
    pipe = LancePipeline.from_pretrained(goldens.CHECKPOINT, "image", device="cpu")
    pipe.components.model.compile_layers(backend="eager")
    yield pipe
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_numbers_are_the_same_and_graphs_are_whole(compiled, image_pipe):
    for task in ("t2i", "image_edit", "x2t_image"):
        found, expected = compiled(**tasks.arguments(task)), image_pipe(**tasks.arguments(task))
        if expected.text is not None:
            assert found.token_ids == expected.token_ids
        else:
            assert (found.latents - expected.latents).abs().max() < 1e-4
    assert graphs() > 0


def test_nothing_is_compiled_between_steps_nor_again(compiled):
    arguments = tasks.arguments("t2i") | {"steps": 6}
    seen = []
    for _ in compiled.stream(**arguments):
        seen.append(graphs())
    assert seen == [seen[0]] * 6
    compiled(**arguments | {"seed": 5})
    assert graphs() == seen[0]
    layers = compiled.components.model.config.num_hidden_layers
    assert layers > 2
    # Two sides of attention for each expert; and the prompt's length, the vision tokens', and the picture's.
    assert seen[0] <= 2 * 2 * 2


def test_one_pipeline_serves_every_kind_of_call(compiled):
    """Guided and unguided steps, questions, a second guidance, a batch: each is a further kind for the same function."""
    for task, more in (
        ("t2i", {"steps": 3}),
        ("x2t_image", {"max_new_tokens": 3}),
        ("image_edit", {"guidance": Guidance(scale=4.0, visual_scale=2.0), "steps": 2}),
        ("t2i", {"batch": 2, "steps": 2, "guidance": Guidance(scale=4.0, interval=(0.0, 1.0))}),
        ("t2i", {"batch": 3, "steps": 2, "guidance": Guidance(scale=1.0)}),
    ):
        compiled(**tasks.arguments(task) | more)
    assert graphs() <= 40  # of 64


def test_layers_that_pass_through_the_device_are_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="cannot be compiled"):
        LancePipeline.from_pretrained(tmp_path, offload="layer", compile=True)


def test_without_it_nothing_is_compiled(image_pipe):
    torch._dynamo.reset()
    counters.clear()
    image_pipe(**tasks.arguments("t2i"))
    assert graphs() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 40), (40,), (1, 2, 40)])
@pytest.mark.parametrize("rows", [48, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("traced", [False, True])
def test_a_linear_layer_is_torchs(dtype, tolerance, shape, rows, bias, traced):
    """One row goes another way; 7 rows of a weight make no parts."""
    torch.manual_seed(0)
    layer = Linear(40, rows, bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    run = torch.compile(layer.to(dtype), backend="eager", fullgraph=True) if traced else layer.to(dtype)
    found = run(x.to(dtype))
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_one_row_goes_its_own_way(monkeypatch):
    seen = []
    monkeypatch.setattr(layers_room, "row_product", lambda row, weight: seen.append(len(row)) or row_product(row, weight))
    layer = Linear(40, 48)
    layer(torch.randn(1, 1, 40))
    layer(torch.randn(1, 2, 40))
    layer.bfloat16()(torch.randn(1, 1, 40, dtype=torch.bfloat16))
    assert seen == [40]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float64, 1e-6)]
)
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_norm_is_torchs(monkeypatch, dtype, tolerance, graded, rows):
    monkeypatch.setattr(layers_room, "NORMED_AT_ONCE", 7 * 96)  # a few blocks, the last one shorter
    torch.manual_seed(0)
    layer, x = RMSNorm(96, eps=1e-6), 1000 * torch.randn(2, rows, 3, 96)
    layer.weight.data.normal_()
    x[0, 0] = 0
    expected = torch.nn.functional.rms_norm(x, (96,), layer.weight, 1e-6)
    with torch.set_grad_enabled(graded):
        found = layer.to(dtype)(x.to(dtype))
    assert (found.dtype, found.requires_grad) == (dtype, graded)
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_mode_of_torch_compile_is_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(Lance, "compile_layers", lambda model, **options: seen.append(options))
    for asked in (False, True, "reduce-overhead"):
        LancePipeline.from_pretrained(goldens.CHECKPOINT, "image", device="cpu", compile=asked)
    assert seen == [{}, {"mode": "reduce-overhead"}]
