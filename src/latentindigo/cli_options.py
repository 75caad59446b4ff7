"""Options of the commands that restore, the same for one photo and for a folder of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from latentindigo.command import INPUT, OUTPUT, QUALITY, SPEED

__all__ = [
    "CheckpointingOption",
    "CompileOption",
    "CropOption",
    "DetailMapOption",
    "DtypeOption",
    "FidelityOption",
    "GuidanceScaleOption",
    "GuidanceVaeOption",
    "InitModelOption",
    "InitOption",
    "LatentInnOption",
    "MethodOption",
    "NegativePromptOption",
    "OffloadOption",
    "PresetOption",
    "PriorConfigOption",
    "PriorOption",
    "PromptOption",
    "SamplesOption",
    "ScaleOption",
    "SchedulerOption",
    "SeedOption",
    "SizeOption",
    "StepsOption",
    "StrengthOption",
    "TileOption",
    "UncertaintyMapOption",
    "UpdateOption",
]

_PRESET = "the preset's"


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"expected WIDTHxHEIGHT in pixels such as 1920x1080, got {text!r}")
    return int(width), int(height)


def _tile(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or int(text) < 256:
        raise typer.BadParameter(f"expected 'auto', 'off' or at least 256 pixels, got {text!r}")
    return int(text)


PriorOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Another latent diffusion model to sample with: a folder, a hub id or a .safetensors file.",
        rich_help_panel=INPUT,
    ),
]
PriorConfigOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="With a --prior of one file: its configurations, in diffusers' layout, so that none is fetched.",
        rich_help_panel=INPUT,
    ),
]
GuidanceVaeOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A cheap autoencoder (AutoencoderTiny) for guidance in image space: a folder or a hub id.",
        rich_help_panel=INPUT,
    ),
]
InitModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Start from the estimate of another restorer, such as Real-ESRGAN: a .safetensors file.",
        rich_help_panel=INPUT,
    ),
]
LatentInnOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Latent network for the prior's autoencoder, from `latentindigo train latent-inn --prior`.",
        rich_help_panel=INPUT,
    ),
]
PresetOption = Annotated[
    Literal["faithful", "default", "vivid"],
    typer.Option(help="How far to trust the photo, and how far the model.", rich_help_panel=QUALITY),
]
FidelityOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=1,
        help="Slide between vivid (0) and faithful (1).",
        show_default=_PRESET,
        rich_help_panel=QUALITY,
    ),
]
MethodOption = Annotated[
    Literal["latent-inn", "pixel-inn", "unguided"] | None,
    typer.Option(
        help="Guide in latent space (fast), in image space, or not at all.",
        show_default=_PRESET,
        rich_help_panel=QUALITY,
    ),
]
UpdateOption = Annotated[
    Literal["projection", "stopped", "through"] | None,
    typer.Option(
        help="Guide without a gradient, with one that stops at the denoiser, or with one through it.",
        show_default=_PRESET,
        rich_help_panel=QUALITY,
    ),
]
InitOption = Annotated[
    Literal["estimator", "encode", "inverse", "noise"] | None,
    typer.Option(
        help="What sampling starts from: a quick estimate, the enlarged photo, the inverse network, or noise.",
        show_default=_PRESET,
        rich_help_panel=QUALITY,
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=1,
        help="Share of noise at the start: above 0, up to 1 for pure noise.",
        show_default=_PRESET,
        rich_help_panel=QUALITY,
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What a prior that takes text is asked for; '' asks for nothing, without guidance by text.",
        show_default="a sharp photograph",
        rich_help_panel=QUALITY,
    ),
]
NegativePromptOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What it is to keep away from.",
        show_default="blur, noise and the like",
        rich_help_panel=QUALITY,
    ),
]
GuidanceScaleOption = Annotated[
    float | None,
    typer.Option(
        metavar="FACTOR",
        min=1,
        max=50,
        help="How strongly text guides; 1 = the prompt alone, in half of the time.",
        show_default="the prior's",
        rich_help_panel=QUALITY,
    ),
]
SamplesOption = Annotated[
    int,
    typer.Option(metavar="N", min=1, max=64, help="Different results for each photo.", rich_help_panel=QUALITY),
]
SeedOption = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Seed of the first result; result k uses seed + k.", rich_help_panel=QUALITY),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1000,
        help="Denoiser evaluations.",
        show_default=_PRESET,
        rich_help_panel=SPEED,
    ),
]
SchedulerOption = Annotated[
    Literal["model", "ddim", "dpm++", "unipc", "euler", "lcm"],
    typer.Option(
        help="How to go from step to step: as the model was saved, or dpm++ or unipc for 4 to 10 steps, lcm for "
        "networks made for it.",
        rich_help_panel=SPEED,
    ),
]
TileOption = Annotated[
    Any,
    typer.Option(
        metavar="PIXELS",
        parser=_tile,
        help="Side of a tile in output pixels (256 or more), 'auto' or 'off'; smaller tiles need less memory.",
        rich_help_panel=SPEED,
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Numbers the networks compute with.", show_default="bfloat16 where it is fast", rich_help_panel=SPEED
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the networks first: on an accelerator it pays for many photos of one size.",
        rich_help_panel=SPEED,
    ),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Less memory for the gradients of --update stopped and through: a third for pixel-inn.",
        rich_help_panel=SPEED,
    ),
]
OffloadOption = Annotated[
    Literal["none", "model", "sequential"],
    typer.Option(
        help="Keep networks (model) or their layers (sequential) on the CPU until the accelerator needs them: less "
        "of its memory, more time.",
        rich_help_panel=SPEED,
    ),
]
ScaleOption = Annotated[
    float,
    typer.Option(metavar="FACTOR", min=1, max=16, help="Output size over input size.", rich_help_panel=OUTPUT),
]
SizeOption = Annotated[
    Any,
    typer.Option(
        metavar="WxH",
        parser=_size,
        help="Output size in pixels instead of --scale; the aspect is kept, the photo fits inside.",
        rich_help_panel=OUTPUT,
    ),
]
CropOption = Annotated[
    bool, typer.Option("--crop", help="With --size: cut to its aspect and fill it.", rich_help_panel=OUTPUT)
]
DetailMapOption = Annotated[
    bool,
    typer.Option("--detail-map", help="Also write NAME.detail.png: which detail was invented.", rich_help_panel=OUTPUT),
]
UncertaintyMapOption = Annotated[
    bool,
    typer.Option(
        "--uncertainty-map",
        help="Also write NAME.uncertainty.png: how far the samples differ (--num-samples 2 or more).",
        rich_help_panel=OUTPUT,
    ),
]
