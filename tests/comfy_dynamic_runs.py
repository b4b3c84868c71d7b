"""ComfyUI's dynamic VRAM without a card, inside one process of its Python; see ``comfy_memory_runs.py``, whose parts this uses.

ComfyUI's own code runs, and the pack's; ``fake_aimdo`` stands below them, and ``fake_device`` is the card.
"""

# ruff: noqa: I001  (this must come before all else of ComfyUI: it tells ComfyUI of the CPU)
from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import comfy_memory_runs as runs
import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.hooks
import comfy.samplers
import comfy.sd
import fake_aimdo
import fake_device
import torch
from comfy_extras import nodes_multigpu

PLENTY = 2**35  # what is free for other things than weights: ComfyUI asks for 1.2 GB at least
WIDER = 16
TABLE, HEAD = (f"diffusion_model.language_model.{name}" for name in ("model.embed_tokens", "lm_head"))


def plug_in() -> Any:
    """From here on ComfyUI has a card, with the streams that it takes for NVIDIA's; what is returned must be kept alive."""
    kept = fake_device.install()
    fake_aimdo.install()
    card = torch.device(fake_device.NAME, 0)
    management.get_torch_device = lambda: card
    management.get_all_torch_devices = lambda exclude_current=False: [] if exclude_current else [card]
    of_the_cpu = management.get_free_memory

    def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        if device not in (None, card):
            return of_the_cpu(device, torch_free_too)
        return (PLENTY, 0) if torch_free_too else PLENTY

    management.get_free_memory = get_free_memory
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.NUM_STREAMS = 2
    management.STREAMS[card] = [fake_aimdo.Stream(), fake_aimdo.Stream()]
    management.MAX_PINNED_MEMORY = 2**30
    return kept


def go_dynamic() -> None:
    """What ``main.py`` does where it finds NVIDIA's card and comfy_aimdo.

    ComfyUI tells small layers from large ones by their bytes, and keeps the small ones on the card: let it take each for as
    much as it is in the published checkpoint, at least, whose rows are ``WIDER`` times as long.
    """
    management.unload_all_models()
    measured = management.module_size

    def module_size(module: torch.nn.Module) -> int:
        return measured(module) * (1 if any(True for _ in module.children()) else WIDER)

    management.module_size = module_size
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic


def adapters(graph: runs.Graph) -> dict[str, dict[str, torch.Tensor]]:
    """A LoRA on layers of both experts, and one on the embedding table and the head."""
    generator = torch.Generator().manual_seed(1)

    def lora(*stems: str) -> dict[str, torch.Tensor]:
        found = {}
        for stem in stems:
            rows, columns = graph.model.model.get_submodule(stem).weight.shape
            found[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            found[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
        return found

    layer = "diffusion_model.language_model.model.layers.1.self_attn"
    return {
        "layers": lora(*(f"{layer}.{name}" for name in ("q_proj", "v_proj", "q_proj_moe_gen"))),
        "tables": lora(TABLE, HEAD),
    }


def everything(nodes: Any, graph: runs.Graph) -> dict[str, Any]:
    """What a graph draws and says, its two sides in turn, with LoRAs and, last, without them again."""
    context, latent = graph.edit()
    drawn = graph.draw()
    found = {
        "picture": drawn,
        "pixels": graph.vae.decode(drawn),
        "edit": graph.draw(context, latent),
        "answer": runs.ask(nodes, graph, "what"),
        "another answer": runs.ask(nodes, graph, "what", picture=graph.picture.flip(2)),
    }
    for name, lora in adapters(graph).items():
        model, clip = comfy.sd.load_lora_for_models(graph.model, graph.clip, lora, 1.0, 1.0)
        found[f"picture, {name}"] = graph.draw(model=model)
        found[f"answer, {name}"] = runs.ask(nodes, graph, "what", clip)
    clip.patcher.patches_uuid = model.patches_uuid  # as Load LoRA (Lance) leaves it at equal strengths
    found["picture, tables, one set"] = graph.draw(model=model)
    found["answer, tables, one set"] = runs.ask(nodes, graph, "what", clip)
    return found | {"picture again": graph.draw(), "answer again": runs.ask(nodes, graph, "what")}


def difference(one: Any, other: Any) -> float:
    """Of two pictures, in parts of what is in them; of two answers, 0 or 1. ``nan`` is infinite: JSON has none."""
    if isinstance(one, str):
        return float(one != other)
    found = float((one.cpu() - other.cpu()).norm() / other.cpu().norm())
    return found if math.isfinite(found) else float("inf")


def placed(graph: runs.Graph) -> dict[str, Any]:
    """The modules that have a place among the card's pages, by priority."""
    found = {name: module for name, module in graph.model.model.named_modules() if hasattr(module, "_v")}
    return dict(sorted(found.items(), key=lambda pair: pair[1]._v[1]))


def cards(graph: runs.Graph) -> dict[str, int]:
    """Cards for all weights, for half of them, and for none."""
    fake_aimdo.CARD.resize(0)
    management.load_models_gpu([graph.model])
    size = graph.model._vbar_get().offset
    return {"all": 2 * size, "half": size // 2, "none": 0}


def compare(nodes: Any) -> dict:
    """Everything on cards of several sizes, against a large card without dynamic VRAM."""
    kept = plug_in()
    graph = runs.Graph(nodes)
    expected = everything(nodes, graph)
    report: dict[str, Any] = {
        "acts": {what: difference(found, expected[what.split(",")[0]]) for what, found in expected.items() if "," in what},
        "before": type(graph.model).__name__,
    }
    go_dynamic()
    graph = runs.Graph(nodes)
    report["patchers"] = [type(one).__name__ for one in (graph.model, graph.clip.patcher, graph.vae.patcher)]
    for name, size in cards(graph).items():
        fake_aimdo.CARD.resize(size)
        found = everything(nodes, graph)
        resident = graph.model._vbar_get().loaded_size()
        report[name] = {what: difference(found[what], expected[what]) for what in expected}
        report[f"{name}, resident"] = resident
        report[f"{name}, pins"] = graph.model._vbar_get().pinned()
    management.unload_all_models()
    report["unloaded"] = [graph.model.loaded_size(), graph.model.pinned_memory_size()]
    report["kept"] = runs.kept()
    del kept
    return report


def residents(nodes: Any) -> dict:
    """On a card for half of the weights: which are resident after an answer and after a picture, and which were asked for."""
    kept = plug_in()
    go_dynamic()
    graph, report = runs.Graph(nodes), {}
    fake_aimdo.CARD.resize(cards(graph)["half"])
    for what, run in (("answer", lambda: runs.ask(nodes, graph, "what")), ("picture", graph.draw)):
        run()
        modules = placed(graph)
        report[what] = [name for name, module in modules.items() if module._v[0].holds(module._v)]
    report["placed"] = list(modules)
    report["asked for"] = [name for name, module in modules.items() if module._v[1] in module._v[0].asked]
    report["bytes"] = {name: module._v[2] for name, module in modules.items()}
    del kept
    return report


def guided(graph: runs.Graph, model: Any, hooks: Any = None) -> torch.Tensor:
    """A picture by ComfyUI's own guider, its positive conditioning with hooks."""
    made = graph.nodes.LanceNativeConditioning.execute(graph.clip, "a red hat", "", "cached", None).result
    positive, negative = made[:2]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive if hooks is None else comfy.hooks.set_hooks_for_conditioning(positive, hooks), negative)
    guider.set_cfg(4.0)
    start, euler = torch.zeros(1, 48, 1, 4, 6), comfy.samplers.sampler_object("euler")
    return guider.sample(torch.ones_like(start), start, euler, torch.linspace(1, 0, 5), disable_pbar=True, seed=1)


def detours(nodes: Any) -> dict:
    """What leaves the dynamic path: LoRAs by hooks and beside the weights, a CLIP on the CPU, a saved model."""
    kept, found = plug_in(), []
    for dynamic in (False, True):
        if dynamic:
            go_dynamic()
        graph = runs.Graph(nodes)
        if dynamic:
            fake_aimdo.CARD.resize(cards(graph)["half"])
        lora = adapters(graph)["layers"]
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
        first = runs.ask(nodes, graph, "what")
        beside, spoken = comfy.sd.load_bypass_lora_for_models(graph.model, graph.clip, lora, 1.0, 1.0)
        on_the_cpu = nodes_multigpu.SelectCLIPDeviceNode.execute(graph.clip, "cpu").result[0]
        weights = graph.model.state_dict_for_saving()
        found.append(
            {
                "hook": guided(graph, graph.model, hooks),
                "no hook": guided(graph, graph.model),
                "beside": graph.draw(model=beside),
                "said beside": runs.ask(nodes, graph, "what", spoken),
                "on the CPU": runs.ask(nodes, graph, "what", on_the_cpu),
                "drawn after it": graph.draw(),
                "said again": runs.ask(nodes, graph, "what"),
                "said first": first,
                "saved": float(sum(tensor.float().abs().sum() for tensor in weights.values())),
            }
        )
    plain, other = found
    report = {what: difference(other[what], plain[what]) for what in plain if what != "saved"}
    report["the hook acts"] = difference(plain["hook"], plain["no hook"])
    report["beside acts"] = difference(plain["beside"], plain["drawn after it"])
    report["said beside acts"] = plain["said beside"] != plain["said first"] == plain["said again"]
    report["saved"] = [one["saved"] for one in found]
    report["the CPU's"] = [type(on_the_cpu.patcher).__name__, str(on_the_cpu.patcher.load_device)]
    del kept
    return report


def detours_on_windows(nodes: Any) -> dict:
    """The same where linear layers have no memory before they are loaded (ComfyUI 0.33: everywhere)."""
    management.WINDOWS = True
    return detours(nodes)


def types_on_windows(nodes: Any) -> dict:
    """Of a network of 8-bit weights there: the types that layers' matrices and all else are kept in."""
    kept, report = plug_in(), {}
    go_dynamic()
    management.WINDOWS = True
    load = importlib.import_module(f"{runs.PACK}.nodes.model_loading").load_model
    tokenizer = runs.Graph(nodes).model.model.tokenizer
    for plain in (False, True):
        patcher = load(str(Path(sys.argv[3], "Lance_3B", "model.safetensors")), tokenizer, "fp8_e4m3fn", disable_dynamic=plain)
        management.load_models_gpu([patcher])
        # The dynamic management casts to its type what it brings to the card.
        late = {} if plain else {"dtype_of": lambda module, name: getattr(module, f"{name}_comfy_model_dtype")}
        report["plain" if plain else "dynamic"] = runs.types_of(patcher.model.diffusion_model, **late)
    del kept
    return report


if __name__ == "__main__":
    with torch.no_grad():  # ComfyUI runs its nodes in inference mode, in which the made-up device lacks a few operators
        runs.main(globals())
