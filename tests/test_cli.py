"""The command line: all nine tasks, the files that they write, the help, and errors in one line."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import goldens
import numpy as np
import pytest
import tasks
from PIL import Image

from lance_runtime import LancePipeline, media
from lance_runtime import __main__ as command_line
from lance_runtime.__main__ import build_parser, main
from lance_runtime.files import NANO
from lance_runtime.media import PICTURE_SUFFIXES, read_image, read_video, write_image, write_video
from lance_runtime.preprocess import sample_frames
from lance_runtime.prompts import TASKS
from lance_runtime.types import LANCE_3B

MEDIA = goldens.PARITY / "media"
MODEL = ["--model", str(goldens.CHECKPOINT), "--device", "cpu"]
FAST = ["--steps", "1", "--guidance", "1"]
PROMPT = ["--prompt", "the dog in the park"]
EDIT = ["--image", str(MEDIA / "wide.png"), "--resolution", "image_256res"]
SMALL = ["--height", "32", "--width", "48"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clip_file(tmp_path):
    """Six frames at 12 a second, of which the model uses five."""
    path = tmp_path / "clip.mp4"
    write_video(path, tasks.clip()["video"])
    return path


def frames_of(path):
    """Frames uint8 (T, H, W, 3) of a file and its rate, through PyAV."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def said(capsys):
    """The last line on the terminal."""
    return capsys.readouterr().out.strip().split("\n")[-1]


# The nine tasks


@pytest.mark.parametrize(
    ("task", "options", "size"),
    [
        ("t2i", SMALL, (48, 32)),
        ("image_edit", EDIT, None),
        ("subject_image", [*EDIT, "--image", str(MEDIA / "tall.png"), *SMALL], (48, 32)),
    ],
)
def test_image_tasks_write_png(task, options, size, capsys, image_pipe):
    assert main([task, *MODEL, *PROMPT, *FAST, *options]) == 0
    assert said(capsys) == f"{task}.png"
    with Image.open(f"{task}.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        expected = image_pipe.request(**tasks.arguments("image_edit")).target().pixels()
        assert picture.size == (size or (expected.width, expected.height))


@pytest.mark.parametrize(
    ("task", "options", "shape"),
    [
        ("t2v", [*SMALL, "--frames", "9"], (9, 32, 48, 3)),
        ("i2v", ["--image", str(MEDIA / "wide.png"), "--resolution", "video_192p", "--frames", "5"], None),
        ("video_edit", ["--video", "clip.mp4", "--resolution", "video_192p"], None),
        (
            "subject_video",
            ["--image", str(MEDIA / "wide.png"), "--resolution", "video_192p", *SMALL, "--frames", "5"],
            (5, 32, 48, 3),
        ),
    ],
)
def test_video_tasks_write_mp4(task, options, shape, capsys, clip_file, video_pipe):
    assert main([task, *MODEL, *PROMPT, *FAST, *options]) == 0
    assert said(capsys) == f"{task}.mp4"
    frames, rate = frames_of(f"{task}.mp4")
    source = video_pipe.request(**tasks.arguments("video_edit" if task == "video_edit" else "i2v")).target().pixels()
    assert frames.shape == (shape or (*source, 3))
    assert rate == 12


@pytest.mark.parametrize("task", ["x2t_image", "x2t_video"])
def test_questions_are_answered_on_the_terminal(task, capsys, clip_file, load_pipeline):
    preset = ["--resolution", tasks.arguments(task)["resolution"]]
    source = ["--image", str(MEDIA / "wide.png")] if task == "x2t_image" else ["--video", str(clip_file)]
    question = ["--question", "What color is the car?", "--max-new-tokens", "4"]
    assert main([task, *MODEL, *source, *preset, *question]) == 0
    shown = capsys.readouterr().out
    picture = {"images": [read_image(MEDIA / "wide.png")]} if task == "x2t_image" else clip_arguments(clip_file)
    arguments = {"question": "What color is the car?", "max_new_tokens": 4, "resolution": preset[1], **picture}
    assert shown == load_pipeline(tasks.variant(task))(task, **arguments).text + "\n"


def clip_arguments(path):
    return {"video": read_video(path), "fps": 12}


def test_a_clip_is_seen_as_long_as_its_model_sees_one(clip_file, monkeypatch):
    asked = []
    monkeypatch.setattr(command_line, "read_video", lambda path, most: asked.append(most) or read_video(path, most))
    assert main(["x2t_video", "--video", str(clip_file), "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert asked == [LancePipeline.from_pretrained(NANO, "video", "cpu").components.model.config.sizes.seconds]
    assert asked[0] < LANCE_3B.seconds


@pytest.mark.parametrize("task", ["t2i", "x2t_image"])
def test_a_folder_is_no_file_to_write(task, tmp_path, capsys):
    assert main([task, *MODEL, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_every_suffix_that_is_taken_can_be_written(suffix, tmp_path):
    frame = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)
    write_image(tmp_path / f"a{suffix}", frame)
    assert Image.open(tmp_path / f"a{suffix}").size == (32, 16)


def test_an_answer_is_written_where_asked(tmp_path, capsys):
    path = tmp_path / "new" / "answer.txt"
    assert main(["x2t_image", *MODEL, *EDIT, "--max-new-tokens", "3", "--output", str(path)]) == 0
    assert path.read_text("utf-8") == capsys.readouterr().out


def test_a_picture_is_the_pipelines(image_pipe, tmp_path):
    path = tmp_path / "new" / "fox.png"
    assert main(["t2i", *MODEL, *PROMPT, *SMALL, "--steps", "2", "--seed", "7", "--output", str(path)]) == 0
    out = image_pipe("t2i", PROMPT[1], height=32, width=48, steps=2, seed=7)
    np.testing.assert_array_equal(np.array(Image.open(path)), out.frames[0])


def test_a_clip_keeps_its_colours(clip_file):
    found, stored = read_video(clip_file), tasks.clip()["video"][[0, 1, 2, 3, 5]]
    assert found.shape == stored.shape
    error = found.astype(float) - stored
    assert abs(error).mean() < 4
    assert abs(error.mean(axis=(0, 1, 2))).max() < 2  # another matrix or range would shift a channel


def test_of_a_long_video_only_what_is_seen_is_kept(tmp_path, monkeypatch):
    """600 frames at 24 a second: 69 of them, over all of it; no other is ever made an array of."""
    path, made = tmp_path / "long.mp4", []
    shades = (np.arange(600) // 3).astype(np.uint8)[:, None, None, None]
    write_video(path, np.broadcast_to(shades, (600, 16, 16, 3)), 24)
    real = media._upright
    monkeypatch.setattr(media, "_upright", lambda frame: made.append(1) or real(frame))
    found = read_video(path)
    assert found.shape == (69, 16, 16, 3)
    assert len(made) == 69
    expected = [index // 3 for index in sample_frames(600, 24.0)]
    assert abs(found[:, 8, 8, 0].astype(int) - expected).max() <= 4
    # Sampled again by the pipeline, as any video: all of them are kept.
    assert sample_frames(69, 12) == list(range(69))


@pytest.mark.parametrize(("turn", "matrix"), [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_a_video_of_a_phone_is_turned_upright(clip_file, turn, matrix):
    """The header says how the frames are to be turned: the display matrix of an MP4's track."""
    content, upright = bytearray(clip_file.read_bytes()), read_video(clip_file)
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value * 2**16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    clip_file.write_bytes(content)
    np.testing.assert_array_equal(read_video(clip_file), np.rot90(upright, turn, axes=(1, 2)))


@pytest.mark.parametrize("output", [[], ["--output", "one.mp4"]])
def test_a_clip_of_one_frame_is_a_clip(output, capsys):
    assert main(["t2v", *MODEL, *PROMPT, *FAST, *SMALL, "--frames", "1", *output]) == 0
    assert frames_of(said(capsys))[0].shape == (1, 32, 48, 3)


def test_every_option_reaches_the_pipeline(image_pipe):
    options = ["--guidance", "3", "--interval", "0.1", "0.9", "--renorm", "channel", "--uncond-positions", "dense"]
    options += ["--visual-guidance", "1.5", "--negative-prompt", "blur", "--shift", "2", "--instruction", "Draw:"]
    options += ["--renorm-min", "0.5"]
    assert main(["image_edit", *MODEL, *PROMPT, *EDIT, "--steps", "2", "--seed", "3", "--output", "a.png", *options]) == 0
    guidance = tasks.Guidance(
        scale=3, interval=(0.1, 0.9), renorm="channel", renorm_min=0.5, visual_scale=1.5, uncond_positions="dense"
    )
    arguments = {"negative_prompt": "blur", "shift": 2.0, "instruction": "Draw:", "seed": 3, "guidance": guidance, "steps": 2}
    images = {"images": [goldens.image("wide.png")], "resolution": tasks.IMAGE}
    expected = image_pipe("image_edit", PROMPT[1], **images, **arguments)
    np.testing.assert_array_equal(np.array(Image.open("a.png")), expected.frames[0])


def test_a_batch_is_a_file_for_each_seed(image_pipe, capsys):
    assert main(["t2i", *MODEL, *PROMPT, *FAST, *SMALL, "--seed", "7", "--batch", "2", "--output", "deep/a.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(Path("deep", f"a_{seed}.png")) for seed in (7, 8)]
    settings = {"height": 32, "width": 48, "steps": 1, "guidance": tasks.Guidance(scale=1)}
    for seed in (7, 8):
        expected = image_pipe("t2i", PROMPT[1], **settings, seed=seed).frames[0].astype(int)
        assert abs(np.array(Image.open(f"deep/a_{seed}.png")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("option", ["--vit=standalone", "--offload=model", "--offload=layer", "--dtype=bfloat16"])
def test_model_options_are_taken(option, capsys):
    assert main(["x2t_image", *MODEL, *EDIT, "--max-new-tokens", "1", option]) == 0


def test_the_variant_follows_the_task_or_the_wish(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for wish, folder in ((["t2v"], "Lance_3B_Video/"), (["t2i"], "Lance_3B/"), (["t2i", "--variant=video"], "Lance_3B_Video/")):
        assert main([*wish, "--model", str(tmp_path / "empty")]) == 2
        assert folder in capsys.readouterr().err


def test_a_picture_of_words_needs_no_vision_tower(tmp_path, capsys):
    for name in ("Lance_3B", "Wan2.2_VAE.pth"):
        (tmp_path / name).symlink_to(goldens.CHECKPOINT / name)
    small = ["--model", str(tmp_path), "--height", "32", "--width", "48", "--steps", "1", "--device", "cpu"]
    out = tmp_path / "a.png"
    assert main(["t2i", "--prompt", "a fox", *small, "--output", str(out)]) == 0
    capsys.readouterr()
    assert main(["x2t_image", "--prompt", "what", "--image", str(out), "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "The vision tower was not found" in capsys.readouterr().err


def test_progress_is_shown(capsys):
    assert main(["t2i", *MODEL, *PROMPT, *SMALL, "--steps", "3"]) == 0
    assert "3/3" in capsys.readouterr().err


# Help


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for task in TASKS:
        assert any(line.strip().startswith(f"{task} ") for line in shown.split("\n")), task
    assert "python -m lance_runtime t2i --model" in shown
    assert "bytedance-research/Lance" in shown
    options = [name for action in build_parser()._actions for name in action.option_strings]
    assert all(option in shown for option in options)
    assert all(action.help for action in build_parser()._actions)


# Errors


def failed(arguments, capsys):
    """The one line that a failing command leaves."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    assert shown.err.startswith("error: ")
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "TASK"),
        (["txt2img", *MODEL], "txt2img"),
        (["t2i", *MODEL, "--colour", "red"], "--colour"),
        (["t2i", *MODEL, "--steps", "many"], "many"),
        (["t2i", *MODEL, "--renorm", "local"], "local"),
        (["t2i", *MODEL, "--height", "100"], "100"),
        (["t2i", *MODEL, "--steps", "0"], "0 steps"),
        (["t2i", *MODEL, "--batch", "0"], "batch of 0"),
        (["t2i", *MODEL, "--interval", "0.9", "0.1"], "(0.9, 0.1)"),
        (["t2i", *MODEL, *EDIT], "no images, and got 1"),
        (["image_edit", *MODEL], "at least 1 image, and got 0"),
        (["image_edit", *MODEL, "--image", "nowhere.png"], "nowhere.png"),
        (["image_edit", *MODEL, "--image", str(goldens.PARITY / "cases.json")], "cases.json"),
        (["video_edit", *MODEL, "--video", "nowhere.mp4"], "nowhere.mp4"),
        (["video_edit", *MODEL, "--video", str(goldens.PARITY / "cases.json")], "cases.json"),
        (["x2t_image", *MODEL, *EDIT, "--temperature", "-1"], "-1"),
        (["t2i", "--model", "nowhere"], "nowhere"),
        (["t2i", *MODEL[:2], "--device", "abacus"], "abacus"),
        (["t2i", *MODEL, *SMALL, *FAST, "--output", "picture.docx"], "docx"),
        (["t2v", *MODEL, *SMALL, *FAST, "--output", "clip.png"], "clip.png"),
        (["t2i", *MODEL, *SMALL, *FAST, "--output", "picture"], "''"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, named, capsys):
    assert named in failed(arguments, capsys)


def test_an_absent_accelerator_is_one_line(capsys):
    import torch

    absent = "cuda" if not torch.cuda.is_available() else "xpu"
    assert absent in failed(["t2i", *MODEL[:2], "--device", absent], capsys)


def test_too_little_memory_is_one_line_with_a_way_out(capsys, monkeypatch):
    import torch

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nSee the documentation.")

    monkeypatch.setattr("lance_runtime.__main__.LancePipeline.from_pretrained", out_of_memory)
    assert "Tried to allocate 1 GiB. Add --offload layer" in failed(["t2i", "--prompt", "a"], capsys)


def test_the_command_line_by_its_path(tmp_path):
    """Portable packages of Windows have a Python that is isolated from the folder that it is started in."""
    script = Path(__file__).parents[1] / "lance.py"
    done = subprocess.run([sys.executable, "-I", script, "download", "--help"], cwd=tmp_path, capture_output=True, check=True)
    assert b"--variant" in done.stdout


def test_a_damaged_picture_is_one_line(tmp_path, capsys):
    (tmp_path / "half.png").write_bytes((MEDIA / "wide.png").read_bytes()[:500])
    assert "half.png" in failed(["image_edit", *MODEL, "--image", "half.png"], capsys)


def test_a_picture_with_a_broken_chunk_is_one_line(tmp_path, capsys):
    """Pillow calls it a SyntaxError."""
    whole = (MEDIA / "wide.png").read_bytes()
    start = whole.index(b"IDAT")
    length = int.from_bytes(whole[start - 4 : start], "big")
    data, rest = whole[start + 4 : start + 4 + length], whole[start + 8 + length :]
    parts = b"".join(chunk(name, part) for name, part in ((b"IDAT", data[:99]), (b"\0DAT", data[99:])))
    (tmp_path / "chunk.png").write_bytes(whole[: start - 4] + parts + rest)
    assert "chunk.png" in failed(["image_edit", *MODEL, "--image", "chunk.png"], capsys)


def chunk(name, data):
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def test_a_picture_beyond_reason_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "wide.png is too large a picture" in failed(["image_edit", *MODEL, *EDIT], capsys)


def test_a_video_that_can_be_seen_through_is_laid_on_white(tmp_path):
    frames = [Image.new("RGBA", (32, 32), (200, 0, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "clear.gif", save_all=True, append_images=frames[1:], duration=1000, disposal=2)
    read = read_video(tmp_path / "clear.gif")
    assert read.shape[1:] == (32, 32, 3)
    assert (read[0] == 255).all()
    assert read[-1, 0, 0].tolist() == [200, 0, 0]


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "lance.safetensors").write_bytes(b"1234")
    assert "lance.safetensors (4 bytes)" in failed(["t2i", "--model", "lance.safetensors"], capsys)


def test_a_failure_leaves_no_file(tmp_path, capsys):
    failed(["t2i", *MODEL, "--height", "100"], capsys)
    assert list(tmp_path.iterdir()) == []


# As a user starts it


def module(*arguments):
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "lance_runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=300)


def test_an_answer_that_the_terminal_cannot_write_is_not_lost(tmp_path):
    root, code = (
        str(Path(__file__).parents[1]),
        "from lance_runtime import __main__ as m; m.run = lambda o: '\\u7ea2'; m.main(['t2i'])",
    )
    told = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=told, check=True)
    assert done.stdout == "\\u7ea2\n"


def test_as_a_module(tmp_path):
    result = module("t2i", *MODEL, *PROMPT, *FAST, *SMALL, "--output", str(tmp_path / "a.png"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'a.png'}\n"
    assert Image.open(tmp_path / "a.png").size == (48, 32)
