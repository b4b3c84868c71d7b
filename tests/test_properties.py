"""What holds for every context: lengths, ids, positions and guidance branches, over random lists of segments."""

from dataclasses import replace
from functools import cache

import full_pass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

from lance_runtime.config import LanceConfig
from lance_runtime.context import Context, Mode, Segment, VisionTokens, layout, unconditional_layout
from lance_runtime.denoise import flow_sigmas
from lance_runtime.guidance import Guidance
from lance_runtime.model.embeddings import latent_position_embedding
from lance_runtime.model.rope import frequencies_are_rounded, rope_table
from lance_runtime.types import VISUAL_CONDITIONS, LatentShape, Modality, PixelShape

settings.register_profile("lance", deadline=None, max_examples=60, database=None)
settings.load_profile("lance")

VISION = VisionTokens(start=901, pad=902, end=903)
CPU = torch.device("cpu")

grids = st.builds(LatentShape, *[st.integers(1, 4)] * 3)
token_ids = st.lists(st.integers(0, 900), min_size=1, max_size=6)
texts = st.builds(Segment.text, token_ids, st.sampled_from([Modality.TEMPLATE, Modality.PROMPT]))
vits = st.builds(lambda grid: Segment.vit(torch.zeros(grid.tokens, 8), grid), grids)
sources = st.builds(
    lambda grid, role: Segment.latents(torch.zeros(48, *grid), role),
    grids,
    st.sampled_from([Modality.EDIT_SOURCE, Modality.SUBJECT]),
)
visuals = st.one_of(vits, sources)
closings = st.lists(st.integers(0, 900), max_size=2)


@st.composite
def lists(draw, segments):
    """Segments in any order; the same one may stand at several places."""
    pool = draw(st.lists(segments, min_size=1, max_size=5))
    return draw(st.lists(st.sampled_from(pool), min_size=1, max_size=7))


contexts = lists(st.one_of(texts, visuals)).map(lambda segments: Context(tuple(segments), VISION))
texts_only = lists(texts).map(lambda segments: Context(tuple(segments), VISION))


def rope_index(segments):
    """Qwen2.5-VL's rope index, token by token, as rows of (t, h, w)."""
    rows = []
    for segment in segments:
        start = max(map(max, rows)) + 1 if rows else 0
        if not segment.is_visual:
            rows += [(start + i,) * 3 for i in range(len(segment.ids))]
            continue
        frames, height, width = segment.grid
        rows.append((start,) * 3)
        rows += [
            (start + 1 + 2 * t, start + 1 + h, start + 1 + w)
            for t in range(frames)
            for h in range(height)
            for w in range(width)
        ]
        rows.append((max(map(max, rows)) + 1,) * 3)
    return rows


def labels_of(segments):
    return [segment.modality for segment in segments for _ in range(len(segment))]


def rows_of(positions):
    return [tuple(column) for column in positions.T.tolist()]


def only(rows, labels, *wanted):
    return [row for row, label in zip(rows, labels, strict=True) if label in wanted]


def whole(context, grid, closing=()):
    closing = [Segment.text(closing)] if closing else []
    return [*context.segments, Segment.target(grid), *closing]


@given(contexts, st.none() | grids, closings)
def test_lengths_add_up(context, grid, closing):
    sequence = layout(context, grid, closing)
    total = sum(sequence.split_lens)
    assert sequence.input_ids.shape == sequence.modality.shape == (total,)
    assert sequence.positions.shape == (3, total)
    assert len(sequence.split_lens) == len(sequence.attn_modes) == len(sequence.splits)
    assert all(len(split) == split.positions.shape[1] for split in sequence.splits)
    assert len(sequence.splits) == len(context.segments) + (grid is not None) + bool(closing)


@given(contexts, grids, closings)
def test_ids_modes_and_labels_say_the_same(context, grid, closing):
    sequence = layout(context, grid, closing)
    ids, labels = sequence.input_ids.tolist(), sequence.modality.tolist()
    for length, mode, segment in zip(sequence.split_lens, sequence.attn_modes, whole(context, grid, closing), strict=True):
        own, ids = ids[:length], ids[length:]
        own_labels, labels = labels[:length], labels[length:]
        visual = [VISION.start, *[VISION.pad] * segment.grid.tokens, VISION.end]
        assert own == (visual if mode != "causal" else list(segment.ids))
        assert set(own_labels) == {int(segment.modality)}
        assert mode == segment.mode.value
    assert ids == labels == []


@given(contexts, grids, closings)
def test_the_prefix_is_what_stands_before_the_target(context, grid, closing):
    sequence = layout(context, grid, closing)
    assert [split.segment for split in sequence.prefix] == list(context.segments)
    assert sequence.target.segment.grid == grid
    assert [split.segment for split in layout(context).prefix] == list(context.segments)


@given(contexts)
def test_without_a_target_the_positions_are_the_plain_rope_index(context):
    assert rows_of(layout(context).positions) == rope_index(context.segments)


@given(texts_only, grids, closings)
def test_mape_leaves_sequences_without_visuals_alone(context, grid, closing):
    assert rows_of(layout(context, grid, closing).positions) == rope_index(whole(context, grid, closing))


@given(contexts, grids, closings)
def test_text_keeps_its_place_with_all_axes_equal(context, grid, closing):
    segments = whole(context, grid, closing)
    found, plain, labels = rows_of(layout(context, grid, closing).positions), rope_index(segments), labels_of(segments)
    text = Modality.TEMPLATE, Modality.PROMPT
    assert only(found, labels, *text) == only(plain, labels, *text)
    assert all(t == h == w for t, h, w in only(found, labels, *text))


@given(contexts, grids)
@pytest.mark.parametrize(("label", "first"), [(Modality.VIT, 1000), (Modality.SUBJECT, 2000)])
def test_mape_shifts_the_first_token_to_its_thousand(label, first, context, grid):
    segments = whole(context, grid)
    labels = labels_of(segments)
    found = only(rows_of(layout(context, grid).positions), labels, label)
    plain = only(rope_index(segments), labels, label)
    if found:
        assert found[0][0] == first
        assert {t - t_ for (t, _, _), (t_, _, _) in zip(found, plain, strict=True)} == {first - plain[0][0]}
        assert [row[1:] for row in found] == [row[1:] for row in plain]


@given(contexts, grids)
def test_the_target_lies_on_its_edit_source_just_when_they_are_as_many(context, grid):
    segments = whole(context, grid)
    labels, found, plain = labels_of(segments), rows_of(layout(context, grid).positions), rope_index(segments)
    source, target = only(found, labels, Modality.EDIT_SOURCE), only(found, labels, Modality.TARGET)
    assert source == only(plain, labels, Modality.EDIT_SOURCE)
    assert target == (source if len(source) == len(target) else only(plain, labels, Modality.TARGET))


@given(contexts, sources.filter(lambda segment: segment.modality == Modality.EDIT_SOURCE))
def test_an_edit_of_the_sources_size_lies_on_it(context, source):
    sequence = layout(context.without(Modality.EDIT_SOURCE).with_visual(source).with_text([1]), source.grid)
    assert torch.equal(sequence.target.positions, sequence.splits[-3].positions)


@given(contexts, st.sets(st.sampled_from(list(Modality))))
def test_without_drops_exactly_those_segments(context, dropped):
    kept = context.without(*dropped).segments
    assert [id(segment) for segment in kept] == [id(s) for s in context.segments if s.modality not in dropped]


@given(contexts, visuals, token_ids)
def test_a_context_is_never_changed(context, visual, ids):
    before = context.segments
    longer = context.with_visual(visual).with_text(ids, Modality.PROMPT)
    context.without(Modality.VIT)
    assert context.segments is before
    assert longer.segments[: len(before)] == before
    assert longer.segments[-2] is visual
    assert longer.segments[-1].ids == tuple(ids)


@given(contexts, token_ids)
def test_another_prompt_stands_before_the_last_text(context, ids):
    context = context.with_text([1, 2])
    other = context.with_prompt(ids)
    assert [s for s in other.segments if s.modality == Modality.PROMPT] == [other.segments[-2]]
    assert other.segments[-2].ids == tuple(ids)
    assert other.without(Modality.PROMPT).segments == context.without(Modality.PROMPT).segments
    assert context.with_prompt([]).segments == context.without(Modality.PROMPT).segments


@given(contexts, grids, closings)
def test_cached_unconditional_positions_keep_the_prefix_and_shorten_the_target(context, grid, closing):
    context = context.with_text([1])
    with_prompt, short = layout(context, grid), layout(context.without(Modality.PROMPT), grid, closing)
    found = unconditional_layout(context, grid, "cached", closing)
    kept = [split.positions for split in with_prompt.prefix if split.segment.modality != Modality.PROMPT]
    assert [split.positions.tolist() for split in found.prefix] == [positions.tolist() for positions in kept]
    assert torch.equal(found.target.positions, short.target.positions)
    assert found.input_ids.tolist() == short.input_ids.tolist()
    assert found.modality.tolist() == short.modality.tolist()


@given(contexts, grids, closings)
def test_dense_unconditional_positions_are_those_of_the_shorter_sequence(context, grid, closing):
    context = context.with_text([1])
    found = unconditional_layout(context, grid, "dense", closing)
    assert torch.equal(found.positions, layout(context.without(Modality.PROMPT), grid, closing).positions)


@given(contexts, grids)
def test_without_visuals_nothing_visual_is_left(context, grid):
    bare = layout(context.without(*VISUAL_CONDITIONS), grid)
    assert set(bare.attn_modes) <= {Mode.CAUSAL.value, Mode.NOISE.value}


@given(grids)
def test_pixels_and_latents_agree_on_their_sizes(grid):
    pixels = grid.pixels()
    assert pixels.latent() == grid
    assert pixels == PixelShape(4 * grid.frames - 3, 16 * grid.height, 16 * grid.width)


def qwens_own(q, k, positions):
    """q and k (1, H, L, 128) turned by transformers' Qwen2.5-VL; 4 and 5 divide the work differently."""
    cos, sin = qwens_rotary()(q, positions[:, None])
    if hasattr(modeling_qwen2_5_vl, "apply_multimodal_rotary_pos_emb"):
        return modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb(q, k, cos, sin, [16, 24, 24])
    return modeling_qwen2_5_vl.apply_rotary_pos_emb(q, k, cos, sin)


@cache
def qwens_rotary():
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "rope_theta": 1e6}
    scaling = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    name = "Qwen2_5_VLTextConfig" if hasattr(configuration_qwen2_5_vl, "Qwen2_5_VLTextConfig") else "Qwen2_5_VLConfig"
    config = getattr(configuration_qwen2_5_vl, name)(**sizes, rope_scaling=scaling)
    return modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(config)


@given(st.lists(st.tuples(*[st.integers(0, 4000)] * 3), min_size=1, max_size=9), st.integers(0, 2**31))
@settings(max_examples=30)
def test_rotary_embedding_is_that_of_qwen(positions, seed):
    q, k = torch.randn(2, 1, 2, len(positions), 128, generator=torch.Generator().manual_seed(seed))
    places = torch.tensor(positions).T
    table = rope_table(LanceConfig(), places, torch.float32)
    for mine, theirs in zip((q, k), qwens_own(q, k, places), strict=True):
        torch.testing.assert_close(table.rotate(mine.transpose(1, 2)).transpose(1, 2), theirs, atol=1e-6, rtol=0)


def test_in_bfloat16_the_frequencies_are_rounded_as_the_reference_has_them():
    """Its model is cast as a whole, and the buffer of the frequencies with it; the angles stay in float32."""
    positions = torch.tensor([[2001, 3], [1500, 40], [777, 9]])
    found = rope_table(LanceConfig(), positions, torch.bfloat16)
    buffer = qwens_rotary().inv_freq.to(torch.bfloat16)
    axis = torch.arange(3).repeat_interleave(torch.tensor([16, 24, 24]))
    angles = positions.float()[axis].T * buffer.float()
    assert found.cos.dtype == torch.bfloat16
    assert torch.equal(found.cos[0, :, 0], angles.cos().to(torch.bfloat16))
    assert torch.equal(found.sin[0, :, 0], angles.sin().to(torch.bfloat16))
    exact = rope_table(LanceConfig(), positions, torch.float32)
    assert (found.cos - exact.cos).abs().max() > 0.5  # far apart it is another embedding


@pytest.mark.parametrize(
    ("trained", "dtype", "device", "rounded"),
    [
        (True, torch.bfloat16, "cpu", True),
        (True, torch.bfloat16, "cuda", True),
        (True, torch.float32, "cuda", True),  # a card without bfloat16: the weights are the same
        (True, torch.float32, "mps", True),
        (True, torch.float32, "cpu", False),  # the reference in float32
        (False, torch.bfloat16, "cuda", False),
        (False, torch.float32, "cpu", False),
    ],
)
def test_frequencies_are_those_that_the_weights_have_learned(trained, dtype, device, rounded):
    config = replace(LanceConfig(), bfloat16_frequencies=trained)
    assert frequencies_are_rounded(config, dtype, torch.device(device)) == rounded


def test_a_model_trained_in_float32_keeps_exact_frequencies():
    positions = torch.tensor([[2001], [1500], [777]])
    config = replace(LanceConfig(), bfloat16_frequencies=False)
    exact, rounded = (rope_table(config, positions, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(rounded.cos, exact.cos.to(torch.bfloat16))


@given(grids, st.sampled_from([32, 64, 128, 2048]))
@settings(max_examples=20)
def test_latent_positions_follow_the_formula(grid, hidden):
    found = latent_position_embedding(grid, hidden, CPU)
    torch.testing.assert_close(found, full_pass.place(grid, hidden), atol=1e-5, rtol=0)


def test_columns_beyond_the_references_table_are_the_next_rows():
    """A picture of 21:9 has 72 columns; the reference numbers the cells of a frame in rows of 64."""
    found = latent_position_embedding(LatentShape(1, 31, 72), 128, CPU).unflatten(0, (31, 72))
    assert torch.equal(found[:-1, 64:], found[1:, :8])
    square = latent_position_embedding(LatentShape(1, 31, 64), 128, CPU).unflatten(0, (31, 64))
    assert torch.equal(found[:, :64], square)


def test_latent_positions_have_no_last_frame():
    long = latent_position_embedding(LatentShape(90, 2, 3), 64, CPU)
    torch.testing.assert_close(long, full_pass.place((90, 2, 3), 64), atol=1e-4, rtol=0)
    rows = long.unflatten(0, (90, 6))[:, 0]
    assert len(rows.unique(dim=0)) == 90


@given(st.integers(1, 10000), st.integers(1, 60))
@settings(max_examples=200)
def test_every_shift_of_the_widget_is_guided_from_the_first_step_on(hundredths, steps):
    """In float32 the first sigma of a shift of 2.14 would be 1 + 1e-7, outside the interval that ends at 1."""
    sigmas = flow_sigmas(steps, hundredths / 100)
    assert 1 - 1e-6 < sigmas[0] <= 1
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    assert Guidance().acts_at(sigmas[0])
    assert Guidance().acts_at(torch.tensor(1.0 + 2**-23))  # as ComfyUI's own schedules round it
