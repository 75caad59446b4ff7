"""What a text-conditioned denoiser is told beside the noisy latent: embeddings of prompts, and how strongly.

Classifier-free guidance (Ho & Salimans 2022) of the network's output, whatever it predicts:

    output = negative + guidance_scale (positive - negative)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Conditioning", "PromptEmbeddings"]


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt, as the text encoders of a model see it.

    Attributes:
        tokens: Embedding of each token, what cross-attention reads.
        pooled: Embedding of the whole prompt, for families that ask for one (SDXL, SD3, FLUX).
    """

    tokens: Float[Tensor, "1 l d"]
    pooled: Float[Tensor, "1 e"] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeddings:
        """The same embeddings on a device and in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeddings(self.tokens.to(device, dtype), pooled)


@dataclass(frozen=True)
class Conditioning:
    """What is wanted, what is not, and how strongly.

    Attributes:
        positive: The prompt.
        negative: What to move away from; None = no classifier-free guidance, one network pass per step.
        guidance_scale: Classifier-free guidance; 1 = the prompt alone. For distilled networks that take the scale as
            an input (FLUX.1-dev), that input.
    """

    positive: PromptEmbeddings
    negative: PromptEmbeddings | None = None
    guidance_scale: float = 1.0
