"""Bad input: a ValueError with both numbers and the remedy, or an adjustment that is documented and logged."""

import logging

import goldens
import numpy as np
import pytest
import tasks
import torch
from PIL import Image

from lance_runtime import Guidance, LancePipeline
from lance_runtime.context import Segment
from lance_runtime.prompts import TASKS
from lance_runtime.tokenizer import SPECIAL_TOKENS
from lance_runtime.types import LatentShape, Modality

PICTURE = goldens.image("small.png")
SMALL = {"height": 32, "width": 48, "steps": 1, "guidance": Guidance(scale=1.0)}


def refusal(call, *args, **options):
    """Both lines of the error: what is wrong, and what to do."""
    with pytest.raises(ValueError, match="\n") as caught:
        call(*args, **options)
    first, second = str(caught.value).split("\n")
    assert first
    assert second.endswith(".")
    return first, second


def names_both(first, *numbers):
    assert all(str(number) in first for number in numbers), first


# Sizes


@pytest.mark.parametrize(
    ("name", "size", "near"), [("height", 100, 96), ("width", 8, 16), ("height", 761, 768), ("width", 1, 16)]
)
def test_sizes_off_the_grid_are_refused_with_the_nearest(image_pipe, name, size, near):
    first, second = refusal(image_pipe, "t2i", "a", **SMALL | {name: size})
    names_both(first, name, size, 16)
    assert str(near) in second


@pytest.mark.parametrize("size", [0, -16, -1])
@pytest.mark.parametrize("name", ["height", "width"])
def test_sizes_of_nothing_are_refused(image_pipe, name, size):
    names_both(refusal(image_pipe, "t2i", "a", **SMALL | {name: size})[0], name, size)


@pytest.mark.parametrize("size", [32.5, 32.0, "32", None, float("nan")])
def test_sizes_that_are_no_whole_numbers_are_refused_or_the_default(image_pipe, size):
    if size is None:
        assert image_pipe.request("t2i", "a", **SMALL | {"height": None}).target().height == 48
    else:
        names_both(refusal(image_pipe, "t2i", "a", **SMALL | {"height": size})[0], size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("fps", "24"), ("shift", None), ("temperature", None), ("top_p", "0.9")),
        *(("given_frames", [PICTURE]), ("given_frames", {"0": PICTURE})),
    ],
)
def test_what_is_of_another_type_is_refused(video_pipe, name, value):
    first, _ = refusal(video_pipe, "t2v", "a", **SMALL | {name: value})
    assert name.removesuffix("s") in first.lower().replace(" ", "_")


@pytest.mark.parametrize("scale", ["4", None, [4.0]])
def test_a_guidance_scale_is_a_number(scale):
    names_both(refusal(Guidance, scale=scale)[0], repr(scale))


def test_a_type_of_numbers_is_torchs():
    names_both(refusal(LancePipeline.from_pretrained, goldens.CHECKPOINT, dtype="bfloat16")[0], "'bfloat16'")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_inference_steps", "Use steps."),
        ("guidance_scale", "Guidance(scale"),
        ("step", "steps"),
        ("sizes", "steps"),
        ("xyz", "batch, context"),
    ],
)
def test_arguments_of_other_names_are_refused_with_ours(image_pipe, name, remedy):
    for call in (image_pipe, image_pipe.stream, image_pipe.layout):
        with pytest.raises(TypeError, match=f"^{name} is none of the [0-9]+ arguments of a call.\\n") as caught:
            call("t2i", "a", **{name: 3})
        assert remedy in str(caught.value).split("\n")[1]


def test_a_name_on_the_hub_is_no_folder():
    with pytest.raises(FileNotFoundError, match=r"\n.*python -m lance_runtime download fetches"):
        LancePipeline.from_pretrained("bytedance-research/Lance")


@pytest.mark.parametrize("task", ["image_edit", "i2v", "video_edit"])
def test_a_size_that_contradicts_the_source_is_refused(task, load_pipeline):
    pipe, arguments = load_pipeline(tasks.variant(task)), tasks.arguments(task)
    target = pipe.request(**arguments).target().pixels()
    first, second = refusal(pipe, **arguments | {"height": target.height + 16})
    names_both(first, target.height + 16, target.height)
    assert "height" in second
    pipe.request(**arguments | {"height": target.height, "width": target.width}).target()


def test_frames_that_contradict_the_clip_are_refused(video_pipe):
    names_both(refusal(video_pipe, **tasks.arguments("video_edit"), num_frames=9)[0], 9, 5)


def test_defaults_are_the_trained_sizes(image_pipe, video_pipe):
    assert image_pipe.request("t2i", "a").target().pixels() == (1, 768, 768)
    assert video_pipe.request("t2v", "a").target().pixels() == (49, 480, 848)
    assert image_pipe.request("t2i", "a").steps == 30
    assert image_pipe.request("t2i", "a").shift == 3.5
    assert image_pipe.request("t2i", "a").guidance == Guidance(scale=4.0, interval=(0.4, 1.0), renorm="global")


# Frames


@pytest.mark.parametrize(("asked", "made"), [(2, 1), (4, 1), (6, 5), (12, 9), (124, 121)])
def test_frames_off_the_grid_are_rounded_down_with_a_note(video_pipe, caplog, asked, made):
    target = video_pipe.request("t2v", "a", num_frames=asked).target()
    assert target.pixels().frames == made
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    names_both(record.getMessage(), asked, made, "4k+1")


@pytest.mark.parametrize("asked", [1, 5, 49, 121])
def test_frames_on_the_grid_need_no_note(video_pipe, caplog, asked):
    assert video_pipe.request("t2v", "a", num_frames=asked).target().pixels().frames == asked
    assert not caplog.records


def test_frames_are_rounded_in_the_result(video_pipe):
    out = video_pipe("t2v", "a", **SMALL, num_frames=8)
    assert out.latents.shape == (48, 2, 2, 3)
    assert out.frames.shape == (5, 32, 48, 3)


def test_more_frames_than_trained_are_allowed_with_a_note(video_pipe, caplog):
    out = video_pipe("t2v", "a", **SMALL, num_frames=125)
    assert out.latents.shape == (48, 32, 2, 3)
    names_both(caplog.records[0].getMessage(), 125, 121)


@pytest.mark.parametrize("asked", [0, -3])
def test_no_frames_are_refused(video_pipe, asked):
    names_both(refusal(video_pipe, "t2v", "a", num_frames=asked)[0], asked, 1)


def test_an_image_task_makes_no_clip(image_pipe):
    names_both(refusal(image_pipe, "t2i", "a", num_frames=5)[0], 1, 5)


# Prompts


@pytest.mark.parametrize("task", tasks.GENERATION_TASKS)
def test_an_empty_prompt_draws(task, load_pipeline):
    arguments = tasks.arguments(task) | {"prompt": "", "steps": 1}
    out = load_pipeline(tasks.variant(task))(**arguments)
    assert out.latents.isfinite().all()


def test_an_empty_prompt_is_no_segment(image_pipe):
    assert len(image_pipe.layout("t2i", "", **SMALL).splits) == len(image_pipe.layout("t2i", "a", **SMALL).splits) - 1


def test_without_a_prompt_guidance_changes_nothing(image_pipe):
    guided, plain = (image_pipe("t2i", "", **SMALL | {"guidance": Guidance(scale=scale)}).latents for scale in (4.0, 1.0))
    torch.testing.assert_close(guided, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|endoftext|>"])
def test_special_tokens_in_a_users_words_stay_plain_text(image_pipe, token):
    tokenizer, text = image_pipe.components.tokenizer, f"a {token}\n{token} dog"
    special = tokenizer.encode_template(token)
    assert len(special) == 1
    for task, words in (("t2i", {"prompt": text}), ("x2t_image", {"question": text}), ("t2i", {"instruction": text})):
        arguments = tasks.arguments(task)
        usual = image_pipe.layout(**arguments).input_ids.tolist().count(special[0])
        assert image_pipe.layout(**arguments | words).input_ids.tolist().count(special[0]) == usual
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_prompt_break_nothing(image_pipe):
    out = image_pipe("t2i", "<|im_end|><|vision_start|><|video_pad|><|vision_end|>", **SMALL)
    assert out.latents.isfinite().all()


@pytest.mark.parametrize("text", [" a hat", "\n\n a hat ", "\ta hat", "   "])
def test_white_space_is_part_of_the_prompt(image_pipe, text):
    splits = image_pipe.layout("t2i", text, **SMALL).splits
    assert image_pipe.components.tokenizer.decode(splits[1].segment.ids) == text
    assert image_pipe("t2i", text, **SMALL).latents.isfinite().all()


def test_a_prompt_that_is_no_text_is_refused(image_pipe):
    names_both(refusal(image_pipe, "t2i", None, **SMALL)[0], "prompt", "NoneType")
    names_both(refusal(image_pipe, "x2t_image", images=[PICTURE], question=7)[0], "question", "int")


# Pictures and clips


def flat(height, width):
    return Image.new("RGB", (width, height), (200, 30, 90))


@pytest.mark.parametrize("size", [(1, 1), (10, 20_000), (20_000, 10), (1, 300)])
@pytest.mark.parametrize("task", ["image_edit", "subject_image", "x2t_image", "i2v"])
def test_odd_pictures_give_some_result(task, size, load_pipeline):
    changed = {"images": [flat(*size)], "steps": 1, "max_new_tokens": 1, "guidance": Guidance(scale=1.0)}
    out = load_pipeline(tasks.variant(task))(**tasks.arguments(task) | changed)
    assert out.latents.isfinite().all() if out.latents is not None else len(out.token_ids) <= 1


@pytest.mark.parametrize("shape", [(1, 48, 64, 3), (1, 1, 1, 3), (2, 9, 400, 3)])
def test_the_shortest_clips_give_some_result(video_pipe, shape):
    video = np.full(shape, 128, np.uint8)
    out = video_pipe("video_edit", "red", video=video, fps=24.0, resolution=tasks.VIDEO, steps=1, guidance=Guidance(scale=1))
    assert out.latents.shape[1] == 1
    answer = video_pipe("x2t_video", video=video, fps=24.0, resolution=tasks.VIDEO, max_new_tokens=2)
    assert len(answer.token_ids) <= 2


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_frame_rates_that_are_none_are_refused(video_pipe, fps):
    names_both(refusal(video_pipe, **tasks.arguments("video_edit") | {"fps": fps})[0], fps)


def test_a_clip_without_frames_is_refused(video_pipe):
    refusal(video_pipe, "video_edit", "red", video=np.zeros((0, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "images", [PICTURE, np.zeros((64, 48, 3), np.uint8), torch.zeros(64, 48, 3, dtype=torch.uint8), "cat.png"]
)
@pytest.mark.parametrize("task", ["image_edit", "x2t_image"])
def test_one_picture_is_not_taken_for_a_list(image_pipe, task, images):
    first, second = refusal(image_pipe, **tasks.arguments(task) | {"images": images})
    assert "images is " in first
    assert "images=[picture]" in second


def test_a_stack_of_pictures_is_a_list(image_pipe):
    stack = np.stack([np.array(PICTURE.convert("RGB"))] * 2)
    request = image_pipe.request("subject_image", "a", images=list(stack))
    assert [image.shape[0] for image in request.images] == [1, 1]


def test_a_clip_among_the_images_is_refused(image_pipe):
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    first, second = refusal(image_pipe, "image_edit", "a", images=[clip])
    names_both(first, 5, 1)
    assert "video=" in second


def test_pictures_of_other_types_are_refused(image_pipe):
    assert "float32" in refusal(image_pipe, "image_edit", "a", images=[np.zeros((8, 8, 3), np.float32)])[0]
    assert "str" in refusal(image_pipe, "image_edit", "a", images=["cat.png"])[0]


# Noise


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_noise_is_refused(image_pipe, broken):
    noise = torch.zeros(48, 1, 2, 3)
    noise[5, 0, 1, 1] = broken
    names_both(refusal(image_pipe, "t2i", "a", **SMALL, noise=noise)[0], 1, noise.numel())


@pytest.mark.parametrize(
    "shape", [(48, 1, 3, 2), (16, 1, 2, 3), (48, 2, 3), (2, 48, 1, 2, 3), (48, 2, 2, 3), (1, 1, 48, 1, 2, 3)]
)
def test_noise_of_another_shape_is_refused(image_pipe, shape):
    first, _ = refusal(image_pipe, "t2i", "a", **SMALL, noise=torch.zeros(shape))
    names_both(first, [1, 48, 1, 2, 3], list(shape if len(shape) > 4 else (1, *shape) if len(shape) == 4 else shape))


def test_noise_of_a_batch_has_its_size(image_pipe):
    names_both(refusal(image_pipe, "t2i", "a", **SMALL, noise=torch.zeros(3, 48, 1, 2, 3), batch=2)[0], "[3, ", "[2, ")
    assert image_pipe("t2i", "a", **SMALL, noise=torch.zeros(2, 48, 1, 2, 3), batch=2).latents.shape == (2, 48, 1, 2, 3)


# Numbers


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": -4}, "-4 steps"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"seed": "42"}, "seed is '42'"),
        ({"shift": 0.0}, "0.0"),
        ({"shift": float("nan")}, "nan"),
        ({"batch": 0}, "batch of 0"),
        ({"seed": 2**64}, 2**64),
        ({"seed": 2**64 - 1, "batch": 2}, 2**64 - 1),
        ({"seed": -(2**63) - 1}, -(2**63) - 1),
        ({"sigmas": [1.0]}, "1 sigmas"),
        ({"sigmas": [0.5, 0.7, 0.0]}, "3 sigmas"),
        ({"sigmas": [2.0, 0.0]}, "2.0"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "0.5"),
        ({"sigmas": [1.0, float("nan"), 0.0]}, "nan"),
        ({"sigmas": [1.0, 0.0, -0.1]}, "3 sigmas"),
    ],
)
def test_numbers_out_of_range_are_refused(image_pipe, changed, named):
    assert str(named) in refusal(image_pipe, "t2i", "a", **SMALL | changed)[0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"max_new_tokens": 0}, "0"),
        ({"temperature": -1.0}, "-1.0"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "1.5"),
        ({"batch": 2}, "2"),
        ({"noise": torch.zeros(48, 1, 1, 1)}, "noise"),
    ],
)
def test_answering_out_of_range_is_refused(image_pipe, changed, named):
    assert named in refusal(image_pipe, **tasks.arguments("x2t_image") | changed)[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"renorm": "local"}, "'local' is none of the 3 known ones"),
        ({"uncond_positions": "both"}, "'both'"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"visual_scale": float("inf")}, "visual_scale is inf"),
        ({"interval": (0.9, 0.1)}, "(0.9, 0.1)"),
        ({"interval": (0.4,)}, "(0.4,)"),
        ({"interval": (float("nan"), 1.0)}, "nan"),
    ],
)
def test_guidance_out_of_range_is_refused(options, named):
    assert named in refusal(Guidance, **options)[0]


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, -1])
def test_seeds_of_every_host_draw(image_pipe, seed):
    assert image_pipe("t2i", "a", **SMALL, seed=seed).latents.isfinite().all()


# Tasks and their arguments


def test_an_unknown_task_is_answered_with_all_nine(image_pipe):
    first, second = refusal(image_pipe, "txt2img", "a")
    names_both(first, "'txt2img'", 9)
    assert all(task in second for task in TASKS)


CLIP = np.zeros((5, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("task", "arguments", "numbers", "fitting"),
    [
        ("t2i", {"images": [PICTURE]}, ("no images", 1), "image_edit"),
        ("t2v", {"images": [PICTURE]}, ("no images", 1), "i2v"),
        ("i2v", {}, ("exactly 1", 0), "t2v"),
        ("i2v", {"images": [PICTURE] * 2}, ("exactly 1", 2), "subject_video"),
        ("image_edit", {}, ("at least 1", 0), "t2i"),
        ("subject_image", {"images": []}, ("at least 1", 0), "t2i"),
        ("x2t_image", {}, ("at least 1", 0), ""),
        ("video_edit", {"images": [PICTURE]}, ("no images", 1), "image_edit"),
        ("video_edit", {}, ("1 video", "got 0"), "t2v"),
        ("x2t_video", {}, ("1 video", "got 0"), ""),
        ("t2v", {"video": CLIP}, ("0 video", "got 1"), "video_edit"),
        ("image_edit", {"images": [PICTURE], "video": CLIP}, ("0 video", "got 1"), ""),
    ],
)
def test_inputs_of_another_task_are_refused(image_pipe, task, arguments, numbers, fitting):
    first, second = refusal(image_pipe, task, **arguments)
    names_both(first, task, *numbers)
    assert fitting in second


@pytest.mark.parametrize(
    ("task", "changed", "named"),
    [
        ("x2t_image", {"prompt": "a dog"}, "5 characters"),
        ("x2t_image", {"negative_prompt": "a dog"}, "prompt"),
        ("t2i", {"question": "what?"}, "5 characters"),
        ("t2i", {"given_frames": {0: PICTURE}}, "1 given frames"),
        ("image_edit", {"given_frames": {0: PICTURE}}, "1 given frames"),
        ("x2t_video", {"given_frames": {0: PICTURE}}, "1 given frames"),
        ("t2v", {"resolution": "image_768res"}, "'image_768res'"),
        ("i2v", {"resolution": "image_256res"}, "'image_256res'"),
        ("image_edit", {"resolution": "video_480p"}, "'video_480p'"),
        ("image_edit", {"resolution": "1024"}, "'1024'"),
    ],
)
def test_arguments_of_another_task_are_refused(load_pipeline, task, changed, named):
    assert named in refusal(load_pipeline(tasks.variant(task)), **tasks.arguments(task) | changed)[0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({3: PICTURE}, "3"),
        ({-4: PICTURE}, "-4"),
        ({0: PICTURE, -3: PICTURE}, "2 given frames name only 1"),
        ({0: np.zeros((4, 8, 8, 3), np.uint8)}, "4 pictures where 1"),
        ({1: np.zeros((3, 8, 8, 3), np.uint8)}, "3 pictures where 1 or 4"),
        ({1: "cat.png"}, "str"),
    ],
)
def test_given_frames_that_do_not_fit_are_refused(video_pipe, given, named):
    assert named in refusal(video_pipe, "t2v", "a", **SMALL, num_frames=9, given_frames=given)[0]


def test_wrong_calls_are_refused_before_anything_is_computed(image_pipe):
    parts = image_pipe.components
    hooks = [
        part.register_forward_hook(lambda *_: pytest.fail("the network ran"))
        for part in (parts.model.vae2llm, parts.vision.patch_embed, parts.model.language_model.model.layers[0].self_attn.q_proj)
    ]
    asked = tasks.arguments("x2t_image")
    try:
        for changed in ({"height": 33}, {"noise": torch.zeros(1)}, {"steps": 0}, {"batch": 0}):
            refusal(image_pipe, "t2i", "a", **SMALL | changed)
        for changed in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"noise": torch.zeros(1)}):
            refusal(image_pipe, **asked | changed)
        with pytest.raises(ValueError, match="a prompt, and got a question"):
            image_pipe.stream("t2i", question="what")  # before the first step is asked for
    finally:
        for hook in hooks:
            hook.remove()


def test_an_answer_has_no_frames(image_pipe):
    out = image_pipe(**tasks.arguments("x2t_image"))
    with pytest.raises(ValueError, match="not frames\\.\n"):
        _ = out.frames


def test_a_context_without_segments_is_refused(image_pipe):
    context = type(empty := image_pipe.context(image_pipe.request("t2i", "a")))((), empty.vision)
    names_both(refusal(image_pipe, "x2t_image", context=context)[0], 0)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("t2i", {"prompt": "a red hat"}),
        ("x2t_image", {"question": "what"}),
        ("t2i", {"instruction": "Draw."}),
        ("image_edit", {"images": [flat(32, 32)], "prompt": "red"}),
    ],
)
def test_what_a_context_has_in_it_is_not_said_beside_it(image_pipe, task, said):
    context = image_pipe.context(image_pipe.request("t2i", "a"))
    first, second = refusal(image_pipe, task, **said, context=context)
    names_both(first, 1, len(said))
    assert all(name in first for name in said)
    assert second == "Add them to the context, or leave the context out."


def test_the_first_frame_of_a_clip_is_no_part_of_a_context(video_pipe):
    said = {"images": [flat(32, 48)], "num_frames": 5, "steps": 1, "guidance": Guidance(scale=1.0), "resolution": tasks.VIDEO}
    context = video_pipe.context(video_pipe.request("t2v", "a"))
    out = video_pipe("i2v", context=context, height=32, width=48, **said)
    assert out.latents.shape[1:] == (2, 2, 3)


@pytest.mark.parametrize("given", [4.0, None, {"scale": 4.0}])
def test_guidance_of_another_kind_is_refused(image_pipe, given):
    first, second = refusal(image_pipe, "t2i", "a", guidance=given)
    assert first.startswith("guidance is ")
    assert second == "Pass guidance=Guidance(scale=4.0)."


@pytest.mark.parametrize(
    ("visual", "numbers"),
    [
        (Segment.latents(torch.zeros(16, 1, 2, 3), Modality.SUBJECT), ([16, 1, 2, 3], [48, 1, 2, 3])),
        (Segment.vit(torch.zeros(4, 2048), LatentShape(1, 2, 2)), ([4, 2048], [4, 128])),
    ],
)
def test_visuals_of_another_model_are_refused(image_pipe, visual, numbers):
    context = image_pipe.context(image_pipe.request("t2i", "a")).with_visual(visual).with_text([1])
    names_both(refusal(image_pipe, "t2i", **SMALL, context=context)[0], *numbers)


def test_i2v_takes_one_first_frame(video_pipe):
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="2 first frames"):
        video_pipe.request("i2v", images=[picture], given_frames={0: picture}, num_frames=5, resolution="video_192p")


@pytest.mark.parametrize("size", ["height", "width", "num_frames"])
def test_answers_have_no_size(size, image_pipe):
    with pytest.raises(ValueError, match="draws nothing, and got 1 sizes"):
        image_pipe.request("x2t_image", images=[np.zeros((64, 64, 3), np.uint8)], question="What?", **{size: 64})


def test_a_task_of_the_other_checkpoint_is_noted(image_pipe, caplog):
    with caplog.at_level(logging.WARNING, "lance"):
        image_pipe.request("t2v", "a cat", height=64, width=64, num_frames=5)
    assert "video checkpoint" in caplog.text


@pytest.mark.parametrize(("task", "more"), [("t2i", {"steps": 1}), ("x2t_image", {"temperature": 1.0, "max_new_tokens": 4})])
def test_a_seed_may_be_numpys(image_pipe, task, more):
    found, expected = (image_pipe(**tasks.arguments(task) | more | {"seed": seed}) for seed in (np.int64(3), 3))
    assert found.token_ids == expected.token_ids
    assert found.latents is None or torch.equal(found.latents, expected.latents)
