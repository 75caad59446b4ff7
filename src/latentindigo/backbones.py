"""Families of denoisers: what each says about itself, and how it is called.

Every family maps noisy latents (B, C, h, w) and a time step to a network output of the same shape. What lies between
is different: text, pooled text, sizes, patches, a guidance scale as an input.

| family | networks | is told |
| --- | --- | --- |
| unconditional | UNet2DModel | nothing but the time step |
| stable-diffusion | UNet2DConditionModel | token embeddings; LCM also the guidance scale |
| sdxl | UNet2DConditionModel, "text_time" | token and pooled embeddings, six numbers about the size |
| stable-diffusion-3 | SD3Transformer2DModel | token and pooled embeddings |
| flux | FluxTransformer2DModel | the same, on latents packed 2×2, with positions; FLUX.1-dev also the guidance scale |

Networks are recognised by the names of their classes: this module needs no diffusers import, and a model without text
never loads a transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.schedules import PredictionType, state_dtype

__all__ = ["Backbone", "Capabilities", "backbone_of"]


@dataclass(frozen=True)
class Capabilities:
    """What a latent diffusion model can do and what it needs, as data.

    Attributes:
        family: "unconditional", "stable-diffusion", "sdxl", "stable-diffusion-3" or "flux".
        prediction_type: What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
        latent_channels: Channels of a latent.
        downsampling: Pixels per latent cell, along one side.
        size_multiple: Number of pixels that height and width are padded to a multiple of.
        text_encoders: Classes (of transformers) of the text encoders, in the order of their folders; () = no text.
        token_width: Width of a token's embedding, None without text.
        pooled_width: Width of the pooled embedding, None where none is asked for.
        distilled_guidance: Whether the guidance scale is an input of the network (FLUX.1-dev, LCM).
    """

    family: str
    prediction_type: PredictionType
    latent_channels: int
    downsampling: int
    size_multiple: int
    text_encoders: tuple[str, ...] = ()
    token_width: int | None = None
    pooled_width: int | None = None
    distilled_guidance: bool = False


@dataclass(frozen=True)
class Backbone:
    """A family of denoisers; this one is told nothing but the time step. The base of the others.

    Attributes:
        channels: Latent channels that go in and come out, (in, out), None where the network does not say.
        multiple: What latent sides must be multiples of.
        token_width: Width of a token's embedding, None without text.
        pooled_width: Width of the pooled embedding, None where none is asked for.
        distilled: Whether the guidance scale is an input of the network.
    """

    family: ClassVar[str] = "unconditional"
    text_encoders: ClassVar[tuple[str, ...]] = ()
    # Flow models whose own pipelines walk evenly from 1 to 1/steps instead of the scheduler's default.
    even_grid: ClassVar[bool] = False

    channels: tuple[int | None, int | None] = (None, None)
    multiple: int = 1
    token_width: int | None = None
    pooled_width: int | None = None
    distilled: bool = False

    def check(self, conditioning: Conditioning) -> None:
        """Refuse embeddings that are not this network's.

        Args:
            conditioning: What the network is to be told.

        Raises:
            ValueError: If the network takes no text, or widths do not fit, or pooled embeddings are missing.
        """
        if self.token_width is None:
            raise ValueError(
                f"expected no conditioning for a denoiser of the {self.family} family, which takes no text, got one; "
                "leave it None"
            )
        prompts = [p for p in (conditioning.positive, conditioning.negative) if p is not None]
        for prompt in prompts:
            if prompt.tokens.ndim != 3 or len(prompt.tokens) != 1:
                raise ValueError(
                    f"expected the tokens of one prompt, (1, length, width), got {tuple(prompt.tokens.shape)}; restore "
                    "images with different prompts one by one"
                )
            width = prompt.tokens.shape[-1]
            if width != self.token_width:
                raise ValueError(
                    f"expected token embeddings of width {self.token_width} for this {self.family} denoiser, got "
                    f"{width}; embed the prompt with the text encoders it was trained with"
                )
            pooled = None if prompt.pooled is None else prompt.pooled.shape[-1]
            if self.pooled_width is not None and pooled != self.pooled_width:
                raise ValueError(
                    f"expected a pooled embedding of width {self.pooled_width} for this {self.family} denoiser, got "
                    f"{pooled}; embed the prompt with the text encoders it was trained with"
                )

    def evaluate(
        self,
        network: Any,
        z: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"] | Tensor,
        conditioning: Conditioning | None,
        canvas: tuple[int, int],
    ) -> Float[Tensor, "b c h w"]:
        """Run the network; classifier-free guidance is one pass with negative and positive side by side.

        Args:
            network: The denoiser, of this family.
            z: Noisy latents in the network's dtype, sides multiples of `multiple`.
            t: Time step of each image, as the scheduler counts them (0..1000).
            conditioning: What the network is told; None for the unconditional family only.
            canvas: (height, width) of the whole picture in pixels, of which `z` may be a tile.

        Returns:
            The network output, shape of `z`.

        Raises:
            ValueError: If text is needed and there is no conditioning.
        """
        if self.token_width is None:
            return network(z, t).sample
        if conditioning is None:
            raise ValueError(self.needs_text())
        wanted, unwanted = conditioning.positive, conditioning.negative
        scale = conditioning.guidance_scale
        if unwanted is None or scale == 1.0 or self.distilled:
            return self._run(network, z, t, [wanted], scale, canvas)
        if unwanted.tokens.shape == wanted.tokens.shape:
            both = self._run(network, torch.cat([z, z]), torch.cat([t, t]), [unwanted, wanted], scale, canvas)
            negative, positive = both.to(state_dtype(both)).chunk(2)
        else:  # Prompts of different lengths do not fit into one batch.
            negative, positive = (
                self._run(network, z, t, [prompt], scale, canvas).to(state_dtype(z)) for prompt in (unwanted, wanted)
            )
        return negative + scale * (positive - negative)

    def needs_text(self) -> str:
        """The sentence for a user who gave a text-conditioned denoiser no text."""
        return (
            f"expected a conditioning for a denoiser of the {self.family} family, which is told a prompt, got none; "
            "set pipe.conditioning (LatentPrior: conditioning=), an empty prompt's embeddings will do"
        )

    def _run(
        self,
        network: Any,
        z: Tensor,
        t: Tensor,
        prompts: Sequence[PromptEmbeddings],
        scale: float,
        canvas: tuple[int, int],
    ) -> Tensor:
        """One pass of a batch that holds the images once for each prompt."""
        raise NotImplementedError

    @staticmethod
    def _tokens(z: Tensor, prompts: Sequence[PromptEmbeddings]) -> Tensor:
        """Token embeddings of the batch."""
        each = len(z) // len(prompts)
        return torch.cat([p.tokens.to(z.device, z.dtype).expand(each, -1, -1) for p in prompts])

    @staticmethod
    def _pooled(z: Tensor, prompts: Sequence[PromptEmbeddings]) -> Tensor:
        """Pooled embeddings of the batch; `check` has seen that they are there."""
        each = len(z) // len(prompts)
        return torch.cat([p.pooled.to(z.device, z.dtype).expand(each, -1) for p in prompts if p.pooled is not None])


@dataclass(frozen=True)
class TextUNet(Backbone):
    """Stable Diffusion 1.x and 2.x, their turbo and LCM descendants: cross-attention to the tokens of a prompt.

    Attributes:
        scale_width: Width of the embedded guidance scale, for networks distilled by LCM, else None.
    """

    family: ClassVar[str] = "stable-diffusion"
    text_encoders: ClassVar[tuple[str, ...]] = ("CLIPTextModel",)

    scale_width: int | None = None

    def _run(
        self,
        network: Any,
        z: Tensor,
        t: Tensor,
        prompts: Sequence[PromptEmbeddings],
        scale: float,
        canvas: tuple[int, int],
    ) -> Tensor:
        told = None
        if self.scale_width is not None:
            told = _embedded_scale(scale, self.scale_width).to(z).expand(len(z), -1)
        return network(
            z,
            t,
            encoder_hidden_states=self._tokens(z, prompts),
            timestep_cond=told,
            added_cond_kwargs=self._added(z, prompts, canvas),
        ).sample

    def _added(
        self, z: Tensor, prompts: Sequence[PromptEmbeddings], canvas: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        return None


@dataclass(frozen=True)
class SDXLUNet(TextUNet):
    """Stable Diffusion XL: also told the pooled prompt, and that the picture is whole and as large as it is."""

    family: ClassVar[str] = "sdxl"
    text_encoders: ClassVar[tuple[str, ...]] = ("CLIPTextModel", "CLIPTextModelWithProjection")

    def _added(
        self, z: Tensor, prompts: Sequence[PromptEmbeddings], canvas: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        # Original size, position of the crop, target size. Not in half precision, which cannot count beyond 2048.
        sizes = torch.tensor([[*canvas, 0, 0, *canvas]], dtype=torch.float32, device=z.device)
        return {"text_embeds": self._pooled(z, prompts), "time_ids": sizes.expand(len(z), -1)}


@dataclass(frozen=True)
class SD3Transformer(Backbone):
    """Stable Diffusion 3 and 3.5: a transformer over patches, by rectified flow.

    Attributes:
        largest: Longest side of a latent that its table of positions covers.
    """

    family: ClassVar[str] = "stable-diffusion-3"
    text_encoders: ClassVar[tuple[str, ...]] = (
        "CLIPTextModelWithProjection",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
    )

    largest: int | None = None

    def _run(
        self,
        network: Any,
        z: Tensor,
        t: Tensor,
        prompts: Sequence[PromptEmbeddings],
        scale: float,
        canvas: tuple[int, int],
    ) -> Tensor:
        if self.largest is not None and max(z.shape[-2:]) > self.largest:
            raise ValueError(
                f"expected latent sides of at most {self.largest}, which is where this network's table of positions "
                f"ends, got {z.shape[-2]}x{z.shape[-1]}; restore in smaller tiles (tile=1024, --tile 1024)"
            )
        return network(
            hidden_states=z,
            timestep=t,
            encoder_hidden_states=self._tokens(z, prompts),
            pooled_projections=self._pooled(z, prompts),
        ).sample


@dataclass(frozen=True)
class FluxTransformer(Backbone):
    """FLUX.1: a transformer over latents packed 2×2, by rectified flow; "dev" is told the guidance scale."""

    family: ClassVar[str] = "flux"
    text_encoders: ClassVar[tuple[str, ...]] = ("CLIPTextModel", "T5EncoderModel")
    even_grid: ClassVar[bool] = True

    def _run(
        self,
        network: Any,
        z: Tensor,
        t: Tensor,
        prompts: Sequence[PromptEmbeddings],
        scale: float,
        canvas: tuple[int, int],
    ) -> Tensor:
        batch, channels, height, width = z.shape
        rows, columns = height // 2, width // 2
        cells = z.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = self._tokens(z, prompts)
        place = torch.zeros(rows, columns, 3, device=z.device, dtype=z.dtype)
        place[..., 1] += torch.arange(rows, device=z.device)[:, None]
        place[..., 2] += torch.arange(columns, device=z.device)
        output = network(
            hidden_states=cells.reshape(batch, rows * columns, 4 * channels),
            timestep=t / 1000,
            guidance=torch.full((batch,), scale, device=z.device, dtype=torch.float32) if self.distilled else None,
            pooled_projections=self._pooled(z, prompts),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=z.device, dtype=z.dtype),
            img_ids=place.reshape(rows * columns, 3),
        ).sample
        cells = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(batch, channels, height, width)


# --- which family a network belongs to ------------------------------------------------------------------------------


def backbone_of(network: Any) -> Backbone:
    """Recognise a denoiser by the name of its class and its configuration.

    Args:
        network: One of diffusers' denoisers, or any other network called as `network(z, t)` with `.sample`.

    Returns:
        Its family, with the sizes read off its configuration.

    Raises:
        ValueError: If it is a network of diffusers that this package cannot drive; the message says why.
    """
    config = getattr(network, "config", None)
    for base in type(network).__mro__:
        describe = _FAMILIES.get(base.__name__)
        if describe is not None:
            return describe(network, config)
    if type(network).__module__.split(".")[0] == "diffusers":
        raise ValueError(f"expected a denoiser among {', '.join(_FAMILIES)}, got {type(network).__name__}")
    # Somebody's own network, which keeps to the plain contract.
    return Backbone(channels=_channels(config), multiple=_unet_multiple(config))


def _channels(config: Any) -> tuple[int | None, int | None]:
    return getattr(config, "in_channels", None), getattr(config, "out_channels", None)


def _unet_multiple(config: Any) -> int:
    """Latent sides are halved between the blocks of a U-Net; other networks cut patches."""
    blocks = getattr(config, "block_out_channels", None)
    if blocks is not None:
        return 2 ** (len(blocks) - 1)
    return int(getattr(config, "patch_size", None) or 1)


def _refuse_labels(network: Any, config: Any) -> None:
    if getattr(config, "class_embed_type", None) is not None or getattr(config, "num_class_embeds", None) is not None:
        raise ValueError(
            f"expected a denoiser that is told at most a prompt, got a {type(network).__name__} that wants class labels"
        )


def _plain_unet(network: Any, config: Any) -> Backbone:
    _refuse_labels(network, config)
    return Backbone(channels=_channels(config), multiple=_unet_multiple(config))


def _text_unet(network: Any, config: Any) -> Backbone:
    _refuse_labels(network, config)
    extra = getattr(config, "addition_embed_type", None)
    if extra not in (None, "text_time") or getattr(config, "encoder_hid_dim_type", None) is not None:
        raise ValueError(
            "expected a U-Net like Stable Diffusion's or SDXL's, got one with "
            f"addition_embed_type={extra!r} and encoder_hid_dim_type={getattr(config, 'encoder_hid_dim_type', None)!r}"
        )
    width = config.cross_attention_dim
    scale_width = getattr(config, "time_cond_proj_dim", None)
    common: dict[str, Any] = {
        "channels": _channels(config),
        "multiple": _unet_multiple(config),
        "token_width": width if isinstance(width, int) else max(width),
        "distilled": scale_width is not None,
        "scale_width": scale_width,
    }
    if extra is None:
        return TextUNet(**common)
    # What remains of the embedding's input after six embedded numbers is the pooled prompt.
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return SDXLUNet(pooled_width=pooled, **common)


def _sd3(network: Any, config: Any) -> Backbone:
    positions = getattr(config, "pos_embed_max_size", None)
    return SD3Transformer(
        channels=_channels(config),
        multiple=config.patch_size,
        token_width=config.joint_attention_dim,
        pooled_width=config.pooled_projection_dim,
        largest=None if positions is None else positions * config.patch_size,
    )


def _flux(network: Any, config: Any) -> Backbone:
    packed = config.in_channels, config.out_channels or config.in_channels
    if config.patch_size != 1 or any(count % 4 for count in packed):
        raise ValueError(
            f"expected a FLUX transformer on latents packed 2x2, got patch_size={config.patch_size} and "
            f"in_channels={config.in_channels}, which is no multiple of 4"
        )
    return FluxTransformer(
        channels=(packed[0] // 4, packed[1] // 4),
        multiple=2,
        token_width=config.joint_attention_dim,
        pooled_width=config.pooled_projection_dim,
        distilled=bool(config.guidance_embeds),
    )


_FAMILIES: dict[str, Any] = {
    "UNet2DModel": _plain_unet,
    "UNet2DConditionModel": _text_unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def _embedded_scale(scale: float, width: int) -> Float[Tensor, "1 d"]:
    """Sines and cosines of 1000 (scale - 1) at `width` / 2 frequencies, as LCM was distilled with."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1.0) * frequencies[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
