"""Prefixes of questions: read once, bounded, never changed by what is written behind them."""

from functools import partial

import goldens
import numpy as np
import pytest
import tasks
import torch

from lance_runtime import LancePipeline
from lance_runtime.context import layout, open_context, question_context
from lance_runtime.decode import answer
from lance_runtime.prefill import prefill
from lance_runtime.reuse import LRUCache, PrefixCache


@pytest.fixture
def ask(image_pipe):
    """Answers a question about a picture, and says how many tokens each pass took through the layers."""
    parts = image_pipe.components
    request = image_pipe.request(**tasks.arguments("x2t_image"))
    visuals = image_pipe.context(request).visuals
    layer = parts.model.language_model.model.layers[0].self_attn.q_proj

    def run(question, prefixes, weights="", seen=visuals, length=6):
        context = question_context(parts.tokenizer, open_context(parts.tokenizer, "Look.", seen), question)
        lengths = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        extra = {} if prefixes is None else {"read": partial(prefixes.prefill, weights, parts.engine)}
        try:
            with torch.no_grad():
                ids = list(answer(parts.engine, layout(context), parts.tokenizer, length, **extra))
        finally:
            hook.remove()
        return ids, lengths

    run.visuals = visuals
    return run


def test_a_second_question_reads_its_words_alone(ask):
    prefixes = PrefixCache()
    for question in ("what color", "where is the dog in the park", "what color"):
        assert ask(question, prefixes)[0] == ask(question, None)[0]
    assert len(prefixes.entries) == 1
    expected, whole = ask("the cat", None)
    found, lengths = ask("the cat", prefixes)
    assert found == expected
    assert lengths == whole[-len(lengths) :]
    assert max(lengths) < len(ask.visuals[0]) <= max(whole)
    assert len(whole) - len(lengths) == 2  # the system sentence, and the picture


def test_a_question_may_end_in_its_picture(ask, image_pipe):
    context = open_context(image_pipe.components.tokenizer, "Look.", ask.visuals)
    asked = {"task": "x2t_image", "context": context, "max_new_tokens": 4}
    image_pipe.forget()
    first, again = image_pipe(**asked), image_pipe(**asked)
    assert len(first.token_ids) == 4
    assert first.token_ids == again.token_ids
    assert image_pipe.layout(**asked).split_lens[:-1] == [len(segment) for segment in context.segments]


def test_states_are_the_same_to_the_bit(ask, image_pipe):
    parts, prefixes = image_pipe.components, PrefixCache()
    context = open_context(parts.tokenizer, "Look.", ask.visuals)
    sequence = layout(question_context(parts.tokenizer, context, "what"))
    with torch.no_grad():
        expected = prefill(parts.engine, sequence)
        for _ in range(3):
            cache, states = prefixes.prefill("", parts.engine, sequence)
            assert torch.equal(states, expected[1])
            assert cache.length == expected[0].length
            assert all(
                torch.equal(a[:, :, :, : cache.length], b) for a, b in zip(cache.layers, expected[0].layers, strict=True)
            )
            for layer in cache.layers:  # a question writes into its cache
                layer.fill_(7)


def test_other_weights_pictures_and_sentences_are_read_anew(ask):
    prefixes = PrefixCache()
    ask("what", prefixes)
    for options in ({"weights": "other"}, {"seen": [type(v).vit(v.values.clone(), v.grid) for v in ask.visuals]}):
        _, lengths = ask("what", prefixes, **options)
        assert max(lengths) == len(ask.visuals[0])
    assert len(prefixes.entries) == 3
    assert max(ask("what", prefixes)[1]) < len(ask.visuals[0])


def test_words_alone_are_not_kept(ask):
    prefixes = PrefixCache()
    assert ask("what", prefixes, seen=[])[0] == ask("what", None, seen=[])[0]
    assert len(prefixes.entries) == 0


def test_an_interrupted_reading_keeps_nothing(ask, image_pipe):
    prefixes, layer = PrefixCache(), image_pipe.components.model.language_model.model.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask("what", prefixes)
    hook.remove()
    assert len(prefixes.entries) == 0
    assert ask("what", prefixes)[0] == ask("what", None)[0]


def test_the_bound_holds():
    kept = LRUCache(10)
    for key, size in (("a", 4), ("b", 4), ("a", 4)):
        kept.put(key, key, size)
    assert (kept.nbytes, len(kept)) == (8, 2)
    assert kept.get("b") == "b"  # used last
    kept.put("c", "c", 5)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.nbytes) == (None, "b", "c", 9)
    kept.put("d", "d", 11)  # larger than all that may be kept: nothing goes for it
    assert (kept.get("d"), kept.nbytes) == (None, 9)
    for key in range(20):
        kept.put(key, key, 0)
    assert len(kept) == 8
    assert kept.get(19) == 19
    kept.clear()
    assert (kept.nbytes, len(kept)) == (0, 0)


def test_kept_bytes_are_those_of_the_prefix(ask):
    prefixes = PrefixCache()
    ask("what", prefixes)
    (prefix,) = (prefixes.entries._entries[key][0] for key in prefixes.entries._entries)
    tokens = sum(map(len, prefix.segments))
    assert prefixes.entries.nbytes == tokens * 3 * 2 * 2 * 32 * 4  # layers, keys and values, key heads, their width, float32
    small = PrefixCache(prefixes.entries.nbytes - 1)
    assert ask("what", small)[0] == ask("what", prefixes)[0]
    assert len(small.entries) == 0


@pytest.mark.parametrize("offload", ["none", "layer"])
def test_a_pipeline_asks_twice_and_reads_the_picture_once(offload):
    pipe = LancePipeline.from_pretrained(goldens.CHECKPOINT, "image", device="cpu", offload=offload)
    arguments = tasks.arguments("x2t_image")
    parts, passes = pipe.components, []
    layer = parts.model.language_model.model.layers[0].self_attn.q_proj
    hooks = [
        parts.vision.patch_embed.register_forward_pre_hook(lambda *_: passes.append("vit")),
        layer.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[1])),
    ]
    first = pipe(**arguments)
    picture = max(size for size in passes if size != "vit")
    assert passes.count("vit") == 1
    del passes[:]
    assert pipe(**arguments).token_ids == first.token_ids
    other = pipe(**arguments | {"question": "the dog in the park"})
    assert "vit" not in passes
    assert max(passes) < picture
    del passes[:]
    changed = [image[:, ::-1].copy() for image in map(np.asarray, arguments["images"])]
    pipe(**arguments | {"images": changed})
    assert passes.count("vit") == 1
    assert max(size for size in passes if size != "vit") == picture
    for hook in hooks:
        hook.remove()
    fresh = LancePipeline.from_pretrained(goldens.CHECKPOINT, "image", device="cpu")
    assert fresh(**arguments | {"question": "the dog in the park"}).token_ids == other.token_ids
