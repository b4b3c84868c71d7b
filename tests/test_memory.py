"""Offloading outside ComfyUI: the same numbers, and one part at a time on the device."""

import gc
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import goldens
import pytest
import tasks
import torch
from alive import Alive
from torch import nn

from lance_runtime import LancePipeline, memory
from lance_runtime.config import LanceConfig
from lance_runtime.context import Context, Segment, VisionTokens, layout
from lance_runtime.denoise import predict_velocity
from lance_runtime.engine import Engine
from lance_runtime.memory import default_dtype
from lance_runtime.model import transformer
from lance_runtime.model.transformer import Lance, held_share
from lance_runtime.prefill import branch
from lance_runtime.streaming import MODULES_IN_FLIGHT, PREFETCH_BYTES, Copied, WeightStreamer
from lance_runtime.types import LatentShape

KINDS = ("model", "layer")
ROOT = Path(__file__).resolve().parents[1]


def load(variant, offload):
    return LancePipeline.from_pretrained(goldens.CHECKPOINT, variant, device="cpu", dtype=torch.float32, offload=offload)


@pytest.fixture(scope="module", params=KINDS)
def offloaded(request):
    return load("image", request.param)


@pytest.mark.parametrize("task", ["t2i", "image_edit", "x2t_image"])
def test_offloading_changes_no_number(task, offloaded, image_pipe):
    found, expected = offloaded(**tasks.arguments(task)), image_pipe(**tasks.arguments(task))
    if task == "x2t_image":
        assert found.token_ids == expected.token_ids
    else:
        assert torch.equal(found.latents, expected.latents)
        assert (found.frames == expected.frames).all()


def test_a_second_call_still_works(offloaded):
    first, second = (offloaded(**tasks.arguments("image_edit") | {"steps": 1}) for _ in range(2))
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("offload", KINDS)
def test_given_frames_of_a_video_are_the_same(offload, video_pipe):
    arguments = tasks.arguments("i2v") | {"steps": 1}
    assert torch.equal(load("video", offload)(**arguments).latents, video_pipe(**arguments).latents)


def change(pipe):
    """Other weights: one in its place, one replaced, one that reads pictures."""
    head, tower = pipe.components.model.llm2vae, pipe.components.vision
    head.bias.add_(1)
    head.weight = nn.Parameter(head.weight.flip(0), requires_grad=False)
    next(tower.parameters()).zero_()


@pytest.mark.parametrize("offload", ["none", *KINDS])
def test_weights_that_were_changed_stay_so(offload):
    pipe, fresh = load("image", offload), load("image", "none")
    drawn, asked = tasks.arguments("t2i") | {"steps": 2}, tasks.arguments("x2t_image")
    before = pipe(**drawn).latents, pipe(**asked).token_ids
    change(pipe), change(fresh)
    pipe.forget()
    for _ in range(2):
        out, expected = pipe(**drawn), fresh(**drawn)
        assert torch.equal(out.latents, expected.latents)
        assert (out.frames == expected.frames).all()
        assert pipe(**asked).token_ids == fresh(**asked).token_ids
    assert not torch.equal(out.latents, before[0])
    assert pipe(**asked).token_ids != before[1]


@pytest.mark.parametrize("kind", ["disk", "", "Model"])
def test_another_kind_is_refused_before_loading(kind, tmp_path):
    with pytest.raises(ValueError, match=r"3 known ones\.\nUse one of: none, model, layer\."):
        LancePipeline.from_pretrained(tmp_path / "nowhere", offload=kind)


def hooked(module):
    return [part for part in module.modules() if hasattr(part, "_hf_hook")]


def test_without_offloading_there_are_no_hooks(image_pipe):
    assert not any(hooked(module) for module in image_pipe.components.modules)


def linears(count):
    """A chain of ``count`` linear layers of 64 bytes, and copies of their weights."""
    chain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count))).requires_grad_(False)
    return chain, [layer.weight.clone() for layer in chain]


def streaming(*models, device="cpu", prefetch_bytes=PREFETCH_BYTES):
    streamer = WeightStreamer(torch.device(device), prefetch_bytes)
    for model in models:
        streamer.attach(model)
    return streamer


def test_weights_are_on_the_device_just_while_their_layer_runs():
    chain, weights = linears(3)
    homes = [layer.weight.data_ptr() for layer in chain]
    streaming(chain, device="meta")
    seen = []
    for layer in chain:
        layer.register_forward_pre_hook(lambda *_: seen.append([other.weight.device.type for other in chain]))
    chain(torch.ones(1, 4, device="meta"))
    assert seen == [["meta", "cpu", "cpu"], ["cpu", "meta", "cpu"], ["cpu", "cpu", "meta"]]
    assert [layer.weight.data_ptr() for layer in chain] == homes
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(chain, weights, strict=True))


@pytest.mark.parametrize(("ahead", "expected"), [(0, 1), (2 * 64, 2), (1000, 3)])
def test_what_followed_last_time_is_copied_ahead(ahead, expected, monkeypatch):
    chain, _ = linears(4)
    streamer, copies, arrived = streaming(chain, prefetch_bytes=ahead), [], []
    real = streamer._copied
    monkeypatch.setattr(streamer, "_copied", lambda number: copies.append(number) or real(number))
    for number, layer in enumerate(chain):
        layer.register_forward_pre_hook(lambda *_, number=number: arrived.append((number in copies, len(copies))))
    chain(torch.ones(1, 4))
    assert copies == [0, 1, 2, 3]  # nothing was known: each is copied when it is needed
    assert not streamer.prefetched
    for _ in range(2):  # the second learns that the first follows the last
        chain(torch.ones(1, 4))
    del copies[:]
    assert len(streamer.prefetched) == expected
    chain(torch.ones(1, 4))
    assert len(copies) == 4  # each once, none of them late
    assert copies[0] == expected % 4


def test_another_order_is_learned_and_an_error_leaves_nothing_on_the_device():
    chain, _ = linears(3)
    first, second, third = chain
    streamer, x = streaming(chain, device="meta"), torch.ones(1, 4, device="meta")
    chain(x)
    third(second(first(x)))
    second(first(x))
    third(first(x))
    assert streamer.followers == {0: 2, 1: 0, 2: 0}
    with pytest.raises(RuntimeError):
        second(torch.ones(1, 5, device="meta"))
    assert all(layer.weight.device.type == "cpu" for layer in chain)


def test_what_one_module_has_copied_ahead_goes_when_another_begins():
    (first, _), (second, _) = linears(3), linears(2)
    streamer, x = streaming(first, second, prefetch_bytes=2 * 64), torch.ones(1, 4)
    for _ in range(3):
        first(x)
    assert set(streamer.prefetched) == {0, 1}  # more of the same is expected
    second(x)
    assert not streamer.prefetched


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch names accelerators from 2.6 on; before, none streams")
def test_a_host_that_runs_ahead_waits_for_all_but_the_last_modules(monkeypatch):
    """The device's clock is a list: what was computed is known only where the host waited for it."""
    chain, _ = linears(6)
    streamer, log = streaming(chain, prefetch_bytes=2 * 64), []
    chain(torch.ones(1, 4))
    chain(torch.ones(1, 4))

    class Stream:
        modules = 0

        def record_event(self):
            self.modules += 1
            log.append(("computing", self.modules))
            return SimpleNamespace(synchronize=lambda number=self.modules: log.append(("done", number)))

    stream, real = Stream(), streamer.cpu_weights
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    monkeypatch.setattr(streamer, "stream", stream)
    monkeypatch.setattr(streamer, "_copied", lambda number: log.append(("copy", number)) or Copied(real[number], None))
    chain(torch.ones(1, 4))
    begun = done = 0
    for what, number in log:
        begun, done = (number if what == "computing" else begun), (number if what == "done" else done)
        assert what != "copy" or begun - done <= MODULES_IN_FLIGHT
    assert begun == 6
    assert done == 6 - MODULES_IN_FLIGHT  # and it never waits for more
    assert sum(what == "copy" for what, _ in log) == 6


@pytest.fixture
def pinned(monkeypatch):
    """Weights that were copied into pinned memory, which a machine without a card does not have."""
    found = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda weight: found.append(weight) or weight.clone())
    return found


def with_a_stream(streamer, monkeypatch):
    monkeypatch.setattr(streamer, "stream", torch.autograd.profiler.record_function("a stream"))
    monkeypatch.setattr(streamer.stream, "record_event", lambda: None, raising=False)
    monkeypatch.setattr(streamer, "_wait", lambda: None)
    return streamer


@pytest.mark.parametrize(("room", "passes"), [(3 * 64, [3, 0, 0]), (64, [3, 2, 2]), (0, [3, 3, 3])])
def test_weights_stay_in_pinned_memory_while_there_is_room(room, passes, pinned, monkeypatch):
    chain, weights = linears(3)
    streamer = with_a_stream(streaming(chain, prefetch_bytes=64), monkeypatch)
    chain(torch.ones(1, 4))
    assert not pinned  # a device that does not read it
    streamer.forget()
    streamer.pins, streamer.room = True, room
    for expected in passes:
        del pinned[:]
        streamer.last = None  # or the last would bring the first again
        for layer, weight in zip(chain, weights, strict=True):
            assert torch.equal(layer(torch.eye(4)), weight.T)
        assert len(pinned) == expected


def test_other_weights_are_pinned_anew(pinned, monkeypatch):
    chain, _ = linears(2)
    streamer = with_a_stream(streaming(chain), monkeypatch)
    streamer.pins, streamer.room = True, 2 * 64
    for _ in range(3):
        chain(torch.eye(4))
    chain[1].weight = nn.Parameter(torch.full((4, 4), 2.0), requires_grad=False)
    assert torch.equal(chain[1](torch.eye(4)), torch.full((4, 4), 2.0))
    chain[1].weight.fill_(3.0)
    streamer.forget()
    assert torch.equal(chain[1](torch.eye(4)), torch.full((4, 4), 3.0))
    assert streamer.room <= 64


@pytest.mark.parametrize("rows", [8192, 16])
def test_the_weights_of_an_mlp_come_once_however_many_parts_its_tokens_have(rows, monkeypatch):
    monkeypatch.setattr(transformer, "ROWS_AT_ONCE", rows)
    config = LanceConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    mlp = transformer.MLP(config, transformer.layers).requires_grad_(False)
    x = torch.randn(2, 48, 128)
    expected, streamer, copies = mlp(x), streaming(mlp), []
    real = streamer._copied
    monkeypatch.setattr(streamer, "_copied", lambda number: copies.append(number) or real(number))
    assert torch.equal(mlp(x), expected)
    assert len(copies) == 1
    assert set(streamer.cpu_weights[0]) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


@pytest.mark.parametrize("how", ["none", "layer", "compiled"])
def test_a_pipeline_that_nobody_wants_leaves_at_once(how):
    """Not only when Python looks for circles: till then, a second model would not fit beside it."""
    pipe = load("image", "none" if how == "compiled" else how)
    if how == "compiled":
        pipe.components.model.compile_layers(backend="eager")
    pipe(**tasks.arguments("x2t_image") | {"max_new_tokens": 2})
    left = [weakref.ref(part) for module in pipe.components.modules for part in module.modules()]
    gc.disable()
    try:
        del pipe
        assert not [part() for part in left if part() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("grid", [LatentShape(1, 48, 48), LatentShape(31, 30, 53)])
def test_a_step_holds_what_comfyui_is_told(grid, branches, dtype):
    """At the real width; two layers hold as much as 36. ComfyUI's formula: model_base.py, ``memory_required``."""
    config, device = LanceConfig(num_hidden_layers=2), torch.device("meta")
    with device:
        model = Lance(config, dtype=dtype).requires_grad_(False)
    engine = Engine(model, dtype, device, attention=lambda q, k, v: torch.empty_like(q))
    with torch.no_grad():
        context = Context((Segment.text(range(100)),), VisionTokens(1, 2, 3))
        prefixes = [branch(engine, layout(context, grid)) for _ in range(branches)]
        latents = torch.empty(branches, 48, *grid, dtype=dtype, device=device)
        times = torch.empty(branches, grid.frames, device=device)
        with Alive() as alive:
            predict_velocity(engine, latents, times, prefixes)
    factor = float(re.search(r"memory_usage_factor = ([\d.]+)", (ROOT / "nodes" / "model.py").read_text("utf-8"))[1])
    told = branches * grid.tokens * dtype.itemsize * 0.01 * factor * 2**20 * held_share(branches * grid.tokens)
    places = sum(one.position_embeddings.nbytes + 2 * one.rope.gen.cos.nbytes for one in prefixes)
    least = 0.75 if dtype == torch.bfloat16 else 0.65  # nothing is cast in float32
    assert least < (alive.most + places) / told < 1


def test_by_layer_the_whole_pipeline_computes_on_the_device_from_weights_beside_it():
    pipe = load("image", "layer")
    pipe(**tasks.arguments("image_edit") | {"steps": 1})
    for module in pipe.components.modules:
        assert all(parameter.device.type == "cpu" for parameter in module.parameters())
        assert not hooked(module)


@pytest.fixture
def watched(monkeypatch):
    """A pipeline with offload="model", and the parts on the device; cpu:0 is the device and cpu the place beside it."""
    real, home, on, ran = nn.Module.to, memory.set_weights, set(), []

    def to(module, *args, **options):
        if module in names and str(args[0]) == "cpu:0":
            on.add(names[module])
        return real(module, *args, **options)

    def set_weights(part, weights):
        on.discard(names[part])
        home(part, weights)

    names = {}
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(memory, "set_weights", set_weights)
    pipe = LancePipeline.from_pretrained(goldens.CHECKPOINT, device="cpu:0", dtype=torch.float32, offload="model")
    parts = pipe.components
    names.update({parts.vision: "vision", parts.model: "model", parts.vae.module: "vae"})
    vae, layers = parts.vae.module, parts.model.language_model.model.layers
    inner = (parts.vision.blocks[0], layers[0], vae.encoder, vae.decoder)
    for part, name in zip(inner, ("vision", "model", "vae", "vae"), strict=True):
        part.register_forward_pre_hook(lambda *_, name=name: ran.append((name, sorted(on))))
    return pipe, ran


@pytest.mark.parametrize("task", ["t2i", "image_edit", "x2t_image"])
def test_by_model_the_part_that_runs_is_alone_on_the_device(task, watched):
    pipe, ran = watched
    for _ in range(2):
        out = pipe(**tasks.arguments(task))
        assert out.token_ids or len(out.frames) == 1
    expected = {"t2i": {"model", "vae"}, "image_edit": {"vision", "model", "vae"}, "x2t_image": {"vision", "model"}}[task]
    assert {name for name, _ in ran} == expected
    assert all(on == [name] for name, on in ran)


def test_by_model_a_preview_between_two_steps_harms_nothing(watched):
    pipe, ran = watched
    for step in pipe.stream(**tasks.arguments("t2i")):
        pipe.components.vae.decode(step.latents)
    assert all(on == [name] for name, on in ran)


def test_by_model_a_picture_between_two_words_harms_nothing(watched):
    pipe, ran = watched
    words = []
    for token in pipe.stream(**tasks.arguments("x2t_image")):
        words.append(token.id)
        pipe.components.vae.decode(torch.zeros(48, 1, 4, 4))
    assert words == pipe(**tasks.arguments("x2t_image")).token_ids
    assert len(words) > 1
    assert all(on == [name] for name, on in ran)


def test_by_model_weights_that_leave_the_device_are_not_copied_back():
    pipe = load("image", "model")
    weight = pipe.components.model.language_model.lm_head.weight
    before = weight.data_ptr()
    weight.data = weight.data.clone()  # as on a device: elsewhere, and not changed
    pipe.components.vae.decode(torch.zeros(48, 1, 4, 4))
    assert pipe.components.model.language_model.lm_head.weight.data_ptr() == before


def test_by_layer_a_row_of_a_table_is_looked_up_where_it_lies():
    table = nn.Embedding(4, 3).requires_grad_(False)
    streaming(table, device="meta")
    seen = []
    table.register_forward_pre_hook(lambda *_: seen.append(table.weight.device.type))
    assert table(torch.ones(1, 2, dtype=torch.long)).device.type == "meta"
    assert seen == ["cpu"]


@pytest.mark.parametrize(("able", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_defaults_fit_the_machine(able, expected, monkeypatch):
    assert default_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able and not including_emulation)
    assert default_dtype(torch.device("cuda")) == expected
    assert default_dtype(torch.device("xpu")) == torch.bfloat16
