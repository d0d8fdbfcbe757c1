"""What a generator is put into while the library runs it, and taken out of afterwards."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

_SEED = 0


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every submodule's own flag is restored afterwards.

    The flags alone are set: an ``eval()`` or ``train()`` of the user's own may do more, such as merge weights.
    """
    flags = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in flags:
            part.training = False
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextlib.contextmanager
def seeded(module: nn.Module) -> Iterator[None]:
    """The same random numbers every time from torch, on the CPU and on the module's devices, from NumPy's global
    generator and Python's; the caller's are left as they are.

    So the noise that a generator draws is the same in every forward pass over as many latents, but for what it draws
    from a ``torch.Generator`` or ``numpy.random.Generator`` of its own.
    """
    devices = {parameter.device for parameter in module.parameters()}
    indices = sorted(device.index for device in devices if device.type == "cuda")
    with torch.random.fork_rng(devices=indices):
        torch.default_generator.manual_seed(_SEED)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(_SEED)
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(_SEED)
        np.random.seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def repeatable(module: nn.Module) -> Iterator[None]:
    """:func:`evaluating`, :func:`seeded` and eagerly, whatever was compiled: a compiled call has no hooks to stop at."""
    with evaluating(module), seeded(module), contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and to import it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
