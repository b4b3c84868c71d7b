"""Qwen2.5's tokenizer, from whatever a checkpoint brings: a folder's files or a header's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SPECIAL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD)

# Qwen2.5's added tokens in the order of their ids, for vocabularies that come without a tokenizer.json.
QWEN_ADDED_TOKENS = (
    *("<|endoftext|>", IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>", "<|image_pad|>", VIDEO_PAD),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


class LanceTokenizer:
    """Text to ids and back; ids of special tokens by name, never by number.

    Text of a user is always plain text: a prompt that spells ``<|im_end|>`` gets the tokens of these characters,
    not the control token, so that no prompt can break the sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self._ids = {token: number for token, number in found.items() if number is not None}
        missing = [token for token in SPECIAL_TOKENS if token not in self._ids]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {len(missing)} of {len(SPECIAL_TOKENS)} special tokens: {', '.join(missing)}.\n"
                "Use the tokenizer files that belong to the Lance checkpoint (Qwen2.5-VL's)."
            )

    @classmethod
    def from_folder(cls, folder: Path) -> LanceTokenizer:
        """From ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt`` (with ``tokenizer_config.json`` if there)."""
        if (folder / "tokenizer.json").is_file():
            return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{' and '.join(missing)} of the tokenizer not found in {folder} (nor tokenizer.json).\n"
                "Download the tokenizer files of bytedance-research/Lance into that folder."
            )
        return cls(_from_vocabulary(folder))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> LanceTokenizer | None:
        """From a safetensors header with ``tokenizer_json`` or ``vocab_json`` and ``merges_txt``; None without them."""
        if "tokenizer_json" in metadata:
            return cls(Tokenizer.from_str(metadata["tokenizer_json"]))
        if "vocab_json" not in metadata or "merges_txt" not in metadata:
            return None
        with TemporaryDirectory() as folder:
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                if (key := name.replace(".", "_")) in metadata:
                    (Path(folder) / name).write_text(metadata[key], "utf-8")
            return cls(_from_vocabulary(Path(folder)))

    def __len__(self) -> int:
        """Ids below this have a meaning; the model's vocabulary is padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def special(self, token: str) -> int:
        """The id of one of ``SPECIAL_TOKENS``."""
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._encode(text, plain=True)

    def encode_template(self, text: str) -> list[int]:
        """Ids of text of ours, in which special tokens are control tokens."""
        return self._encode(text, plain=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are no UTF-8 become the replacement character."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _encode(self, text: str, plain: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = plain
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _from_vocabulary(folder: Path) -> Tokenizer:
    """A bare vocabulary through transformers, which knows Qwen2.5's rules for splitting text."""
    from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]  # transformers 5 names it at run time

    tokenizer = Qwen2TokenizerFast.from_pretrained(str(folder)).backend_tokenizer
    if tokenizer.token_to_id(VIDEO_PAD) is None:  # no tokenizer_config.json: the added tokens follow the vocabulary
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_ADDED_TOKENS])
    return tokenizer
