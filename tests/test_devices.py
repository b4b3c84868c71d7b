"""Devices that are no CUDA: the pipeline runs on a made-up one, and only the defaults ask for one maker's functions."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tasks
import torch
from torch.utils import backend_registration

from lance_runtime import denoise as denoise_room
from lance_runtime.model import attention as attention_room
from lance_runtime.model.attention import sdpa, surely_fused, without_cudnn_attention

HERE = Path(__file__).parent
FILES = [*(HERE.parent / "lance_runtime").rglob("*.py"), *(HERE.parent / "nodes").rglob("*.py"), HERE.parent / "__init__.py"]
# Functions that may ask what a maker's device can do.
ASKERS = {"default_device", "default_dtype", "multiplies_in_parts", "turn_off", "turn_back", "surely_fused"} | {
    "capture",
    "capture_stream",
}
MAKERS = {"cuda", "mps", "xpu", "hip", "npu"}
LATENT_TOLERANCE = 1e-3  # that of the goldens: the device has no fused attention
TASKS = {
    "image": ["image_edit", "subject_image", "t2i", "x2t_image"],
    "video": ["i2v", "subject_video", "t2v", "video_edit", "x2t_video"],
}


# The test's own tools are newer than the oldest torch that the runtime takes.
new_torch = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)


@new_torch
@pytest.mark.parametrize(
    ("variant", "offload"),
    [
        ("image", "none"),
        ("video", "none"),
        ("image", "model"),
        ("video", "layer"),
        ("image", "recorded"),
        ("video", "recorded"),
    ],
)
def test_every_task_runs_on_a_device_of_another_kind(variant, offload):
    command = [sys.executable, str(HERE / "fake_device.py"), variant, offload]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("table") == "cpu"  # its rows are looked up there
    recordings = found.pop("recordings")
    assert recordings >= len(TASKS[variant]) if offload == "recorded" else recordings == 0
    assert sorted(found) == TASKS[variant]
    for task, result in found.items():
        if task.startswith("x2t"):
            expected, ids = result["ids"]
            assert ids == expected
            continue
        assert result["device"] == "toaster"
        assert result["apart"] < LATENT_TOLERANCE
        assert result["pixels"] <= 1


@new_torch
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


@new_torch
@pytest.mark.parametrize(
    "reaches",
    [
        "x * x.sum().item()",
        "x + torch.tensor([1.0], device=x.device)",
        "x + x.cpu().to(x.device)",
        "x[x > 0]",
        "x.masked_select(x > 0)",
        "x.unique()",
        "x.repeat_interleave(torch.arange(3, device=x.device))",
    ],
)
def test_a_recording_must_not_reach_the_host(reaches):
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import fake_device, torch
kept = fake_device.install()
there = torch.ones(3).to(fake_device.NAME)
assert fake_device.Recording(lambda x: x + torch.arange(3, device=x.device), [there]).output.cpu().tolist() == [1, 2, 3]
try:
    fake_device.Recording(lambda x: {reaches}, [there])
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert "reaches the host" in done.stdout, done.stderr


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch prefers cuDNN from 2.5 on")
def test_reading_and_decoding_go_without_plans_for_one_shape(image_pipe, monkeypatch):
    """cuDNN's attention is off where every call has another shape, and for pictures; for the steps of clips it is on."""
    components, seen, plans = image_pipe.components, {True: 0, False: 0}, torch.backends.cuda.cudnn_sdp_enabled

    def attention(q, k, v):
        seen[plans()] += 1
        return sdpa(q, k, v)

    engine = replace(components.engine, attention=attention)
    monkeypatch.setattr(type(components), "engine", engine)
    image_pipe(**tasks.arguments("x2t_image") | {"max_new_tokens": 3})
    assert seen.pop(True) == 0
    assert seen[False] > 0
    assert plans()
    for few, steps in ((True, "off"), (False, "on")):
        seen.update({True: 0, False: 0})
        monkeypatch.setattr(denoise_room, "BATCHED_TOKENS", 8192 if few else 0)
        image_pipe(**tasks.arguments("t2i") | {"steps": 1})
        assert (seen[True] > 0) == (steps == "on")
    assert plans()
    with pytest.raises(ZeroDivisionError), without_cudnn_attention():
        raise ZeroDivisionError
    assert plans()


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch prefers cuDNN from 2.5 on")
def test_one_of_two_threads_that_ends_first_leaves_the_other_without_cudnn():
    one, two = without_cudnn_attention(), without_cudnn_attention()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    two.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "hip", "fused"),
    [
        ("cpu", torch.bfloat16, None, None, True),
        ("cuda", torch.bfloat16, (8, 0), None, True),
        ("cuda", torch.bfloat16, (7, 5), None, False),
        ("cuda", torch.float32, (7, 5), None, True),
        ("cuda", torch.bfloat16, (9, 4), "6.2", False),
        ("mps", torch.float32, None, None, False),
    ],
)
def test_where_torch_never_writes_scores_out(kind, dtype, capability, hip, fused, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert surely_fused(torch.device(kind), dtype) == fused


@pytest.mark.parametrize("task", ["image_edit", "x2t_image"])
def test_queries_of_text_lie_side_by_side(image_pipe, monkeypatch, task):
    """Some devices' attention takes few of them for it."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def attention(q, *others, **more):
        if more:  # causal, or with a mask
            seen.append(q.is_contiguous())
        return real(q, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    image_pipe(**tasks.arguments(task) | ({"steps": 1} if task == "image_edit" else {"max_new_tokens": 3}))
    assert seen
    assert all(seen)


def test_attention_that_may_write_scores_out_goes_in_parts(monkeypatch):
    q, k, v = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    expected, calls, real = sdpa(q, k, v), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *x: calls.append(x[0].shape) or real(*x))
    monkeypatch.setattr(attention_room, "surely_fused", lambda device, dtype: False)
    monkeypatch.setattr(attention_room, "MAX_UNFUSED_SCORES", 2 * 3 * 20 * 16)
    torch.testing.assert_close(sdpa(q, k, v), expected)
    assert [shape[2] for shape in calls] == [16, 16, 16, 2]


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
