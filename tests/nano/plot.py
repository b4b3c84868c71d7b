"""The losses of a training as a picture: ``python tests/nano/plot.py --work DIR`` -> ``losses.png`` and the logs beside it."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LOGS = {
    "vae_both": "VAE",
    "vae_decoder": "VAE, decoder alone",
    "vision": "vision tower",
    "lance": "all tasks, one process",
    "lance1": "the other process",
}
UNITS = {"step", "s", "psnr"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def plot(logs: dict[str, list[dict[str, Any]]], to: Path) -> None:
    """One panel a stage, one line a task."""
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 4), squeeze=False)
    for axis, (name, lines) in zip(axes[0], logs.items(), strict=True):
        for key in sorted({key for line in lines for key in line} - UNITS):
            rows = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*rows, strict=True), label=key)
        minutes = lines[-1]["s"] / 60
        axis.set(title=f"{LOGS[name]} ({minutes:.0f} min)", xlabel="step", ylabel="loss", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(to, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    found = [name for name in LOGS if (work / f"{name}.jsonl").is_file()]
    (HERE / "logs").mkdir(exist_ok=True)
    for name in found:
        shutil.copy(work / f"{name}.jsonl", HERE / "logs" / f"{name}.jsonl")
    plot({name: read(work / f"{name}.jsonl") for name in found}, HERE / "losses.png")


if __name__ == "__main__":
    main()
