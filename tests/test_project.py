"""The files around the code agree with each other and with the code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lance_runtime.preprocess import sample_frames

ROOT = Path(__file__).parents[1]
EXTRAS = ("standalone", "test")


def pins() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(pin.name): pin for pin in found if pin.marker is None or pin.marker.evaluate()}


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_extra_is_pinned_within_its_bounds():
    wanted = [Requirement(line) for extra in EXTRAS for line in project()["optional-dependencies"][extra]]
    known = pins()
    assert sorted(known) == sorted(canonicalize_name(requirement.name) for requirement in wanted)
    for requirement in wanted:
        (pin,) = known[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow {pin}"


def test_the_nodes_need_nothing_installed():
    assert project()["dependencies"] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(name):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text("utf-8"))
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_readme_shows_every_task_with_arguments_that_exist():
    from lance_runtime.__main__ import build_parser
    from lance_runtime.prompts import TASKS

    text = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^\| `(\w+)` \|.*\| `(.+)` \|$", text, flags=re.MULTILINE)
    parsed = [build_parser().parse_args(re.findall(r'"[^"]*"|\S+', command)) for _, command in commands]
    assert [options.task for options in parsed] == [task for task, _ in commands]
    assert sorted(options.task for options in parsed) == sorted(TASKS)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the bench needs torch.compiler.set_stance")
def test_the_bench_counts_what_a_step_multiplies(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import bench

    from lance_runtime.model.transformer import Lance

    sizes = ["--hidden", "256", "--layers", "3", "--height", "64", "--width", "96", "--prompt-tokens", "9"]
    options = bench.parse([*sizes, "--vocabulary", "64", "--repeats", "1"])
    config, target = bench.config_of(options), bench.PixelShape(1, 64, 96).latent()
    model = Lance(config).requires_grad_(False)
    engine = bench.Engine(model, bench.torch.float32, bench.torch.device("cpu"))
    sequence = bench.layout(bench.make_context(options, config, target), target)
    branches = [bench.branch(engine, sequence)] * 2
    bench.bench_step(bench.Bench(options), engine, branches, target)
    found = bench.json.loads(capsys.readouterr().out)

    hidden, inner, keys, latents, vision = 256, config.intermediate_size, 128, 24, 2
    a_token = hidden * (2 * hidden + 2 * keys) + 3 * hidden * inner  # q and o, k and v, MLP
    glue = latents * 2 * 48 * hidden + 256 * hidden + hidden * hidden  # into and out of the model, one time
    linear = 2 * 2 * (3 * (latents + vision) * a_token + glue)
    bench.bench_decode(bench.Bench(options), engine, bench.make_context(options, config, target))
    answered = bench.json.loads(capsys.readouterr().out)
    assert answered["tokens"] == options.tokens
    assert answered["weights_gb"] == pytest.approx(4 * (3 * a_token + config.vocab_size * hidden) / 1e9, rel=1e-3)

    prefix = bench.SYSTEM_TOKENS + 9 + bench.CLOSING_TOKENS
    attention = 2 * 3 * 4 * (latents + vision) * (latents + vision + prefix) * hidden
    assert found["linear_gflop"] == pytest.approx(linear / 1e9, rel=1e-3)
    assert found["attention_gflop"] == pytest.approx(attention / 1e9, rel=1e-3)


def test_a_card_can_be_made_smaller_than_it_is(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import footprint

    asked, taken = [], [0]
    for name, stand_in in (
        ("get_device_properties", lambda _: SimpleNamespace(total_memory=150 * 10**9)),
        ("set_per_process_memory_fraction", asked.append),
        ("memory_reserved", lambda _=None: taken[0]),
        ("mem_get_info", None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    footprint.shrink_card(6 * 10**9)
    assert asked == [pytest.approx(0.04)]
    assert torch.cuda.mem_get_info() == (6 * 10**9, 6 * 10**9)
    for taken[0], free in ((2 * 10**9, 4 * 10**9), (7 * 10**9, 0)):
        assert torch.cuda.mem_get_info(torch.device("cuda")) == (free, 6 * 10**9)


def test_sources_that_are_measured_are_seen_whole(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import footprint

    for (_, _, frames), _ in footprint.TASKS.values():
        if 1 < frames <= 49:  # the longer one is drawn from words
            assert len(sample_frames(frames, footprint.SOURCE_FPS)) == frames


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the bench needs torch.compiler.set_stance")
def test_the_floor_is_what_the_runtime_multiplies(monkeypatch):
    """ROOFLINE.md's counts are those of this code, and the largest follows from the sizes alone."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import roofline

    written = (ROOT / "tests" / "benchmarks" / "ROOFLINE.md").read_text("utf-8")
    for section in roofline.counted():
        assert "\n".join(section).strip() in written
    readme = (ROOT / "README.md").read_text("utf-8")
    for name, *numbers, _int8, nvfp4, _mxfp8 in (row.strip("| ").split(" | ") for row in roofline.memory()):
        assert name.startswith("---") or f"| {' | '.join((name, *numbers, nvfp4))} |" in readme
    a_layer = 2048 * (2048 + 2048 + 2 * 256) + 3 * 2048 * 11008
    assert roofline.step(roofline.WORKS[0]).counted.linear == pytest.approx(2 * 2 * (2304 + 2) * 36 * a_layer, rel=1e-3)
