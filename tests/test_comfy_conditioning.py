"""ComfyUI's own nodes around prompts, previews and text: what they do with Lance's CONDITIONING and CLIP."""

from __future__ import annotations

import goldens
import pytest
from comfy_results import difference, saved_latents
from graphs import loader, node, text_to_image
from workflow_nodes import ask, edit, sampler

pytestmark = pytest.mark.comfy
CAT = "the cat in the dark forest"


@pytest.fixture(scope="module")
def server(comfy_server):
    comfy_server.upload_image(goldens.PARITY / "media" / "wide.png")
    return comfy_server


def drawn(server, size=(96, 64), **nodes):
    """Latents of a short run of KSampler with these nodes put in, or in the place of others."""
    graph = text_to_image(steps=3, cfg=3.0)
    del graph["decode"], graph["save"]
    graph["empty"]["inputs"].update(width=size[0], height=size[1])
    graph["other"] = node("CLIPTextEncode", clip=["load", 1], text=CAT)
    for name in ("positive", "negative"):
        if name in nodes:
            graph["prompt"] = graph["positive"]
            graph["sample"]["inputs"][name] = [f"new {name}", 0]
            nodes[f"new {name}"] = nodes.pop(name)
    latents = saved_latents(server.run({**graph, **nodes}))
    assert latents.isfinite().all()
    return latents


def combined(first="prompt", second="other"):
    return node("ConditioningCombine", conditioning_1=[first, 0], conditioning_2=[second, 0])


def test_combine_mixes_two_prompts(server):
    hat, cat = drawn(server), drawn(server, positive=combined("other", "other"))
    both = drawn(server, positive=combined())
    assert min(difference(both, hat), difference(both, cat)) > 1e-3
    alone = drawn(server, positive=node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.0, end=1.0))
    assert difference(cat, alone) < 1e-5


def test_area_draws_a_prompt_in_its_place(server):
    """An area of ComfyUI counts 8 pixels a latent, of which Lance has one for every 16."""
    area = node("ConditioningSetArea", conditioning=["other", 0], width=64, height=64, x=0, y=0, strength=1.0)
    size = (256, 256)
    plain, mixed = drawn(server, size), drawn(server, size, area=area, positive=combined("prompt", "area"))
    change = (mixed - plain).abs().amax(dim=(0, 1, 2))
    assert change.shape == (16, 16)
    assert change[:8, :8].mean() > 2 * change[8:, 8:].mean()


def test_area_of_a_video(server):
    area = {"width": 0.5, "height": 1.0, "temporal": 0.5, "x": 0.0, "y": 0.0, "z": 0.0, "strength": 1.0}
    nodes = {
        "area": node("ConditioningSetAreaPercentageVideo", conditioning=["other", 0], **area),
        "empty": node("EmptyHunyuanLatentVideo", width=96, height=64, length=13, batch_size=1),
        "positive": combined("prompt", "area"),
    }
    assert drawn(server, **nodes).shape[2] == 4


def test_timestep_range(server):
    def within(conditioning, start, end):
        return node("ConditioningSetTimestepRange", conditioning=[conditioning, 0], start=start, end=end)

    plain = drawn(server)
    assert difference(drawn(server, positive=within("prompt", 0.0, 1.0)), plain) == 0
    halves = {"one": within("prompt", 0.0, 0.4), "two": within("other", 0.4, 1.0), "positive": combined("one", "two")}
    assert difference(drawn(server, **halves), plain) > 1e-3


def test_zero_out_is_an_empty_prompt(server):
    zero = node("ConditioningZeroOut", conditioning=["other", 0])
    assert difference(drawn(server, negative=zero), drawn(server)) == 0
    nothing = node("CLIPTextEncode", clip=["load", 1], text="")
    assert difference(drawn(server, positive=zero), drawn(server, positive=nothing)) == 0


@pytest.mark.parametrize("ours", [False, True])
def test_previews_and_progress_while_sampling(ours, server):
    graph = text_to_image(steps=4, seed=11 + ours)
    if ours:
        graph["sample"] = sampler("a red hat", ["empty", 0], steps=4)
    result = server.run(graph)
    assert result.previews
    counted = [(event["value"], event["max"]) for event in result.of_type("progress") if event["node"] == "sample"]
    assert (3, 3) in counted  # prefill: one block of text through three layers
    steps = [(value, most) for value, most in counted if most == 4]
    assert steps[-1] == (4, 4)
    assert steps == sorted(steps)
    assert counted.index((3, 3)) < counted.index(steps[0])
    kinds = [event["type"] for event in result.events]
    assert kinds.index("preview") < max(i for i, event in enumerate(result.events) if event["type"] == "progress")


def test_what_a_second_branch_takes_over_is_not_counted(server):
    """Both branches of guidance see the picture, which is read once: each bar goes on to its own end."""
    graph = {"load": loader(), "picture": node("LoadImage", image="wide.png"), "change": edit(image_0=["picture", 0])}
    graph["sample"] = sampler("make it night", ["change", 1], ["change", 0], steps=2)
    graph |= {
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }
    result = server.run(graph)
    bars = []
    for event in (event for event in result.of_type("progress") if event["node"] == "sample"):
        if event["value"] == 1:
            bars.append([])
        bars[-1].append((event["value"], event["max"]))
    assert [bar[-1][0] for bar in bars] == [bar[-1][1] for bar in bars]
    first, second, steps = (bar[-1][1] for bar in bars)
    assert first > second > 0
    assert steps == 2


def question(**settings):
    asked = ask("What color is the car?", image_0=["picture", 0])
    asked["inputs"].update(max_length=8, **settings)
    return {"load": loader(), "picture": node("LoadImage", image="wide.png"), "ask": asked}


def generated(length, **drawing):
    inputs = {"clip": ["load", 1], "prompt": "What color is the car?", "image": ["picture", 0], "max_length": length}
    sampling = {f"sampling_mode.{key}": value for key, value in drawing.items()}
    return node("TextGenerate", **inputs, sampling_mode="on" if drawing else "off", **sampling)


def text_of(server, **nodes):
    graph = {**question(), **nodes}
    graph = {**graph, **{f"show {name}": node("PreviewAny", source=[name, 0]) for name in nodes}}
    result = server.run(graph)
    return [result.outputs[f"show {name}"]["text"][0] for name in nodes]


def test_generate_text_answers_as_lance_ask(server):
    ours, built_in = text_of(server, ask=question()["ask"], text=generated(8))
    assert ours
    assert built_in == ours


def test_generate_text_repeats_with_a_seed(server):
    drawing = {
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.0,
    }
    nodes = {f"{length} {seed}": generated(length, seed=seed, **drawing) for length, seed in ((12, 3), (14, 3), (12, 4))}
    first, longer, other = text_of(server, **nodes)
    assert longer.startswith(first.rstrip("\ufffd"))
    assert other != first


def test_tokens_are_counted(server):
    first = question(seed=5, resolution="image_512res")  # not asked about before: a known picture is not read again
    result = server.run({**first, "show": node("PreviewAny", source=["ask", 0])})
    counted = [(event["value"], event["max"]) for event in result.of_type("progress") if event["node"] == "ask"]
    assert (9, 9) in counted  # prefill: text, picture and question through three layers
    assert {most for _, most in counted} == {8, 9}


def test_an_interrupted_answer_stops_at_once_and_the_next_is_right(server):
    small = {"resolution": "image_256res"}
    expected = text_of(server, ask=question(**small)["ask"])
    graph = {**question(**small), "show": node("PreviewAny", source=["ask", 0])}
    graph["ask"]["inputs"].update(question="Tell me everything.", max_length=4000)
    written = []

    def interrupt(event):
        if event["type"] == "progress_text":
            written.append(event)
            if len(written) == 3:
                server.interrupt()

    result = server.run(graph, check=False, on_event=interrupt)
    assert result.interrupted
    assert len(written) < 30
    again = {**question(seed=6, **small), "show ask": node("PreviewAny", source=["ask", 0])}
    assert server.run(again).outputs["show ask"]["text"] == expected
