"""Files: the real model's shape, loading without waste, every layout that people have, and what is refused."""

import argparse
import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import goldens
import pytest
import tasks
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lance_runtime import LancePipeline
from lance_runtime import files as files_room
from lance_runtime.checkpoint import (
    HEADER_TENSOR,
    POSITION_TABLE,
    TensorFile,
    guess_variant,
    identify,
    pack_json,
)
from lance_runtime.components import assign, build_lance, load_components
from lance_runtime.config import LanceConfig, VisionConfig
from lance_runtime.dequantize import plain_tensors, plain_vit_tensors
from lance_runtime.files import find_sources
from lance_runtime.model.vision import build_vision
from lance_runtime.tokenizer import LanceTokenizer

MODEL = goldens.CHECKPOINT / "Lance_3B" / "model.safetensors"
VIDEO_MODEL = goldens.CHECKPOINT / "Lance_3B_Video" / "model.safetensors"
VIT = goldens.CHECKPOINT / "Qwen2.5-VL-ViT" / "vit.safetensors"
VAE = goldens.CHECKPOINT / "Wan2.2_VAE.pth"
CPU = torch.device("cpu")
IMAGE_TABLE, VIDEO_TABLE = 4096 * 2048, 126_976 * 2048


def load(folder, variant="image", **options):
    return LancePipeline.from_pretrained(folder, variant, device="cpu", **{"dtype": torch.float32, **options})


@pytest.fixture
def tree(tmp_path):
    """A copy of the tiny checkpoint's tree to change."""
    return Path(shutil.copytree(goldens.CHECKPOINT, tmp_path / "Lance"))


@pytest.fixture(scope="module")
def drawn(image_pipe):
    """What the tiny checkpoint draws."""
    return image_pipe(**tasks.arguments("t2i")).latents


def rewrite(path, change, metadata=None):
    """Save a safetensors file again with its tensors changed."""
    save_file(change(load_file(path)), path, metadata=metadata)


def refusal(call, *args, **options):
    """Both lines of the error: what is wrong, and what to do."""
    with pytest.raises((ValueError, FileNotFoundError), match="\n") as caught:
        call(*args, **options)
    first, second = str(caught.value).split("\n")
    assert first
    assert second.endswith(".")
    return str(caught.value)


# The real model's shape


@pytest.fixture(scope="module")
def real():
    return build_lance(LanceConfig())


def elements(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_the_image_checkpoint_has_its_tensors_and_elements(real):
    assert len(real.state_dict()) + 1 == 1021
    assert elements(real) + IMAGE_TABLE == 6_185_205_808
    assert 2 * (elements(real) + IMAGE_TABLE) == 12_370_411_616


def test_the_video_checkpoint_has_its_tensors_and_elements(real):
    vision = build_vision(VisionConfig())
    assert len(vision.state_dict()) == 390
    assert len(real.state_dict()) + 1 + 390 == 1411
    assert elements(real) + elements(vision) + VIDEO_TABLE == 7_105_548_336


def test_the_real_models_names_are_the_checkpoints(real):
    stored = [name for name in TensorFile(MODEL) if name != POSITION_TABLE]
    layers = [name for name in stored if ".layers.0." in name]
    expected = {name for name in stored if ".layers." not in name}
    expected |= {name.replace(".layers.0.", f".layers.{index}.") for name in layers for index in range(36)}
    assert set(real.state_dict()) == expected
    assert {name.removeprefix("vit_model.") for name in TensorFile(VIDEO_MODEL) if name.startswith("vit_model.")} == set(
        TensorFile(VIT)
    )


def test_the_real_model_takes_no_memory(real):
    assert all(tensor.is_meta for tensor in (*real.parameters(), *real.buffers()))
    assert not any(parameter.requires_grad for parameter in real.parameters())


def test_configurations_from_json_and_from_shapes_are_the_real_one(real):
    released = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    }
    assert LanceConfig.from_json(released) == LanceConfig()
    assert LanceConfig.from_shapes({name: tuple(t.shape) for name, t in real.state_dict().items()}) == LanceConfig()


def test_sections_that_do_not_fill_the_head_are_refused():
    assert "[16, 24, 23] covers 126 of 128" in refusal(LanceConfig, mrope_section=(16, 24, 23))


# Loading


class Made(TorchDispatchMode):
    """Counts the elements outside the meta device that operations filled at random or with a constant."""

    filled = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if re.search(r"uniform|normal|rand|fill|zero|ones", func.__name__):
            self.filled += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta)
        return out


def test_loading_initialises_nothing():
    sources = find_sources(goldens.CHECKPOINT, "video")
    with Made() as made:
        load_components(sources, torch.float32, CPU, CPU)
    assert made.filled == 0
    with Made() as made:  # the count counts: an ordinary layer fills its weights
        torch.nn.Linear(3, 5)
    assert made.filled >= 15


class Watched(TensorFile):
    """A file that knows which of its tensors were read, and how many of them were alive when the next one was."""

    def __init__(self, path):
        super().__init__(path)
        self.read, self.alive, self._refs = [], 0, []

    def __getitem__(self, name):
        self.alive = max(self.alive, sum(ref() is not None for ref in self._refs))
        tensor = super().__getitem__(name)
        self.read.append(name)
        self._refs.append(weakref.ref(tensor))
        return tensor


def test_opening_reads_no_tensor():
    file = Watched(VIDEO_MODEL)
    plain_tensors(file), plain_vit_tensors(file), identify(file), guess_variant(file)
    assert file.read == []


def test_each_tensor_is_read_once_and_let_go_before_the_next():
    file = Watched(VIDEO_MODEL)
    model = build_lance(find_sources(goldens.CHECKPOINT, "video").config)
    gc.disable()
    try:
        assign(model, plain_tensors(file), torch.float32, CPU)
    finally:
        gc.enable()
    assert sorted(file.read) == sorted(model.state_dict())
    assert file.alive == 0
    assert not any(name.startswith(("vit_model.", POSITION_TABLE)) for name in file.read)


def test_the_watch_sees_tensors_that_are_kept():
    file = Watched(MODEL)
    kept = list(file.values())
    assert file.alive == len(kept) - 1


def mapped(tensor, path):
    """Whether a tensor's memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path.resolve()))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the kernel's list of mappings")
def test_weights_that_need_no_cast_stay_in_the_files():
    pipe = load(goldens.CHECKPOINT, "video", dtype=torch.bfloat16).components
    for module, path in ((pipe.model, VIDEO_MODEL), (pipe.vision, VIDEO_MODEL)):
        assert all(mapped(parameter, path) for parameter in module.parameters())
    stored = TensorFile(VAE)
    assert mapped(stored["conv1.weight"], VAE)
    as_stored = load(goldens.CHECKPOINT, dtype=stored["conv1.weight"].dtype).components.vae.module
    assert all(mapped(parameter, VAE) for parameter in as_stored.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_on_the_way_in(dtype):
    parts = load(goldens.CHECKPOINT, "video", dtype=dtype).components
    for module in parts.modules:
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert parts.dtype == parts.engine.dtype == dtype


def test_half_precision_draws_nearly_the_same(drawn):
    half = load(goldens.CHECKPOINT, dtype=torch.bfloat16)(**tasks.arguments("t2i"))
    assert half.latents.dtype == torch.float32
    assert 0 < (half.latents - drawn).abs().mean() < 0.05
    assert half.frames.shape == (1, 48, 64, 3)


def test_a_cpu_gets_float32_without_asking():
    assert LancePipeline.from_pretrained(goldens.CHECKPOINT, device="cpu").components.dtype == torch.float32


# Layouts


def draws(folder, drawn, **options):
    return torch.equal(load(folder, **options)(**tasks.arguments("t2i")).latents, drawn)


def test_ema_weights_serve_where_there_are_no_others(tree, drawn):
    shutil.move(tree / "Lance_3B" / "model.safetensors", tree / "Lance_3B" / "ema.safetensors")
    assert draws(tree, drawn)


def test_model_weights_go_before_ema(tree, drawn):
    shutil.copy(MODEL, tree / "Lance_3B" / "ema.safetensors")
    rewrite(tree / "Lance_3B" / "ema.safetensors", lambda tensors: {k: v * 0 for k, v in tensors.items()})
    assert draws(tree, drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_either_precision_are_the_same(tree, drawn, dtype):
    rewrite(tree / "Lance_3B" / "model.safetensors", lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    assert draws(tree, drawn)


@pytest.mark.parametrize("rows", [0, 7, 500])
def test_the_position_table_does_not_matter(tree, drawn, rows):
    def change(tensors):
        del tensors[POSITION_TABLE]
        return tensors | ({POSITION_TABLE: torch.full((rows, 128), 9.0)} if rows else {})

    rewrite(tree / "Lance_3B" / "model.safetensors", change)
    assert draws(tree, drawn)


PREFIXES = [
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "module.",
    "_orig_mod.module.",
    "ema.",
    "transformer.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_file_that_others_saved_loads(tree, drawn, prefix):
    rewrite(tree / "Lance_3B" / "model.safetensors", lambda tensors: {prefix + k: v for k, v in tensors.items()})
    assert draws(tree, drawn)


def test_a_video_checkpoint_that_others_saved_has_its_tower(tree):
    path = tree / "Lance_3B_Video" / "model.safetensors"
    rewrite(path, lambda tensors: {"module." + k: v for k, v in tensors.items()})
    files = (path, goldens.CHECKPOINT / "Lance_3B_Video" / "model.safetensors")
    found, expected = (plain_vit_tensors(TensorFile(file)) for file in files)
    assert guess_variant(TensorFile(path)) == "video"
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_wrapped_layers_and_old_buffers_do_not_matter(tree, drawn):
    def change(tensors):
        renamed = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in tensors.items()}
        return renamed | {"language_model.model.rotary_emb.inv_freq": torch.ones(16)}

    rewrite(tree / "Lance_3B" / "model.safetensors", change)
    assert draws(tree, drawn)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "module"])
def test_a_wrapped_language_model_is_no_conversion(tree, drawn, wrapper):
    def change(tensors):
        return {name.replace("language_model.", f"language_model.{wrapper}."): tensor for name, tensor in tensors.items()}

    rewrite(tree / "Lance_3B" / "model.safetensors", change)
    assert draws(tree, drawn)


def test_weights_and_their_average_in_one_file_are_refused(tree):
    path = tree / "Lance_3B" / "model.safetensors"
    rewrite(path, lambda tensors: tensors | {"ema." + name: tensor.clone() for name, tensor in tensors.items()})
    message = refusal(load, tree)
    assert "2 tensors of the file are one weight" in message
    assert "Keep one set" in message


@pytest.mark.parametrize("key", [None, "state_dict", "model", "ema", "module.state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".PT", ".bin", ".ckpt"])
def test_pickles_under_every_name_are_read(tmp_path, suffix, key):
    expected = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.bfloat16)}
    stored: dict = expected
    for name in reversed([] if key is None else key.split(".")):
        stored = {"step": 7, name: stored}
    torch.save(stored, tmp_path / f"old{suffix}")
    found = TensorFile(tmp_path / f"old{suffix}")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert set(found) == set(expected)


def test_settings_beside_the_weights_of_a_pickle_do_not_matter(tmp_path):
    torch.save({"a": torch.ones(2), "model": {"lr": 1.0}}, tmp_path / "flat.pth")
    torch.save({"state_dict": {"lr": 1.0}, "model": {"a": torch.ones(2)}}, tmp_path / "inside.pth")
    torch.save({"model": {"a": torch.ones(2)}, "step": torch.tensor(5)}, tmp_path / "loose.pth")
    for name in ("flat", "inside", "loose"):
        assert list(TensorFile(tmp_path / f"{name}.pth")) == ["a"]


TEXTS = ("the dog", "  a red hat, \n and a cat ", "A cat's “poster” 1234", "把背景换成草地。", "<|im_end|> as text")


@pytest.mark.parametrize(
    "without", [["tokenizer_config.json"], ["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]]
)
def test_every_set_of_tokenizer_files_counts_alike(tree, image_pipe, without):
    for name in without:
        (tree / "Lance_3B" / name).unlink()
    found, expected = LanceTokenizer.from_folder(tree / "Lance_3B"), image_pipe.components.tokenizer
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    if without != ["tokenizer.json", "tokenizer_config.json"]:  # the tiny tokenizer numbers its added tokens in its own way
        template = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>"
        assert found.encode_template(template) == expected.encode_template(template)
        assert len(found) == len(expected)
        assert [found.decode([index]) for index in range(len(found))] == [
            expected.decode([index]) for index in range(len(found))
        ]


def test_a_bare_vocabulary_gets_qwens_added_tokens_behind_it(tree):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tree / "Lance_3B" / name).unlink()
    found = LanceTokenizer.from_folder(tree / "Lance_3B")
    first = len(json.loads((tree / "Lance_3B" / "vocab.json").read_text("utf-8")))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    offsets = [number - 151_643 for number in (151_643, 151_644, 151_645, 151_652, 151_653, 151_656)]  # the real ids
    assert [found.encode_template(name) for name in names] == [[first + offset] for offset in offsets]


def embeddings(pipe):
    context = pipe.context(pipe.request(**tasks.arguments("x2t_video")))
    return context.visuals[0].values


def test_the_two_vision_towers_see_differently_and_the_checkpoints_own_is_the_default():
    auto, own, separate = (
        embeddings(load(goldens.CHECKPOINT, "video", vit=vit)) for vit in ("auto", "checkpoint", "standalone")
    )
    assert torch.equal(auto, own)
    assert (own - separate).abs().max() > 1e-2
    assert not torch.equal(goldens.tensors("x2t_video_vqa")["vit_embeds_0"][: len(own)], separate)


def test_the_image_checkpoint_takes_the_separate_tower():
    assert find_sources(goldens.CHECKPOINT, "image").vit.path == VIT
    assert "0 tensors of a vision tower" in refusal(load, goldens.CHECKPOINT, vit="checkpoint")


def test_a_video_checkpoint_does_without_the_separate_tower(tree):
    (tree / "Qwen2.5-VL-ViT" / "vit.safetensors").unlink()
    assert find_sources(tree, "video").vit is None
    assert "vit.safetensors" in refusal(find_sources, tree, "video", "standalone")


# Single files


METADATA = {
    "llm_config_json": "llm_config.json",
    "tokenizer_json": "tokenizer.json",
    "tokenizer_config_json": "tokenizer_config.json",
    "vocab_json": "vocab.json",
    "merges_txt": "merges.txt",
}


@pytest.fixture
def flat(tmp_path):
    """One folder of single files, everything else in their headers."""
    for folder, name in (
        ("Lance_3B", "bytedance_lance_3b.safetensors"),
        ("Lance_3B_Video", "bytedance_lance_3b_video.safetensors"),
    ):
        header = {key: (goldens.CHECKPOINT / folder / file).read_text("utf-8") for key, file in METADATA.items()}
        save_file(load_file(goldens.CHECKPOINT / folder / "model.safetensors"), tmp_path / name, metadata=header)
    config = (goldens.CHECKPOINT / "Qwen2.5-VL-ViT" / "config.json").read_text("utf-8")
    save_file(load_file(VIT), tmp_path / "qwen_vit.safetensors", metadata={"config": config})
    save_file(torch.load(VAE, weights_only=True), tmp_path / "wan2.2_vae.safetensors")
    return tmp_path


def test_a_flat_folder_of_single_files_is_a_model(flat, drawn):
    assert draws(flat, drawn)
    assert find_sources(flat, "image").vit.path.name == "qwen_vit.safetensors"


def test_a_single_file_is_a_model_with_what_lies_beside_it(flat, drawn, image_pipe):
    assert draws(flat / "bytedance_lance_3b.safetensors", drawn)
    arguments = tasks.arguments("x2t_image")
    assert load(flat / "bytedance_lance_3b.safetensors")(**arguments).token_ids == image_pipe(**arguments).token_ids


def test_a_flat_folder_holds_both_variants(flat):
    assert find_sources(flat, "video").model.path.name == "bytedance_lance_3b_video.safetensors"
    assert find_sources(flat, "image").model.path.name == "bytedance_lance_3b.safetensors"
    assert "Variant 'audio'" in refusal(find_sources, flat, "audio")


@pytest.fixture
def comfyui(tmp_path):
    """ComfyUI's folders with what its page downloads: the hub's files under flat names, without anything beside them."""
    models, tokenizer = tmp_path / "models", tmp_path / "comfy" / "text_encoders" / "qwen25_tokenizer"
    for name, source in (
        ("diffusion_models/Lance_3B.safetensors", goldens.CHECKPOINT / "Lance_3B" / "model.safetensors"),
        ("diffusion_models/Lance_3B_Video.safetensors", goldens.CHECKPOINT / "Lance_3B_Video" / "model.safetensors"),
        ("text_encoders/qwen2.5_vl_vit.safetensors", VIT),
        ("vae/wan2.2_vae.safetensors", VAE),
    ):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        if source == VAE:
            save_file(torch.load(VAE, weights_only=True), models / name)
        else:
            shutil.copy(source, models / name)
    # What is small here and not of the usual size, as on the hub.
    shutil.copy(goldens.CHECKPOINT / "Lance_3B" / "llm_config.json", models / "diffusion_models" / "llm_config.json")
    shutil.copy(VIT.with_name("config.json"), models / "text_encoders" / "config.json")
    tokenizer.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(goldens.CHECKPOINT / "Lance_3B" / name, tokenizer / name)
    return models


@pytest.mark.parametrize("of", [".", "diffusion_models/Lance_3B.safetensors"])
def test_what_comfyuis_page_downloads_is_a_model(comfyui, drawn, of):
    (comfyui / "diffusion_models" / "A_damaged.safetensors").write_bytes(b"x" * 40)
    (comfyui / "text_encoders" / "a_damaged.safetensors").write_bytes(b"x" * 40)
    (comfyui / "text_encoders" / "a_link.safetensors").symlink_to(comfyui / "nowhere.safetensors")
    (comfyui / "text_encoders" / "b_folder.safetensors").mkdir()
    strange = json.dumps({"a": {"dtype": "F3_E1M1", "shape": [8], "data_offsets": [0, 3]}}).encode()  # of tomorrow
    (comfyui / "text_encoders" / "c_new_type.safetensors").write_bytes(len(strange).to_bytes(8, "little") + strange + b"abc")
    assert draws(comfyui / of, drawn)
    sources = find_sources(comfyui / of, "image")
    assert sources.vit.path == comfyui / "text_encoders" / "qwen2.5_vl_vit.safetensors"
    assert sources.vae == comfyui / "vae" / "wan2.2_vae.safetensors"


def test_both_variants_of_comfyuis_folders_are_found(comfyui):
    for place in (comfyui, comfyui.parent):  # the models folder, and ComfyUI's own
        assert find_sources(place, "video").model.path.name == "Lance_3B_Video.safetensors"
        assert find_sources(place, "image").model.path.name == "Lance_3B.safetensors"


@pytest.mark.parametrize("of", [".", "models", "models/diffusion_models/hub/Lance_3B/model.safetensors"])
def test_the_hubs_tree_may_lie_deeper_in_comfyuis_folders(tmp_path, drawn, of):
    hub = tmp_path / "models" / "diffusion_models" / "hub"
    hub.parent.mkdir(parents=True)
    shutil.copytree(goldens.CHECKPOINT, hub)
    assert draws(tmp_path / of, drawn)
    sources = find_sources(tmp_path / of, "image")
    assert (sources.vit.path, sources.vae) == (hub / "Qwen2.5-VL-ViT" / "vit.safetensors", hub / VAE.name)
    assert find_sources(tmp_path / "models", "video").model.path.parent.name == "Lance_3B_Video"


@pytest.mark.parametrize("of", [".", "models", "models/unet/Lance_3B.safetensors"])
def test_comfyuis_older_folders_and_links_count_as_well(comfyui, drawn, of):
    elsewhere = comfyui.parent / "elsewhere"
    elsewhere.mkdir()
    (comfyui / "diffusion_models").rename(comfyui / "unet")
    (comfyui / "text_encoders").rename(elsewhere / "towers")
    (comfyui / "clip").mkdir()
    (comfyui / "clip" / "linked").symlink_to(elsewhere / "towers", target_is_directory=True)
    (comfyui / "clip" / "up").symlink_to(comfyui, target_is_directory=True)  # and around for ever
    (comfyui / "clip" / "self").symlink_to(comfyui / "clip", target_is_directory=True)
    assert draws(comfyui.parent / of, drawn)
    assert find_sources(comfyui.parent / of, "image").vit.path == comfyui / "clip" / "linked" / "qwen2.5_vl_vit.safetensors"


def test_a_file_at_the_root_has_no_tree_around_it():
    assert files_room._homes(Path("/lance.safetensors"), Path("/lance.safetensors")) == [Path("/")]


def test_a_type_that_safetensors_does_not_know_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F3_E1M1", "shape": [8], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "new.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    message = refusal(TensorFile, tmp_path / "new.safetensors")
    assert message.startswith(f"new.safetensors ({8 + len(header) + 3} bytes) cannot be read by safetensors ")


def test_words_alone_need_no_vision_tower(tree, drawn):
    shutil.rmtree(tree / "Qwen2.5-VL-ViT")
    assert "The vision tower was not found" in refusal(load, tree)
    pipe = load(tree, vit="none")
    assert pipe.components.vision is None
    assert torch.equal(pipe(**tasks.arguments("t2i")).latents, drawn)
    clip = load(tree, "video", vit="none")(**tasks.arguments("i2v"))
    assert clip.latents.isfinite().all()
    message = refusal(pipe, **tasks.arguments("image_edit"))
    assert message.startswith("1 pictures are to be seen by a model without its vision tower (vit='none').")


def test_objects_beside_the_weights_of_a_pickle_are_named(tmp_path):
    torch.save({"args": argparse.Namespace(a=1), "state_dict": {"a": torch.zeros(2)}}, tmp_path / "x.ckpt")
    message = refusal(TensorFile, tmp_path / "x.ckpt")
    assert "contains Python objects (argparse.Namespace)" in message
    assert "torch.save(model.state_dict()" in message


@pytest.mark.parametrize("without", [["tokenizer_json"], ["tokenizer_json", "llm_config_json"], ["vocab_json", "merges_txt"]])
def test_part_of_the_metadata_is_enough(flat, drawn, without):
    path = flat / "bytedance_lance_3b.safetensors"
    with safe_open(path, "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key not in without}
    rewrite(path, dict, header)
    assert draws(path, drawn)


def test_a_single_file_without_tokenizer_says_so(flat):
    rewrite(flat / "bytedance_lance_3b.safetensors", dict)
    assert "vocab.json and merges.txt of the tokenizer not found" in refusal(load, flat)


def test_variants_are_told_apart(tmp_path):
    tensors = load_file(MODEL)
    for name, change, expected in (
        ("a", lambda t: t, "image"),
        ("b", lambda t: t | {POSITION_TABLE: torch.zeros(4097, 1)}, None),
        ("Lance_3B_b", lambda t: t | {POSITION_TABLE: torch.zeros(4097, 1)}, None),
        ("b_video", lambda t: t, "video"),
        ("c", lambda t: t | {"vit_model.merger.ln_q.weight": torch.zeros(1)}, "video"),
        ("d", lambda t: {k: v for k, v in t.items() if k != POSITION_TABLE}, None),
        ("Lance_3B_d", lambda t: {k: v for k, v in t.items() if k != POSITION_TABLE}, "image"),
    ):
        save_file(change(dict(tensors)), tmp_path / f"{name}.safetensors")
        assert guess_variant(TensorFile(tmp_path / f"{name}.safetensors")) == expected, name


def test_a_folder_of_videos_makes_no_video_checkpoint(tmp_path):
    for folder, name, expected in (("videos", "a", "image"), ("my_video", "model", "video")):
        path = tmp_path / folder / f"{name}.safetensors"
        path.parent.mkdir()
        save_file(load_file(MODEL), path)
        assert guess_variant(TensorFile(path)) == expected


def test_pickles_of_before_zip_archives_are_read(tmp_path):
    """Which of the two formats a file has, only its bytes tell."""
    expected = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.bfloat16)}
    torch.save(expected, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = TensorFile(tmp_path / "old.pth")
    assert found.shapes == {"a": (3, 4), "b": (5,)}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Refusals


def gen(name):
    return f"language_model.model.layers.0.{name}"


OTHERS = {
    "AWQ-INT4": {
        gen("mlp_moe_gen.up_proj.qweight"): torch.zeros(4, 2, dtype=torch.uint8),
        gen("mlp_moe_gen.up_proj.scales"): torch.zeros(4, 1, dtype=torch.bfloat16),
        gen("mlp_moe_gen.up_proj.zeros"): torch.zeros(4, 1, dtype=torch.uint8),
    },
    "NVFP4": {
        gen("mlp_moe_gen.up_proj.weight"): torch.zeros(4, 2, dtype=torch.uint8),
        gen("mlp_moe_gen.up_proj.weight_scale"): torch.zeros(4, 1).to(torch.float8_e4m3fn),
    },
    "bitsandbytes": {
        gen("mlp_moe_gen.up_proj.weight"): torch.zeros(8, 1, dtype=torch.uint8),
        gen("mlp_moe_gen.up_proj.weight.absmax"): torch.zeros(1),
    },
    "it does not say which": {
        gen("mlp_moe_gen.up_proj.weight"): torch.zeros(4, 2).to(torch.float8_e4m3fn),
        gen("mlp_moe_gen.up_proj.weight_scale"): torch.ones(()),
    },
    "MLX": {"model.layers.0.mlp_moe_gen.up_proj.weight": torch.zeros(4, 2), "lm_head.weight": torch.zeros(4, 2)},
    "plain Qwen2.5-VL": {
        "model.embed_tokens.weight": torch.zeros(4, 2),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 2),
        "visual.patch_embed.proj.weight": torch.zeros(4, 3, 2, 14, 14),
    },
    "Wan 2.1": {"encoder.conv1.weight": torch.zeros(4, 3, 3, 3, 3), "decoder.conv1.weight": torch.zeros(4, 16, 3, 3, 3)},
    "Wan 2.2 VAE": {"encoder.conv1.weight": torch.zeros(4, 12, 3, 3, 3), "decoder.conv1.weight": torch.zeros(4, 48, 3, 3, 3)},
    "vision tower": {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 14, 14)},
    "plain language model": {"model.embed_tokens.weight": torch.zeros(4, 2)},
    "unknown file (it holds some.thing": {"some.thing": torch.zeros(1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_file_in_the_models_place_is_named(tree, what):
    save_file(OTHERS[what], tree / "Lance_3B" / "model.safetensors")
    message = refusal(load, tree)
    assert what in message
    assert "model.safetensors" in message
    assert "bytedance-research/Lance" in message


@pytest.mark.parametrize("what", OTHERS)
def test_another_single_file_is_named(tmp_path, what):
    path = tmp_path / "state_dict.safetensors"
    save_file(OTHERS[what], path)
    message = refusal(load, path)
    assert what in message
    assert f"{path.name} ({len(OTHERS[what])} tensors) is " in message


def test_only_what_can_be_converted_is_sent_to_convert(tmp_path):
    said = {}
    for what, tensors in OTHERS.items():
        save_file(tensors, tmp_path / "other.safetensors")
        said[what] = "lance_runtime convert" in refusal(load, tmp_path / "other.safetensors")
    assert [what for what, sent in said.items() if sent] == ["AWQ-INT4"]


def test_a_part_of_a_model_is_named(tmp_path):
    path = tmp_path / "model-00002-of-00004.safetensors"
    save_file(OTHERS["plain language model"], path)
    assert "is part 2 of 4 of a model" in refusal(load, path)
    path = path.with_name("model-00001-of-00001.safetensors")
    save_file(OTHERS["vision tower"], path)
    assert identify(TensorFile(path)) == "a vision tower alone"


@pytest.mark.parametrize("what", ["AWQ-INT4", "NVFP4", "MLX"])
def test_a_folder_of_a_conversion_is_named(tmp_path, what):
    save_file(OTHERS[what], tmp_path / "state_dict.safetensors")
    message = refusal(load, tmp_path)
    assert what in message
    assert "state_dict.safetensors" in message


def test_a_wan21_vae_is_named(tree):
    wan21 = torch.load(VAE, weights_only=True)
    wan21 |= {"conv2.weight": torch.zeros(16, 16, 1, 1, 1), "decoder.conv1.weight": torch.zeros(64, 16, 3, 3, 3)}
    (tree / VAE.name).unlink()
    save_file(wan21, tree / "wan2.2_vae.safetensors")
    message = refusal(load, tree)
    assert "Wan 2.1" in message
    assert "16" in message
    assert "48" in message


def test_another_file_in_the_vision_towers_place_is_named(tree):
    shutil.copy(MODEL, tree / "Qwen2.5-VL-ViT" / "vit.safetensors")
    assert "vit.safetensors is a Lance checkpoint" in refusal(load, tree)


def test_missing_and_unknown_tensors_are_counted(tree):
    def change(tensors):
        tensors.pop("vae2llm.bias")
        return tensors | {"vae2llm.extra": torch.zeros(2)}

    rewrite(tree / "Lance_3B" / "model.safetensors", change)
    message = refusal(load, tree)
    assert "1 tensors are missing (vae2llm.bias)" in message
    assert "1 unknown (vae2llm.extra)" in message


def test_weights_of_another_size_are_named(tree):
    rewrite(tree / "Lance_3B" / "model.safetensors", lambda tensors: tensors | {"vae2llm.bias": torch.zeros(64)})
    assert "vae2llm.bias is (64,) where (128,) belongs" in refusal(load, tree)


def header_end():
    return 8 + int.from_bytes(MODEL.read_bytes()[:8], "little")


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 2000, "header", "header + 1", "half", "last byte"])
def test_a_truncated_file_is_refused_with_its_size(tree, cut):
    size = MODEL.stat().st_size
    places = {"header": header_end(), "header + 1": header_end() + 1, "half": size // 2, "last byte": size - 1}
    kept = places.get(cut, cut)
    path = tree / "Lance_3B" / "model.safetensors"
    path.write_bytes(MODEL.read_bytes()[:kept])
    message = refusal(load, tree)
    assert f"{kept} bytes" in message
    assert "model.safetensors" in message
    assert "Download it again" in message


@pytest.mark.parametrize("cut", [0, 10, 100_000, 2_000_000])
def test_a_truncated_pickle_is_refused_with_its_size(tree, cut):
    (tree / VAE.name).write_bytes(VAE.read_bytes()[:cut])
    message = refusal(load, tree)
    assert f"{VAE.name} ({cut} bytes)" in message
    assert "Download it again" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12370411616\n",
        b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x07\0\0\0\0\0\0\0" + b'{"a":1}',
        b"\xff" * 64,
    ],
)
def test_a_file_of_something_else_is_refused(tree, content):
    (tree / "Lance_3B" / "model.safetensors").write_bytes(content)
    message = refusal(load, tree)
    assert f"model.safetensors ({len(content)} bytes) is no safetensors file" in message


def test_bytes_behind_the_end_are_refused(tree):
    path = tree / "Lance_3B" / "model.safetensors"
    path.write_bytes(MODEL.read_bytes() + b"1234")
    assert f"{MODEL.stat().st_size + 4} bytes where its header says {MODEL.stat().st_size}" in refusal(load, tree)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("Lance_3B/model.safetensors", ["The image checkpoint", "Lance_3B/model.safetensors", "Lance_3B/ema.safetensors"]),
        ("Qwen2.5-VL-ViT/vit.safetensors", ["The vision tower", "Qwen2.5-VL-ViT/vit.safetensors"]),
        ("Wan2.2_VAE.pth", ["The Wan 2.2 VAE", "Wan2.2_VAE.pth", "wan2.2_vae.safetensors"]),
    ],
)
def test_a_missing_file_is_named_with_its_place_and_source(tree, gone, named):
    (tree / gone).unlink()
    message = refusal(load, tree)
    assert all(part in message for part in [*named, str(tree), "bytedance-research/Lance"])


def test_missing_tokenizer_files_are_named(tree):
    for name in ("tokenizer.json", "vocab.json"):
        (tree / "Lance_3B" / name).unlink()
    message = refusal(load, tree)
    assert "vocab.json of the tokenizer not found" in message
    assert str(tree / "Lance_3B") in message


def test_a_missing_folder_is_named(tmp_path):
    message = refusal(load, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "Lance_3B/" in message


def test_a_tokenizer_without_lances_tokens_is_refused(tree):
    path = tree / "Lance_3B" / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "<|video_pad|>"]
    path.write_text(json.dumps(values), "utf-8")
    assert "lacks 1 of 5 special tokens: <|video_pad|>" in refusal(load, tree)


def test_an_unreadable_configuration_is_named(tree):
    (tree / "Lance_3B" / "llm_config.json").write_text("{", "utf-8")
    assert "llm_config.json" in refusal(load, tree)


class Bomb:
    """Pickles as a call that leaves a mark when it is loaded with code allowed."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def test_code_in_a_pickle_is_not_run(tree, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"conv1.weight": Bomb(mark)}, tree / VAE.name)
    message = refusal(load, tree)
    assert not mark.exists()
    assert f"{VAE.name} (" in message
    assert "never loaded" in message
    torch.load(tree / VAE.name, weights_only=False)  # the bomb was live
    assert mark.exists()


@pytest.mark.parametrize(
    "value", [[1, 2], torch.zeros(3), {"optimizer": {"conv1.weight": torch.zeros(3)}}, {1: torch.zeros(2)}]
)
def test_a_pickle_of_something_else_is_refused(tree, value):
    torch.save(value, tree / VAE.name)
    message = refusal(load, tree)
    assert VAE.name in message or "196 tensors are missing" in message


def test_metadata_may_be_a_tensor(tmp_path):
    """As ComfyUI's save nodes keep it; what is in the header itself goes first."""
    header = {"llm_config_json": '{"a": "ü"}', "lance_variant": "video"}
    tensors = {"a": torch.ones(2), HEADER_TENSOR: pack_json(header)}
    save_file(tensors, tmp_path / "a.safetensors", {"lance_variant": "image"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert list(file) == ["a"]
    assert file.metadata == header | {"lance_variant": "image"}
    assert guess_variant(file) == "image"
