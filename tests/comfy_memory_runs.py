"""Runs the nodes inside one process of ComfyUI's Python and prints, as JSON, what stayed alive.

Run in ComfyUI's folder: ``python comfy_memory_runs.py <what> <pack> <checkpoint tree>``; what is a function below.
"""

# ruff: noqa: E402  (ComfyUI must be told of the CPU before the rest of it is imported)
from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))

from comfy.cli_args import args

args.cpu = '"cpu": false' not in sys.argv[1]  # of a cell that tests/benchmarks/footprint.py measures

import comfy.model_management as management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import psutil
import torch

PACK = "a_pack_of_any_name"
FOLDERS = ("diffusion_models", "text_encoders", "vae")


def load_pack(folder: str) -> Any:
    place = Path(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(PACK, place, submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{PACK}.nodes")


def alive(*names: str) -> int:
    """How many objects of these classes of the pack there are; ``LookupError`` for a name that is no class's."""
    rooms = [module for name, module in list(sys.modules.items()) if name.startswith(PACK)]
    known = {thing for room in rooms for thing in vars(room).values() if isinstance(thing, type)}
    wanted = tuple(thing for thing in known if thing.__name__ in names and thing.__module__.startswith(PACK))
    if len(wanted) != len(names):
        raise LookupError(f"{names} name {len(wanted)} classes of the pack")
    gc.collect()
    return sum(type(thing) in wanted for thing in gc.get_objects())


def kept() -> int:
    """Caches, and branches made of them, that outlived their run."""
    return alive("KVCache", "Branch")


class Graph:
    """The loader's three outputs, and short runs with them."""

    def __init__(
        self,
        nodes: Any,
        model: str = "Lance_3B/model.safetensors",
        vae: str = "Wan2.2_VAE.pth",
        weight_type: str = "float32",
    ) -> None:
        self.nodes = nodes
        loaded = nodes.LanceNativeLoader.execute(model, "auto", vae, "auto", weight_type)
        self.model, self.clip, self.vae = loaded.result
        self.picture = torch.linspace(0, 1, 64 * 96 * 3).view(1, 64, 96, 3)

    def edit(self) -> tuple[Any, dict]:
        return self.nodes.LanceNativeEdit.execute(
            self.clip, self.vae, "image_256res", 1, images={"image_0": self.picture}
        ).result

    def draw(self, context: Any = None, latent: dict | None = None, model: Any = None, **other: Any) -> torch.Tensor:
        latent = latent or self.nodes.LanceNativeEmptyLatent.execute("custom", 96, 64, 1, 0.0, 1).result[0]
        settings = {"prompt": "a red hat", "negative_prompt": "", "seed": 5, "steps": 4, "cfg": 4.0, "shift": 3.5}
        settings |= other
        guidance = {"interval_start": 0.0, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0}
        return self.nodes.LanceNativeSampler.execute(
            model or self.model,
            self.clip,
            latent,
            denoise=1.0,
            uncond_positions="cached",
            context=context,
            **settings,
            **guidance,
        ).result[0]["samples"]

    def small_context(self) -> Any:
        """Latents of 4 x 6, encoded anew."""
        latent = self.nodes.LanceNativeVAEEncode.execute(self.vae, self.picture, "as is", 24.0).result[0]
        made = self.nodes.LanceNativeContext.execute(
            self.clip, "image_edit", "edit source", "", "", visuals={"visual_0": latent}
        )
        return made.result[0]

    def ask(self, length: int = 12) -> str:
        tokens = self.nodes.LanceNativeViTEncode.execute(self.clip, self.picture, "image_256res", 24.0).result[0]
        made = self.nodes.LanceNativeContext.execute(self.clip, "x2t_image", "look", "", "", visuals={"visual_0": tokens})
        return self.answer(made.result[0], length)

    def answer(self, context: Any, length: int) -> str:
        """As Lance Ask does, without a node to write into."""
        understand = sys.modules[f"{PACK}.nodes.understand"]
        asked = understand.question_context(understand.lance_of(self.clip).tokenizer, context, "what")
        return understand.speak(self.clip, asked, length, understand.Sampling(), None)


def interrupted(run: Any, at: int, layer: Any) -> bool:
    """Whether a run ended by ComfyUI's interruption, asked for at a call of a layer (progress may be throttled away)."""
    seen = []

    def count(*anything: Any, **more: Any) -> None:
        seen.append(None)
        if len(seen) == at:
            management.interrupt_current_processing(True)

    hook = layer.register_forward_pre_hook(count)
    try:
        run()
    except management.InterruptProcessingException:
        return True
    finally:
        management.interrupt_current_processing(False)
        hook.remove()
    return False


def interrupts(nodes: Any) -> dict:
    """Interrupts in prefill, while sampling (its guider kept, as a node's cache keeps it), and in an answer."""
    graph = Graph(nodes)
    context, latent = graph.edit()
    drawn, answer = graph.draw(context, latent), graph.ask()
    report = {"after runs": kept(), "prefixes": alive("Prefix")}
    network = graph.model.model.diffusion_model
    layer = network.language_model.model.layers[1].self_attn.q_proj
    report["in prefill"] = [interrupted(lambda: graph.draw(context, latent), 1, layer), kept()]
    report["while sampling"] = [interrupted(lambda: graph.draw(context, latent), 2, network.llm2vae), kept()]
    report["in an answer"] = [interrupted(lambda: graph.ask(4000), 3, network.language_model.lm_head), kept()]
    positive, negative, _ = nodes.LanceNativeConditioning.execute(graph.clip, "a red hat", "", "cached", context).result
    guider = comfy.samplers.CFGGuider(graph.model)
    guider.set_conds(positive, negative)
    guider.set_cfg(4.0)
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, 5)
    noise = torch.ones_like(latent["samples"])

    def callback(step: int, *anything: Any) -> None:
        management.interrupt_current_processing(step == 1)

    def run() -> None:
        guider.sample(noise, latent["samples"], euler, sigmas, callback=callback, disable_pbar=True, seed=1)

    report["kept guider"] = [interrupted(run, 0, network.llm2vae), kept()]  # its callback interrupts
    report["drawn again"] = float((graph.draw(context, latent) - drawn).abs().max())
    report["answered again"] = graph.ask() == answer
    return report


def wan_model() -> Any:
    """Wan 2.1, as ComfyUI loads it from a file's tensors."""
    foreign = importlib.import_module("comfy_foreign_models")
    return comfy.sd.load_diffusion_model_state_dict(foreign.initialised(foreign.wan_model()))


def draw_with_wan(model: Any) -> None:
    guider = comfy.samplers.CFGGuider(model)
    cond = [[torch.ones(1, 4, 4096), {"pooled_output": None}]]
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    start, euler = torch.zeros(1, 16, 1, 8, 8), comfy.samplers.sampler_object("euler")
    guider.sample(torch.ones_like(start), start, euler, torch.linspace(1, 0, 3), disable_pbar=True, seed=1)


def others(nodes: Any) -> dict:
    """Two Lance graphs and another model in turn, then all of them dropped."""
    first, second, wan = Graph(nodes), Graph(nodes, "Lance_3B_Video/model.safetensors"), wan_model()
    before = [first.draw(), second.draw()]
    draw_with_wan(wan)
    first.ask()
    again = [first.draw(), second.draw()]
    report = {
        "change": max(float((a - b).abs().max()) for a, b in zip(before, again, strict=True)),
        "differ": float((before[0] - before[1]).abs().max()),
        "kept": kept(),
        "prefixes": alive("Prefix"),
    }
    del first, second, wan
    management.unload_all_models()
    management.cleanup_models_gc()
    return {**report, "models": alive("LanceModel", "LanceDiffusion", "VisionTower")}


def low_memory(nodes: Any) -> dict:
    """The same picture and answer with (almost) no memory for weights, with a LoRA and without."""
    graph = Graph(nodes)
    shape = graph.model.model.diffusion_model.language_model.model.layers[0].self_attn.q_proj.weight.shape
    generator = torch.Generator().manual_seed(1)
    stem = "diffusion_model.language_model.model.layers.0.self_attn.q_proj"
    lora = {
        f"{stem}.lora_down.weight": torch.randn(2, shape[1], generator=generator),
        f"{stem}.lora_up.weight": torch.randn(shape[0], 2, generator=generator),
    }
    patched, _ = comfy.sd.load_lora_for_models(graph.model, None, lora, 1.0, 0.0)
    drawn, changed, answer = graph.draw(), graph.draw(model=patched), graph.ask()
    management.unload_all_models()
    # ComfyUI gives the CPU all the memory it wants; told that this is no CPU, it obeys.
    management.is_device_cpu = lambda device: False
    management.vram_state = management.VRAMState.NO_VRAM
    report = {"with a LoRA": float((graph.draw(model=patched) - changed).abs().max()), "low": graph.model.model.model_lowvram}
    report["bytes loaded"] = graph.model.model.model_loaded_weight_memory
    report["bytes"] = graph.model.model_size()
    report["without"] = float((graph.draw() - drawn).abs().max())
    report["the LoRA acts"] = float((changed - drawn).abs().max())
    report["answer"] = graph.ask() == answer
    ask(nodes, graph, "what", picture=graph.picture.flip(2))
    tower = graph.clip.cond_stage_model.tower._loaded()
    report["tower"] = [tower.loaded_size(), tower.partially_unload(tower.offload_device, 1), tower.model_size()]
    report["kept"] = kept()
    return report


def ranks(patcher: Any, patched: Any, table: torch.nn.Module, head: torch.nn.Module) -> dict[str, Any]:
    """In which order both kinds of memory management take the weights."""
    report: dict[str, Any] = {}
    ranked = sorted(patcher._load_list(for_dynamic=True))
    report["last of the dynamic"] = [entry[-3] for entry in ranked[-2:]]
    large = [(entry[-4], entry[-3]) for entry in ranked[:-2] if entry[0]]
    experts = [[pair for pair in large if ("_moe_gen" in pair[1]) == gen] for gen in (False, True)]
    by_size = [sorted((size for size, _ in expert), reverse=True) for expert in experts]
    report["experts in turn"] = large == experts[0] + experts[1] and len(experts[1]) > 5
    report["by size"] = [[size for size, _ in expert] for expert in experts] == by_size
    plain = sorted(patcher._load_list(), reverse=True)
    sizes = [entry[-4] for entry in plain if entry[-2] not in (table, head)]
    report["plain by size"] = sizes == sorted(sizes, reverse=True)
    place = [entry[-2] for entry in plain].index(head)
    report["behind the head"] = sorted({type(entry[-2]).__name__ for entry in plain[place + 1 :]})
    report["last of the plain"] = plain[-1][-3]
    report["last under a LoRA"] = sorted(patched._load_list(), reverse=True)[-1][-3]
    wide = [entry[-3] for entry in plain if entry[-3].endswith(("up_proj", "down_proj", "gate_proj"))]
    report["plain experts in turn"] = wide == sorted(wide, key=lambda name: "_moe_gen" in name) and len(wide) > 10
    return report


def seldom(nodes: Any) -> dict:
    """Where the embedding table and the head are while memory is short, and that nothing depends on it."""
    graph = Graph(nodes)
    network, patcher = graph.model.model.diffusion_model, graph.model
    table, head = network.language_model.model.embed_tokens, network.language_model.lm_head
    names = {module: name for name, module in graph.model.model.named_modules()}
    whole = []
    table.register_forward_pre_hook(lambda *_: whole.append(names[table]))
    lora = {
        "diffusion_model.language_model.model.embed_tokens.lora_down.weight": torch.ones(2, table.weight.shape[1]) / 8,
        "diffusion_model.language_model.model.embed_tokens.lora_up.weight": torch.ones(table.weight.shape[0], 2) / 8,
    }
    patched = comfy.sd.load_lora_for_models(graph.model, graph.clip, lora, 1.0, 1.0)[0]
    drawn, answer, changed = graph.draw(), graph.ask(), graph.draw(model=patched)
    report: dict[str, Any] = {"whole tables": len(whole), "the LoRA acts": float((changed - drawn).abs().max())}
    report |= ranks(patcher, patched, table, head)
    management.unload_all_models()
    management.is_device_cpu = lambda device: False

    def outside() -> list[str]:
        kept = (module for module in names if hasattr(module, "comfy_cast_weights") and hasattr(module, "weight"))
        return sorted(names[module] for module in kept if not getattr(module, "comfy_patched_weights", False))

    seldom_read = sum(management.module_size(module) for module in (table, head))
    for streams in (0, 2):  # ComfyUI reserves room for as many modules that follow
        management.NUM_STREAMS = streams
        patcher.partially_load(patcher.load_device, patcher.model_size() - management.module_size(table) // 2)
        report[f"outside, {streams} streams"] = sorted(
            {type(graph.model.model.get_submodule(name)).__name__ for name in outside()}
        )
        patcher.detach()
    management.NUM_STREAMS = 0
    widest = max(
        management.module_size(module) for module in names if isinstance(module, torch.nn.Linear) and module is not head
    )
    room = patcher.model_size() - seldom_read + 2 * widest  # what is passed through needs a place, too
    patcher.partially_load(patcher.load_device, room)
    report["outside"], report["loaded"] = outside(), graph.model.model.model_loaded_weight_memory
    report["all but these"] = sum(weight.nbytes for weight in network.parameters()) - seldom_read
    estimate, context = graph.clip.cond_stage_model.memory_estimation_function, graph.edit()[0]
    there = estimate({"context": context})
    graph.clip.cond_stage_model.device = torch.device("meta")  # the head is elsewhere
    report["passing"] = estimate({"context": context}) - there == head.weight.numel() * 4
    graph.clip.cond_stage_model.device = torch.device("cpu")
    management.unload_all_models()
    management.vram_state = management.VRAMState.NO_VRAM
    report["drawn"], report["answered"] = float((graph.draw() - drawn).abs().max()), graph.ask() == answer
    whole.clear()
    report["with a LoRA"], report["tables of a LoRA"] = float((graph.draw(model=patched) - changed).abs().max()), len(whole)
    return report


class Passes:
    """Counts what goes through a graph's vision tower, and the tokens of each pass through its language model."""

    def __init__(self, graph: Graph) -> None:
        self.tower, self.tokens = 0, []
        tower = graph.clip.cond_stage_model.tower
        layer = graph.model.model.diffusion_model.language_model.model.layers[0].self_attn.q_proj
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: self.tokens.append(inputs[0].shape[1])),
            tower._loaded().model.vision.register_forward_pre_hook(self.see),
        ]

    def see(self, *anything: Any) -> None:
        self.tower += 1

    def taken(self) -> list:
        """Times through the tower, and the longest pass, since the last call."""
        found = [self.tower, max(self.tokens, default=0)]
        self.tower, self.tokens[:] = 0, []
        return found


def ask(nodes: Any, graph: Graph, question: str, clip: Any = None, picture: Any = None) -> str:
    class Ask(nodes.LanceNativeAsk):
        hidden = SimpleNamespace(unique_id=None)

    images = {"image_0": graph.picture if picture is None else picture}
    return Ask.execute(clip or graph.clip, question, "image_256res", 8, 0.0, 1.0, 1, images=images).result[0]


def with_lora(graph: Graph) -> Any:
    """The graph's CLIP with a LoRA that changes words."""
    stem, generator = "diffusion_model.language_model.model.layers.0.self_attn.v_proj", torch.Generator().manual_seed(1)
    lora = {
        f"{stem}.lora_down.weight": torch.randn(4, 128, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(64, 4, generator=generator),
    }
    return comfy.sd.load_lora_for_models(graph.model, graph.clip, lora, 0.0, 1.0)[1]


def questions(nodes: Any) -> dict:
    """Lance Ask, several times about the same picture: what is computed again, and when what is kept goes."""
    graph = Graph(nodes)
    passes, kept_now, report = Passes(graph), graph.model.model.question_cache.entries, {}
    first = ask(nodes, graph, "what")
    report["first"] = passes.taken()
    estimate, tokenize = graph.clip.cond_stage_model.memory_estimation_function, graph.clip.tokenize
    report["estimates"] = [
        estimate(tokenize("what")),
        *(estimate(tokenize("what", image=x)) for x in (graph.picture, graph.picture.repeat(2, 1, 1, 1))),
    ]
    passes.taken()
    second = ask(nodes, graph, "the dog in the park")
    report["second"], report["kept bytes"] = passes.taken(), kept_now.nbytes
    report["first again"], report["third"] = ask(nodes, graph, "what") == first, passes.taken()
    graph.draw()  # a sampler and its clean-up in between
    passes.taken()
    report["after drawing"] = [ask(nodes, graph, "the dog in the park") == second, *passes.taken()]
    report["another picture"] = [ask(nodes, graph, "what", picture=graph.picture.flip(2)) != first, *passes.taken()]
    changed = ask(nodes, graph, "what", with_lora(graph))
    report["with a LoRA"] = [changed != first, *passes.taken()]
    report["without it"] = [ask(nodes, graph, "what") == first, *passes.taken()]
    management.unload_all_models()
    report["unloaded"] = [len(kept_now), kept_now.nbytes]
    report["loaded again"] = [ask(nodes, graph, "the dog in the park") == second, *passes.taken()]
    report["caches"] = kept()
    fresh = Graph(nodes)
    report["answers of a fresh model"] = [
        ask(nodes, fresh, "the dog in the park") == second,
        ask(nodes, fresh, "what") == first,
    ]
    report["its LoRA's"] = ask(nodes, fresh, "what", with_lora(fresh)) == changed
    elsewhere = graph.clip.clone()
    elsewhere.patcher = with_lora(fresh).patcher  # as after Select CLIP Device
    report["a copy's"] = ask(nodes, graph, "what", elsewhere) == changed
    return report


def devices(nodes: Any) -> dict:
    """MODEL and CLIP on two devices (cpu:0 is one, cpu another): where the weights were when each side had run."""
    graph, places = Graph(nodes), []
    module = graph.model.model
    drawn, answered = graph.draw(), ask(nodes, graph, "what")
    elsewhere = graph.clip.clone()
    elsewhere.patcher.load_device = torch.device("cpu:0")  # as Select CLIP Device leaves it
    for _ in range(2):
        same = ask(nodes, graph, "what", elsewhere) == answered
        places.append([str(module.device), same])
        same = torch.equal(graph.draw(), drawn)
        places.append([str(module.device), same])
    report = {"places": places, "patcher": type(graph.model).__name__}

    def generated(clip: Any) -> list[int]:
        return clip.generate(clip.tokenize("what", image=graph.picture), do_sample=False, max_length=6)

    other = Graph(nodes)
    changed = with_lora(other)
    expected, own = generated(changed), generated(graph.clip)
    changed.patcher.load_device = torch.device("cpu:0")
    elsewhere.patcher = changed.patcher  # a copy on another device
    return report | {"a copy's": generated(elsewhere) == expected, "its own": own != expected}


def beside(nodes: Any) -> dict:
    """LoRAs that run beside the weights (Bypass): of a CLIP, of one with a copy of its own, and after they are gone."""
    graph, stem = Graph(nodes), "diffusion_model.language_model.model.layers.0.self_attn.v_proj"
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"{stem}.lora_down.weight": torch.randn(4, 128, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(64, 4, generator=generator),
    }
    drawn, said = graph.draw(), ask(nodes, graph, "what")

    def spoken(clip: Any, strength: float) -> str:
        return ask(nodes, graph, "what", comfy.sd.load_bypass_lora_for_models(graph.model, clip, lora, 0.0, strength)[1])

    report = {"acts": len({said, *(spoken(graph.clip, strength) for strength in (1.0, 2.0, 3.0))})}
    gc.collect()
    hooks = [thing for thing in gc.get_objects() if type(thing).__name__ == "BypassForwardHook"]
    report["kept alive"], report["said again"] = len(hooks), ask(nodes, graph, "what") == said
    copied = graph.clip.clone()
    copied.patcher = Graph(nodes).clip.patcher  # as Select CLIP Device leaves it
    report["a copy's acts"] = spoken(copied, 2.0) != said
    report["MODEL's"] = float((graph.draw() - drawn).abs().max())
    return report


def lora_on_both(nodes: Any) -> dict:
    """How many weights are patched anew while a LoRA draws and answers in turn, at equal strengths and at others."""
    import tempfile

    from safetensors.torch import save_file

    stem, report = "diffusion_model.language_model.model.layers.0.self_attn.q_proj", {}
    patched, real = [], comfy.model_patcher.ModelPatcher.patch_weight_to_device

    def patch(patcher: Any, key: str, *more: Any, **options: Any) -> Any:
        patched.extend([key] * (key in patcher.patches))
        return real(patcher, key, *more, **options)

    comfy.model_patcher.ModelPatcher.patch_weight_to_device = patch
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(1)
        down, up = torch.randn(4, 128, generator=generator), torch.randn(128, 4, generator=generator)
        save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, Path(folder, "both.safetensors"))
        folder_paths.add_model_folder_path("loras", folder)
        for name, strength in (("equal", 1.0), ("apart", 0.5)):
            graph = Graph(nodes)
            model, clip, _ = nodes.LanceNativeLoraLoader.execute(
                graph.model, graph.clip, "both.safetensors", 1.0, strength
            ).result
            patched.clear()
            for _ in range(3):
                graph.draw(model=model)
                ask(nodes, graph, "what", clip)
            report[name] = len(patched)
    return report


def prompts(nodes: Any) -> dict:
    """What a prompt takes: no weights of CLIP's. And what is left of one when ComfyUI has kept or saved it."""
    import io

    graph, loads = Graph(nodes), []
    recipe, conditioning = sys.modules[f"{PACK}.nodes.recipe"], sys.modules[f"{PACK}.nodes.conditioning"]
    real = management.load_models_gpu
    management.load_models_gpu = lambda models, *more, **options: (loads.append(len(models)), real(models, *more, **options))
    changed = with_lora(graph).clone()
    made = changed.encode_from_tokens_scheduled(changed.tokenize("a red hat"))
    report = {"loads": len(loads), "kind": type(changed).__name__, "pooled": made[0][1]["pooled_output"]}
    changed.generate(changed.tokenize("what"), do_sample=True, top_p=0.0, max_length=2)
    report["loads of an answer"] = len(loads)
    own = made[0][1]["lance"]
    alone = recipe.Recipe.of(None, made[0][0])  # as scheduled CLIP hooks leave it
    report["from its tensor"] = [alone.ids == own.ids, alone.context is None, len(own.ids)]
    other = torch.zeros(1, 77, 768)
    try:
        recipe.Recipe.of(None, other)
    except ValueError as error:
        report["of another model"] = str(error)
    context, _ = graph.edit()
    positive = conditioning.conditionings(graph.clip, context, "red", "", "cached")[0]
    file = io.BytesIO()
    torch.save(positive, file)
    file.seek(0)
    ((tag, found),) = torch.load(file, weights_only=True)  # as Load Training Dataset does
    saved, before = found["lance"], positive[0][1]["lance"]
    same = [torch.equal(a.values, b.values) for a, b in zip(saved.context.visuals, before.context.visuals, strict=True)]
    report["saved"] = [torch.equal(tag, positive[0][0]), saved.ids == before.ids, *same]
    flat = nodes.LanceNativeNoise.execute(3).result[0]
    whole, picture = (flat.generate_noise({"samples": torch.zeros(2, 16, *size)}) for size in ((1, 4, 6), (4, 6)))
    report["noise of pictures"] = [list(picture.shape), torch.equal(picture, whole[:, :, 0])]
    return report


def bars(nodes: Any) -> dict:
    """What the bars of two readings of one question counted up to, and how far they came."""
    graph, found = Graph(nodes), []

    class Bar(comfy.utils.ProgressBar):
        def __init__(self, total: int, *more: Any, **options: Any) -> None:
            super().__init__(total, *more, **options)
            self.counted = [total, 0]
            found.append(self.counted)

        def update(self, value: int) -> None:
            self.counted[1] += value
            super().update(value)

    comfy.utils.ProgressBar = Bar
    tokens = nodes.LanceNativeViTEncode.execute(graph.clip, graph.picture, "image_256res", 24.0).result[0]
    made = nodes.LanceNativeContext.execute(graph.clip, "x2t_image", "look", "", "", visuals={"visual_0": tokens})
    for _ in range(2):
        graph.answer(made.result[0], 2)
    return {"readings": found[::2]}


def questions_and_gone(nodes: Any) -> dict:
    """What stays of a graph that was asked."""
    graph = Graph(nodes)
    ask(nodes, graph, "what", with_lora(graph))
    ask(nodes, graph, "what")
    del graph
    management.unload_all_models()
    management.cleanup_models_gc()
    return {"kept": alive("PrefixCache", "LRUCache", "KeptPrefix"), "models": alive("LanceModel", "VisionTower")}


def nano(nodes: Any) -> dict:
    """A picture of the built-in Nano with (almost) no memory for weights."""
    name = "Lance Nano (built in)"
    graph = Graph(nodes, name, name)
    management.is_device_cpu = lambda device: False
    management.vram_state = management.VRAMState.NO_VRAM
    latent = nodes.LanceNativeEmptyLatent.execute("custom", 96, 96, 1, 0.0, 1).result[0]
    prompt = "a big red star in the middle on a pink background"
    pixels = graph.vae.decode(graph.draw(latent=latent, prompt=prompt, steps=30))
    report = {"low": graph.model.model.model_lowvram, "bytes loaded": graph.model.model.model_loaded_weight_memory}
    return report | {"bytes": graph.model.model_size(), "pixels": (pixels.reshape(96, 96, 3) * 255).round().int().tolist()}


def growth(nodes: Any) -> dict:
    """Megabytes that the process grew by a run, over runs 10 to 30: a picture with a context, and an answer."""
    graph = Graph(nodes)
    process, sizes = psutil.Process(), []
    for _ in range(30):
        context = graph.small_context()
        graph.draw(context)
        graph.answer(context, 4)
        gc.collect()
        sizes.append(process.memory_info().rss / 2**20)
    return {"a run": (sizes[-1] - sizes[9]) / 20, "kept": kept()}


def types_of(
    network: torch.nn.Module, dtype_of: Any = lambda module, name: getattr(module, name).dtype
) -> dict[str, list[str]]:
    """The types of the layers' matrices, and of all other parameters."""
    layers = set(network.language_model.model.layers.modules())
    found: dict[str, set[str]] = {"matrices": set(), "others": set()}
    for module in network.modules():
        for name, _ in module.named_parameters(recurse=False):
            matrix = name == "weight" and module in layers and isinstance(module, torch.nn.Linear)
            found["matrices" if matrix else "others"].add(str(dtype_of(module, name)))
    return {what: sorted(types) for what, types in found.items()}


def main(functions: dict[str, Any]) -> None:
    """Run the one that the command line names, and print what it reports."""
    what, pack, tree = sys.argv[1:]
    for folder in FOLDERS:
        folder_paths.add_model_folder_path(folder, tree)
    sys.stdout.write("\n" + json.dumps(functions[what](load_pack(pack))) + "\n")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    main(globals())
