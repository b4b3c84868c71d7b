"""Memory and time of every task in the real ComfyUI, resident and within budgets: one process and one JSON line a cell.

    python tests/benchmarks/footprint.py --comfyui DIR --tree DIR [--budgets 6 8 12 16] [--record MACHINE]

--tree is laid out as on the hub (``python -m lance_runtime download``); with --random it is made first, of the real size
and with random weights, which take the same memory and time. Files in fp8, int8, ... are written by ``quantize`` beside the
published ones. A budget is imposed twice: the card says that it is as small (so that ComfyUI loads and batches as it would
there), and torch is forbidden to take more. Models are loaded by ComfyUI's plain memory management: the dynamic one belongs
to its server. Each task runs twice, on other sources. Nothing of this has run on a card yet.

``peak_gb`` is the most that torch had taken from the card; without one, the most that the process held.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

GIGA, PUBLISHED, TOKENS = 1e9, "bfloat16", 64
SOURCE_FPS = 12.0  # of a source as long as the target: all its frames are seen
# Height, width and frames of each task at its trained size, and the checkpoint that it runs on.
TASKS = {
    "t2i": ((768, 768, 1), "Lance_3B"),
    "image_edit": ((768, 768, 1), "Lance_3B"),
    "x2t_image": ((768, 768, 1), "Lance_3B"),
    "t2v": ((480, 848, 49), "Lance_3B_Video"),
    "t2v long": ((480, 848, 121), "Lance_3B_Video"),
    "video_edit": ((480, 848, 49), "Lance_3B_Video"),
    "x2t_video": ((480, 848, 49), "Lance_3B_Video"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--comfyui", type=Path, help="its folder (default: COMFYUI_PATH, or ~/comfy/ComfyUI)")
    add("--python", help="that runs it (default: COMFYUI_PYTHON, its own environment's, or this one)")
    add("--tree", type=Path, required=True, help="Lance_3B, Lance_3B_Video, Qwen2.5-VL-ViT and Wan2.2_VAE.pth")
    add("--random", action="store_true", help="make the tree first (28 GB), with the tokenizer of the test's checkpoint")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--formats", nargs="+", default=[PUBLISHED, "fp8", "int8"])
    add("--budgets", nargs="+", type=float, default=[6, 8, 12, 16], metavar="GB", help="beside no budget at all")
    add("--steps", type=int, default=4, help="of a picture or clip (default: 4; time grows with them, memory does not)")
    add("--size", type=int, nargs=3, metavar=("HEIGHT", "WIDTH", "FRAMES"), help="in place of each task's own")
    add("--cpu", action="store_true", help="without a card, where a budget means nothing")
    add("--record", metavar="MACHINE", help="also append the results to results.jsonl, under this name of the machine")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for task in options.tasks:
        size, checkpoint = TASKS[task]
        for form in options.formats:
            file = f"{checkpoint}/model{'' if form == PUBLISHED else '_' + form}.safetensors"
            for budget in [None, *([] if options.cpu else options.budgets)]:
                settings = {"size": options.size or size, "file": file, "steps": options.steps, "cpu": options.cpu}
                yield {"task": task, "format": form, "budget_gb": budget, **settings}


def random_tree(tree: Path) -> None:
    """Checkpoints, vision tower and VAE of the real size; bfloat16, as published."""
    import goldens
    from bench import Bench, make_vae
    from bench import parse as bench_settings
    from loading import write_checkpoint
    from safetensors.torch import save_file

    from lance_runtime.components import build_lance
    from lance_runtime.config import LanceConfig, VisionConfig
    from lance_runtime.model.vision import build_vision
    from lance_runtime.vae import original_name

    for name in ("Lance_3B", "Lance_3B_Video"):
        shutil.copytree(goldens.CHECKPOINT / name, tree / name, ignore=shutil.ignore_patterns("model.safetensors"))
        (tree / name / "llm_config.json").unlink()  # the small one's; without it the shapes say the sizes
        write_checkpoint(tree / name / "model.safetensors", build_lance(LanceConfig()))
    shutil.copytree(goldens.CHECKPOINT / "Qwen2.5-VL-ViT", tree / "Qwen2.5-VL-ViT", ignore=shutil.ignore_patterns("*"))
    write_checkpoint(tree / "Qwen2.5-VL-ViT" / "vit.safetensors", build_vision(VisionConfig()))
    vae = make_vae(Bench(bench_settings(["--vae", "160", "--dtype", "bfloat16"]))).module.state_dict()
    save_file({original_name(key): value.contiguous() for key, value in vae.items()}, tree / "Wan2.2_VAE.safetensors")


def quantised(tree: Path, file: str, form: str) -> None:
    """Write a file that is not there yet."""
    if form == PUBLISHED or (tree / file).is_file():
        return
    from lance_runtime.checkpoint import TensorFile
    from lance_runtime.quantize import Plan, quantize

    source = (tree / file).with_name("model.safetensors")
    quantize(TensorFile(source), tree / file, Plan(form))


def main() -> None:
    options = parse()
    comfyui, python = options.comfyui, options.python
    if comfyui is None or python is None:
        from comfy_server import comfyui_python, find_comfyui

        if (comfyui := comfyui or find_comfyui()) is None:
            raise SystemExit("No ComfyUI was found.\nName its folder with --comfyui.")
        python = python or comfyui_python(comfyui)
    if options.random:
        random_tree(options.tree)
    for cell in cells(options):
        quantised(options.tree, cell["file"], cell["format"])
        command = [python, __file__, json.dumps(cell), ROOT, options.tree.resolve()]
        done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": last_line(done.stderr)}
        line = {"bench": "footprint", **cell, **found}
        print(json.dumps(line), flush=True)
        if options.record:
            known = {"machine": options.record, "date": time.strftime("%Y-%m-%d")}
            with (HERE / "results.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line | known) + "\n")


def last_line(text: str) -> str:
    """What an error says, without where."""
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1][:200]


# In ComfyUI's process


def shrink_card(budget: int) -> None:
    """To a number of bytes, before ComfyUI asks for its size; what torch has taken is no longer free."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    torch.cuda.mem_get_info = lambda device=None: (max(0, budget - torch.cuda.memory_reserved(device)), budget)


def run_cell(cell: dict[str, Any], pack: str, tree: str) -> dict[str, Any]:
    import torch

    card, budget = not cell["cpu"], cell["budget_gb"]
    if card and budget is not None:
        shrink_card(int(budget * GIGA))
    import comfy_memory_runs as runs

    for folder in runs.FOLDERS:
        runs.folder_paths.add_model_folder_path(folder, tree)
    nodes = runs.load_pack(pack)
    vae = next(name for name in ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors") if Path(tree, name).is_file())
    with torch.inference_mode():  # as ComfyUI runs nodes
        graph = runs.Graph(nodes, cell["file"], vae, "default")
        task = work(graph, nodes, runs, cell)
        start = time.perf_counter()
        task(cell["steps"])
        first = time.perf_counter()
        task(cell["steps"])
    seconds = {"first_seconds": first - start, "seconds": time.perf_counter() - first}
    if card:
        return {**seconds, "peak_gb": torch.cuda.max_memory_reserved() / GIGA, "device": "cuda"}
    from loading import process_peak_bytes

    return {**seconds, "peak_gb": process_peak_bytes() / GIGA, "device": "cpu"}


def work(graph: Any, nodes: Any, runs: Any, cell: dict[str, Any]) -> Callable[[int], object]:
    """One task, from pictures and words to pixels or words, as a function of the number of steps."""
    import torch

    height, width, frames = cell["size"]
    sources = iter(torch.rand(2, frames, height, width, 3))  # another for each call: one that is known is not read again

    def answer(_: int) -> object:
        tokens = nodes.LanceNativeViTEncode.execute(graph.clip, next(sources), "auto", SOURCE_FPS).result[0]
        task = "x2t_image" if frames == 1 else "x2t_video"
        context = nodes.LanceNativeContext.execute(graph.clip, task, "look", "", "", visuals={"visual_0": tokens}).result[0]
        return graph.answer(context, TOKENS)

    def draw(steps: int) -> object:
        context, latent = None, nodes.LanceNativeEmptyLatent.execute("custom", width, height, frames, 0.0, 1).result[0]
        if "edit" in cell["task"]:
            source = next(sources)
            tokens = nodes.LanceNativeViTEncode.execute(graph.clip, source, "auto", SOURCE_FPS).result[0]
            code = nodes.LanceNativeVAEEncode.execute(graph.vae, source, "auto", SOURCE_FPS).result[0]
            visuals = {"visual_0": tokens, "visual_1": code}
            task = "image_edit" if frames == 1 else "video_edit"
            context = nodes.LanceNativeContext.execute(graph.clip, task, "edit source", "", "", visuals=visuals).result[0]
        return graph.vae.decode(graph.draw(context, latent, steps=steps))

    return answer if cell["task"].startswith("x2t") else draw


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].startswith("{"):
        sys.path.insert(0, str(Path.cwd()))
        made = run_cell(json.loads(sys.argv[1]), *sys.argv[2:])
        sys.stdout.write("\n" + json.dumps(made) + "\n")
    else:
        main()
