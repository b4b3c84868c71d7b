"""Weights over a real HTTP server that speaks the hub's protocol: first, resumed, repeated, damaged, refused, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from goldens import CHECKPOINT
from hub_server import serve
from safetensors.torch import save_file

from lance_runtime.__main__ import main
from lance_runtime.commands import download_parser
from lance_runtime.download import Hub, download, make_plan, models_around, readable
from lance_runtime.files import VARIANT_FOLDERS, find_sources

pytest.importorskip("huggingface_hub")

MODEL, VAE, VIT = "Lance_3B/model.safetensors", "Wan2.2_VAE.pth", "Qwen2.5-VL-ViT/vit.safetensors"
TEXTS = ("llm_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
IMAGE = [f"diffusion_models/Lance_3B/{name}" for name in (*TEXTS, "model.safetensors")]
VIDEO = [name.replace("Lance_3B", "Lance_3B_Video") for name in IMAGE]
TOWER = ["text_encoders/Qwen2.5-VL-ViT/config.json", f"text_encoders/{VIT}"]
PLACES = {"image": [*IMAGE, *TOWER, f"vae/{VAE}"], "video": [*VIDEO, f"vae/{VAE}"]}
PLACES["all"] = [*IMAGE, *VIDEO, *TOWER, f"vae/{VAE}"]
CHUNK = 10 << 20  # what huggingface_hub writes at a time
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def tree(tmp_path):
    """The hub's repository: the tiny checkpoint, and what else a repository holds."""
    folder = tmp_path / "repository"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "README.md").write_text("a card")
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.png").write_bytes(b"png")
    return folder


@pytest.fixture
def hub(tree):
    with serve(tree) as running:
        yield running


@pytest.fixture
def large_hub(tree):
    """Weights of 24 MB, which huggingface_hub writes in three chunks."""
    (tree / MODEL).write_bytes(os.urandom(24 << 20))
    with serve(tree) as running:
        yield running


def fetch(hub, models, variant="image"):
    """As the command does it; returns what it said."""
    said = []
    remote = Hub(hub.url)
    plan = make_plan(models, variant, remote)
    said += plan.lines()
    download(plan, remote, said.append)
    return said


def found(models):
    return sorted(path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file())


def command(hub, models, *options):
    """The command line as a user starts it."""
    words = [sys.executable, "-m", "lance_runtime", "download", "--to", str(models), *options]
    environment = {**os.environ, "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("variant", ["image", "video", "all"])
def test_a_variant_goes_to_comfyuis_own_folders(variant, hub, models, tree):
    fetch(hub, models, variant)
    assert found(models) == sorted(PLACES[variant])
    for name in PLACES[variant]:
        assert (models / name).read_bytes() == (tree / name.split("/", 1)[1]).read_bytes()


def test_the_command_says_what_it_needs_before_it_starts(hub, models):
    process = command(hub, models)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = shown.splitlines()
    assert lines[0].split() == ["1.9", "MB", "diffusion_models/Lance_3B/model.safetensors"]
    statement = next(line for line in lines if "to fetch into" in line)
    assert statement.startswith("4.6 MB to fetch into")
    assert "are free" in statement
    assert lines.index(statement) < lines.index(f"checking {MODEL}")
    assert lines[-1] == f"9 files of the image variant are complete in {models}"
    assert found(models) == sorted(PLACES["image"])


def test_complete_files_are_checked_and_not_fetched_again(hub, models):
    fetch(hub, models)
    hub.sent.clear()
    said = fetch(hub, models)
    assert hub.sent == []
    assert any(line.startswith("0 bytes to fetch") for line in said)
    assert {f"checking {MODEL}", f"checking {VIT}", f"checking {VAE}"} < set(said)
    fetch(hub, models, "all")  # the video checkpoint joins the rest
    assert {sent.name.split("/")[0] for sent in hub.sent} == {"Lance_3B_Video"}


PAGE_NAMES = {  # what a template's list of missing models saves the hub's files as
    MODEL: "diffusion_models/Lance_3B.safetensors",
    "Lance_3B_Video/model.safetensors": "diffusion_models/Lance_3B_Video.safetensors",
    VIT: "text_encoders/qwen2.5_vl_vit.safetensors",
}


def save_as_the_page_does(tree, models):
    for name, place in PAGE_NAMES.items():
        (models / place).parent.mkdir(exist_ok=True)
        shutil.copy(tree / name, models / place)


def test_what_the_page_saved_is_not_fetched_again(hub, models, tree, tmp_path):
    save_as_the_page_does(tree, models)
    said = fetch(hub, models, "all")
    assert not set(PAGE_NAMES) & {sent.name for sent in hub.sent}
    assert any(line.endswith("diffusion_models/Lance_3B.safetensors  is there") for line in said)
    assert f"checking {MODEL}" in said
    for variant in ("image", "video"):  # with the small files that the page did not bring
        sources = find_sources(models, variant)
        assert sources.model.path == models / "diffusion_models" / f"{VARIANT_FOLDERS[variant]}.safetensors"
        assert sources.tokenizer.encode("a fox") == find_sources(tree, variant).tokenizer.encode("a fox")


def test_a_folder_of_that_name_need_not_hold_a_tokenizer(models, tree, tmp_path):
    save_as_the_page_does(tree, models)
    shutil.copy(tree / VAE, models / VAE)
    (models / "diffusion_models" / "Lance_3B").mkdir()
    with pytest.raises(FileNotFoundError, match=r"not found in .*diffusion_models \(nor"):
        find_sources(models, "image")
    around = tmp_path / "comfy" / "text_encoders" / "qwen25_tokenizer"
    shutil.copytree(tree / "Lance_3B", around, ignore=shutil.ignore_patterns("*.safetensors"))
    assert len(find_sources(models, "image").tokenizer) == len(find_sources(tree, "image").tokenizer)


def test_what_the_page_saved_damaged_is_named(hub, models, tree):
    save_as_the_page_does(tree, models)
    place = models / PAGE_NAMES[MODEL]
    place.write_bytes(bytes(place.stat().st_size))
    with pytest.raises(ValueError, match=r"diffusion_models.Lance_3B\.safetensors has the hash"):
        fetch(hub, models)


def test_another_file_under_the_pages_name_is_left_alone(hub, models):
    place = models / PAGE_NAMES[MODEL]
    place.parent.mkdir()
    place.write_bytes(b"quantised, say")
    fetch(hub, models)
    assert (models / "diffusion_models" / MODEL).is_file()
    assert place.read_bytes() == b"quantised, say"


def test_comfyuis_own_file_of_the_vae_serves(hub, models, tree):
    place = models / "vae" / "wan2.2_vae.safetensors"
    place.parent.mkdir()
    save_file(torch.load(tree / VAE), place)
    fetch(hub, models)
    assert VAE not in {sent.name for sent in hub.sent}
    assert find_sources(models, "image").vae == place


def test_a_dropped_connection_goes_on_where_it_broke(large_hub, models):
    large_hub.cut_after[MODEL] = 15 << 20
    fetch(large_hub, models)
    ranges = [sent.range for sent in large_hub.sent if sent.name == MODEL]
    assert ranges == [None, f"bytes={CHUNK}-"]


def test_a_killed_download_is_resumed_by_the_next(large_hub, models, tree):
    """huggingface_hub deletes its own partial files; ours wait beside the target, under the hash of their content."""
    large_hub.stall_after[MODEL] = 2 * CHUNK + 5
    process = command(large_hub, models)
    try:
        deadline = time.monotonic() + 60
        while not (parts := list(models.rglob("*.part"))) or parts[0].stat().st_size < 2 * CHUNK:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    assert parts[0].parent == models / "diffusion_models" / "Lance_3B"
    large_hub.sent.clear()
    said = fetch(large_hub, models)
    assert "21.0 MB are there" in said[0]
    (again,) = [sent for sent in large_hub.sent if sent.name == MODEL]
    assert again == (MODEL, f"bytes={2 * CHUNK}-", (24 << 20) - 2 * CHUNK)
    assert (models / "diffusion_models" / MODEL).read_bytes() == (tree / MODEL).read_bytes()
    assert list(models.rglob("*.part")) == []


def test_a_part_that_is_whole_is_only_checked(hub, models, tree):
    plan = make_plan(models, "image", Hub(hub.url))
    part = plan.files[0].part(models)
    part.parent.mkdir(parents=True)
    shutil.copy(tree / MODEL, part)
    fetch(hub, models)
    assert MODEL not in {sent.name for sent in hub.sent}
    assert not part.exists()


@pytest.mark.parametrize("name", [MODEL, VAE, "Lance_3B/llm_config.json"])
def test_a_wrong_hash_is_refused_and_the_file_removed(name, hub, models):
    hub.damaged.add(name)
    with pytest.raises(ValueError, match=f"{name} arrived with the hash .* it was removed") as error:
        fetch(hub, models)
    assert str(error.value).count("\n") == 1
    assert not [place for place in found(models) if place.endswith((name, ".part"))]
    hub.damaged.clear()
    fetch(hub, models)
    assert found(models) == sorted(PLACES["image"])


@pytest.mark.parametrize("content", [b"cut off", None])
def test_another_file_of_that_name_is_never_overwritten(content, hub, models, tree):
    place = models / "vae" / VAE
    place.parent.mkdir()
    size = (tree / VAE).stat().st_size
    place.write_bytes(content or bytes(size))
    named = f"has 7 bytes .* says {size}" if content else "has the hash"
    with pytest.raises(ValueError, match=named) as error:
        fetch(hub, models)
    assert "Move it away" in str(error.value).split("\n")[1]
    assert place.read_bytes() == (content or bytes(size))


def test_too_little_disk_is_refused_before_anything_is_fetched(hub, models, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1_000_000))
    with pytest.raises(ValueError, match=r"4\.6 MB are to be fetched and 1\.0 MB are free") as error:
        fetch(hub, models)
    assert "--to" in str(error.value).split("\n")[1]
    assert hub.sent == []
    assert found(models) == []


def test_a_full_disk_on_the_way_is_not_called_a_network(hub, models):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    remote = Hub(hub.url)
    file = make_plan(models, "image", remote).files[0]
    part = file.part(models)
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        remote.fetch(file, part)
    assert "cannot be reached" not in str(error.value)


def test_no_network_is_one_clear_line(models):
    process = command("http://127.0.0.1:9", models)
    shown, errors = process.communicate(timeout=180)
    assert process.returncode == 2
    assert shown == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "bytedance-research/Lance cannot be reached" in line
    assert "HF_ENDPOINT" in line


def test_offline_mode_is_named(hub, models, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process = command(hub, models)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "OfflineModeIsEnabled" in errors
    assert "HF_HUB_OFFLINE" in errors


def test_a_repository_without_the_weights_is_named(hub, models, tree):
    (tree / MODEL).unlink()
    with pytest.raises(ValueError, match=r"no Lance_3B/model\.safetensors and no .*ema\.safetensors among its 16"):
        fetch(hub, models)


def test_other_names_of_the_weights_are_taken(hub, models, tree):
    (tree / MODEL).rename(tree / "Lance_3B" / "ema.safetensors")
    fetch(hub, models)
    assert (models / "diffusion_models/Lance_3B/ema.safetensors").is_file()


def test_what_was_fetched_runs(hub, models, tmp_path):
    """ComfyUI's folders are a --model too."""
    fetch(hub, models, "all")
    for variant, vit in (("image", "auto"), ("video", "auto"), ("video", "standalone")):
        sources = find_sources(models, variant, vit)
        assert sources.vae == models / "vae" / VAE
        assert sources.vision.depth == 4  # the tiny tower's, from text_encoders/
    output = tmp_path / "a.png"
    size = ["--height", "32", "--width", "48", "--steps", "1", "--device", "cpu"]
    assert main(["t2i", "--model", str(models), "--prompt", "a fox", *size, "--output", str(output)]) == 0
    assert output.is_file()


# The command line around it


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["download", "--to", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_without_a_comfyui_around_the_folder_is_asked_for(capsys, tmp_path):
    assert models_around(tmp_path / "lance_runtime" / "download.py") is None
    assert main(["download"]) == 2
    assert "--to .../ComfyUI/models" in capsys.readouterr().err


def test_the_comfyui_around_the_pack_is_found(tmp_path):
    (tmp_path / "models").mkdir()
    assert models_around(tmp_path / "custom_nodes" / "lance-native" / "lance_runtime" / "download.py") == tmp_path / "models"


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["download", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(action.help for action in download_parser()._actions)
    assert "--variant" in shown
    assert "--to" in shown


@pytest.mark.parametrize("size", ["--variant=both", "--colour=red"])
def test_wrong_options_are_one_line(size, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["download", size])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sizes_are_said_as_disks_are_sold():
    assert [readable(size) for size in (12_370_411_616, 1_945_040, 2794, 9)] == ["12.4 GB", "1.9 MB", "2.8 kB", "9 bytes"]


def test_nothing_of_the_network_is_imported_before_it_is_needed():
    code = "import sys, lance_runtime.download, lance_runtime.__main__; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
