"""What must come to the same: cached and uncached, at once and in parts, streamed and called, batched and single."""

from dataclasses import replace
from functools import cache

import full_pass
import goldens
import pytest
import tasks
import torch
from torch import nn

from lance_runtime import Guidance
from lance_runtime import denoise as denoise_room
from lance_runtime.components import build_lance
from lance_runtime.config import LanceConfig
from lance_runtime.context import Context, Segment, VisionTokens, closing_ids, layout, unconditional_layout
from lance_runtime.denoise import Branches, denoise, flow_sigmas, predict_velocity
from lance_runtime.engine import Engine
from lance_runtime.kv_cache import KVCache
from lance_runtime.prefill import branch, prefill, shared_splits
from lance_runtime.prompts import TASKS
from lance_runtime.types import VISUAL_CONDITIONS, LatentShape, Modality

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _no_grad(request):
    if "gradient" in request.node.name:
        yield
    else:
        with torch.no_grad():
            yield


@pytest.fixture
def pipe(request, load_pipeline):
    return load_pipeline(tasks.variant(request.node.callspec.params["task"] if hasattr(request.node, "callspec") else "t2i"))


@cache
def context_of(pipe, task):
    return pipe.context(pipe.request(**tasks.arguments(task)))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, **options):
    torch.testing.assert_close(found, expected, **(CLOSE | options))


# One full pass


@pytest.mark.parametrize("task", tasks.GENERATION_TASKS)
def test_velocity_is_that_of_one_full_pass(task, pipe):
    target, context = pipe.request(**tasks.arguments(task)).target(), context_of(pipe, task)
    latents, timesteps = random(48, *target), torch.full((target.frames,), 0.7)
    timesteps[0] = 0 if task == "i2v" else 0.7
    closing, engine = closing_ids(pipe.components.tokenizer), pipe.components.engine
    sequences = [layout(context, target, closing)]
    sequences += [unconditional_layout(context, target, kind, closing) for kind in ("cached", "dense")]
    for sequence in sequences:
        found = predict_velocity(engine, latents[None], timesteps[None], [branch(engine, sequence)])[0]
        close(found, full_pass.velocity(engine.model, sequence, latents, timesteps))


@pytest.mark.parametrize("task", tasks.UNDERSTANDING_TASKS)
def test_an_answer_is_that_of_full_passes(task, pipe):
    context, found = context_of(pipe, task), pipe(**tasks.arguments(task)).token_ids
    written = []
    for _ in found:
        logits = full_pass.logits(pipe.components.model, layout(context.with_text(written) if written else context))
        written.append(int(logits[: len(pipe.components.tokenizer)].argmax()))
    assert found == written
    assert len(found) == 5


@pytest.mark.parametrize("task", tasks.UNDERSTANDING_TASKS)
def test_logits_are_those_of_one_full_pass(task, pipe):
    engine, sequence = pipe.components.engine, layout(context_of(pipe, task))
    _, hidden = prefill(engine, sequence)
    close(engine.model.logits(hidden[0, -1]), full_pass.logits(engine.model, sequence))


@pytest.mark.parametrize(("split", "wrong"), [(0, "full"), (1, "causal"), (2, "causal"), (4, "noise"), (5, "causal")])
def test_the_full_pass_can_tell_modes_apart(split, wrong, image_pipe):
    """The comparison is worth something only where the mask matters."""
    sequence = layout(context_of(image_pipe, "image_edit"), LatentShape(1, 2, 2))
    latents, times, model = random(48, 1, 2, 2), torch.ones(1), image_pipe.components.model
    modes = [*sequence.attn_modes[:split], wrong, *sequence.attn_modes[split + 1 :]]
    right, other = (full_pass.velocity(model, sequence, latents, times, given) for given in (None, modes))
    assert (other - right).abs().max() > 1e-4


# A prefix in parts


@pytest.mark.parametrize("task", [task for task in TASKS if task != "i2v"])
def test_a_prefix_extended_later_equals_one_made_at_once(task, pipe):
    engine, context = pipe.components.engine, context_of(pipe, task)
    request = pipe.request(**tasks.arguments(task))
    sequence = layout(context, None if request.understands else request.target())
    at_once, hidden = prefill(engine, sequence)
    for done in range(1, len(sequence.prefix)):
        begun, _ = prefill(engine, type(sequence)(sequence.prefix[:done], sequence.vision))
        length, before = begun.length, begun.committed(0).clone()
        extended, states = prefill(engine, sequence, begun.fork(begun.length), done)
        assert extended.length == at_once.length
        for layer in range(len(at_once.layers)):
            close(extended.committed(layer), at_once.committed(layer))
        close(states[:, -1], hidden[:, -1])
        assert begun.length == length
        assert torch.equal(begun.committed(0), before)


@pytest.mark.parametrize("positions", ["cached", "dense"])
@pytest.mark.parametrize("task", ["image_edit", "video_edit", "subject_image", "t2i"])
def test_a_picture_is_read_once_for_all_branches(task, positions, pipe):
    """The second branch shares what the first has read of the pictures, and ends with the same numbers."""
    engine, context = pipe.components.engine, context_of(pipe, task)
    target = pipe.request(**tasks.arguments(task)).target()
    first = branch(engine, layout(context, target))
    sequence = unconditional_layout(context, target, positions)
    lengths, layer = [], engine.model.language_model.model.layers[0].self_attn
    reads = (layer.q_proj, layer.q_proj_moe_gen)
    hooks = [read.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1])) for read in reads]
    alone = branch(engine, sequence)
    layers = range(len(first.cache.layers))
    whole, before = sum(lengths), [first.cache.committed(layer).clone() for layer in layers]
    del lengths[:]
    found = branch(engine, sequence, [first, alone])
    for hook in hooks:
        hook.remove()
    visuals = [i for i, split in enumerate(sequence.prefix) if split.segment.is_visual]
    shared = sum(len(split) for split in sequence.prefix[: visuals[-1] + 1]) if visuals else 0
    assert sum(lengths) == whole - shared
    assert found.cache.length == alone.cache.length
    tokens = found.cache.length - shared
    assert found.cache.nbytes == tokens * engine.model.config.kv_values_per_token * engine.dtype.itemsize
    for layer in layers:
        close(found.cache.committed(layer), alone.cache.committed(layer))
        assert torch.equal(first.cache.committed(layer), before[layer])


def test_other_positions_or_pictures_are_not_shared(image_pipe):
    context, target = context_of(image_pipe, "image_edit"), LatentShape(1, 4, 4)
    sequence = layout(context, target)
    assert shared_splits(sequence, sequence) == 1 + max(i for i, s in enumerate(sequence.prefix) if s.segment.is_visual)
    moved = replace(sequence, splits=tuple(replace(split, positions=split.positions + 1) for split in sequence.splits))
    assert shared_splits(sequence, moved) == 0
    copied = [replace(s, values=s.values.clone()) if s.is_visual else s for s in context.segments]
    assert shared_splits(sequence, layout(Context(tuple(copied), context.vision), target)) == 0


def test_guidance_reads_a_picture_once(image_pipe):
    engine, lengths = image_pipe.components.engine, []
    layer = engine.model.language_model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    image_pipe(**tasks.arguments("image_edit") | {"steps": 1, "guidance": Guidance(scale=4.0, interval=(0.0, 1.0))})
    hook.remove()
    vit = max(len(s) for s in context_of(image_pipe, "image_edit").segments if s.modality == Modality.VIT)
    assert lengths.count(vit) == 1


def test_nothing_left_to_prefill_changes_nothing(image_pipe):
    engine, sequence = image_pipe.components.engine, layout(context_of(image_pipe, "x2t_image"))
    cache, _ = prefill(engine, sequence)
    again, hidden = prefill(engine, sequence, cache, len(sequence.prefix))
    assert again is cache
    assert hidden is None
    assert cache.length == sum(sequence.split_lens)


# Seeds and batches


@pytest.mark.parametrize("task", ["t2i", "i2v", "image_edit"])
def test_a_seed_repeats_its_result_and_another_does_not(task, pipe):
    arguments = tasks.arguments(task)
    first, again, other = (pipe(**arguments, seed=seed).latents for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


@pytest.mark.parametrize("task", ["t2v", "i2v", "image_edit"])
def test_a_batch_is_its_samples(task, pipe):
    arguments = tasks.arguments(task)
    both = pipe(**arguments, seed=5, batch=2)
    singles = [pipe(**arguments, seed=seed) for seed in (5, 6)]
    close(both.latents, torch.stack([single.latents for single in singles]))
    assert both.frames.shape == (2, *singles[0].frames.shape)
    assert abs(both.frames[1].astype(int) - singles[1].frames.astype(int)).max() <= 1


def test_own_noise_stands_for_the_seed(image_pipe):
    arguments = tasks.arguments("t2i")
    drawn = torch.randn([12, 48], generator=torch.Generator().manual_seed(9)).T.reshape(48, 1, 3, 4)
    assert torch.equal(image_pipe(**arguments, noise=drawn).latents, image_pipe(**arguments, seed=9).latents)
    assert torch.equal(image_pipe(**arguments, noise=drawn.numpy()).latents, image_pipe(**arguments, seed=9).latents)


@pytest.mark.parametrize("task", ["t2i", "image_edit"])
@pytest.mark.parametrize("batch", [1, 2])
def test_branches_in_one_pass_equal_branches_one_after_another(task, batch, pipe, monkeypatch):
    arguments = tasks.arguments(task) | {"guidance": Guidance(interval=(0, 1), visual_scale=1.5), "batch": batch}
    together = pipe(**arguments).latents
    monkeypatch.setattr(denoise_room, "BATCHED_TOKENS", 0)
    passes = count_passes(pipe, monkeypatch)
    close(pipe(**arguments).latents, together)
    assert passes == [batch] * 6  # two steps of three branches


def count_passes(pipe, monkeypatch):
    """Batch sizes of the denoising passes, as they are run."""
    seen, real = [], denoise_room.predict_velocity

    def spy(engine, latents, timesteps, branches):
        seen.append(len(latents))
        return real(engine, latents, timesteps, branches)

    monkeypatch.setattr(denoise_room, "predict_velocity", spy)
    return seen


def test_few_tokens_are_one_pass_and_the_unguided_steps_leave_the_others_out(image_pipe, monkeypatch):
    passes = count_passes(image_pipe, monkeypatch)
    image_pipe(**tasks.arguments("t2i") | {"steps": 4, "guidance": Guidance(interval=(0.7, 1.0))})
    assert passes == [2, 2, 2, 1]  # sigmas 1, 0.91, 0.78, 0.54


# Guidance


def velocities(pipe, task, sigma=1.0):
    """Velocities of the three branches at the seed's noise, one by one."""
    request, context = pipe.request(**tasks.arguments(task)), context_of(pipe, task)
    target, engine = request.target(), pipe.components.engine
    noise = pipe.noise(request, context, target)
    sequences = (
        layout(context, target),
        unconditional_layout(context, target, "cached"),
        layout(context.without(Modality.PROMPT, *VISUAL_CONDITIONS), target),
    )
    times = torch.full((1, target.frames), sigma)
    return noise, [predict_velocity(engine, noise, times, [branch(engine, sequence)]) for sequence in sequences]


def first_step(pipe, task, **options):
    guidance = Guidance(interval=(0, 1), renorm="none", **options)
    return next(pipe.stream(**tasks.arguments(task) | {"guidance": guidance, "sigmas": [1.0, 0.75]})).latents[None]


@pytest.mark.parametrize("task", ["t2i", "image_edit", "subject_video"])
@pytest.mark.parametrize(("scale", "visual"), [(4.0, 1.0), (3.0, 2.0), (1.0, 1.5), (2.0, 0.0)])
def test_guidance_follows_the_formula(task, scale, visual, pipe):
    noise, (v, v_text, v_none) = velocities(pipe, task)
    guided = v_none + scale * (v - v_text) + visual * (v_text - v_none)
    close(first_step(pipe, task, scale=scale, visual_scale=visual), noise - guided * 0.25, atol=1e-4)


def test_visual_scale_1_is_plain_guidance():
    cond, text, none = random(3, 2, 48, 1, 2, 2)
    for renorm in ("global", "channel", "none"):
        guidance = Guidance(renorm=renorm)
        close(guidance.combine([cond, text, none]), guidance.combine([cond, text]), atol=1e-4)


def test_visual_scale_1_is_approached_smoothly_and_left_visibly(image_pipe):
    plain, near, far = (first_step(image_pipe, "image_edit", visual_scale=scale) for scale in (1.0, 1.00001, 2.0))
    close(near, plain, atol=1e-4)
    assert (far - plain).abs().max() > 1e-2


def test_renorm_scales_each_sample_down_by_itself():
    cond, text = random(2, 2, 48, 2, 3, 4)
    text[1] *= 10
    plain = Guidance(renorm="none").combine([cond, text])
    whole = Guidance(renorm="global").combine([cond, text])
    for sample in range(2):
        factor = (cond[sample].norm() / plain[sample].norm()).clamp(max=1)
        close(whole[sample], plain[sample] * factor)
    tokens = Guidance(renorm="channel").combine([cond, text])
    assert (tokens.norm(dim=1) <= cond.norm(dim=1) + 1e-4).all()
    floored = Guidance(renorm="global", renorm_min=0.95).combine([cond, text])
    close(floored[1], plain[1] * 0.95, atol=1e-4)


def test_scale_1_never_makes_the_other_branches(image_pipe):
    sequence = layout(context_of(image_pipe, "t2i"), LatentShape(1, 3, 4))
    engine = image_pipe.components.engine

    def refused():
        raise AssertionError("a branch that was not needed")

    branches = Branches(engine, lambda: sequence, refused, refused)
    steps = list(denoise(engine, random(1, 48, 1, 3, 4), flow_sigmas(3), branches, Guidance(scale=1.0)))
    assert [step.index for step in steps] == [0, 1, 2]


def test_a_negative_prompt_acts(image_pipe):
    arguments = tasks.arguments("image_edit")
    plain, negative = image_pipe(**arguments).latents, image_pipe(**arguments, negative_prompt="a red hat").latents
    assert (plain - negative).abs().max() > 1e-3


def test_a_negative_prompt_that_is_the_prompt_takes_guidance_away(image_pipe):
    arguments = tasks.arguments("image_edit")
    unguided = image_pipe(**arguments | {"guidance": Guidance(scale=1.0)}).latents
    close(image_pipe(**arguments, negative_prompt=arguments["prompt"]).latents, unguided, atol=1e-4)


def test_an_empty_negative_prompt_is_none(image_pipe):
    arguments = tasks.arguments("t2i")
    assert torch.equal(image_pipe(**arguments, negative_prompt="").latents, image_pipe(**arguments).latents)


# Schedules, streams, contexts


def test_own_sigmas_are_the_schedule(image_pipe):
    arguments = tasks.arguments("t2i")
    sigmas = [1.0, 3.5 * 0.5 / (1 + 2.5 * 0.5), 0.0]
    close(image_pipe(**arguments, sigmas=sigmas).latents, image_pipe(**arguments | {"steps": 2, "shift": 3.5}).latents)
    assert not torch.equal(image_pipe(**arguments, sigmas=[1, 0.5, 0]).latents, image_pipe(**arguments).latents)


def test_part_of_a_schedule_goes_on_from_its_latents(image_pipe):
    arguments = tasks.arguments("t2i") | {"steps": 4}
    steps, sigmas = list(image_pipe.stream(**arguments)), flow_sigmas(4).tolist()
    rest = image_pipe(**arguments | {"sigmas": sigmas[2:], "noise": steps[1].latents})
    close(rest.latents, steps[-1].latents)


@pytest.mark.parametrize("task", ["t2i", "i2v"])
def test_a_streams_last_step_is_the_calls_result(task, pipe):
    arguments = tasks.arguments(task) | {"steps": 3}
    steps = list(pipe.stream(**arguments))
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.sigma for step in steps] == flow_sigmas(3)[1:].tolist()
    assert torch.equal(steps[-1].latents, pipe(**arguments).latents)
    assert not torch.equal(steps[0].latents, steps[1].latents)


def test_streamed_tokens_are_the_calls_answer(image_pipe):
    arguments = tasks.arguments("x2t_image")
    tokens, out = list(image_pipe.stream(**arguments)), image_pipe(**arguments)
    assert [token.id for token in tokens] == out.token_ids
    assert tokens[-1].text == out.text
    assert tokens[2].text == image_pipe.components.tokenizer.decode(out.token_ids[:3])


def test_an_answer_outgrows_its_room(image_pipe, monkeypatch):
    """The cache grows while an answer is written, and says the same."""
    arguments, capacities, real = tasks.arguments("x2t_image") | {"max_new_tokens": 7}, [], KVCache.reserve
    expected = image_pipe(**arguments).token_ids
    monkeypatch.setattr("lance_runtime.decode.ANSWER_ROOM", 3)
    monkeypatch.setattr(KVCache, "reserve", lambda cache, tokens: capacities.append(tokens) or real(cache, tokens))
    assert len(expected) == 7
    assert image_pipe(**arguments).token_ids == expected
    assert capacities[-3:] == [3, 3, 1]


def test_progress_counts_to_the_total(image_pipe):
    seen = []
    image_pipe(**tasks.arguments("t2i") | {"steps": 3}, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_stream_left_early_harms_nothing(image_pipe):
    arguments = tasks.arguments("t2i")
    stream = image_pipe.stream(**arguments)
    next(stream)
    stream.close()
    assert torch.is_grad_enabled() is False
    assert torch.equal(image_pipe(**arguments).latents, image_pipe(**arguments).latents)


def test_sampled_text_repeats_with_its_seed(image_pipe):
    arguments = tasks.arguments("x2t_image") | {"max_new_tokens": 12, "temperature": 2.0}
    answers = [image_pipe(**arguments, seed=seed).token_ids for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2] != answers[3]


def test_a_small_top_p_is_greedy_however_hot(image_pipe):
    arguments = tasks.arguments("x2t_image")
    greedy = image_pipe(**arguments).token_ids
    assert image_pipe(**arguments, temperature=3.0, top_p=1e-6).token_ids == greedy
    assert image_pipe(**arguments, temperature=3.0, top_p=1.0).token_ids != greedy


def test_top_p_keeps_the_fewest_tokens_that_reach_it(image_pipe):
    context = context_of(image_pipe, "x2t_image")
    arguments = {"task": "x2t_image", "max_new_tokens": 1, "temperature": 1.0, "context": context}
    logits = full_pass.logits(image_pipe.components.model, layout(context))[: len(image_pipe.components.tokenizer)]
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.1).sum()) + 1
    seen = {image_pipe(**arguments, top_p=0.1, seed=seed).token_ids[0] for seed in range(20)}
    assert 1 < len(seen) <= kept
    assert seen <= set(order[:kept].tolist())


@pytest.mark.parametrize("task", ["t2i", "image_edit", "subject_image", "x2t_image", "x2t_video"])
def test_a_ready_made_context_gives_the_same(task, pipe):
    arguments = tasks.arguments(task)
    expected, context = pipe(**arguments), context_of(pipe, task)
    bare = {key: value for key, value in arguments.items() if key not in ("images", "video", "fps", "prompt", "question")}
    if not expected.token_ids:
        bare |= {"height": expected.latents.shape[2] * 16, "width": expected.latents.shape[3] * 16}
        assert torch.equal(pipe(**bare, context=context).latents, expected.latents)
    else:
        assert pipe(**bare, context=context).token_ids == expected.token_ids


# Given frames


def video(pipe, given, **options):
    """Two-step t2v of three latent frames with given ones; latents."""
    arguments = {"height": 64, "width": 64, "num_frames": 9, "steps": 2, "guidance": tasks.EVERYWHERE} | options
    return pipe("t2v", "a red hat", given_frames=given, **arguments).latents


def encoded(pipe, frames):
    """Latents of frames uint8 (T, 64, 64, 3)."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    return pipe.components.vae.encode(pixels)


def square_clip():
    return goldens.clip("clip24.npz")[0][:9, :64, :64].copy()


def test_the_first_frame_given_is_i2v(video_pipe):
    arguments = tasks.arguments("i2v")
    expected = video_pipe(**arguments).latents
    picture = arguments.pop("images")[0]
    size = {"height": expected.shape[2] * 16, "width": expected.shape[3] * 16}
    found = video_pipe(**arguments | size | {"task": "t2v", "given_frames": {0: picture}})
    assert torch.equal(found.latents, expected)


def test_a_negative_index_counts_from_the_end(video_pipe):
    picture = goldens.image("square.png")
    last, counted = video(video_pipe, {-1: picture}), video(video_pipe, {2: picture})
    assert torch.equal(last, counted)
    assert not torch.equal(last, video(video_pipe, {1: picture}))
    assert torch.equal(video(video_pipe, {-3: picture}), video(video_pipe, {0: picture}))


def test_a_run_of_given_frames_is_encoded_as_one_clip(video_pipe):
    frames = square_clip()
    found = video(video_pipe, {0: frames[0], 1: frames[1:5]})
    close(found[:, :2], encoded(video_pipe, frames[:5]))
    assert (found[:, 2] - video(video_pipe, {0: frames[0]})[:, 2]).abs().max() > 1e-3


def test_given_frames_stay_as_they_are_and_move_the_others(video_pipe):
    frames = square_clip()
    free, held = video(video_pipe, None), video(video_pipe, {0: frames[0], 2: frames[5]})
    close(held[:, :1], encoded(video_pipe, frames[:1]))
    still = frames[5:6].repeat(5, axis=0)
    close(held[:, 2:], encoded(video_pipe, still)[:, 1:])
    assert (held[:, 1] - free[:, 1]).abs().max() > 1e-3


def test_all_frames_given_come_back(video_pipe):
    frames = square_clip()
    found = video(video_pipe, {0: frames[0], 1: frames[1:5], -1: frames[5:9]})
    close(found, encoded(video_pipe, frames))


def test_given_frames_serve_every_sample_of_a_batch(video_pipe):
    picture = goldens.image("square.png")
    both = video(video_pipe, {-1: picture}, batch=2, seed=3)
    close(both[1], video(video_pipe, {-1: picture}, seed=4))


# The cache


def small_config():
    return LanceConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=40,
        mrope_section=(2, 3, 3),
    )


def keys(tokens, seed, batch=1):
    return random(batch, 2, tokens, 16, seed=seed), random(batch, 2, tokens, 16, seed=seed + 100)


def filled(tokens=3, capacity=8):
    """A cache with committed tokens in both layers, and what was written."""
    cache, written = KVCache(small_config(), capacity, torch.float32, torch.device("cpu")), keys(tokens, 1)
    for layer in range(2):
        cache.append(layer, *written)
    cache.commit(tokens)
    return cache, written


def test_appended_tokens_come_back_behind_the_committed():
    cache, (k, v) = filled()
    more_k, more_v = keys(2, 2)
    seen_k, seen_v = cache.append(0, more_k, more_v)
    assert torch.equal(seen_k, torch.cat([k, more_k], dim=2))
    assert torch.equal(seen_v, torch.cat([v, more_v], dim=2))


def test_what_is_not_committed_is_forgotten():
    cache, (k, v) = filled()
    cache.append(0, *keys(2, 2))
    again_k, again_v = keys(1, 3)
    seen_k, seen_v = cache.append(0, again_k, again_v)
    assert cache.length == 3
    assert torch.equal(seen_k, torch.cat([k, again_k], dim=2))
    assert torch.equal(seen_v, torch.cat([v, again_v], dim=2))


def test_attached_tokens_leave_the_cache_as_it_was():
    cache, (k, v) = filled()
    before = [layer.clone() for layer in cache.layers]
    more_k, more_v = keys(2, 2, batch=3)
    seen_k, seen_v = cache.attached(1, more_k, more_v)
    assert torch.equal(seen_k, torch.cat([k.expand(3, -1, -1, -1), more_k], dim=2))
    assert torch.equal(seen_v, torch.cat([v.expand(3, -1, -1, -1), more_v], dim=2))
    assert cache.length == 3
    # Free places hold whatever lay in the memory, which may be NaN.
    torch.testing.assert_close(cache.layers, before, rtol=0, atol=0, equal_nan=True)


def test_reserve_makes_room_and_keeps_the_tokens():
    cache, (k, v) = filled(capacity=3)
    size = cache.nbytes
    cache.reserve(0)
    assert cache.nbytes == size
    cache.reserve(5)
    assert cache.capacity == 8
    assert cache.nbytes == size // 3 * 8
    assert torch.equal(cache.layers[1][0, :, :, :3], k)
    assert torch.equal(cache.append(1, *keys(5, 4))[1][:, :, :3], v)
    block = cache.layers[0]
    cache.reserve(4)
    assert cache.layers[0] is block


def test_a_fork_shares_what_was_read_and_nothing_else():
    cache, (k, v) = filled(tokens=5)
    first = cache.fork(3, capacity=6)
    assert (first.length, first.capacity, first.nbytes) == (3, 6, cache.nbytes // 8 * 3)
    more_k, more_v = keys(2, 5)
    for layer in range(2):
        seen_k, _ = first.append(layer, more_k, more_v)
    first.commit(2)
    assert torch.equal(seen_k, torch.cat([k[:, :, :3], more_k], dim=2))
    assert first.committed(0).data_ptr() != cache.committed(0).data_ptr()
    second, (last_k, last_v) = first.fork(4), keys(1, 6, batch=2)  # of a fork, and within what it has written
    second.reserve(1)
    second.append(0, *keys(1, 7))
    seen_k, seen_v = second.attached(0, last_k, last_v)
    expected = [
        torch.cat([old[:, :, :3], new[:, :, :1]], dim=2).expand(2, -1, -1, -1) for old, new in ((k, more_k), (v, more_v))
    ]
    assert torch.equal(seen_k, torch.cat([expected[0], last_k], dim=2))
    assert torch.equal(seen_v, torch.cat([expected[1], last_v], dim=2))
    assert (cache.length, first.length, second.length) == (5, 5, 4)
    assert torch.equal(cache.committed(1)[0], k)
    assert torch.equal(first.committed(1)[1], torch.cat([v[:, :, :3], more_v], dim=2))
    assert cache.fork(2).capacity == 2


def test_gradients_reach_appended_keys():
    cache, _ = filled(capacity=5)
    k, v = (x.requires_grad_() for x in keys(2, 2))
    seen_k, seen_v = cache.append(0, k, v)
    cache.commit(2)
    (seen_k.square().sum() + seen_v.sum()).backward()
    close(k.grad, 2 * k.detach())
    close(v.grad, torch.ones_like(v))


def small_engine(trained=""):
    """A network of its own weights, of which those whose names hold ``trained`` take gradients."""
    model = build_lance(small_config()).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        ones = torch.ones_like(parameter) if "norm" in name else 0
        parameter.data = ones + 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(trained in name)
    return Engine(model, torch.float32, torch.device("cpu"))


def small_sequence():
    segments = (
        Segment.text([5, 6, 7]),
        Segment.latents(random(48, 1, 2, 2), Modality.EDIT_SOURCE),
        Segment.text([8, 9], Modality.PROMPT),
        Segment.text([10]),
    )
    return layout(Context(segments, VisionTokens(1, 2, 3)), LatentShape(1, 2, 2))


def cached_velocity(engine, sequence, latents):
    return predict_velocity(engine, latents[None], torch.full((1, 1), 0.5), [branch(engine, sequence)])[0]


@pytest.mark.parametrize(
    "trained", ["", "_moe_gen", "layers.0.self_attn.k_proj_moe_gen", "layers.1.", "v_proj.weight", "q_proj"]
)
def test_gradients_through_the_prefix_are_those_of_one_full_pass(trained):
    engine, sequence, latents = small_engine(trained), small_sequence(), random(48, 1, 2, 2, seed=1)
    cached_velocity(engine, sequence, latents).square().mean().backward()
    found = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    other = small_engine(trained)
    weights = dict(other.model.named_parameters())
    full_pass.velocity(
        WithWeights(other.model.config, weights), sequence, latents, torch.full((1,), 0.5)
    ).square().mean().backward()
    expected = {name: p.grad for name, p in weights.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert expected
    for name, gradient in expected.items():
        close(found[name], gradient, atol=1e-5, rtol=1e-3)


class WithWeights(nn.Module):
    """What ``full_pass`` asks of a model, with weights that keep their gradients."""

    def __init__(self, config, weights):
        super().__init__()
        self.config, self.weights = config, weights

    def state_dict(self):
        return self.weights


def test_an_mlp_in_groups_of_tokens_is_the_same(monkeypatch):
    mlp, x = small_engine().model.language_model.model.layers[0].mlp_moe_gen, random(2, 7, 32)
    with torch.no_grad():
        whole = mlp(x)
        monkeypatch.setattr("lance_runtime.model.transformer.ROWS_AT_ONCE", 4)
        lengths = []
        hook = mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
        torch.testing.assert_close(mlp(x), whole, atol=1e-6, rtol=1e-6)
        hook.remove()
    assert lengths == [4, 4, 4, 2]
