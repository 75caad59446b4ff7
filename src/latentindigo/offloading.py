"""Networks whose weights are elsewhere: offloaded by accelerate's hooks until they are called.

Hooks bring the weights when `forward` is called. Between calls a network's parameters lie on the CPU (model offload) or
have no values at all (sequential offload), so nothing may be concluded from them: not the device, and not the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

__all__ = ["entry", "execution_device", "private_copy", "weights_of"]

Network = TypeVar("Network")
Method = TypeVar("Method", bound=Callable[..., Any])


def entry(method: Method) -> Method:
    """Mark a method that callers use as they use `forward`: diffusers' `apply_forward_hook`, with the types kept.

    Args:
        method: A method of a network.

    Returns:
        A method that lets the network's hook bring the weights first.
    """
    marked: Any = apply_forward_hook(method)
    return marked


def execution_device(network: Any) -> torch.device:
    """Where a network computes, which is where its inputs must be.

    Args:
        network: A network, offloaded or not.

    Returns:
        The device that its hooks bring its weights to; without hooks, the device of its weights.
    """
    if hasattr(network, "_hf_hook"):
        for hook in (hook for module in network.modules() for hook in _hooks_of(module)):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    device = getattr(network, "device", None)  # diffusers' networks also know about group offloading.
    if isinstance(device, torch.device):
        return device
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def private_copy(network: Network) -> Network:
    """A deep copy that is no longer offloaded: its weights are its own and lie where it computes.

    Args:
        network: A network, offloaded or not; it is not changed.

    Returns:
        The copy, without hooks.
    """
    origin: Any = network
    hooks = {id(hook): hook for m in origin.modules() if (hook := getattr(m, "_hf_hook", None)) is not None}
    # A hook is not copied: it may know the hook of the network before it, and that network with all its weights.
    copied = copy.deepcopy(origin, dict(hooks))
    if not hooks:
        return copied
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(copied, recurse=True)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.clone()  # What a hook put back is what it brings to the original too.
    return copied.to(execution_device(network))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with values even where an offloaded network holds none.

    Args:
        network: A network, offloaded or not.

    Returns:
        Name -> weight, as `state_dict` names them.
    """
    state = network.state_dict()
    for prefix, module in network.named_modules():
        for hook in _hooks_of(module):
            kept: Mapping[str, Tensor] = getattr(hook, "weights_map", None) or {}
            for name in (*module._parameters, *module._buffers) if kept else ():
                key = f"{prefix}.{name}" if prefix else name
                if key in state and state[key].is_meta:
                    state[key] = kept[name]
    return state


def _hooks_of(module: nn.Module) -> Sequence[Any]:
    """The hooks of one module, which accelerate may have chained."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))
