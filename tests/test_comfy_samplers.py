"""ComfyUI's own samplers, guiders, schedulers and model sampling nodes on Lance, against the runtime."""

from __future__ import annotations

import goldens
import pytest
import torch
from comfy_results import TOLERANCE, comfy_noise, difference, upload_media
from graphs import custom_sampling, empty, golden_graph, node
from sampler_graphs import CFG, NEGATIVE, PROMPT, SEED, SHIFT, STEPS, base, ends, ksampler, latents, with_patch

from lance_runtime import Guidance
from lance_runtime.denoise import draw_noise, flow_sigmas
from lance_runtime.types import LatentShape

pytestmark = pytest.mark.comfy
PLAIN = {"interval": (0.0, 1.0), "renorm": "none", "uncond_positions": "dense"}
ACTS = 1e-3
EXACT = 1e-5


@pytest.fixture(scope="module")
def drawn(image_pipe):
    """Latents of the runtime for the prompt, 64 x 96, with ComfyUI's noise and plain guidance unless told otherwise."""

    def draw(sigmas=None, noise=None, guidance=None, **arguments):
        arguments = {"steps": STEPS, **arguments} if sigmas is None else {"sigmas": sigmas, **arguments}
        noise = comfy_noise(SEED, 48, 1, 4, 6) if noise is None else noise
        guidance = guidance or Guidance(scale=CFG, **PLAIN)
        return image_pipe("t2i", PROMPT, height=64, width=96, noise=noise, guidance=guidance, **arguments).latents

    return draw


def custom(sigmas, sampler="euler", model="load"):
    """Nodes of SamplerCustom."""
    sampling = {"add_noise": True, "noise_seed": SEED, "cfg": CFG, "latent_image": ["empty", 0]}
    links = {"sampler": ["pick", 0], "sigmas": ["sigmas", 0]}
    return {
        "pick": node("KSamplerSelect", sampler_name=sampler),
        "sigmas": sigmas,
        "sample": node("SamplerCustom", **ends(model), **sampling, **links),
    }


def lance_sigmas(steps=STEPS, denoise=1.0):
    return node("LanceNativeScheduler", steps=steps, shift=SHIFT, denoise=denoise)


def lance_guidance(start, end, renorm):
    return node("LanceNativeGuidance", interval_start=start, interval_end=end, renorm=renorm, renorm_min=0.0)


def advanced(start, end, latent, noise="enable", left="disable"):
    inputs = {"add_noise": noise, "noise_seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler"}
    ends_at = {"start_at_step": start, "end_at_step": end, "return_with_leftover_noise": left}
    return node("KSamplerAdvanced", **ends(), latent_image=[latent, 0], scheduler="simple", **inputs, **ends_at)


def test_ksampler_advanced_in_two_halves(comfy_server, drawn):
    first, second = advanced(0, 2, "empty", left="enable"), advanced(2, 10000, "first", noise="disable")
    found = latents(comfy_server, {**base(), "first": first, "sample": second})
    assert difference(found[0], drawn()) < TOLERANCE


@pytest.mark.parametrize("steps", [5, 7])
def test_sampler_custom_with_our_sigmas(comfy_server, drawn, steps):
    found = latents(comfy_server, {**base(), **custom(lance_sigmas(steps))})
    assert difference(found[0], drawn(steps=steps)) < TOLERANCE


def test_sampler_custom_with_sigmas_by_hand(comfy_server, drawn):
    sigmas = [1.0, 0.8, 0.45, 0.2, 0.0]
    found = latents(comfy_server, {**base(), **custom(node("ManualSigmas", sigmas=str(sigmas)[1:-1]))})
    assert difference(found[0], drawn(sigmas=sigmas)) < TOLERANCE


def test_sampler_custom_advanced_with_a_negative_prompt(comfy_server, drawn):
    graph = {**base(negative=NEGATIVE), **custom_sampling(["load", 0], SEED, STEPS, SHIFT, CFG, None)}
    graph["noise"] = node("RandomNoise", noise_seed=SEED)
    graph["guider"] = node("CFGGuider", **ends(), cfg=CFG)
    graph["sample"]["inputs"]["latent_image"] = ["empty", 0]
    found = latents(comfy_server, graph)
    assert difference(found[0], drawn(negative_prompt=NEGATIVE)) < TOLERANCE
    assert difference(found[0], drawn()) > ACTS


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.75, 1.0)])
def test_dual_cfg_guides_by_the_pictures_too(comfy_server, image_pipe, tmp_path, interval):
    name, visual_scale = "image_edit_dense", 2.5
    graph = golden_graph(name, upload_media(comfy_server, tmp_path))
    graph["guidance"]["inputs"].update(interval_start=interval[0], interval_end=interval[1], renorm="none")
    conds = {"cond1": ["conds", 0], "cond2": ["conds", 1], "negative": ["conds", 2]}
    scales = {"cfg_conds": CFG, "cfg_cond2_negative": visual_scale, "style": "regular"}
    graph["guider"] = node("DualCFGGuider", model=["guidance", 0], **conds, **scales)
    guidance = Guidance(CFG, interval, "none", visual_scale=visual_scale, uncond_positions="dense")
    expected = image_pipe(**{**goldens.arguments(name), "guidance": guidance}).latents
    graph = {key: value for key, value in graph.items() if key not in ("save", "decode", "latent")}
    assert difference(latents(comfy_server, graph)[0], expected) < TOLERANCE
    assert difference(goldens.tensors(name)["latent"], expected) > ACTS


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "res_multistep", "uni_pc", "euler_ancestral"])
def test_other_samplers(comfy_server, sampler):
    first, again = (latents(comfy_server, with_patch(sampler_name=sampler)) for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert difference(first, latents(comfy_server, with_patch())) > ACTS


@pytest.mark.parametrize("scheduler", ["normal", "beta"])
def test_other_schedulers(comfy_server, scheduler):
    basic = node("BasicScheduler", model=["load", 0], scheduler=scheduler, steps=STEPS, denoise=1.0)
    classic = latents(comfy_server, {**base(), "sample": ksampler(scheduler=scheduler)})
    assert torch.equal(latents(comfy_server, {**base(), **custom(basic)}), classic)
    assert difference(classic, latents(comfy_server, with_patch())) > ACTS


@pytest.mark.parametrize("class_type", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
def test_model_sampling_moves_the_shift_only(comfy_server, drawn, class_type):
    plain = latents(comfy_server, with_patch())
    assert difference(latents(comfy_server, with_patch(node(class_type, shift=SHIFT))), plain) < EXACT
    moved = latents(comfy_server, with_patch(node(class_type, shift=1.5)))[0]
    assert difference(moved, plain[0]) > ACTS
    if class_type == "ModelSamplingSD3":
        assert difference(moved, drawn(shift=1.5)) < TOLERANCE


@pytest.mark.parametrize("ours", [False, True])
def test_denoise_below_one_begins_inside_the_schedule(comfy_server, drawn, ours):
    graph = {**base(), "first": ksampler()}
    if ours:
        graph.update(custom(lance_sigmas(denoise=0.5)))
        graph["sample"]["inputs"]["latent_image"] = ["first", 0]
    else:
        graph["sample"] = ksampler(latent="first", denoise=0.5)
    first, found = latents(comfy_server, graph, "first", "sample")
    sigmas = flow_sigmas(2 * STEPS)[-STEPS - 1 :]
    start = sigmas[0] * comfy_noise(SEED, 48, 1, 4, 6) + (1 - sigmas[0]) * first
    assert difference(found, drawn(sigmas=sigmas.tolist(), noise=start)) < TOLERANCE


def test_batch_of_ksampler(comfy_server, drawn):
    found = latents(comfy_server, {**base(negative=NEGATIVE, batch=2), "sample": ksampler()})
    noise = torch.randn(2, 48, 1, 4, 6, generator=torch.Generator().manual_seed(SEED))
    for row, sample in zip(noise, found, strict=True):
        assert difference(sample, drawn(noise=row, negative_prompt=NEGATIVE)) < TOLERANCE


def lance_sampler(seed, batch):
    drawing = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "uncond_positions": "cached", "shift": SHIFT, "denoise": 1.0}
    guidance = {"interval_start": 0.4, "interval_end": 1.0, "renorm": "global", "renorm_min": 0.0}
    links = {"model": ["load", 0], "clip": ["load", 1], "latent": ["start", 0]}
    sample = node("LanceNativeSampler", **links, seed=seed, steps=STEPS, cfg=CFG, **drawing, **guidance)
    return {**base(), "start": empty(96, 64, batch=batch), "sample": sample}


def test_batch_of_lance_sampler_is_its_singles(comfy_server):
    both = latents(comfy_server, lance_sampler(11, 2))
    singles = torch.cat([latents(comfy_server, lance_sampler(seed, 1)) for seed in (11, 12)])
    assert difference(both, singles) < EXACT
    assert difference(both[0], both[1]) > ACTS


def test_lance_sampler_takes_a_latent_of_four_channels(comfy_server):
    ours = lance_sampler(11, 1)
    core = {**ours, "start": node("EmptyLatentImage", width=96, height=64, batch_size=1)}
    assert torch.equal(latents(comfy_server, core), latents(comfy_server, ours))


def test_an_empty_interval_leaves_the_unconditional_pass_out(comfy_server, drawn):
    never = lance_guidance(1.0, 1.0, "global")
    plain, steered = (latents(comfy_server, with_patch(never, base(negative=text))) for text in ("", NEGATIVE))
    assert torch.equal(plain, steered)
    assert difference(plain[0], drawn(guidance=Guidance(scale=1.0))) < TOLERANCE


@pytest.mark.parametrize("renorm", ["none", "global", "channel"])
def test_interval_and_renorm_are_the_runtimes(comfy_server, drawn, renorm):
    steps = 8  # the last of which begins below 0.4
    found = latents(comfy_server, with_patch(lance_guidance(0.4, 1.0, renorm), base(negative=NEGATIVE), steps=steps))
    inside, everywhere = (
        drawn(guidance=Guidance(CFG, (low, 1.0), renorm, uncond_positions="dense"), negative_prompt=NEGATIVE, steps=steps)
        for low in (0.4, 0.0)
    )
    assert difference(found[0], inside) < TOLERANCE
    assert difference(inside, everywhere) > ACTS


def test_functions_before_guidance_act_where_guidance_does(comfy_server, drawn):
    """With these settings APG is plain guidance at a scale of one more: outside the interval it must not act at all."""
    steps = 8  # the last of which begins below 0.4
    graph = with_patch(lance_guidance(0.4, 1.0, "none"), base(negative=NEGATIVE), steps=steps)
    graph["apg"] = node("APG", model=["load", 0], eta=1.0, norm_threshold=0.0, momentum=0.0)
    graph["patch"]["inputs"]["model"] = ["apg", 0]
    guidance = Guidance(CFG + 1, (0.4, 1.0), "none", uncond_positions="dense")
    expected = drawn(guidance=guidance, negative_prompt=NEGATIVE, steps=steps)
    assert difference(latents(comfy_server, graph)[0], expected) < TOLERANCE


def test_guidance_of_another_node_is_kept_where_the_renorm_is_off(comfy_server):
    rescale, none = node("RescaleCFG", multiplier=0.7), lance_guidance(0.0, 1.0, "none")
    graph = with_patch(rescale, base(negative=NEGATIVE))
    alone, without = latents(comfy_server, graph), latents(comfy_server, with_patch(none, base(negative=NEGATIVE)))
    graph["both"] = {**none, "inputs": {**none["inputs"], "model": ["patch", 0]}}
    graph |= {"sample": ksampler("both", "fresh")}
    assert torch.equal(latents(comfy_server, graph), alone)
    assert difference(alone, without) > ACTS


@pytest.mark.parametrize("shift", [2.14, 4.28])
def test_a_shift_that_rounds_above_1_is_guided_in_its_first_step(comfy_server, drawn, shift):
    sample = lance_sampler(SEED, 1)
    sample["sample"]["inputs"].update(shift=shift, uncond_positions="dense")
    found = latents(comfy_server, sample)[0]
    noise = draw_noise(None, LatentShape(1, 4, 6), SEED)
    expected = [
        drawn(shift=shift, noise=noise, negative_prompt=NEGATIVE, guidance=Guidance(CFG, (0.4, end), uncond_positions="dense"))
        for end in (1.0, 0.999)
    ]
    assert difference(found, expected[0]) < TOLERANCE
    assert difference(*expected) > ACTS


def test_model_sampling_flux_tells_the_network_the_same_times(comfy_server, drawn):
    """It has no multiplier; with our schedule only what the network is told could differ."""
    graph = {**base(), **custom(lance_sigmas(), model="patch")}
    graph["patch"] = node("ModelSamplingFlux", model=["load", 0], max_shift=1.15, base_shift=0.5, width=96, height=64)
    assert difference(latents(comfy_server, graph)[0], drawn()) < TOLERANCE


def test_renormalize_cfg_of_lumina(comfy_server):
    renorm = node("RenormCFG", cfg_trunc=100.0, renorm_cfg=0.5)
    assert difference(latents(comfy_server, with_patch(renorm)), latents(comfy_server, with_patch())) > ACTS


def test_perp_neg_is_off_outside_the_interval(comfy_server, drawn):
    graph = {**base(negative=NEGATIVE), "patch": lance_guidance(1.0, 1.0, "none"), **custom(lance_sigmas())}
    graph["patch"]["inputs"]["model"] = ["load", 0]
    guider = node("PerpNegGuider", **ends("patch"), empty_conditioning=["negative", 0], cfg=CFG, neg_scale=1.0)
    links = {"sampler": ["pick", 0], "sigmas": ["sigmas", 0], "latent_image": ["empty", 0]}
    graph |= {"guider": guider, "noise": node("RandomNoise", noise_seed=SEED)}
    graph["sample"] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], **links)
    assert difference(latents(comfy_server, graph)[0], drawn(guidance=Guidance(scale=1.0))) < TOLERANCE
