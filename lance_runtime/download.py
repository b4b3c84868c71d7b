"""The weights from the hub into ComfyUI's model folders: listed, measured, fetched with resume, checked by hash.

huggingface_hub lists and transfers, and is imported when it is needed. This file stays out of the registry's archive,
whose scanner holds back whatever talks to the network (.comfyignore); ComfyUI never imports it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .checkpoint import HUB, WAN_22, identify
from .files import (
    FLAT_NAMES,
    MODEL_HOMES,
    MODEL_NAMES,
    VAE_HOMES,
    VAE_NAMES,
    VARIANT_FOLDERS,
    VIT_FOLDER,
    VIT_HOMES,
    VIT_NAME,
    whole_files,
)

REPOSITORY = HUB.split()[0]
VAE_NAME = VAE_NAMES[0]
# The hub's folders keep their names: a checkpoint's configuration and tokenizer lie beside it.
HOMES = {**dict.fromkeys(VARIANT_FOLDERS.values(), MODEL_HOMES[0]), VIT_FOLDER: VIT_HOMES[0], VAE_NAME: VAE_HOMES[0]}
# The video checkpoint carries a vision tower of its own.
PARTS = {
    "image": (VARIANT_FOLDERS["image"], VIT_FOLDER, VAE_NAME),
    "video": (VARIANT_FOLDERS["video"], VAE_NAME),
    "all": tuple(HOMES),
}
WEIGHTS = {**dict.fromkeys(VARIANT_FOLDERS.values(), MODEL_NAMES), VIT_FOLDER: (VIT_NAME,)}
SMALL = (".json", ".txt")  # configuration and tokenizer
CHUNK = 1 << 24

Say = Callable[[str], object]


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it: path, bytes, and its sha256 (large files) or git's own sha1 (small ones)."""

    name: str
    size: int
    digest: str

    def target(self, models: Path) -> Path:
        return self.home(models) / self.name

    def home(self, models: Path) -> Path:
        return models / HOMES[self.name.split("/")[0]]

    def present(self, models: Path) -> Path | None:
        """Where it lies already: in its place, or beside that under the name that ComfyUI's page saves it under."""
        home = self.home(models)
        flat = [home / name for name, place in FLAT_NAMES[home.name].items() if place == self.name and (home / name).is_file()]
        saved = [path for path in flat if path.stat().st_size == self.size or self.is_served_by(path)]
        return next((path for path in (self.target(models), *saved) if path.is_file()), None)

    def is_served_by(self, path: Path) -> bool:
        """Whether it is the VAE, and the path ComfyUI's own file of that: the same numbers in another kind of file."""
        return self.name == VAE_NAME and any(identify(file) == WAN_22 for file in whole_files([path]))

    def part(self, models: Path) -> Path:
        """Where an unfinished download waits; bound to the content, so that two versions never mix."""
        target = self.target(models)
        return target.with_name(f"{target.name}.{self.digest[:8]}.part")

    def hash_of(self, path: Path) -> str:
        found = hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a download will do: every file that belongs to the variant, and the folder that they go to."""

    models: Path
    files: tuple[HubFile, ...]

    def missing(self) -> list[HubFile]:
        return [file for file in self.files if file.present(self.models) is None]

    def needed(self) -> int:
        """Bytes that the disk must still take; what was fetched before an interruption lies there already."""
        return sum(file.size - _fetched(file.part(self.models)) for file in self.missing())

    def lines(self) -> Iterator[str]:
        """The list of files and the sum, for people."""
        missing = self.missing()
        for file in self.files:
            place, begun = file.present(self.models) or file.target(self.models), _fetched(file.part(self.models))
            note = "  is there" if file not in missing else f"  {readable(begun)} are there" if begun else ""
            yield f"  {readable(file.size):>9}  {place.relative_to(self.models).as_posix()}{note}"
        free = shutil.disk_usage(self.models).free
        yield f"{readable(self.needed())} to fetch into {self.models}, where {readable(free)} are free."


class Hub:
    """The repository at one commit. Every failure of the network is an ``OSError`` of two lines.

    endpoint: an address that speaks the hub's protocol; by default what huggingface_hub is set to (``HF_ENDPOINT``).
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint, self.commit = endpoint, "main"

    def files(self) -> list[HubFile]:
        """All files of the repository, whose present commit is kept for what is fetched later."""
        api = _huggingface_hub().HfApi(endpoint=self.endpoint)
        try:
            found = api.model_info(REPOSITORY, files_metadata=True)
        except Exception as error:
            _unreachable(error)
        self.commit = found.sha
        return [HubFile(one.rfilename, one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in found.siblings]

    def fetch(self, file: HubFile, part: Path) -> None:
        """Append what is missing to a part file.

        huggingface_hub's own download throws an interrupted file away; its transfer, which this calls, goes on from any byte.
        """
        library = _huggingface_hub()
        url = library.hf_hub_url(REPOSITORY, file.name, revision=self.commit, endpoint=self.endpoint)
        headers = {**library.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        while (begun := _fetched(part)) < file.size:
            try:
                with part.open("ab") as stream:
                    library.file_download.http_get(
                        url, stream, resume_size=begun, headers=headers, expected_size=file.size, displayed_filename=file.name
                    )
            except Exception as error:
                if _fetched(part) <= begun:  # a connection that brought something before it broke is worth another
                    _unreachable(error)


def make_plan(models: Path, variant: str, hub: Hub) -> Plan:
    """What of a variant ("image", "video", "all") is to go where. ``ValueError`` where a file of another size is in the way."""
    if not models.is_dir():
        raise ValueError(f"{models} is no folder.\nName ComfyUI's models folder: --to .../ComfyUI/models")
    plan = Plan(models, tuple(_chosen(hub.files(), variant)))
    for file in plan.files:
        target = file.target(models)
        if target.is_file() and target.stat().st_size != file.size:
            _in_the_way(target, f"has {target.stat().st_size} bytes", f"{file.size}")
    return plan


def download(plan: Plan, hub: Hub, say: Say) -> None:
    """Fetch what is missing and check every file. ``ValueError`` for too little disk and for content of another hash."""
    free = shutil.disk_usage(plan.models).free
    if plan.needed() > free:
        raise ValueError(
            f"{readable(plan.needed())} are to be fetched and {readable(free)} are free in {plan.models}.\n"
            "Make room, or name a folder on another disk (ComfyUI's extra_model_paths.yaml can point there): --to FOLDER"
        )
    for file in plan.files:
        if (place := file.present(plan.models)) is None:
            _obtain(file, plan.models, hub, say)
        elif place.stat().st_size == file.size:  # not ComfyUI's own file of the VAE, whose hash the hub does not say
            _check_present(file, place, say)


def models_around(file: Path) -> Path | None:
    """The models folder of the ComfyUI that a file of this pack is installed in."""
    folders = file.absolute().parents
    models = folders[3] / "models" if len(folders) > 3 and folders[2].name == "custom_nodes" else None
    return models if models is not None and models.is_dir() else None


def readable(size: int) -> str:
    """12370411616 -> "12.4 GB" (powers of 1000, as disks are sold)."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


def _obtain(file: HubFile, models: Path, hub: Hub, say: Say) -> None:
    target, part = file.target(models), file.part(models)
    target.parent.mkdir(parents=True, exist_ok=True)
    hub.fetch(file, part)
    say(f"checking {file.name}")
    found = file.hash_of(part)
    if found != file.digest:
        part.unlink()
        raise ValueError(
            f"{file.name} arrived with the hash {found[:16]}... where {REPOSITORY} says {file.digest[:16]}...; it was "
            "removed.\nRun the command again; if it stays so, something between you and the hub changes what passes through."
        )
    part.replace(target)


def _check_present(file: HubFile, target: Path, say: Say) -> None:
    say(f"checking {file.name}")
    found = file.hash_of(target)
    if found != file.digest:
        _in_the_way(target, f"has the hash {found[:16]}...", f"{file.digest[:16]}...")


def _chosen(files: list[HubFile], variant: str) -> Iterator[HubFile]:
    """A variant's weights with the small files beside them; of several names for the weights the first that is there."""
    for part in PARTS[variant]:
        within = [file for file in files if file.name == part or file.name.startswith(f"{part}/")]
        names = [part] if part == VAE_NAME else [f"{part}/{name}" for name in WEIGHTS[part]]
        weights = next((file for name in names for file in within if file.name == name), None)
        if weights is None:
            raise ValueError(
                f"{REPOSITORY} holds no {' and no '.join(names)} among its {len(files)} files.\n"
                "The repository has changed: look for a newer Lance Native, or fetch the files by hand as the README says."
            )
        yield weights
        yield from (file for file in within if file.name.endswith(SMALL) and file.name.count("/") == 1)


def _fetched(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _in_the_way(target: Path, found: str, expected: str) -> NoReturn:
    raise ValueError(
        f"{target} {found} where {REPOSITORY} says {expected}: it is another file, or was cut off.\n"
        "Move it away, or name another folder with --to."
    )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise ValueError(
            "huggingface_hub is not installed in this Python.\n"
            "Run: pip install huggingface_hub, or use the Python that ComfyUI runs with."
        ) from error
    return huggingface_hub


def _unreachable(error: Exception) -> NoReturn:
    if getattr(error, "errno", None):
        raise error  # the disk's, not the network's
    first = str(error).split("\n", maxsplit=1)[0][:200]
    raise OSError(
        f"{REPOSITORY} cannot be reached, or broke off: {type(error).__name__}, {first}.\n"
        "See to the network (and to HF_HUB_OFFLINE and HF_ENDPOINT) and run the command again: it goes on where it stopped."
    ) from error
