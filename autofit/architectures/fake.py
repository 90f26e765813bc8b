"""Built-in pipelines on fake tensors: of shapes and dtypes, without memory and without values."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autofit.architectures import made


class _AnyScalar(TorchDispatchMode):
    """Answers a fake tensor's ``item()``: schedulers ask while they are built, and are built again
    outside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def made_fake(name: str, mode: FakeTensorMode) -> Any:
    """Make a built-in pipeline in a fake mode; its scheduler is real.

    Position tables are fake too. To compute them takes seconds and gigabytes: Stable Diffusion
    3.5's has 384 · 384 positions of 1,536 numbers in float64.
    """
    with mode, _AnyScalar():
        pipe = made(name)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return pipe
