"""The decoding loop: one token after another, as a generator of ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Layout
from .engine import Engine
from .kv_cache import ANSWER_ROOM, KVCache
from .model.attention import full_attention, without_cudnn_attention
from .model.rope import Rope
from .model.transformer import Streams
from .prefill import prefill
from .recorded import Recorded
from .tokenizer import IM_END, LanceTokenizer

# The shortest answer that is worth a recording, and the most keys: masked attention does not split them among processors.
LEAST_RECORDED, MOST_KEYS_RECORDED = 32, 4096
MASK_MULTIPLE = 16  # what torch would pad a mask to, in every layer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn, seeded, from the likely ones.

    top_k, top_p, min_p: keep the k most probable tokens (0: all), the fewest that sum to top_p, and those at least min_p
    times as probable as the first. repetition: divides positive logits of tokens that were written already, multiplies
    negative ones (1: off). presence: is taken off their logits (0: off).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    top_k: int = 0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Temperature {self.temperature} is not a number from 0 up.\nUse 0 for greedy decoding.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not within (0, 1].\nUse 1 to keep every token.")

    def choose(self, logits: Tensor, written: Sequence[int], generator: torch.Generator) -> int:
        """logits (V) in float32 -> a token id, drawn on the CPU, so that a seed gives the same on every device."""
        logits = self._penalised(logits, written)
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities, order = torch.softmax(logits / self.temperature, dim=-1).sort(descending=True)
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= self.top_p] = 0
        probabilities[probabilities < self.min_p * probabilities[0]] = 0
        if self.top_k > 0:
            probabilities[self.top_k :] = 0
        return int(order[int(torch.multinomial(probabilities.cpu(), 1, generator=generator))])

    def _penalised(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        if not written or (self.repetition == 1 and self.presence == 0):
            return logits
        ids, logits = torch.tensor(sorted(set(written)), device=logits.device), logits.clone()
        known = logits[ids]
        logits[ids] = torch.where(known > 0, known / self.repetition, known * self.repetition) - self.presence
        return logits


def answer(
    engine: Engine,
    sequence: Layout,
    tokenizer: LanceTokenizer,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    read: Callable[[Layout], tuple[KVCache, Any]] | None = None,
) -> Iterator[int]:
    """Read a laid-out question and yield the ids of its answer. read: in the place of ``prefill`` with this engine."""
    cache, states = prefill(engine, sequence) if read is None else read(sequence)
    yield from decode(
        engine,
        cache,
        states[:, -1:],
        int(sequence.positions.max()) + 1,
        vocabulary=len(tokenizer),
        stop=tokenizer.special(IM_END),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )


def decode(
    engine: Engine,
    cache: KVCache,
    last: Tensor,
    position: int,
    *,
    vocabulary: int,
    stop: int,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yield the ids of an answer, without the closing ``stop``.

    cache: the prefilled context, extended in place. last: its last token's final states (1, 1, D). position: rope
    position of the first new token, the same on all axes. vocabulary: logits from this id on are left out.
    """
    check_length(max_new_tokens)
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(int(sampling.seed))
    written: list[int] = []
    for step in range(max_new_tokens):
        if step % ANSWER_ROOM == 0:
            read = token_reader(engine, cache, position + step, min(ANSWER_ROOM, max_new_tokens - step))
        logits = engine.model.logits(last)[0, -1, :vocabulary].float()
        token = sampling.choose(logits, written, generator)
        if token == stop:
            return
        written.append(token)
        if step + 1 < max_new_tokens:  # before the caller has it: a device works on while the text is shown
            last = read(token, step % ANSWER_ROOM)
        yield token


def check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves nothing to write.\nUse 1 or more; the default is 256.")


def token_reader(engine: Engine, cache: KVCache, position: int, tokens: int) -> Callable[[int, int], Tensor]:
    """What reads up to so many tokens of an answer into the cache, from a rope position on.

    It is given a token's id and how many it has read before, and returns the token's final states (1, 1, D).
    """
    rope = engine.rope((position + torch.arange(tokens)).expand(3, -1))
    pays = tokens >= LEAST_RECORDED and cache.length + tokens <= MOST_KEYS_RECORDED
    if not (engine.cuda_graphs and pays) or cache.begin:
        cache.reserve(tokens)
        return lambda token, place: next_states(engine, cache, token, rope.at(place))
    cache.reserve(tokens + MASK_MULTIPLE - 1)
    recorded = Recorded(partial(states_in_place, engine, cache, rope, cache.length))

    def read(token: int, place: int) -> Tensor:
        states = recorded(engine.embed([token]), torch.tensor([place], device=engine.device))
        cache.commit(1)
        return states

    return read


@without_cudnn_attention()
def states_in_place(engine: Engine, cache: KVCache, rope: Rope, first: int, row: Tensor, place: Tensor) -> Tensor:
    """``next_states`` with its position in a tensor, so that one graph serves every token.

    row: the token's embedding (1, 1, D). place (1): its place in the rotary table, and behind the first so many tokens of
    the cache. Attention sees all places of the cache, and a mask keeps out those that are not written yet.
    """
    at, room = place + first, cache.capacity // MASK_MULTIPLE * MASK_MULTIPLE
    later = torch.arange(room, device=at.device) > at
    mask = torch.zeros(1, room, dtype=row.dtype, device=at.device).masked_fill(later, -math.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (part[:, :, :room] for part in cache.write(layer, k, v, at))
        return full_attention(q, keys, values, partial(F.scaled_dot_product_attention, attn_mask=mask))

    table = Rope(*(part.index_select(1, place) for part in rope))
    return engine.run(Streams(und=row), Streams(und=table), attend).und


@without_cudnn_attention()
def next_states(engine: Engine, cache: KVCache, token: int, rope: Rope) -> Tensor:
    """Read one token into the cache, with the rotary table of its position; returns its final states (1, 1, D)."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return engine.attend_fully(q, *cache.append(layer, k, v))

    result = engine.run(Streams(und=engine.embed([token])), Streams(und=rope), attend)
    cache.commit(1)
    return result.und
