"""Every task of the nine as a graph of our nodes in the real ComfyUI, against the reference's goldens."""

from __future__ import annotations

import goldens
import pytest
from comfy_results import TOLERANCE, difference, saved_latents, upload_media
from graphs import golden_graph, loader, node, pictures

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def media(comfy_server, tmp_path_factory):
    return upload_media(comfy_server, tmp_path_factory.mktemp("media"))


@pytest.mark.parametrize("name", goldens.DRAWN)
def test_graph_of_our_nodes(name, comfy_server, media):
    result = comfy_server.run(golden_graph(name, media))
    assert difference(saved_latents(result)[0], goldens.tensors(name)["latent"]) < TOLERANCE


@pytest.mark.parametrize("name", goldens.DRAWN)
def test_lance_sampler(name, comfy_server, media):
    result = comfy_server.run(golden_graph(name, media, in_one_node=True))
    assert difference(saved_latents(result)[0], goldens.tensors(name)["latent"]) < TOLERANCE


@pytest.mark.parametrize("name", goldens.ANSWERED)
def test_lance_ask(name, comfy_server, media):
    case = goldens.CASES[name]
    graph = pictures(case, media)
    sources = {f"images.image_{i}": [f"image{i}", 0] for i in range(len(case.get("images", [])))}
    sources.update({"video": ["clip", 0]} if "video" in case else {})
    graph["load"] = loader(case["checkpoint"])
    settings = {"resolution": case["settings"]["resolution"], "max_length": case["settings"]["max_new_tokens"]}
    sampling = {"temperature": 0.0, "top_p": 1.0, "seed": 42}
    if not case["question"]:  # the golden's instruction is not the one that we take for a caption
        graph["context"], sources = _own_instruction(case, sources), {"context": ["context", 0]}
        graph["vit"] = node(
            "LanceNativeViTEncode", clip=["load", 1], source=["image0", 0], resolution=settings["resolution"], fps=24.0
        )
    graph["ask"] = node("LanceNativeAsk", clip=["load", 1], question=case["question"], **settings, **sampling, **sources)
    graph["show"] = node("PreviewAny", source=["ask", 0])
    result = comfy_server.run(graph)
    assert result.outputs["ask"]["text"] == [case["expected_text"]]
    streamed = [event["text"] for event in result.of_type("progress_text")]
    assert case["expected_text"] in streamed
    assert len(streamed) > 1


def _own_instruction(case, sources):
    return node(
        "LanceNativeContext",
        clip=["load", 1],
        task="own",
        role="look",
        text="",
        system=case["instruction"],
        **{"visuals.visual_0": ["vit", 0]},
    )
