"""Quantised checkpoints inside one process of ComfyUI's Python; see ``comfy_memory_runs.py``, whose parts this uses.

The tree is as on the hub, its image checkpoint quantised.
"""

# ruff: noqa: I001  (this must come before all else of ComfyUI: it tells ComfyUI of the CPU)
from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import comfy_memory_runs as runs
import comfy.sd
import comfy.model_management as management
import torch
import folder_paths
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import save_file


def runtime(name: str) -> Any:
    """A room of the pack's own copy of the runtime."""
    return importlib.import_module(f"{runs.PACK}.lance_runtime.{name}")


def quantised(model: Any) -> dict[str, Any]:
    """ComfyUI's quantised weights by name."""
    found = model.model.diffusion_model.named_parameters()
    return {name: weight for name, weight in found if isinstance(weight, QuantizedTensor)}


def plain(tree: str) -> Any:
    return runtime("dequantize").plain_tensors(runtime("checkpoint").TensorFile(Path(tree, "Lance_3B", "model.safetensors")))


def decoded(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A weight as ComfyUI decodes it in a type."""
    weight = weight.data
    params = dataclasses.replace(weight._params, orig_dtype=dtype)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params).dequantize()


def weights(nodes: Any) -> dict:
    """How many weights ComfyUI holds quantised, and how many of them decode to other bits than the runtime's."""
    graph, expected = runs.Graph(nodes), plain(sys.argv[3])
    found = quantised(graph.model)
    report: dict[str, Any] = {
        "quantised": len(found),
        "expected": len(expected.layers),
        "same names": set(found) == set(expected.layers),
    }
    for dtype in (torch.float32, torch.bfloat16):
        report[str(dtype)] = sum(not torch.equal(decoded(w, dtype), expected[name].to(dtype)) for name, w in found.items())
    parameters = graph.model.model.diffusion_model.named_parameters()
    report["others"] = sum(name not in found and not torch.equal(w.float(), expected[name].float()) for name, w in parameters)
    report["linear"] = max(linear(graph.model, name, expected) for name in found if ".layers.1." in name)
    return report


@torch.no_grad()
def linear(model: Any, name: str, expected: Any) -> float:
    """A layer of ComfyUI against the plain product, relative; inputs rounded where ComfyUI rounds them."""
    layer, rounded = (
        model.model.diffusion_model.get_submodule(name.removesuffix(".weight")),
        expected.layers[name].format.inputs,
    )
    x = torch.randn(1, 7, expected.shapes[name][1], generator=torch.Generator().manual_seed(0))
    bias = None if layer.bias is None else layer.bias.float()
    return relative(layer(x), torch.nn.functional.linear(x if rounded is None else rounded(x), expected[name], bias))


def lora() -> dict[str, torch.Tensor]:
    """On a layer of either expert."""
    generator, found = torch.Generator().manual_seed(1), {}
    for module in ("q_proj", "q_proj_moe_gen", "v_proj"):
        stem, rows = f"diffusion_model.language_model.model.layers.1.self_attn.{module}", 64 if module[0] == "v" else 128
        found[f"{stem}.lora_down.weight"] = torch.randn(4, 128, generator=generator) * 0.2
        found[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def patched(nodes: Any) -> dict:
    """A LoRA on quantised weights, against the same LoRA on the same weights decoded, with memory and without."""
    graph, full = runs.Graph(nodes), runs.Graph(nodes, "Decoded/model.safetensors")
    adapter = lora()
    on, on_full = (comfy.sd.load_lora_for_models(g.model, g.clip, adapter, 1.0, 1.0) for g in (graph, full))
    bare, exact, bare_full = graph.draw(), full.draw(model=on_full[0]), full.draw()
    report = {"bare": relative(bare, bare_full), "the LoRA acts": relative(exact, bare_full)}
    report["patched"] = relative(graph.draw(model=on[0]), exact)
    kept = quantised(graph.model)
    report["still quantised"] = len(kept)
    report["removed"] = float((graph.draw() - bare).abs().max())
    answer = graph.ask()
    report["same answer"] = answer == full.ask()
    management.unload_all_models()
    # ComfyUI gives the CPU all the memory it wants; told that this is no CPU, it obeys.
    management.is_device_cpu = lambda device: False
    management.vram_state = management.VRAMState.NO_VRAM
    report["low patched"] = relative(graph.draw(model=on[0]), exact)
    report["low"], report["bytes loaded"] = graph.model.model.model_lowvram, graph.model.model.model_loaded_weight_memory
    report["bytes"] = graph.model.model_size()
    report["low bare"] = relative(graph.draw(), bare_full)
    report["low answer"] = graph.ask() == answer
    report["kept"] = runs.kept()
    return report


def everywhere(nodes: Any) -> dict:
    """A LoRA on every quantised weight through Load LoRA (Lance), patched in by ComfyUI and beside the weights."""
    graph, full = runs.Graph(nodes), runs.Graph(nodes, "Decoded/model.safetensors")
    generator, found = torch.Generator().manual_seed(1), {}
    for name, weight in quantised(graph.model).items():
        stem, (rows, columns) = "diffusion_model." + name.removesuffix(".weight"), weight.shape
        found[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.05
        found[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
    place = Path(sys.argv[3], "loras", "everywhere.safetensors")
    place.parent.mkdir(exist_ok=True)
    save_file(found, place)
    # PEFT's DoRA has to know the weights.
    dora = {n.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor for n, tensor in found.items()}
    for name in list(dora):
        if name.endswith("lora_B.weight"):
            dora[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.full((len(dora[name]),), 2.0)
    save_file(dora, place.with_name("dora.safetensors"))
    folder_paths.add_model_folder_path("loras", str(place.parent))
    load = importlib.import_module(f"{runs.PACK}.nodes.lora").LanceNativeLoraLoader.execute
    (model, _, said), (exact, _, plain) = (load(g.model, g.clip, place.name, 1.0, 1.0).result for g in (graph, full))
    beside, _ = comfy.sd.load_bypass_lora_for_models(graph.model, graph.clip, found, 1.0, 1.0)
    expected, bare = full.draw(model=exact), full.draw()
    report = {"acts": relative(expected, bare), "patched": relative(graph.draw(model=model), expected)}
    report["beside"] = relative(graph.draw(model=beside), expected)
    (dora, _, _), (exact, _, _) = (load(g.model, g.clip, "dora.safetensors", 1.0, 1.0).result for g in (graph, full))
    scales = [{key: patch[1].weights[4] for key, (patch,) in model.patches.items()} for model in (dora, exact)]
    report["DoRA"] = max(float((scales[0][key] - scales[1][key]).abs().max()) for key in scales[1])
    return {**report, "said": said, "plain": plain, "count": len(found)}


def types(nodes: Any) -> dict:
    """Which types a network of 8-bit weights has, and what becomes of a wish for float16."""
    load, report = importlib.import_module(f"{runs.PACK}.nodes.model_loading").load_model, {}
    path = str(Path(sys.argv[3], "Decoded", "model.safetensors"))
    tokenizer = runs.Graph(nodes, "Decoded/model.safetensors").model.model.tokenizer
    network = load(path, tokenizer, "fp8_e4m3fn").model.diffusion_model
    report |= runs.types_of(network)
    report["operations"] = type(network.language_model.model.layers[0].mlp.up_proj).__qualname__
    runs.args.fp16_unet = True
    model = load(path, tokenizer).model
    report["float16 wished"] = str(model.get_dtype())
    model.manual_cast_dtype = torch.float16  # as Select Model Device sets it
    report["float16 set"] = str(model.get_dtype_inference())
    return report


def foreign(nodes: Any) -> dict:
    """A file that does not say how its fp8 layers are multiplied, one of them with a scale for what comes in."""
    room, checkpoint = importlib.import_module(f"{runs.PACK}.nodes.model_loading"), runtime("checkpoint")
    file = checkpoint.TensorFile(Path(sys.argv[3], "Lance_3B", "model.safetensors"))
    tensors = {name: file[name] for name in file}
    marks = [name for name in tensors if name.endswith(checkpoint.QUANT_TENSOR)]
    for mark in marks:
        how = checkpoint.unpack_json(tensors[mark])
        tensors[mark] = checkpoint.pack_json({"format": how["format"]})
    scaled = marks[0].replace(checkpoint.QUANT_TENSOR, ".input_scale")
    tensors[scaled] = torch.tensor(2.0)
    place = Path(sys.argv[3], "foreign.safetensors")
    save_file(tensors, place, metadata=file.metadata)
    state = room._state(checkpoint.TensorFile(place))
    place.unlink()
    said = {mark: checkpoint.unpack_json(state[mark]).get("full_precision_matrix_mult", False) for mark in marks}
    return {"scaled": said.pop(marks[0]), "others": sorted(set(said.values())), "count": len(said)}


def beside(nodes: Any) -> dict:
    """Attention on the CPU beside a card: the backend that was chosen for the card must not be called."""
    room = importlib.import_module(f"{runs.PACK}.nodes.attention")
    q, k, v = (torch.randn(1, 2, length, 16) for length in (5, 9, 9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    called, chosen = [], room.optimized_attention
    room.optimized_attention = lambda *arguments, **options: called.append(1) or chosen(*arguments, **options)
    attention, report = room.comfy_attention({}), {}
    for name in ("cpu", "cuda"):
        management.get_torch_device = lambda name=name: torch.device(name)
        report[name] = [float((attention(q, k, v) - expected).abs().max()), len(called)]
    return report


def precise(nodes: Any) -> dict:
    """A backend that always computes in 8 bits: how often it is called for a step, and for what is read once."""
    room = importlib.import_module(f"{runs.PACK}.nodes.attention")
    q = torch.randn(1, 2, 5, 16)
    called = []
    room.optimized_attention = room.EIGHT_BITS = lambda *arguments, **options: called.append(1)
    room.comfy_attention({})(q, q, q)
    exact = room.comfy_attention()(q, q, q)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    return {"calls": len(called), "error": float((exact - expected).abs().max())}


if __name__ == "__main__":
    runs.main(globals())
