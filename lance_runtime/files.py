"""Where the parts of a model lie: the hub's tree, ComfyUI's model folders, or single files with their configuration."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

from .checkpoint import (
    ANY_VARIANT,
    HUB,
    QUANT_HEADER,
    WAN_22,
    TensorFile,
    check_is_lance,
    guess_variant,
    has_own_vit,
    identify,
)
from .config import LanceConfig, VisionConfig
from .dequantize import plain_tensors
from .tokenizer import LanceTokenizer
from .types import check_choice

LOGGER = logging.getLogger("lance")
VARIANT_FOLDERS = {"image": "Lance_3B", "video": "Lance_3B_Video"}
MODEL_NAMES = ("model.safetensors", "ema.safetensors")
VIT_FOLDER, VIT_NAME = "Qwen2.5-VL-ViT", "vit.safetensors"
VAE_NAMES = ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors")
# The hub's files under flat names, by ComfyUI's folders: workflows use them, and the page saves what it fetches so. They are
# the same on every system (Windows lists "Lance_3B\model.safetensors", which a graph from elsewhere does not match).
FLAT_NAMES = {
    "diffusion_models": {f"{hub}.safetensors": f"{hub}/{MODEL_NAMES[0]}" for hub in VARIANT_FOLDERS.values()},
    "text_encoders": {"qwen2.5_vl_vit.safetensors": f"{VIT_FOLDER}/{VIT_NAME}"},
    "vae": {VAE_NAMES[2]: VAE_NAMES[0]},
}
# A small Lance that comes with the code: it knows plain shapes and colours (tests/nano).
NANO = Path(__file__).with_name("nano")
VIT_CHOICES = ("auto", "checkpoint", "standalone", "none")
# ComfyUI's own folders under models/, with their older names: the hub's tree lies in them part by part.
MODEL_HOMES, VIT_HOMES, VAE_HOMES = ("diffusion_models", "unet"), ("text_encoders", "clip"), ("vae",)
# Where ComfyUI keeps its own copy of Qwen2.5's tokenizer, beside models/: what it downloads itself comes without one.
COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
# Colours of a host's previews, of models whose VAE is their own: {"factors": (channels, 3), "bias": (3)}.
LATENT_RGB = "latent_rgb_json"
# What a single file carries in its header, and where it lies on the hub.
HEADER_FILES = {
    "llm_config_json": "llm_config.json",
    "tokenizer_json": "tokenizer.json",
    "tokenizer_config_json": "tokenizer_config.json",
    "vocab_json": "vocab.json",
    "merges_txt": "merges.txt",
    LATENT_RGB: "latent_rgb.json",
}


@dataclass(frozen=True)
class Sources:
    """The opened files of one model.

    ``vit`` is None where the checkpoint's own vision tower is to be used, and ``vision`` where none is.
    """

    model: TensorFile
    vit: TensorFile | None
    vae: Path
    config: LanceConfig
    vision: VisionConfig | None
    tokenizer: LanceTokenizer


def find_sources(path: Path, variant: str, vit: str = "auto") -> Sources:
    """Find and open everything that a variant needs, under a folder or beside a single file.

    vit: "auto" takes the checkpoint's own vision tower where it has one, as the reference does; "checkpoint" and
    "standalone" insist; "none" does without, and nothing can be shown to the model then. ``FileNotFoundError`` says which
    file, where it was looked for and where to get it.
    """
    check_choice("Variant", variant, VARIANT_FOLDERS)
    check_choice("vit", vit, VIT_CHOICES)
    model = TensorFile(find_model(path, variant))
    check_is_lance(model)
    homes = _homes(path, model.path)
    tower = None if vit == "none" or _uses_own_vit(model, vit) else TensorFile(_find_vit(homes))
    return Sources(
        model=model,
        vit=tower,
        vae=_find_vae(homes),
        config=read_config(model),
        vision=None if vit == "none" else read_vision_config(tower, _find_vit_config(homes)),
        tokenizer=read_tokenizer(model),
    )


def read_config(file: TensorFile) -> LanceConfig:
    """From the header's ``llm_config_json``, from ``llm_config.json`` beside the file, or from the tensors' shapes."""
    beside = file.path.with_name("llm_config.json")
    if "llm_config_json" in file.metadata:
        return LanceConfig.from_json(_parsed(file.metadata["llm_config_json"], f"llm_config_json of {file.path.name}"))
    if beside.is_file():
        return LanceConfig.from_json(_parsed(beside.read_text("utf-8"), str(beside)))
    return LanceConfig.from_shapes(plain_tensors(file).shapes)


def read_vision_config(file: TensorFile | None, config_file: Path) -> VisionConfig:
    """From the ViT header's ``config``, from ``config.json``, or the 3B model's."""
    if file is not None and "config" in file.metadata:
        return VisionConfig.from_json(_parsed(file.metadata["config"], f"config of {file.path.name}"))
    beside = config_file if file is None else file.path.with_name("config.json")
    return VisionConfig.from_json(_parsed(beside.read_text("utf-8"), str(beside))) if beside.is_file() else VisionConfig()


def read_tokenizer(file: TensorFile, bundled: Path | None = None) -> LanceTokenizer:
    """From the header's metadata, from the files beside the checkpoint, or from those of ComfyUI: around it, or ``bundled``.

    Beside a checkpoint that the page saved as Lance_3B.safetensors they are in the folder Lance_3B/.
    """
    if found := LanceTokenizer.from_metadata(file.metadata):
        return found
    around = (parent / COMFYUI_TOKENIZER for parent in file.path.absolute().parents)
    for folder in (file.path.parent, file.path.with_suffix(""), *around, *([bundled] if bundled else [])):
        with suppress(FileNotFoundError):
            return LanceTokenizer.from_folder(folder)
    return LanceTokenizer.from_folder(file.path.parent)  # which says what is missing


def header_of(file: TensorFile, folder: Path | None = None) -> dict[str, str]:
    """Metadata for a copy of the file that stands alone: its own, and the small files beside it (or in ``folder``)."""
    places = {key: (folder or file.path.parent) / name for key, name in HEADER_FILES.items()}
    small = {key: path.read_text("utf-8") for key, path in places.items() if path.is_file()}
    return {**small, **{key: value for key, value in file.metadata.items() if key != QUANT_HEADER}}


def _parsed(text: str, name: str) -> dict:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} ({len(text)} characters) is no JSON: {error}.\nDownload it again from {HUB}.") from error


def _uses_own_vit(model: TensorFile, vit: str) -> bool:
    own = has_own_vit(model)
    if vit == "checkpoint" and not own:
        raise ValueError(
            f"{model.path.name} holds 0 tensors of a vision tower of its own (vit='checkpoint').\n"
            "Use vit='standalone': only the video checkpoint carries one."
        )
    return own if vit == "auto" else vit == "checkpoint"


def _home(path: Path) -> Path:
    """The folder of a model; the models folder of a ComfyUI."""
    home = path if path.is_dir() else path.absolute().parent
    return home / "models" if any((home / "models" / name).is_dir() for name in MODEL_HOMES) else home


def _homes(path: Path, model: Path) -> list[Path]:
    """Where the other parts of a model may lie: its folder, the tree that its file is of, and ComfyUI's models folder."""
    folder = model.absolute().parent
    around = (above.parent for above in (folder, *folder.parents) if above.name in MODEL_HOMES)
    return list(dict.fromkeys([_home(path), folder.parent, *around]))


def find_model(path: Path, variant: str) -> Path:
    """The checkpoint of a variant under a folder, or the single file itself; ``FileNotFoundError`` where there is none."""
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist.\nGive the folder that holds {VARIANT_FOLDERS[variant]}/; python -m lance_runtime download "
            f"fetches {HUB}."
        )
    home, hub = _home(path), VARIANT_FOLDERS[variant]
    folders = (home, *(home / name for name in MODEL_HOMES))
    fixed = [folder / hub / name for folder in folders for name in MODEL_NAMES]
    fixed += [folder / f"{hub}.safetensors" for folder in folders[1:]]
    others = [home / folder / name for folder in VARIANT_FOLDERS.values() for name in MODEL_NAMES]
    shared = [p for p in others if p.is_file() and guess_variant(TensorFile(p)) == ANY_VARIANT]
    found = (file for folder in folders for file in _single_files(folder, "a Lance checkpoint"))
    single = (file.path for file in found if guess_variant(file) in (variant, ANY_VARIANT))
    tried = fixed[: len(MODEL_NAMES)]
    return _first([*fixed, *shared], single) or _missing(f"The {variant} checkpoint", tried, home, MODEL_HOMES)


def _find_vit(homes: list[Path]) -> Path:
    name = f"{VIT_FOLDER}/{VIT_NAME}"
    found = _find(homes, VIT_HOMES, (name,), "a vision tower alone")
    return found or _missing("The vision tower", [homes[0] / name], homes[0], VIT_HOMES)


def _find_vit_config(homes: list[Path]) -> Path:
    fixed = [home / part / VIT_FOLDER / "config.json" for home in homes for part in ("", *VIT_HOMES)]
    return _first(fixed, iter(())) or fixed[0]


def _find_vae(homes: list[Path]) -> Path:
    tried = [homes[0] / name for name in VAE_NAMES]
    return _find(homes, VAE_HOMES, VAE_NAMES, WAN_22) or _missing("The Wan 2.2 VAE", tried, homes[0], VAE_HOMES)


def _find(homes: list[Path], within: tuple[str, ...], names: tuple[str, ...], what: str) -> Path | None:
    """A part of a model beside it, beside its folder, or in ComfyUI's folder of such parts."""
    parts = [home / name for home in homes for name in within]
    single = (file.path for folder in (homes[0], *parts) for file in _single_files(folder, what))
    return _first([folder / name for folder in (*homes, homes[0].parent, *parts) for name in names], single)


def _first(fixed: list[Path], single: Iterator[Path]) -> Path | None:
    """The first of the fixed places that exists, else the first single file."""
    return next((path for path in fixed if path.is_file()), None) or next(single, None)


def _single_files(folder: Path, what: str) -> Iterator[TensorFile]:
    """The files of a folder that hold what is looked for; in ComfyUI's folders they may lie deeper, as they do there."""
    deep = folder.name in (*MODEL_HOMES, *VIT_HOMES, *VAE_HOMES)
    paths = folder.glob("*.safetensors") if not deep else _below(folder)
    return (file for file in whole_files(paths) if identify(file) == what)


def _below(folder: Path) -> Iterator[Path]:
    """The safetensors files under a folder, behind links as well (which ``Path.glob`` leaves alone), each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()  # a link back: nothing below it is new
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names if name.endswith(".safetensors"))


def whole_files(paths: Iterable[Path]) -> Iterator[TensorFile]:
    """Those that can be opened (headers alone are read); of a damaged one the log tells, and the search goes on."""
    for path in sorted(paths):
        try:
            yield TensorFile(path)
        except (ValueError, OSError) as error:  # a link to nowhere, too
            LOGGER.warning("[Lance] %s", str(error).split("\n", maxsplit=1)[0])


def _missing(what: str, tried: list[Path], folder: Path, parts: tuple[str, ...]) -> NoReturn:
    names = ", ".join(str(path.relative_to(folder)) for path in tried)
    others = [f"{file.path.name} is {identify(file)}" for file in islice(whole_files(folder.glob("*.safetensors")), 3)]
    there = f" ({'; '.join(others)})" if others else ""
    raise FileNotFoundError(
        f"{what} was not found in {folder}: neither {names} nor a single file{there}, there or in {parts[0]}/.\n"
        f"Get it from {HUB}."
    )
