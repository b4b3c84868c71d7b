"""The names of Lance's files in combos: the hub's tree under the flat names that workflows use, and the built-in Nano."""

import re

import folder_paths

from ..lance_runtime.files import FLAT_NAMES, NANO, VAE_NAMES, VARIANT_FOLDERS

# After weights of the real size, which are the default of whoever has some.
NANO_CHOICE = "Lance Nano (built in)"
NANO_FILES = {
    "diffusion_models": NANO / VARIANT_FOLDERS["image"] / "model.safetensors",
    "vae": NANO / VAE_NAMES[1],
}


# What names of ours look like, among all the others of a folder. Whose VAE it is, only a name that looks so can say.
LIKELY = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in (
        ("diffusion_models", "lance"),
        ("text_encoders", "qwen.*vi"),
        ("vae", r"wan.?2[._]?2"),
    )
}


def model_files(folder: str) -> list[str]:
    """What ComfyUI lists in a folder, and before it the workflows' names of files of the hub's tree.

    Files that look like Lance's come first, since the first is what a new node begins with; a network that does not comes
    after Nano.
    """
    names = folder_paths.get_filename_list(folder)
    tree = [name for name in FLAT_NAMES[folder] if name not in names and _in_tree(folder, name)]
    likely = [name for name in names if LIKELY[folder].search(name)]
    others = [name for name in names if name not in likely]
    nano = [NANO_CHOICE] if folder in NANO_FILES else []
    return [*tree, *likely, *(nano + others if folder == "diffusion_models" else others + nano)]


def model_path(folder: str, name: str) -> str:
    """The file that a combo's value stands for; a file of just that name wins over the hub's tree."""
    if name == NANO_CHOICE:
        return str(NANO_FILES[folder])
    there = name in folder_paths.get_filename_list(folder)
    return folder_paths.get_full_path_or_raise(folder, name if there else _in_tree(folder, name) or name)


def _in_tree(folder: str, name: str) -> str | None:
    """ComfyUI's name of the hub's file, which may lie some folders deeper (models/diffusion_models/Lance/Lance_3B/...)."""
    place = FLAT_NAMES[folder].get(name)
    listed = folder_paths.get_filename_list(folder) if place else ()
    return next((found for found in listed if f"/{found}".replace("\\", "/").endswith(f"/{place}")), None)
