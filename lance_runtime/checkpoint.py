"""Every file layout -> one canonical state dict, by immutable key rules, read lazily.

The canonical names are the hub's own (``language_model.*``, ``vae2llm.*``, ...), without the position table, which is
computed, and with the ViT's tensors (``vit_model.*`` in the video checkpoint) apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import safetensors
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

HUB = "bytedance-research/Lance on the Hugging Face hub"
POSITION_TABLE = "latent_pos_embed.pos_embed"
VIT_PREFIX = "vit_model."
# Rows of the position table that Lance_3B carries (one latent frame of 64 x 64); the video checkpoint's has more frames.
IMAGE_TABLE_ROWS = 64 * 64
ANY_VARIANT, VARIANT_HEADER = "any", "lance_variant"
HEADER_TENSOR = "lance_header"  # see pack_json
# What tells weights that ComfyUI's own machinery quantised: a tensor a layer, a header entry, or the first way of all.
QUANT_TENSOR, QUANT_HEADER, OLD_QUANT_TENSOR = ".comfy_quant", "_quantization_metadata", "scaled_fp8"
SCALE_NAMES = (".weight_scale", ".scales", ".scale_weight")
BITSANDBYTES = (".SCB", ".absmax", ".quant_map")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
# Under what training scripts keep the weights beside their own state.
WEIGHTS_IN_PICKLES = ("state_dict", "model_state_dict", "model", "module", "ema")
FOREIGN_OBJECT = re.compile(r"Unsupported (?:global: GLOBAL|class|operand)\s+([\w.]+)")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
# What torch puts around a module that is compiled, sharded, checkpointed, or on several cards.
WRAPPER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# Whatever stands before a part of the network is of whoever trained or saved the file (ComfyUI's "model.diffusion_model.").
FRONT = re.compile(
    r"^.*?(?=(language_model\.(model|lm_head)|time_embedder|vae2llm|llm2vae|latent_pos_embed|vit_model)(\.|$)|scaled_fp8$)"
)


def pack_json(values: Mapping[str, Any]) -> Tensor:
    """JSON as a tensor of bytes: metadata for a host that saves tensors alone, and ComfyUI's notes on quantised layers."""
    return torch.frombuffer(bytearray(json.dumps(dict(values)).encode("utf-8")), dtype=torch.uint8)


def unpack_json(packed: Tensor) -> dict[str, Any]:
    return json.loads(packed.numpy().tobytes())


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; ``shapes`` needs no reading."""

    shapes: dict[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # a Mapping would read it


class TensorFile(Tensors):
    """Tensors of one file, and its ``metadata``.

    safetensors are memory-mapped; pickles (.pth, .pt, .bin, ...) are loaded with ``weights_only``, and memory-mapped where
    they can be.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        self.metadata: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        if self.is_pickle:
            self._open_pickle()
        else:
            self._open_safetensors()
        if HEADER_TENSOR in self.shapes:  # no weight: metadata, wherever it is kept
            self.metadata = {**unpack_json(self[HEADER_TENSOR]), **self.metadata}
            del self.shapes[HEADER_TENSOR], self.dtypes[HEADER_TENSOR]

    @property
    def is_pickle(self) -> bool:
        return self.path.suffix.lower() in PICKLES

    def _open_safetensors(self) -> None:
        header = _read_header(self.path)
        self.metadata = header.pop("__metadata__", {})
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in header.items()}
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except SafetensorError as error:  # which is no ValueError: an unknown type of numbers, say
            raise ValueError(
                f"{self.path.name} ({self.path.stat().st_size} bytes) cannot be read by safetensors "
                f"{safetensors.__version__}: {_first_line(error)}\nUpdate safetensors, or download the file again."
            ) from error

    def _open_pickle(self) -> None:
        try:
            # Only zip archives, which torch has written since 1.6, can be mapped.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_zipfile(self.path))
        except Exception as error:
            size = self.path.stat().st_size
            if found := FOREIGN_OBJECT.search(str(error)):
                raise ValueError(
                    f"{self.path.name} ({size} bytes) contains Python objects ({found[1]}), which are never loaded.\n"
                    "Save the weights alone: torch.save(model.state_dict(), ...)."
                ) from error
            raise ValueError(
                f"{self.path.name} ({size} bytes) is no complete pickle of tensors: {_first_line(error)}\n"
                f"Download it again from {HUB}; pickles with code in them are never loaded."
            ) from error
        weights = _with_tensors(state)
        if weights is None:
            what = f"{list(state)[:5]}" if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(
                f"{self.path.name} ({self.path.stat().st_size} bytes) holds {what}, not tensors by name.\n"
                f"Download it again from {HUB}."
            )
        self._pickled = {name: value for name, value in weights.items() if isinstance(value, Tensor) and isinstance(name, str)}
        self.shapes = {name: tuple(value.shape) for name, value in self._pickled.items()}
        self.dtypes = {name: str(value.dtype) for name, value in self._pickled.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._pickled[name] if hasattr(self, "_pickled") else self._file.get_tensor(name)


# What a file may hold beside the network: what is computed, the vision tower, and what ComfyUI saves along.
BESIDE = (POSITION_TABLE, VIT_PREFIX, "vae.", "model_sampling.")
ROTARY_BUFFER = "rotary_emb.inv_freq"


def canonical_name(stored: str) -> str:
    """A tensor's name as on the hub, without what trainers, savers and wrappers add to it."""
    return FRONT.sub("", WRAPPER.sub("", stored))


def is_beside(name: str) -> bool:
    """Whether a tensor of this canonical name is none of the network's weights."""
    return name.startswith(BESIDE) or name.endswith(ROTARY_BUFFER)


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Canonical names -> stored ones; ``ValueError`` where two are of one weight (a trained model and its average, say)."""
    found: dict[str, str] = {}
    for name in stored:
        if (other := found.setdefault(canonical_name(name), name)) != name:
            raise ValueError(
                f"2 tensors of the file are one weight of the network: {other} and {name}.\n"
                "Keep one set of weights in the file (the averaged one, if there is one)."
            )
    return found


def model_names(file: TensorFile) -> dict[str, str]:
    """Canonical to stored names of the decoder's and the glue's tensors; ``ValueError`` names what no Lance checkpoint is."""
    check_is_lance(file)
    return {name: stored for name, stored in canonical_names(file).items() if not is_beside(name)}


def vit_name(stored: str) -> str:
    """The name of a vision tower's tensor within the tower."""
    return canonical_name(stored).removeprefix(VIT_PREFIX).removeprefix("visual.")


def vit_names(file: TensorFile) -> dict[str, str]:
    """Names in the ViT to stored ones: of the checkpoint's own (``vit_model.*``), or of a file that is a ViT."""
    own = [name for name in file if canonical_name(name).startswith(VIT_PREFIX)]
    names = {vit_name(name): name for name in own or file}
    if "patch_embed.proj.weight" not in names:
        raise ValueError(
            f"{file.path.name} is {identify(file)}, not the vision tower of Qwen2.5-VL.\n"
            f"Use Qwen2.5-VL-ViT/vit.safetensors of {HUB}."
        )
    return names


def has_own_vit(file: TensorFile) -> bool:
    return any(canonical_name(name).startswith(VIT_PREFIX) for name in file)


def guess_variant(file: TensorFile) -> str | None:
    """ "image" or "video" from the header, the position table, the ViT inside, or the file's name; None where nothing tells.

    ``ANY_VARIANT`` for a checkpoint whose header says that it was trained for both.
    """
    if (stated := file.metadata.get(VARIANT_HEADER)) in (ANY_VARIANT, "image", "video"):
        return stated
    table = next((shape for name, shape in file.shapes.items() if name.endswith(POSITION_TABLE)), None)
    # The hub's files have all one name, in folders that say what they are.
    name = (file.path.parent.name if file.path.name == "model.safetensors" else file.path.name).lower()
    if has_own_vit(file) or "video" in name:
        return "video"
    if table is not None:
        return "image" if table[0] <= IMAGE_TABLE_ROWS else None
    return "image" if "lance_3b" in name else None


def is_quantised(file: TensorFile) -> bool:
    """Whether weights of a file are quantised in a way that ComfyUI reads natively."""
    marked = any(name.endswith((QUANT_TENSOR, OLD_QUANT_TENSOR)) for name in file)
    return marked or QUANT_HEADER in file.metadata


def check_is_lance(file: TensorFile) -> None:
    """``ValueError`` that names what the file is, unless it is a Lance checkpoint: full, or quantised as ComfyUI does."""
    what = identify(file)
    if what != "a Lance checkpoint":
        convert = "Convert it with python -m lance_runtime convert, or use" if what.startswith(CONVERTIBLE) else "Use"
        raise ValueError(
            f"{file.path.name} ({len(file)} tensors) is {what}, not a full Lance checkpoint.\n"
            f"{convert} Lance_3B/model.safetensors or Lance_3B_Video/model.safetensors of {HUB}."
        )


# What ``convert`` reads, and the VAE, as ``identify`` names them.
CONVERTIBLE, WAN_22 = ("an AWQ-INT4", "an NVFP4"), "a Wan 2.2 VAE"


def identify(file: TensorFile) -> str:
    """What a file is, in words, from its names, shapes and dtypes."""
    if (shard := SHARD.search(file.path.name)) and int(shard[2]) > 1:
        return f"part {int(shard[1])} of {int(shard[2])} of a model"
    generates = any("_moe_gen" in name for name in file)
    if kind := _identify_conversion(file, generates):
        return f"{kind} conversion of Lance" if generates else f"{kind} conversion"
    return "a Lance checkpoint" if generates else _identify_other(file)


def _identify_conversion(file: TensorFile, generates: bool) -> str | None:
    """The kind of a file that somebody's tool has made of a model; None for the model itself."""
    if any(name.endswith(BITSANDBYTES) for name in file):
        return "a bitsandbytes"
    if any(name.endswith(".qweight") for name in file):
        return "an NVFP4" if any(name.endswith((".scales_fp8", ".scales_bf16")) for name in file) else "an AWQ-INT4"
    scaled = not {"U8", "I8"}.isdisjoint(file.dtypes.values()) or any(name.endswith(SCALE_NAMES) for name in file)
    if generates and scaled and not is_quantised(file):
        return "a quantised (NVFP4 or other, it does not say which)"
    if generates and not any("language_model.model." in canonical_name(name) for name in file):
        return "an MLX (no language_model prefix)"
    return None


def _identify_other(file: TensorFile) -> str:
    if "decoder.conv1.weight" in file and "encoder.conv1.weight" in file:
        channels = file.shapes["decoder.conv1.weight"][1]
        return WAN_22 if channels == 48 else f"a VAE of {channels} channels (Wan 2.1's has 16)"
    if any(name.startswith(("visual.", "model.visual.")) for name in file):
        return "a plain Qwen2.5-VL (no generation expert)"
    if "patch_embed.proj.weight" in file:
        return "a vision tower alone"
    if any(name.endswith("embed_tokens.weight") for name in file):
        return "a plain language model (no generation expert)"
    return f"an unknown file (it holds {', '.join(sorted(file)[:3])}, ...)"


def check_names(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> None:
    """Strict: ``ValueError`` where a tensor is missing, unknown or of another shape (both map names to shapes)."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} tensors are missing ({_some(missing)}) and {len(unknown)} unknown ({_some(unknown)}) "
            f"of {len(expected)} expected.\nThe file does not belong to this model, or is incomplete: download it again."
        )
    wrong = [name for name, shape in expected.items() if tuple(found[name]) != tuple(shape)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors have another shape; {name} is {tuple(found[name])} where {tuple(expected[name])} belongs.\n"
            "The configuration and the weights are of different models: use the llm_config.json that came with the file."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def _read_header(path: Path) -> dict:
    """A safetensors header; ``ValueError`` for a file that is shorter than it says, or none at all."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path.name} ({size} bytes) is no safetensors file, or was cut off within its header of {length} bytes.\n"
            f"Download it again from {HUB}."
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path.name} has {size} bytes where its header says {expected}: it is truncated or damaged.\n"
            f"Download it again from {HUB}."
        )
    return header


def _with_tensors(state: Any) -> dict | None:
    """What training scripts keep within a dictionary beside their own state, or the dictionary; None without tensors."""
    if not isinstance(state, dict):
        return None
    inner = (_with_tensors(state.get(key)) for key in WEIGHTS_IN_PICKLES)
    own = state if any(isinstance(value, Tensor) for value in state.values()) else None
    return next((found for found in inner if found is not None), own)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0][:160]
