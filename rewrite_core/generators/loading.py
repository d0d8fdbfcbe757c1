"""Loading a generator: a state dict into a module of yours, or, where you say so, a pickled network."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, RewriteCoreError
from ..files import read_whole_state
from .checkpoint import without_prefixes

_NETWORKS = ("G_ema", "g_ema", "generator", "G", "netG", "model")  # what pickled dicts call theirs
_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what torch.save's older files start with


def load_generator(
    checkpoint: str | os.PathLike, make: Callable[[], nn.Module] | None = None, *, allow_pickle: bool = False
) -> nn.Module:
    """A generator on the CPU, in eval mode, with the weights of a checkpoint.

    Args:
        checkpoint: a state dict (.safetensors, .npz, or any file that ``torch.load`` reads with ``weights_only=True``),
            which runs no code as it is read; keys may carry DataParallel's or torch.compile's prefix.
        make: returns the module that the state dict is loaded into. Without it the file must hold a whole network.
        allow_pickle: read a pickled network: an ``nn.Module``, or a dict with one under "G_ema", "generator" and the
            like. **A pickle runs whatever code its author put into it, with your rights, as it is opened**: only for
            files whose source you trust. The code that the network was trained with must be importable.

    Raises:
        FileNotFoundError: no such file.
        FileFormatError: it cannot be read, does not fit the module, or holds no network.
        RewriteCoreError: a whole network was asked for without `allow_pickle`, or its code cannot be imported.
    """
    if make is not None:
        generator = make()
        load_into(generator, checkpoint)
        return generator.eval()
    if not allow_pickle:
        raise RewriteCoreError(
            f"{os.fspath(checkpoint)}: a network without the code that makes it is a pickle, and opening a pickle runs "
            "whatever code is in it; give make= and a state dict, or allow_pickle=True if you trust where the file "
            "comes "
            "from."
        )
    return _unpickle(Path(checkpoint)).eval()


def load_into(generator: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Load a state dict into `generator`, all of it; raises FileFormatError where it does not fit."""
    tensors, extra = read_whole_state(checkpoint)
    wanted = generator.state_dict()
    state = without_prefixes(tensors | extra, wanted.__contains__)
    for key in wanted.keys() - state.keys():  # safetensors' save_model leaves one name of a tied weight
        tied = next((other for other in state if other in wanted and _same_memory(wanted[key], wanted[other])), None)
        if tied is not None:
            state[key] = state[tied]
    try:
        generator.load_state_dict(state)
    except MemoryError:
        raise
    except Exception as error:  # a module may do anything with its extra state
        problem = " ".join(str(error).split())[:300]
        raise FileFormatError(f"{os.fspath(checkpoint)} does not fit {type(generator).__name__}: {problem}") from error


def _same_memory(one: object, other: object) -> bool:
    """Whether two tensors are the same numbers in the same place, whatever objects they are."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.layout != torch.strided or other.layout != torch.strided:
        return False
    here, there = ((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (one, other))
    return here == there and one.data_ptr() != 0


def _unpickle(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file at {path}.")
    try:
        with open(path, "rb") as file:  # opened once: what is in it runs once
            start = file.read(len(_TORCH))
            file.seek(0)
            content: Any
            if zipfile.is_zipfile(path) or start == _TORCH:
                content = torch.load(file, map_location="cpu", weights_only=False)
            else:
                content = pickle.load(file)
    except ImportError as error:
        raise RewriteCoreError(
            f"{path} needs {error.name or error} to be opened; install it, or run where the code that the network was "
            "trained with can be imported."
        ) from error
    except Exception as error:  # unpickling runs anything
        raise FileFormatError(f"{path} cannot be unpickled ({type(error).__name__}: {error}).") from error
    found = [content, *(content.get(name) for name in _NETWORKS)] if isinstance(content, dict) else [content]
    network = next((part for part in found if isinstance(part, nn.Module)), None)
    if network is None:
        held = f"a dict of {list(content)[:5]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        tensors = isinstance(content, dict) and any(isinstance(part, Tensor) for part in content.values())
        advice = "; it looks like a state dict, so give make= instead" if tensors else ""
        raise FileFormatError(f"{path} holds {held} and no network{advice}.")
    return network
