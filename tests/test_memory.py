"""Offloading outside ComfyUI: the same numbers, and one part at a time on the device."""

import goldens
import pytest
import tasks
import torch
from accelerate import hooks
from torch import nn

from lance_runtime import LancePipeline
from lance_runtime.memory import default_device, default_dtype

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


def test_by_layer_no_weight_stays_on_the_device():
    parts = load("image", "layer").components
    for module in parts.modules:
        assert all(parameter.is_meta for parameter in module.parameters())
    linear = parts.model.language_model.model.layers[0].mlp.up_proj
    assert isinstance(linear._hf_hook, hooks.AlignDevicesHook)


def test_by_layer_a_weight_is_there_just_while_its_layer_runs():
    pipe, seen = load("image", "layer"), []
    layers = pipe.components.model.language_model.model.layers
    first, second = layers[0].mlp.up_proj, layers[1].mlp.up_proj
    inner = first._old_forward

    def spy(x):
        seen.append((first.weight.device.type, second.weight.device.type))
        return inner(x)

    first._old_forward = spy
    pipe(**tasks.arguments("t2i") | {"steps": 1})
    assert set(seen) == {("cpu", "meta")}
    assert first.weight.is_meta


@pytest.fixture
def watched(monkeypatch):
    """A pipeline with offload="model", and the parts on the device; cpu:0 is the device and cpu the place beside it."""
    real, on, ran = nn.Module.to, set(), []

    def to(module, *args, **options):
        name = names.get(module)
        if name is not None:
            (on.add if str(args[0]) == "cpu:0" else on.discard)(name)
        return real(module, *args, **options)

    names = {}
    monkeypatch.setattr(nn.Module, "to", to)
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


def test_defaults_fit_the_machine():
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert default_device().type in ("cpu", "cuda", "mps", "xpu")
