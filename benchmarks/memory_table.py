"""How much memory each prior needs: weights counted, activations traced, on tensors without values.

    python benchmarks/memory_table.py            # prints the tables of docs/memory.md from the recorded sizes
    python benchmarks/memory_table.py --write    # writes them there
    python benchmarks/memory_table.py --trace    # first traces every model again (minutes) and records the sizes

Networks of the published configurations (`prior_configs/`) are built on PyTorch's "meta" device, where tensors have a
shape and no memory, and run once; every tensor's storage is followed from its birth to its end. That is exact for what
a network keeps. It leaves out what an allocator wastes and what libraries use inside (convolution workspaces).
Attention is taken to keep its inputs and its output, as the fused kernels do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_priors import CONFIGS, GAMMA, LATENT_INN, LEVELS, PIXEL_INN, build, published
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentindigo.backbones import backbone_of
from latentindigo.conditioning import Conditioning, PromptEmbeddings
from latentindigo.inn import InvertibleNet
from latentindigo.memory import SIZES, PriorSizes, memory_tables

ROOT = Path(__file__).resolve().parent.parent
META = torch.device("meta")
DTYPE = torch.bfloat16
SIDES = (512, 1024)
START, END = "<!-- tables: made by benchmarks/memory_table.py -->", "<!-- end of tables -->"


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors made inside.

    Attributes:
        peak: Most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known | self._known:
                self._follow(tensor.untyped_storage())
        return output

    def _follow(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Attention as fused kernels do it: the scores are never kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


def peak_of(run: Callable[[Tensor], Any], leaf: Tensor, *, gradient: bool) -> int:
    """Bytes that a network needs at most beside its weights, forward or forward and backward to its input."""
    # Autocast knows no device without values: the INNs are traced in float32, which is at least what they need.
    plain = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with plain, _Fused(), Live() as live, torch.set_grad_enabled(gradient):
        leaf = leaf.detach().requires_grad_(gradient)
        output = run(leaf)
        if gradient:
            found = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            torch.autograd.grad([t.float().square().sum() for t in found], leaf)
    return live.peak


def weights_of(network: nn.Module) -> tuple[int, int]:
    """Numbers in a network, and in its largest layer."""
    layers = [
        sum(t.numel() for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None)
        for layer in network.modules()
    ]
    return sum(layers), max(layers)


def trace(name: str) -> dict[str, Any]:
    """Everything about one model, ready for JSON."""
    model = published(name)
    parts: dict[str, Any] = {part: build(model[part], META, DTYPE) for part in ("vae", "denoiser", "guidance_vae")}
    text, backbone = model["text"], backbone_of(parts["denoiser"])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=META, dtype=DTYPE)

    pooled = empty(1, text["pooled"]) if "pooled" in text else None
    told = Conditioning(PromptEmbeddings(empty(1, text["tokens"], text["width"]), pooled), guidance_scale=3.5)
    channels = model["vae"]["latent_channels"]
    gamma, time = torch.empty(1, GAMMA, device=META), torch.empty(1, device=META)
    inns: dict[str, Any] = {"pixel_inn": PIXEL_INN, "latent_inn": {**LATENT_INN, "channels": channels, "spread": True}}
    for part, config in inns.items():
        with META:
            parts[part] = InvertibleNet(**config).requires_grad_(False)
    peaks: dict[str, dict[str, int]] = {}
    for side in SIDES:
        z, x = empty(1, channels, side // 8, side // 8), empty(1, 3, side, side)

        def denoise(part: Tensor, side: int = side) -> Tensor:
            return backbone.evaluate(parts["denoiser"], part, time, told, (side, side))

        def decode(part: Tensor) -> Tensor:
            return parts["vae"].decode(part).sample

        def data(inn: InvertibleNet) -> Callable[[Tensor], Any]:
            def run(u: Tensor) -> Any:
                coarse, details = inn(u, gamma, LEVELS)
                return coarse, inn.inverse(torch.empty_like(coarse), details, gamma, LEVELS)

            return run

        peaks[str(side)] = {
            "denoise": peak_of(denoise, z, gradient=False),
            "denoise_gradient": peak_of(denoise, z, gradient=True),
            "encode": peak_of(lambda part: parts["vae"].encode(part).latent_dist.mode(), x, gradient=False),
            "decode": peak_of(decode, z, gradient=False),
            "decode_gradient": peak_of(decode, z, gradient=True),
            "tiny_decode_gradient": peak_of(lambda part: parts["guidance_vae"].decode(part).sample, z, gradient=True),
            "latent_inn": peak_of(data(parts["latent_inn"]), z.float(), gradient=True),
            "pixel_inn": peak_of(data(parts["pixel_inn"]), x.float(), gradient=True),
        }
    counts = {part: weights_of(network) for part, network in parts.items()}
    return {
        "title": model["title"],
        "weights": {part: count for part, (count, _) in counts.items()},
        "largest_layer": max(largest for _, largest in counts.values()),
        "peaks": peaks,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trace, record, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", action="store_true", help="trace every model again and record the sizes")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/memory.md")
    args = parser.parse_args(argv)
    if args.trace:
        names = ("sd15", "sd21", "sdxl", "sd35-medium", "flux1-dev")
        if set(names) != {path.stem for path in CONFIGS.glob("*.json")}:
            parser.error("prior_configs/ holds other models than this script lists")
        SIZES.write_text(json.dumps({name: trace(name) for name in names}, indent=1) + "\n")
    tables = memory_tables(PriorSizes.load())
    if args.write:
        page = ROOT / "docs" / "memory.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(START)
        page.write_text(f"{before}{START}\n\n{tables}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        sys.stdout.write(f"{tables}\n")


if __name__ == "__main__":
    main()
