"""Quantised formats against their definitions, files written and read, conversions to the last bit."""

import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import goldens
import pytest
import tasks
import torch
from quantised_files import MODEL, community_awq, community_nvfp4, is_linear, quantised_tree, rounded_once
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lance_runtime import LancePipeline
from lance_runtime.__main__ import main
from lance_runtime.checkpoint import TensorFile, identify, pack_json
from lance_runtime.convert import convert
from lance_runtime.dequantize import plain_tensors, plain_vit_tensors
from lance_runtime.quant_error import Settings, compare
from lance_runtime.quant_formats import FORMATS, NATIVE, tile_scales, untile_scales
from lance_runtime.quantize import Plan, quantize

VIDEO_MODEL = MODEL.parents[1] / "Lance_3B_Video" / "model.safetensors"
# Measured on weights of a normal distribution; a coarser format than the name says would show.
ERRORS = {"fp8": 0.027, "int8": 0.008, "nvfp4": 0.097, "mxfp8": 0.027}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weight(rows=160, columns=96, seed=0):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    return values.bfloat16().float()


def refusal(call, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match="\n") as caught:
        call(*args, **options)
    return str(caught.value)


def load(folder, dtype=torch.float32, **options):
    return LancePipeline.from_pretrained(folder, "image", device="cpu", dtype=dtype, **options)


# Formats


def e4m3(byte):
    """The number of an E4M3 byte, by the definition."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = math.ldexp(mantissa / 8, -6) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)
    return -size if byte & 128 else size


def scale_at(stored, row, block, blocks):
    """A block scale's byte, by cuBLAS' formula for its place in 512-byte tiles."""
    tile = row // 128 * -(-blocks // 4) + block // 4
    return int(stored.view(torch.uint8).flatten()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4])


def defined_nvfp4(parts, row, column):
    byte = int(parts["weight"][row, column // 2])
    code = byte >> 4 if column % 2 == 0 else byte & 15
    scale = e4m3(scale_at(parts["weight_scale"], row, column // 16, parts["weight"].shape[1] // 8))
    return (-1 if code & 8 else 1) * E2M1[code & 7] * scale * float(parts["weight_scale_2"])


def defined_mxfp8(parts, row, column):
    scale = scale_at(parts["weight_scale"], row, column // 32, parts["weight"].shape[1] // 32)
    return e4m3(int(parts["weight"].view(torch.uint8)[row, column])) * 2.0 ** (scale - 127)


def defined_fp8(parts, row, column):
    return e4m3(int(parts["weight"].view(torch.uint8)[row, column])) * float(parts["weight_scale"])


def defined_int8(parts, row, column):
    return int(parts["weight"][row, column]) * float(parts["weight_scale"][row, 0])


DEFINED = {"fp8": defined_fp8, "int8": defined_int8, "nvfp4": defined_nvfp4, "mxfp8": defined_mxfp8}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_is_what_its_definition_says(kind):
    parts = FORMATS[kind].encode(weight())
    found = FORMATS[kind].decode(parts)
    places = [(row, column) for row in range(0, 160, 7) for column in range(96)]
    assert all(float(found[place]) == DEFINED[kind](parts, *place) for place in places)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_keeps_its_value_within_the_formats_precision(kind):
    exact = weight(512, 512)
    found = FORMATS[kind].decode(FORMATS[kind].encode(exact))
    assert ERRORS[kind] / 2 < (found - exact).norm() / exact.norm() < ERRORS[kind]


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "mxfp8"])
def test_decoded_weights_are_bfloat16_numbers(kind):
    found = FORMATS[kind].decode(FORMATS[kind].encode(weight(512, 512)))
    assert torch.equal(found.bfloat16().float(), found)


def test_decoded_int8_is_exact_in_float32():
    parts = FORMATS["int8"].encode(weight(512, 512))
    exact = parts["weight"].double() * parts["weight_scale"].double()
    assert torch.equal(FORMATS["int8"].decode(parts).double(), exact)
    assert torch.equal(parts["weight_scale"].bfloat16().float(), parts["weight_scale"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])
def test_sizes_of_weights_do_not_matter(kind, factor):
    exact = weight() * 2.0 ** round(math.log2(factor))
    found, plain = (FORMATS[kind].decode(FORMATS[kind].encode(values)) for values in (exact, weight()))
    assert torch.equal(found, plain * (exact[0, 0] / weight()[0, 0]))


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_stay_zeros(kind):
    assert (FORMATS[kind].decode(FORMATS[kind].encode(torch.zeros(32, 64))) == 0).all()
    half = weight(32, 64)
    half[:, :32] = 0
    found = FORMATS[kind].decode(FORMATS[kind].encode(half))
    assert (found[:, :32] == 0).all()
    assert found.isfinite().all()


def test_four_bits_take_the_nearest_number_and_ties_the_even_code():
    steps = [i / 16 for i in range(-96, 97)]
    block = torch.tensor([[6.0, *steps, *[0.0] * 14]])
    parts = FORMATS["nvfp4"].encode(block)
    decoded = FORMATS["nvfp4"].decode(parts)[0, 1 : 1 + len(steps)].tolist()
    whole = float(parts["weight_scale_2"])
    for index, (x, found) in enumerate(zip(steps, decoded, strict=True), 1):
        scale = e4m3(scale_at(parts["weight_scale"], 0, index // 16, block.shape[1] // 16)) * whole
        nearest = min(range(8), key=lambda code: (abs(E2M1[code] * scale - abs(x)), code % 2))
        assert abs(found) == E2M1[nearest] * scale


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (130, 5), (300, 17)])
def test_tiles_of_scales_are_undone(rows, columns):
    scales = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    tiled = tile_scales(scales)
    assert tiled.shape[0] % 128 == tiled.shape[1] % 4 == 0
    assert torch.equal(untile_scales(tiled, rows, columns), scales)
    assert all(scale_at(tiled, r, c, columns) == scales[r, c] for r in range(0, rows, 13) for c in range(columns))


def test_e5m2_and_scaleless_fp8_are_read():
    values = weight().to(torch.float8_e5m2)
    decode = NATIVE["float8_e5m2"].decode
    assert torch.equal(decode({"weight": values}), values.float())
    assert torch.equal(decode({"weight": values, "weight_scale": torch.tensor(0.5)}), values.float() / 2)


# Files


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_file_says_what_it_is_and_keeps_the_rest(tmp_path, kind):
    path = tmp_path / "q.safetensors"
    written = quantize(TensorFile(MODEL), path, Plan(kind, keep_layers=()))
    stored, source = load_file(path), load_file(MODEL)
    quantised = {name for name in source if is_linear(name)}
    assert set(written.errors) == quantised
    for name, tensor in source.items():
        if name not in quantised:
            assert torch.equal(stored[name].view(torch.int16), tensor.bfloat16().view(torch.int16))
            continue
        layer = name.removesuffix(".weight")
        said = json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist()))
        full = {} if kind == "int8" else {"full_precision_matrix_mult": True}
        assert said == {"format": FORMATS[kind].name, **full}
        parts = {part: stored[f"{layer}.{part}"] for part in FORMATS[kind].encode(tensor.float())}
        decoded = FORMATS[kind].decode(parts)
        error = (decoded - tensor.float()).norm() / tensor.float().norm()
        assert written.errors[name] == pytest.approx(float(error), rel=1e-6)
        assert error < 1.1 * ERRORS[kind]
    assert written.after == sum(tensor.nbytes for tensor in stored.values())
    assert written.before == sum(tensor.numel() * 2 for tensor in source.values())


def test_scope_and_kept_layers_are_obeyed():
    shapes = TensorFile(MODEL).shapes
    both = set(Plan("fp8").chosen(shapes))
    assert both == {name for name in shapes if is_linear(name) and ".layers.1." in name}
    gen, und = (set(Plan("fp8", scope).chosen(shapes)) for scope in ("gen", "und"))
    assert gen == {name for name in both if "_moe_gen" in name}
    assert und == both - gen
    assert len(gen) == len(und) == 7
    assert {name.split(".")[3] for name in Plan("fp8", keep_layers=(1,)).chosen(shapes)} == {"0", "2"}
    assert "Layer 3 is none of the 3 layers" in refusal(Plan("fp8", keep_layers=(3,)).chosen, shapes)


def test_weights_that_do_not_fill_blocks_stay_as_they_are():
    shapes = {
        "language_model.model.layers.0.mlp.up_proj.weight": (96, 40),
        "language_model.model.layers.0.mlp.down_proj.weight": (96, 48),
    }
    chosen = {kind: len(Plan(kind, keep_layers=()).chosen(shapes)) for kind in FORMATS}
    assert chosen == {"fp8": 2, "int8": 2, "nvfp4": 1, "mxfp8": 0}


class Watched(TensorFile):
    """Counts the tensors that are read, and how many are alive when the next one is."""

    def __init__(self, path):
        import weakref

        super().__init__(path)
        self.read, self.alive, self._ref, self._refs = [], 0, weakref.ref, []

    def __getitem__(self, name):
        self.alive = max(self.alive, sum(ref() is not None for ref in self._refs))
        tensor = super().__getitem__(name)
        self.read.append(name)
        self._refs.append(self._ref(tensor))
        return tensor


def test_one_weight_at_a_time_is_in_memory(tmp_path):
    file, seen = Watched(MODEL), []
    quantize(file, tmp_path / "q.safetensors", Plan("nvfp4"), lambda done, total: seen.append((done, total)))
    assert sorted(file.read) == sorted(file)
    assert file.alive == 0
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in load_file(tmp_path / "q.safetensors").values())
    assert len(seen) == len(file)
    watch = Watched(MODEL)
    kept = list(watch.values())  # the watch sees tensors that are kept
    assert watch.alive == len(kept) - 1


def test_every_tensor_is_aligned_for_mapping(tmp_path):
    path = tmp_path / "q.safetensors"
    quantize(TensorFile(MODEL), path, Plan("fp8"))
    text = path.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, name


def test_an_interrupted_run_leaves_no_file(tmp_path):
    path = tmp_path / "q.safetensors"

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(TensorFile(MODEL), path, Plan("fp8"), interrupt)
    assert not list(tmp_path.iterdir())
    quantize(TensorFile(MODEL), path, Plan("fp8"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refusal(quantize, TensorFile(MODEL), tmp_path / "q.safetensors", Plan("fp8"))
    assert re.search(r"q.safetensors takes \d{6,} bytes; 1000 are free", message)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "q.safetensors"
    quantize(TensorFile(MODEL), path, Plan("fp8"))
    assert f"{path.stat().st_size} bytes" in refusal(quantize, TensorFile(MODEL), path, Plan("fp8"))
    assert "quantised already" in refusal(quantize, TensorFile(path), tmp_path / "r.safetensors", Plan("fp8"))
    assert "'.bin'" in refusal(quantize, TensorFile(MODEL), tmp_path / "q.bin", Plan("fp8"))
    assert "0 of 96 weights" in refusal(
        quantize, TensorFile(MODEL), tmp_path / "r.safetensors", Plan("fp8", keep_layers=(0, 1, 2))
    )
    assert "'fp7'" in refusal(Plan, "fp7")
    assert "'all'" in refusal(Plan, "fp8", "all")


# Reading


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return {kind: quantised_tree(folder, kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_runtime_computes_with_the_decoded_weights(trees, kind):
    pipe, source = load(trees[kind]), load_file(MODEL)
    assert pipe.components.model.llm2vae.weight.dtype == torch.float32
    for name, parameter in pipe.components.model.named_parameters():
        exact = source[name].float()
        expected = FORMATS[kind].decode(FORMATS[kind].encode(exact)) if is_linear(name) else exact
        assert torch.equal(parameter, expected), name
    half = load(trees[kind], torch.bfloat16).components.model.state_dict()
    assert all(torch.equal(half[name], parameter.bfloat16()) for name, parameter in pipe.components.model.named_parameters())


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_stay_close_and_answers_come(trees, kind, image_pipe):
    pipe = load(trees[kind])
    exact, found = (p(**tasks.arguments("t2i")).latents for p in (image_pipe, pipe))
    assert 0 < (found - exact).norm() / exact.norm() < 4 * ERRORS[kind]
    assert pipe(**tasks.arguments("x2t_image")).token_ids


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("header", [False, True])
def test_files_that_comfyui_saved_are_read(trees, tmp_path, prefix, header):
    """With its prefix, and with the formats in the header in the place of a tensor a layer."""
    source = trees["nvfp4"] / "Lance_3B" / "model.safetensors"
    stored, metadata = load_file(source), {}
    if header:
        layers = [name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")]
        metadata["_quantization_metadata"] = json.dumps({"layers": {prefix + layer: {"format": "nvfp4"} for layer in layers}})
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".comfy_quant")}
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in stored.items()}, path, metadata=metadata)
    found, expected = plain_tensors(TensorFile(path)), plain_tensors(TensorFile(source))
    assert set(found) == set(expected)
    assert len(found.layers) == 42
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layer", ["lm_head", "vae2llm", "llm2vae"])
def test_a_header_may_name_any_layer(trees, tmp_path, layer):
    stored = load_file(MODEL)
    name = next(name for name in stored if name.endswith(f"{layer}.weight")).removesuffix(".weight")
    parts = FORMATS["fp8"].encode(stored.pop(f"{name}.weight").float())
    stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    said = {"layers": {f"model.diffusion_model.{name}": {"format": "float8_e4m3fn"}}}
    path = tmp_path / "model.safetensors"
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    save_file(named, path, metadata={"_quantization_metadata": json.dumps(said)})
    assert torch.equal(plain_tensors(TensorFile(path))[f"{name}.weight"], FORMATS["fp8"].decode(parts))
    del named[f"model.diffusion_model.{name}.weight"]
    save_file(named, path, metadata={"_quantization_metadata": json.dumps(said)})
    for beside in ("llm_config.json", "tokenizer.json", "../Wan2.2_VAE.pth"):
        shutil.copy(MODEL.parent / beside, tmp_path)
    assert f"1 tensors are missing ({name}.weight)" in refusal(load, path, vit="none")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("header", [False, True])
def test_a_quantised_tower_within_the_checkpoint_is_read(tmp_path, prefix, header):
    """Some tools quantise every linear layer of a file."""
    stored, metadata = load_file(VIDEO_MODEL), {}
    layers = [name.removesuffix(".weight") for name in stored if name.startswith("vit_model.") and ".mlp." in name]
    layers = [layer for layer in layers if f"{layer}.weight" in stored]
    expected = {}
    for layer in layers:
        parts = FORMATS["fp8"].encode(stored.pop(f"{layer}.weight").float())
        expected[layer.removeprefix("vit_model.") + ".weight"] = FORMATS["fp8"].decode(parts)
        stored |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        if not header:
            stored[f"{layer}.comfy_quant"] = pack_json({"format": "float8_e4m3fn"})
    if header:
        said = {"layers": {prefix + layer: {"format": "float8_e4m3fn"} for layer in layers}}
        metadata["_quantization_metadata"] = json.dumps(said)
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in stored.items()}, path, metadata=metadata)
    tower = plain_vit_tensors(TensorFile(path))
    assert len(expected) > 3
    assert all(torch.equal(tower[name], weight) for name, weight in expected.items())
    assert set(tower) == set(plain_vit_tensors(TensorFile(VIDEO_MODEL)))
    assert len(plain_tensors(TensorFile(path))) == len(plain_tensors(TensorFile(VIDEO_MODEL)))


def test_the_first_kind_of_scaled_fp8_is_read(trees, tmp_path):
    stored = load_file(trees["fp8"] / "Lance_3B" / "model.safetensors")
    old = {n.replace("weight_scale", "scale_weight"): t for n, t in stored.items() if not n.endswith(".comfy_quant")}
    layers = [name.removesuffix(".scale_weight") for name in old if name.endswith(".scale_weight")]
    old |= {f"{layer}.scale_input": torch.tensor(1.0) for layer in layers}
    path = tmp_path / "model.safetensors"
    save_file({**old, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    found, expected = (
        plain_tensors(TensorFile(path)),
        plain_tensors(TensorFile(trees["fp8"] / "Lance_3B" / "model.safetensors")),
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_fp8_without_scales_is_a_checkpoint(tmp_path):
    tensors = {n: t.to(torch.float8_e4m3fn) if is_linear(n) else t for n, t in load_file(MODEL).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    file = TensorFile(tmp_path / "model.safetensors")
    assert identify(file) == "a Lance checkpoint"
    assert plain_tensors(file).layers == {}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"format": "int3"}, "'int3'"),
        ({"format": "int8_tensorwise", "convrot": True}, "convrot"),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, "convrot"),
    ],
)
def test_what_cannot_be_decoded_is_named(trees, tmp_path, said, words):
    stored = load_file(trees["int8"] / "Lance_3B" / "model.safetensors")
    layer = "language_model.model.layers.1.mlp.up_proj"
    stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors")
    message = refusal(lambda: list(plain_tensors(TensorFile(tmp_path / "model.safetensors")).values()))
    assert words in message
    assert layer in message


# Conversions of the community


def converted(tmp_path, make, name, **options):
    meant = make(tmp_path / name, **options)
    target = tmp_path / "out" / "lance_3b.safetensors"
    count = convert(TensorFile(tmp_path / name), target, folder=MODEL.parent)
    assert count == 42
    return meant, target


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (community_awq, "awq_state_dict.safetensors", {}),
        (community_awq, "awq_state_dict.safetensors", {"group": 32}),
        (community_nvfp4, "nvfp4_state_dict.safetensors", {}),
        (community_nvfp4, "nvfp4_state_dict.safetensors", {"scales": ("bf16",)}),
        (community_nvfp4, "nvfp4_state_dict.safetensors", {"scales": ("fp8",)}),
    ],
)
def test_a_conversion_is_its_formula_rounded_once(tmp_path, make, name, options):
    meant, target = converted(tmp_path, make, name, **options)
    found = load_file(target)
    assert set(found) == set(meant) == set(load_file(MODEL))
    for key, values in meant.items():
        assert found[key].dtype == torch.bfloat16
        bits, expected = found[key].view(torch.int16), rounded_once(values)
        assert torch.equal(bits, expected) or torch.equal(bits[values != 0], expected[values != 0]), key
    assert identify(TensorFile(target)) == "a Lance checkpoint"


def test_rounding_once_is_not_what_float32_does_halfway():
    """The check itself: a number whose float32 lies halfway between two bfloat16, and which is not halfway."""
    halfway = 1 + 2.0**-8
    assert rounded_once(torch.tensor([halfway + 2.0**-30], dtype=torch.float64)).tolist() == [0x3F81]
    assert rounded_once(torch.tensor([halfway, -halfway, 1.0, 0.0], dtype=torch.float64)).tolist() == [
        0x3F80,
        0x3F80 - 0x8000,
        0x3F80,
        0,
    ]


def test_a_conversion_draws_alone(tmp_path, image_pipe):
    """Configuration and tokenizer are in its header; the rescaled norms belong to its weights."""
    _, target = converted(tmp_path, community_awq, "awq_state_dict.safetensors")
    for name in ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"):
        (target.parent / name).symlink_to(goldens.CHECKPOINT / name)
    out = load(target)(**tasks.arguments("t2i")).latents
    assert out.isfinite().all()
    with safe_open(target, "pt") as file:
        assert {"llm_config_json", "tokenizer_json"} <= set(file.metadata())
    norm = "language_model.model.layers.0.input_layernorm.weight"
    assert torch.equal(load_file(target)[norm], load_file(MODEL)[norm] * 1.5)


def test_the_communitys_files_say_where_to_go(tmp_path):
    for make, name, words in ((community_awq, "a.safetensors", "AWQ-INT4"), (community_nvfp4, "n.safetensors", "NVFP4")):
        make(tmp_path / name)
        message = refusal(load, tmp_path / name)
        assert words in message
        assert "lance_runtime convert" in message


def test_what_loading_takes_conversion_takes(tmp_path):
    """An old buffer is left alone; two tensors of one weight are refused."""
    community_awq(tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    buffer = {"language_model.model.rotary_emb.inv_freq": torch.ones(16)}
    save_file(stored | buffer, tmp_path / "a.safetensors")
    assert convert(TensorFile(tmp_path / "a.safetensors"), tmp_path / "out.safetensors", folder=MODEL.parent) == 42
    save_file(stored | {"ema.llm2vae.bias": torch.ones(48)}, tmp_path / "a.safetensors")
    message = refusal(convert, TensorFile(tmp_path / "a.safetensors"), tmp_path / "new.safetensors", folder=MODEL.parent)
    assert message.startswith("2 tensors of the file are one weight of the network: ")


def test_what_cannot_be_converted_is_refused(tmp_path):
    target = tmp_path / "out.safetensors"
    assert "0 quantised weights" in refusal(convert, TensorFile(MODEL), target)
    community_awq(tmp_path / "awq.safetensors")
    stored = load_file(tmp_path / "awq.safetensors")
    for gone, words in (
        ("language_model.model.embed_tokens.weight", "embed_tokens"),
        ("vae2llm.bias", "1 tensors are missing (vae2llm.bias)"),
    ):
        save_file({name: tensor for name, tensor in stored.items() if name != gone}, tmp_path / "part.safetensors")
        assert words in refusal(convert, TensorFile(tmp_path / "part.safetensors"), target)
    assert not target.exists()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyuis_formats_are_converted_too(trees, tmp_path, prefix):
    path = trees["int8"] / "Lance_3B" / "model.safetensors"
    plain = plain_tensors(TensorFile(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, tmp_path / "named.safetensors", metadata)
    assert convert(TensorFile(tmp_path / "named.safetensors"), tmp_path / "full.safetensors") == 42
    found = load_file(tmp_path / "full.safetensors")
    assert all(torch.equal(found[name], plain[name].bfloat16()) for name in plain)


def test_nobodys_file_is_written_over_on_the_way(tmp_path):
    other = tmp_path / "q.part"
    other.write_text("a download")
    written = quantize(TensorFile(MODEL), tmp_path / "q.safetensors", Plan("fp8", keep_layers=()))
    assert other.read_text() == "a download"
    assert {path.name for path in tmp_path.iterdir()} == {"q.part", written.path.name}


def test_a_weight_of_zeros_has_no_error(tmp_path):
    full = dict(TensorFile(MODEL))
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(full | {name: torch.zeros_like(full[name])}, tmp_path / "zero.safetensors", TensorFile(MODEL).metadata)
    for file in MODEL.parent.glob("*.*"):
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, tmp_path)
    written = quantize(TensorFile(tmp_path / "zero.safetensors"), tmp_path / "q.safetensors", Plan("fp8"))
    assert written.errors[name] == 0


# Errors of the network


SMALL = Settings(("a red hat",), "what", size=64, steps=4)


def test_the_same_weights_have_no_error(trees):
    pipe = load(trees["fp8"])
    same = plain_tensors(TensorFile(trees["fp8"] / "Lance_3B" / "model.safetensors"))
    result = compare(pipe, same, SMALL)
    assert len(same.layers) == 42
    assert result.layers == [(0.0, 0.0)] * 3
    assert [error for _, error in result.velocities] == [0.0] * 3
    assert (result.logits, result.same) == (0.0, result.answer_tokens)


def test_errors_are_those_of_two_networks(trees):
    """The first velocity, and the states behind the second layer, computed in the open."""
    from full_pass import velocity

    from lance_runtime.context import layout

    exact, coarse, seen = load(goldens.CHECKPOINT), load(trees["nvfp4"]), []
    result = compare(load(goldens.CHECKPOINT), coarse_weights(trees), SMALL, lambda done, total: seen.append((done, total)))
    request = exact.request("t2i", "a red hat", height=64, width=64)
    context, target = exact.context(request), request.target()
    noise = exact.noise(request, context, target)[0]
    a, b = (velocity(p.components.model, layout(context, target), noise, torch.ones(1)) for p in (exact, coarse))
    assert result.velocities[0] == (1.0, pytest.approx(float((b - a).norm() / a.norm()), rel=1e-3))
    assert 0.01 < result.velocities[0][1] < 0.5
    assert [drawing > 0 and answering > 0 for drawing, answering in result.layers] == [True] * 3
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("offload", ["model", "layer"])
def test_errors_are_the_same_where_weights_are_offloaded(trees, offload):
    found, expected = (
        compare(load(goldens.CHECKPOINT, offload=kind), weights, SMALL)
        for kind, weights in ((offload, coarse_weights(trees)), ("none", coarse_weights(trees)))
    )
    assert found == expected
    assert found.logits > 0


def coarse_weights(trees, kind="nvfp4"):
    return plain_tensors(TensorFile(trees[kind] / "Lance_3B" / "model.safetensors"))


def test_finer_formats_have_smaller_errors(trees):
    found = [compare(load(goldens.CHECKPOINT), coarse_weights(trees, kind), SMALL) for kind in ("int8", "fp8", "nvfp4")]
    for values in ([r.velocities[0][1] for r in found], [r.logits for r in found], [r.layers[-1][0] for r in found]):
        assert values == sorted(values)
        assert values[0] > 0


def test_questions_after_a_comparison_are_answered_by_the_other_weights(trees):
    pipe, question = load(goldens.CHECKPOINT), tasks.arguments("x2t_image") | {"max_new_tokens": 24}
    before = pipe(**question).token_ids
    compare(pipe, coarse_weights(trees), SMALL)
    assert pipe(**question).token_ids == load(trees["nvfp4"])(**question).token_ids != before


def test_layers_before_the_first_quantised_one_have_no_error(tmp_path):
    quantize(TensorFile(MODEL), tmp_path / "q.safetensors", Plan("fp8", "gen", keep_layers=(0,)))
    result = compare(load(goldens.CHECKPOINT), plain_tensors(TensorFile(tmp_path / "q.safetensors")), SMALL)
    drawing, answering = zip(*result.layers, strict=True)
    assert drawing[0] == 0 < drawing[1] < drawing[2]
    assert answering == (0.0, 0.0, 0.0)  # words never pass through the generation expert
    assert result.logits == 0


# The command line


def test_what_cannot_be_measured_is_said_before_or_after_the_file_is_written(tmp_path, capsys, monkeypatch):
    asked = ["quantize", "--model", str(goldens.CHECKPOINT), "--output", str(tmp_path / "q.safetensors"), "--format", "fp8"]

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(LancePipeline, "from_pretrained", out_of_memory)
    assert main([*asked, "--size", "64", "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Not measured: CUDA out of memory. Tried to allocate 1 GiB. Measure with --device cpu." in shown
    assert "weights quantised" in shown
    (tmp_path / "q.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(asked) == 2
    assert "--no-measure" in capsys.readouterr().err
    assert not (tmp_path / "q.safetensors").exists()


def test_quantize_prints_a_table(tmp_path, capsys):
    path, report = tmp_path / "lance.safetensors", tmp_path / "report.json"
    options = ["--format", "nvfp4", "--size", "64", "--steps", "4", "--prompt", "a red hat", "--device", "cpu"]
    assert main(["quantize", "--model", str(goldens.CHECKPOINT), "--output", str(path), *options, "--report", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "weights", "und", "weights", "gen", "drawing", "answering"]
    rows = [line.split() for line in lines[1:4]]
    assert [row[:3] for row in rows] == [["0", "-", "-"], ["1", rows[1][1], "%"], ["2", "-", "-"]]
    assert rows[0][3:] == ["0.00", "%", "0.00", "%"]
    assert 9 < float(rows[1][1]) < 10
    assert [line.split(":")[0] for line in lines[4:8]] == [f"velocity at sigma {s}" for s in ("1.000", "0.778", "0.538")] + [
        "logits"
    ]
    assert lines[-1] == str(path)
    assert len(json.loads(report.read_text())["weights"]) == 14
    assert LancePipeline.from_pretrained(goldens.CHECKPOINT, device="cpu")


def test_a_file_is_written_without_measuring(tmp_path, capsys):
    path = tmp_path / "lance.safetensors"
    assert main(["quantize", "--model", str(MODEL), "--output", str(path), "--format", "fp8", "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert "14 weights quantised" in out
    assert "No tokenizer" not in out
    assert path.is_file()
    shutil.copy(MODEL, tmp_path / "bare.safetensors")
    bare = ["--model", str(tmp_path / "bare.safetensors"), "--output", str(tmp_path / "q.safetensors"), "--format", "fp8"]
    assert main(["quantize", *bare, "--no-measure"]) == 0
    assert capsys.readouterr().out.startswith("No tokenizer was found: put its files beside the copy.\n")


@pytest.mark.parametrize(
    ("options", "named"), [(["--size", "100"], "100"), (["--steps", "0"], "0 steps"), (["--device", "abacus"], "abacus")]
)
def test_wrong_measurements_are_refused_before_writing(tmp_path, capsys, options, named):
    path = tmp_path / "q.safetensors"
    asked = ["--model", str(goldens.CHECKPOINT), "--output", str(path), "--format", "fp8", *options]
    assert main(["quantize", *asked]) == 2
    assert named in capsys.readouterr().err
    assert not path.exists()


def test_a_report_gets_its_folder(tmp_path, capsys):
    path, report = tmp_path / "q.safetensors", tmp_path / "deep" / "er" / "report.json"
    asked = ["--model", str(MODEL), "--output", str(path), "--format", "fp8", "--no-measure", "--report", str(report)]
    assert main(["quantize", *asked]) == 0
    assert "14 weights" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["weights"]) == 14


def test_what_cannot_be_measured_is_not_written(tmp_path, capsys):
    alone, path = tmp_path / "alone" / "a.safetensors", tmp_path / "q.safetensors"
    shutil.copytree(MODEL.parent, alone.parent)
    (alone.parent / "model.safetensors").rename(alone)
    assert main(["quantize", "--model", str(alone), "--output", str(path), "--format", "fp8"]) == 2
    error = capsys.readouterr().err
    assert "The vision tower was not found" in error
    assert "--no-measure" in error
    assert not path.exists()


def test_convert_says_what_it_did(tmp_path, capsys):
    community_awq(tmp_path / "awq_state_dict.safetensors")
    target = str(tmp_path / "out.safetensors")
    assert main(["convert", "--model", str(tmp_path), "--output", target, "--files", str(MODEL.parent)]) == 0
    assert capsys.readouterr().out.splitlines() == ["42 quantised weights are bfloat16 now.", target]
    assert main(["convert", "--model", str(tmp_path), "--output", str(tmp_path / "bare.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("No tokenizer was found: ")


def test_commands_refuse_in_one_line(tmp_path, capsys):
    out = ["--output", str(tmp_path / "o.safetensors")]
    for arguments, words in (
        (["quantize", "--model", str(MODEL), "--format", "fp8", "--keep-layers", "a", *out], "Layers 'a'"),
        (["quantize", "--model", str(tmp_path), "--format", "fp8", *out], "was not found"),
        (["convert", "--model", str(tmp_path), *out], "holds 0 of"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    with pytest.raises(SystemExit):
        main(["quantize", "--format", "fp7"])
    assert "invalid choice: 'fp7'" in capsys.readouterr().err
