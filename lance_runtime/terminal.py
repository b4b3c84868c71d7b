"""What all commands share: how they refuse, how they show progress, and the names of number formats."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # Qwen2.5's activations are beyond float16


class Parser(argparse.ArgumentParser):
    """Errors in one line, as for everything that goes wrong later."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains)\n")


class Progress:
    """A bar that appears with the first progress: a call that is refused shows its error alone."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(desc=self.title, total=total, unit=self.unit, unit_scale=self.unit == "B")
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
