"""The fixed sentences that Lance was trained with; the sentences themselves are data (``prompts.json``)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from .tokenizer import IM_END, IM_START
from .types import check_choice

GENERATION_TASKS = ("t2i", "t2v", "i2v", "image_edit", "video_edit", "subject_image", "subject_video")
UNDERSTANDING_TASKS = ("x2t_image", "x2t_video")
TASKS = GENERATION_TASKS + UNDERSTANDING_TASKS
UNSEEING_TASKS = ("t2i", "t2v", "i2v")  # the vision tower is shown nothing
VIDEO_TASKS = ("t2v", "i2v", "video_edit", "subject_video", "x2t_video")

# One template for every task: {SYSTEM}, then the user's segments, then the assistant's.
SYSTEM_OPENING = f"{IM_START}system\n"
USER_OPENING = f"{IM_END}\n{IM_START}user\n"
ASSISTANT_OPENING = f"{IM_END}\n{IM_START}assistant\n"


@cache
def _sentences() -> dict:
    return json.loads(Path(__file__).with_name("prompts.json").read_text("utf-8"))


def check_task(task: str) -> None:
    """``ValueError`` for a name that is none of the nine tasks."""
    check_choice("Task", task, TASKS)


def system_sentence(task: str, asked: bool = False) -> str:
    """The system sentence of a task; for understanding it depends on whether a question is asked.

    The reference draws one of four sentences at random for a caption; we always take the first, so that results
    repeat. For subjects its inference says "image" also where a video is made: it takes the kind of the last thing that it
    is given. (Reference: data/common.py, generate_system_prompt; data/datasets_custom/validation_dataset.py.)
    """
    check_task(task)
    sentences = _sentences()
    if task.startswith("subject"):
        return sentences["system"]["subject"].format(modality="image")
    if task in GENERATION_TASKS:
        return sentences["system"][task]
    if asked:
        return sentences["system"][f"{task}_question"]
    return caption_sentences(task)[0]


def caption_sentences(task: str) -> list[str]:
    """The sentences that ask for a caption of an image (``x2t_image``) or a video (``x2t_video``)."""
    return [sentence.format(vision_type=task.removeprefix("x2t_")) for sentence in _sentences()["caption"]]


def enhancement(style: str, prompt: str) -> str:
    """The question that makes Lance rewrite a prompt; style: image, video, edit, or image to video."""
    questions = _sentences()["enhance"]
    check_choice("Style", style, questions)
    return questions[style].replace("{prompt}", prompt)
