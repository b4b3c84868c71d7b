"""Nodes that make contexts: pictures and words, in any order, that Lance sees before it draws or answers."""

from typing import Any

from ..lance_runtime.context import Context, Segment, open_context
from ..lance_runtime.prompts import TASKS, system_sentence
from ..lance_runtime.types import Modality
from .clip import lance_of
from .pictures import (
    AS_IS,
    AUTO,
    FPS,
    SAMPLED,
    encode_source,
    fps_input,
    grid_of,
    normalised,
    resolution_input,
    seen,
    sizes_of,
    source_input,
    source_latent,
    stills,
)
from .schema import CATEGORY, LanceContext, LanceVitTokens, io

ROLES = {"edit source": Modality.EDIT_SOURCE, "subject": Modality.SUBJECT, "look": Modality.VIT}
OWN_SYSTEM = "own"
MAX_VISUALS = 16


class LanceNativeViTEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeViTEncode",
            display_name="Lance ViT Encode",
            category=CATEGORY,
            description="Reads a picture or video for its meaning, as tokens for a Lance Context.",
            search_aliases=["clip vision encode", "vision", "lance vision"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                source_input("source", tooltip="An image, several images in a row (a video), or a VIDEO."),
                resolution_input(),
                fps_input(),
            ],
            outputs=[LanceVitTokens.Output(display_name="ViT tokens", tooltip="What Lance sees, for a Lance Context.")],
        )

    @classmethod
    def execute(cls, clip: Any, source: Any, resolution: str, fps: float) -> io.NodeOutput:
        lance = lance_of(clip)
        return io.NodeOutput(lance.tower.encode(*seen(source, resolution, lance.sizes, fps)))


class LanceNativeVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNativeVAEEncode",
            display_name="Lance VAE Encode",
            category=CATEGORY,
            description="Encodes a picture or video at a size that Lance was trained on.",
            search_aliases=["vae encode", "bucket", "lance latents"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of Load Lance."),
                source_input("source", tooltip="An image, several images in a row (a video), or a VIDEO."),
                resolution_input(AS_IS),
                fps_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The encoded picture or video."),
                io.Int.Output(display_name="width", tooltip="Width in pixels."),
                io.Int.Output(display_name="height", tooltip="Height in pixels."),
                io.Int.Output(display_name="frames", tooltip="Number of frames."),
            ],
        )

    @classmethod
    def execute(cls, vae: Any, source: Any, resolution: str, fps: float) -> io.NodeOutput:
        latent = encode_source(vae, *seen(source, resolution, sizes_of(vae), fps))
        shape = grid_of(latent).pixels()
        return io.NodeOutput(latent, shape.width, shape.height, shape.frames)


class LanceNativeContext(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        visual = io.MultiType.Input("visual", [LanceVitTokens, io.Latent], tooltip="ViT tokens, or encoded latents.")
        return io.Schema(
            node_id="LanceNativeContext",
            display_name="Lance Context",
            category=CATEGORY,
            description="Lays pictures and words out in the order in which Lance should see them. Chain several to interleave.",
            search_aliases=["interleave", "multi turn", "reference", "lance prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.Combo.Input(
                    "task",
                    options=[*TASKS, OWN_SYSTEM],
                    default="image_edit",
                    tooltip="Which of the trained system sentences opens the context; 'own' takes the one in 'system'.",
                ),
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default="edit source",
                    tooltip="What latents are for: the picture to change ('edit source') or something to keep ('subject'). "
                    "ViT tokens are looked at, whatever the role.",
                ),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="Words after the visuals of this node; may be empty."
                ),
                io.Autogrow.Input(
                    "visuals",
                    template=io.Autogrow.TemplatePrefix(visual, prefix="visual_", min=0, max=MAX_VISUALS),
                    optional=True,
                    tooltip="Give each picture to Lance ViT Encode and to Lance VAE Encode, and connect both, ViT first.",
                ),
                LanceContext.Input("context", optional=True, tooltip="A context to go on with; its system sentence stays."),
                io.String.Input(
                    "system", multiline=True, default="", tooltip="The system sentence where task is 'own'.", advanced=True
                ),
            ],
            outputs=[
                LanceContext.Output(
                    display_name="context", tooltip="For a sampler, for Lance Ask, or for a further Lance Context."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        task: str,
        role: str,
        text: str,
        system: str,
        visuals: dict | None = None,
        context: Context | None = None,
    ) -> io.NodeOutput:
        tokenizer = lance_of(clip).tokenizer
        if context is None:
            sentence = system if task == OWN_SYSTEM else system_sentence(task, asked=task.startswith("x2t"))
            context = open_context(tokenizer, sentence)
        context = context.extended(_segment(visual, role) for visual in (visuals or {}).values() if visual is not None)
        return io.NodeOutput(context.with_text(tokenizer.encode(text)) if text else context)


def _segment(visual: Any, role: str) -> Segment:
    if isinstance(visual, Segment):
        return visual
    latents = normalised(visual)
    if ROLES[role] == Modality.VIT:
        raise ValueError(
            f"The role 'look' takes ViT tokens, and got latents of {len(latents)} channels.\n"
            "Use Lance ViT Encode, or another role."
        )
    return Segment.latents(latents, ROLES[role])


def _both_streams(clip: Any, vae: Any, source: Any, resolution: str, fps: float, role: Modality) -> list[Segment]:
    """A picture as the reference gives it to a task that draws: ViT tokens, then clean latents."""
    lance = lance_of(clip)
    picture = seen(source, resolution, lance.sizes, fps)
    return [lance.tower.encode(*picture), Segment.latents(normalised(encode_source(vae, *picture)), role)]


class LanceNativeEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        images = io.Autogrow.TemplatePrefix(
            io.Image.Input("image", tooltip="A picture to change; of a batch the first."),
            "image_",
            min=0,
            max=MAX_VISUALS,
        )
        return io.Schema(
            node_id="LanceNativeEdit",
            display_name="Lance Edit",
            category=CATEGORY,
            description="Pictures or a video to change, and the latent to begin with. Say the change in the prompt.",
            search_aliases=["edit image", "edit video", "instruct", "kontext", "image to image"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.Vae.Input("vae", tooltip="The VAE of Load Lance."),
                io.Autogrow.Input("images", template=images, optional=True, tooltip="Several: the last one gives the size."),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A video to change. " + SAMPLED,
                ),
                resolution_input(),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Results to draw at once."),
            ],
            outputs=[
                LanceContext.Output(display_name="context", tooltip="The pictures, for Lance Sampler or Lance Conditioning."),
                io.Latent.Output(display_name="latent", tooltip="The last source, to begin with: a mask keeps parts of it."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, vae: Any, resolution: str, batch_size: int, images: dict | None = None, video: Any = None
    ) -> io.NodeOutput:
        sources = [*stills(images), *([] if video is None else [video])]
        if not sources:
            raise ValueError("Lance Edit has 0 pictures to change; it needs 1 or more.\nConnect an image or a video.")
        task = "image_edit" if video is None else "video_edit"
        parts = [_both_streams(clip, vae, source, resolution, FPS, Modality.EDIT_SOURCE) for source in sources]
        context = open_context(lance_of(clip).tokenizer, system_sentence(task), [s for part in parts for s in part])
        return io.NodeOutput(context, source_latent(context.segments[-1], batch_size))


class LanceNativeSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        images = io.Autogrow.TemplatePrefix(
            io.Image.Input("image", tooltip="A subject to keep; of a batch the first."), "image_", min=1, max=MAX_VISUALS
        )
        return io.Schema(
            node_id="LanceNativeSubject",
            display_name="Lance Subject",
            category=CATEGORY,
            description="Subjects to show in a new picture or video. Say the new scene in the prompt; begin with any latent.",
            search_aliases=["reference image", "subject", "character", "ip adapter", "identity"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load Lance."),
                io.Vae.Input("vae", tooltip="The VAE of Load Lance."),
                io.Autogrow.Input("images", template=images, tooltip="One picture a subject; many tend to melt into one."),
                resolution_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent to begin with. If it is a video, 'auto' takes the size class of videos.",
                ),
            ],
            outputs=[
                LanceContext.Output(display_name="context", tooltip="The subjects, for Lance Sampler or Lance Conditioning.")
            ],
        )

    @classmethod
    def execute(cls, clip: Any, vae: Any, resolution: str, images: dict, latent: dict | None = None) -> io.NodeOutput:
        lance = lance_of(clip)
        if resolution == AUTO and latent is not None:  # a subject is as large as the task's other pictures, as in training
            resolution = lance.sizes.preset(video=grid_of(latent).frames > 1)
        parts = [_both_streams(clip, vae, image, resolution, FPS, Modality.SUBJECT) for image in stills(images)]
        system = system_sentence("subject_image")
        return io.NodeOutput(open_context(lance.tokenizer, system, [s for part in parts for s in part]))
