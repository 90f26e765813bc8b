"""All that a technique might leave behind: of a pipe, and of the process."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from autofit import anatomy

PLAIN = (bool, int, float, str, bytes, tuple, torch.dtype, torch.device, type(None))


def snapshot(pipe: Any, *, memory: bool = True) -> dict[str, object]:
    """Name everything and note it. Without ``memory``, tensors may stand at another address."""
    found: dict[str, object] = dict(_process())
    found["pipe"] = sorted(pipe.__dict__)
    for name, component in pipe.components.items():
        found[f"pipe.{name}"] = id(component)
    for name, module in anatomy.modules(pipe).items():
        for path, part in module.named_modules(prefix=name):
            found.update(_attributes(path, part))
            found.update(_tensors(path, part, memory))
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    found = []
    for name in {**before, **after}:
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {old} -> {new}")
    return found


def _attributes(path: str, module: nn.Module) -> Iterator[tuple[str, object]]:
    # Thousands of modules, a dozen tables each: what is one module's stays together.
    own = module.__dict__
    yield path, {name: v if isinstance(v, PLAIN) else id(v) for name, v in own.items()}
    yield f"{path} keys", {name: [*v] for name, v in own.items() if isinstance(v, dict) and v}
    yield f"{path}.forward", getattr(module.forward, "__func__", module.forward)
    if hasattr(module, "processor"):
        yield f"{path}.processor", (id(module.processor), repr(vars(module.processor)))
    if "_diffusers_hook" in own:
        yield f"{path} hooks", list(own["_diffusers_hook"].hooks)


def _tensors(path: str, module: nn.Module, memory: bool) -> Iterator[tuple[str, object]]:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is None:
                continue
            bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            facts: dict[str, object] = {
                "object": id(tensor),
                "bits": zlib.crc32(bits),
                "layout": (tensor.dtype, str(tensor.device), tensor.stride()),
                # dynamo's notes on what it compiled stay, and change nothing
                "attributes": sorted(a for a in tensor.__dict__ if not a.startswith("_dynamo")),
            }
            if memory:
                facts["memory"] = tensor.data_ptr()
            yield f"{path}.{name} tensor", facts


def _process() -> Iterator[tuple[str, object]]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    yield "default dtype", torch.get_default_dtype()
    yield "default device", str(torch.get_default_device())
    yield "gradients", torch.is_grad_enabled()
    yield "threads", torch.get_num_threads()
    yield "flash", cuda.flash_sdp_enabled()
    yield "efficient", cuda.mem_efficient_sdp_enabled()
    yield "math", cuda.math_sdp_enabled()
    yield "cudnn attention", cuda.cudnn_sdp_enabled()
    yield "kernel order", tuple(torch._C._get_sdp_priority_order())
    yield "cudnn", (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    yield "matmul tf32", cuda.matmul.allow_tf32
    yield "attention backend", _AttentionBackendRegistry.get_active_backend()[0]
