"""Graphs in ComfyUI's API format, built of small pieces."""

from __future__ import annotations

from typing import Any

import goldens

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def loader(checkpoint: str = "Lance_3B", weight_type: str = "float32") -> dict[str, Any]:
    return node(
        "LanceNativeLoader",
        model_name=f"{checkpoint}/model.safetensors",
        vit_name="auto",
        vae_name="Wan2.2_VAE.pth",
        variant="auto",
        weight_type=weight_type,
    )


def text_to_image(prompt: str = "a red hat", negative: str = "", model: Any = None, **sampler: Any) -> Graph:
    """Load Lance -> CLIP Text Encode, twice -> KSampler -> VAE Decode -> Save Image, and the latents in a file.

    model: nodes between the loader and the sampler, the last of which is called "model".
    """
    settings = {"seed": 7, "steps": 25, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, **sampler}
    return {
        "load": loader(),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=negative),
        "empty": node("EmptyLatentImage", width=96, height=64, batch_size=1),
        **(model or {}),
        "sample": node(
            "KSampler",
            model=["model" if model else "load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            **settings,
        ),
        **saved(),
    }


def saved() -> Graph:
    """The latents in a file, and the frames as pictures."""
    return {
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="image"),
    }


def custom_sampling(model: list, seed: int, steps: int, shift: float, cfg: float, context: list | None) -> Graph:
    """SamplerCustomAdvanced with our noise and schedule."""
    link = {} if context is None else {"context": context}
    return {
        "noise": node("LanceNativeNoise", noise_seed=seed, **link),
        "sigmas": node("LanceNativeScheduler", steps=steps, shift=shift, denoise=1.0),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "guider": node("CFGGuider", model=model, positive=["conds", 0], negative=["conds", 1], cfg=cfg),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["start", 0],
        ),
    }


def golden_graph(name: str, files: dict[str, str], in_one_node: bool = False) -> Graph:
    """A golden's case as a graph of our nodes. files: media name -> name among ComfyUI's inputs."""
    case, settings = goldens.CASES[name], goldens.CASES[name]["settings"]
    graph, context, start = _inputs(case, files)
    graph["load"] = loader(case["checkpoint"])
    graph["start"], start_link = start, ["start", 1 if start["class_type"] == "LanceNativeEdit" else 0]
    guidance = {
        "interval_start": settings["cfg_interval"][0],
        "interval_end": settings["cfg_interval"][1],
        "renorm": settings["cfg_renorm"],
        "renorm_min": settings["cfg_renorm_min"],
    }
    link = {} if context is None else {"context": context}
    prompts = {"prompt": case["prompt"], "negative_prompt": "", "uncond_positions": settings["uncond_positions"]}
    if in_one_node:
        graph["sample"] = node(
            "LanceNativeSampler",
            model=["load", 0],
            clip=["load", 1],
            latent=start_link,
            seed=settings["seed"],
            steps=settings["steps"],
            cfg=settings["cfg"],
            shift=settings["shift"],
            denoise=1.0,
            **prompts,
            **guidance,
            **link,
        )
    else:
        graph["conds"] = node("LanceNativeConditioning", clip=["load", 1], **prompts, **link)
        graph["guidance"] = node("LanceNativeGuidance", model=["load", 0], **guidance)
        sampler = (settings["seed"], settings["steps"], settings["shift"], settings["cfg"])
        graph.update(custom_sampling(["guidance", 0], *sampler, context))
        graph["sample"]["inputs"]["latent_image"] = start_link
    return {**graph, **saved()}


def _inputs(case: dict, files: dict[str, str]) -> tuple[Graph, list | None, dict]:
    """Nodes that load a case's media, the link to its context, and the node that makes the latent to begin with."""
    settings, task = case["settings"], case["task"]
    graph = pictures(case, files)
    images = {f"images.image_{i}": [f"image{i}", 0] for i in range(len(case.get("images", [])))}
    both = {"clip": ["load", 1], "vae": ["load", 2]}
    if task in ("image_edit", "video_edit"):
        if "video" in case:
            images = {"video": ["clip", 0]}
        edit = node("LanceNativeEdit", **both, resolution=settings["resolution"], batch_size=1, **images)
        return graph, ["start", 0], edit
    if task.startswith("subject"):
        graph["context"] = node("LanceNativeSubject", **both, resolution=settings["resolution"], **images)
        return graph, ["context", 0], empty(settings["width"], settings["height"], settings.get("num_frames", 1))
    if task == "i2v":
        golden = goldens.tensors_of(case)
        _, frames, height, width = golden["latent"].shape
        graph["empty"] = empty(width * 16, height * 16, frames * 4 - 3)
        video = node(
            "LanceNativeVideoStart", vae=["load", 2], latent=["empty", 0], first=["image0", 0], middle_at=0.5, overlap=9
        )
        return graph, None, video
    return graph, None, empty(settings["width"], settings["height"], settings.get("num_frames", 1))


def pictures(case: dict, files: dict[str, str]) -> Graph:
    """Nodes "image0", "image1", ... and "clip" that load a case's media, transparency and frame rate included."""
    graph: Graph = {}
    for index, file in enumerate(case.get("images", [])):
        graph[f"file{index}"] = node("LoadImage", image=files[file])
        graph[f"image{index}"] = node("JoinImageWithAlpha", image=[f"file{index}", 0], alpha=[f"file{index}", 1])
    if "video" in case:
        graph["frames"] = node("LoadImage", image=files[case["video"]])
        graph["clip"] = node("CreateVideo", images=["frames", 0], fps=goldens.clip(case["video"])[1])
    return graph


def empty(width: int, height: int, frames: int = 1, batch: int = 1) -> dict[str, Any]:
    return node(
        "LanceNativeEmptyLatent", size="custom", width=width, height=height, frames=frames, seconds=0.0, batch_size=batch
    )
