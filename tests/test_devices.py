"""Devices that are no CUDA: the pipeline runs on a made-up one, and only the defaults ask for one maker's functions."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [*(HERE.parent / "lance_runtime").rglob("*.py"), *(HERE.parent / "nodes").rglob("*.py"), HERE.parent / "__init__.py"]
ASKERS = {"default_device", "default_dtype"}  # functions that may ask what a maker's device can do
MAKERS = {"cuda", "mps", "xpu", "hip", "npu"}
LATENT_TOLERANCE = 1e-3  # that of the goldens: the device has no fused attention
TASKS = {
    "image": ["image_edit", "subject_image", "t2i", "x2t_image"],
    "video": ["i2v", "subject_video", "t2v", "video_edit", "x2t_video"],
}


@pytest.mark.parametrize(("variant", "offload"), [("image", "none"), ("video", "none"), ("image", "model"), ("video", "layer")])
def test_every_task_runs_on_a_device_of_another_kind(variant, offload):
    command = [sys.executable, str(HERE / "fake_device.py"), variant, offload]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == TASKS[variant]
    for task, result in found.items():
        if task.startswith("x2t"):
            expected, ids = result["ids"]
            assert ids == expected
            continue
        assert result["device"] == "toaster"
        assert result["apart"] < LATENT_TOLERANCE
        assert result["pixels"] <= 1


def test_the_device_refuses_tensors_of_the_cpu():
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import fake_device, torch
kept = fake_device.install()
there = torch.ones(2, 3).to(fake_device.NAME)
assert torch.equal((there @ there.T).cpu(), torch.full((2, 2), 3.0))
try:
    there + torch.ones(2, 3)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert "got tensors of the CPU" in done.stdout, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HERE.parent).as_posix())
def test_no_call_is_one_makers_own(path):
    """``torch.cuda.*`` and ``tensor.cuda()`` would fail or do nothing elsewhere; the defaults alone may ask."""
    tree = ast.parse(path.read_text("utf-8"))
    allowed = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in ASKERS]
    exempt = {id(inner) for function in allowed for inner in ast.walk(function)}
    calls = [
        f"line {node.lineno}: .{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in MAKERS and id(node) not in exempt
    ]
    assert calls == []
