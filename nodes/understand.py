"""Nodes that make Lance speak: questions about pictures, and better prompts."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lance_runtime.context import Context, open_context, question_context
from ..lance_runtime.decode import Sampling
from ..lance_runtime.grounding import find_boxes
from ..lance_runtime.preprocess import vit_area, vit_size
from ..lance_runtime.prompts import enhancement, system_sentence
from .clip import LanceTextModel, answer_of, lance_of
from .pictures import AUTO, SAMPLED, resolution_input, seen, stills
from .progress import node_of, say
from .schema import CATEGORY, LanceContext, io


def speak(clip: Any, context: Context, length: int, sampling: Sampling, node: str | None) -> str:
    """An answer, written into the node as it comes."""
    lance = lance_of(clip)
    text = ""
    for text in _texts(lance, answer_of(clip, context, length, sampling)):
        say(node, text)
    return text


def _texts(lance: LanceTextModel, ids: Iterator[int]) -> Iterator[str]:
    written: list[int] = []
    for token in ids:
        written.append(token)
        yield lance.tokenizer.decode(written)


def sampling_inputs() -> list[io.Input]:
    return [
        io.Int.Input("max_length", default=256, min=1, max=4096, tooltip="Tokens at most; an answer usually ends by itself."),
        io.Float.Input(
            "temperature",
            default=0.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="0 always says the likeliest; higher is freer.",
            advanced=True,
        ),
        io.Float.Input(
            "top_p",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="0.9 keeps the likeliest words that together have 90 % of the probability.",
            advanced=True,
        ),
        io.Int.Input(
            "seed",
            default=42,
            min=0,
            max=2**64 - 1,
            tooltip="For a temperature above 0.",
            control_after_generate=io.ControlAfterGenerate.fixed,
            advanced=True,
        ),
    ]


class LanceNativeAsk(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        images = io.Autogrow.TemplatePrefix(
            io.Image.Input("image", tooltip="A picture; of a batch the first. Frames of a video belong to 'video'."),
            "image_",
            min=0,
            max=16,
        )
        return io.Schema(
            node_id="LanceNativeAsk",
            display_name="Lance Ask",
            category=CATEGORY,
            description="Asks about pictures or a video; without a question it describes them. The answer appears in the node "
            "as it is written. Boxes that the answer names come out as boxes and as a mask.",
            search_aliases=["caption", "vqa", "describe", "question", "ocr", "detect", "interrogate", "describe image", "vlm"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.String.Input("question", multiline=True, dynamic_prompts=True, default="", tooltip="Empty: a description."),
                io.Autogrow.Input("images", template=images, optional=True, tooltip="One or more pictures."),
                io.Video.Input("video", optional=True, tooltip="A video. " + SAMPLED),
                LanceContext.Input(
                    "context",
                    optional=True,
                    tooltip="Instead of pictures: a context of your own. Pictures beside it only give boxes their coordinates.",
                ),
                resolution_input(),
                *sampling_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="answer", tooltip="The answer as text."),
                io.BoundingBox.Output(display_name="boxes", tooltip="The boxes in the answer, in pixels of the last picture."),
                io.Mask.Output(display_name="mask", tooltip="The same boxes as a mask; empty where there are none."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        question: str,
        resolution: str,
        max_length: int,
        temperature: float,
        top_p: float,
        seed: int,
        images: dict | None = None,
        video: Any = None,
        context: Context | None = None,
    ) -> io.NodeOutput:
        lance, question = lance_of(clip), question.strip()
        sources = [*stills(images), *([] if video is None else [video])]
        if context is None and not sources and not question:
            raise ValueError(
                "Lance Ask has 0 pictures to describe; it needs 1 or more.\nConnect an image or a video, or write a question."
            )
        pictures = [seen(source, resolution, lance.sizes) for source in sources]
        if context is None:
            task = "x2t_image" if video is None else "x2t_video"
            context = _seen(lance, pictures, system_sentence(task, asked=bool(question)))
        asked = question_context(lance.tokenizer, context, question)
        answer = speak(clip, asked, max_length, Sampling(temperature, top_p, seed), node_of(cls))
        boxes, mask = _boxes(lance, answer, pictures)
        return io.NodeOutput(answer, boxes, mask, ui={"text": [answer]})


def _seen(lance: LanceTextModel, pictures: Iterable[tuple[np.ndarray, str]], system: str) -> Context:
    return open_context(lance.tokenizer, system, [lance.tower.encode(*picture) for picture in pictures])


def _boxes(lance: LanceTextModel, answer: str, pictures: list[tuple[np.ndarray, str]]) -> tuple[list[dict], Tensor]:
    """Boxes in pixels of the (last) picture, and a mask of them; nothing where there is no picture."""
    if not pictures:
        return [], torch.zeros(1, 64, 64)
    frames, preset = pictures[-1]
    height, width = frames.shape[1:3]
    shown = height, width, preset, lance.tower.config
    boxes = find_boxes(answer, vit_size(*shown), vit_area(*shown), (height, width))
    mask = torch.zeros(1, height, width)
    for box in boxes:
        mask[0, box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]] = 1
    return boxes, mask


class LanceNativeEnhancePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeEnhancePrompt",
            display_name="Lance Enhance Prompt",
            category=CATEGORY,
            description="Rewrites a short prompt as the long, literal one that it draws best from; offline, same weights.",
            search_aliases=["rewrite prompt", "prompt upsampling", "expand prompt", "magic prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, default="", tooltip="A few words: what to draw."
                ),
                io.Combo.Input(
                    "style",
                    options=["image", "video", "edit", "image to video"],
                    default="image",
                    tooltip="What the prompt is for.",
                ),
                io.Image.Input("image", optional=True, tooltip="The picture to change or to begin with."),
                *sampling_inputs(),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="The long prompt; yours, if nothing readable came back.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompt: str,
        style: str,
        max_length: int,
        temperature: float,
        top_p: float,
        seed: int,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        """The prompt in Lance's words; the user's own where nothing readable comes back."""
        if image is None and not prompt.strip():
            raise ValueError("Lance Enhance Prompt has 0 words to rewrite; it needs 1 or more.\nWrite what to draw.")
        lance = lance_of(clip)
        pictures = [] if image is None else [seen(image[:1], AUTO, lance.sizes)]
        context = _seen(lance, pictures, system_sentence("x2t_image", asked=True))
        asked = question_context(lance.tokenizer, context, enhancement(style, prompt))
        answer = speak(clip, asked, max_length, Sampling(temperature, top_p, seed), node_of(cls))
        answer = answer.strip().rstrip("\ufffd").rstrip()  # a character that the length cut through
        better = answer if answer and "\ufffd" not in answer else prompt
        both = f"{prompt}\n\u2192 {better}"
        say(node_of(cls), both)
        return io.NodeOutput(better, ui={"text": [both]})
