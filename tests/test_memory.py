"""Offloading outside ComfyUI: the same numbers, and one part at a time on the device."""

import goldens
import pytest
import tasks
import torch
from torch import nn

from lance_runtime import LancePipeline, memory
from lance_runtime.memory import Passing, default_device, default_dtype

KINDS = ("model", "layer")


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


@pytest.mark.parametrize("kind", ["disk", "", "Model"])
def test_another_kind_is_refused_before_loading(kind, tmp_path):
    with pytest.raises(ValueError, match="none, model, layer\\.\n"):
        LancePipeline.from_pretrained(tmp_path / "nowhere", offload=kind)


def hooked(module):
    return [part for part in module.modules() if hasattr(part, "_hf_hook")]


def test_without_offloading_there_are_no_hooks(image_pipe):
    assert not any(hooked(module) for module in image_pipe.components.modules)


def linears(count):
    """A chain of ``count`` layers of 64 bytes, whose weights pass through a device that is the CPU under another name."""
    chain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count))).requires_grad_(False)
    return chain, [layer.weight.clone() for layer in chain]


def test_weights_are_on_the_device_just_while_their_layer_runs():
    chain, weights = linears(3)
    homes = [layer.weight.data_ptr() for layer in chain]
    Passing(chain, torch.device("meta"))
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
    passing, copies, arrived = Passing(chain, torch.device("cpu"), ahead), [], []
    real = passing._copied
    monkeypatch.setattr(passing, "_copied", lambda link: copies.append(link) or real(link))
    for layer in chain:
        layer.register_forward_pre_hook(lambda layer, _: arrived.append((layer in copies, len(copies))))
    chain(torch.ones(1, 4))
    assert copies == list(chain)  # nothing was known: each is copied when it is needed
    assert not passing.coming
    for _ in range(2):  # the second learns that the first follows the last
        chain(torch.ones(1, 4))
    del copies[:]
    assert len(passing.coming) == expected
    chain(torch.ones(1, 4))
    assert len(copies) == 4  # each once, none of them late
    assert copies[0] is chain[expected % 4]


def test_another_order_is_learned_and_an_error_leaves_nothing_on_the_device():
    chain, _ = linears(3)
    first, second, third = chain
    passing, x = Passing(chain, torch.device("meta")), torch.ones(1, 4, device="meta")
    chain(x)
    third(second(first(x)))
    second(first(x))
    third(first(x))
    assert passing.follower == {first: third, second: first, third: first}
    with pytest.raises(RuntimeError):
        second(torch.ones(1, 5, device="meta"))
    assert all(layer.weight.device.type == "cpu" for layer in chain)


def test_by_layer_the_whole_pipeline_computes_on_the_device_from_weights_beside_it():
    pipe = load("image", "layer")
    pipe(**tasks.arguments("image_edit") | {"steps": 1})
    for module in pipe.components.modules:
        assert all(parameter.device.type == "cpu" for parameter in module.parameters())
        assert not hooked(module)


@pytest.fixture
def watched(monkeypatch):
    """A pipeline with offload="model", and the parts on the device; cpu:0 is the device and cpu the place beside it."""
    real, home, on, ran = nn.Module.to, memory.send_home, set(), []

    def to(module, *args, **options):
        if module in names and str(args[0]) == "cpu:0":
            on.add(names[module])
        return real(module, *args, **options)

    def send_home(homes):
        on.discard(next(name for module, name in names.items() if set(homes) <= set(module.modules())))
        home(homes)

    names = {}
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(memory, "send_home", send_home)
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


def test_by_model_weights_that_leave_the_device_are_not_copied_back():
    pipe = load("image", "model")
    weight = pipe.components.model.language_model.lm_head.weight
    before = weight.data_ptr()
    weight.data = weight.data.clone()  # as on a device: elsewhere, and not changed
    pipe.components.vae.decode(torch.zeros(48, 1, 4, 4))
    assert pipe.components.model.language_model.lm_head.weight.data_ptr() == before


def test_by_layer_a_row_of_a_table_is_looked_up_where_it_lies():
    table = nn.Embedding(4, 3).requires_grad_(False)
    Passing(table, torch.device("meta"))
    seen = []
    table.register_forward_pre_hook(lambda *_: seen.append(table.weight.device.type))
    assert table(torch.ones(1, 2, dtype=torch.long)).device.type == "meta"
    assert seen == ["cpu"]


def test_defaults_fit_the_machine():
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert default_device().type in ("cpu", "cuda", "mps", "xpu")
