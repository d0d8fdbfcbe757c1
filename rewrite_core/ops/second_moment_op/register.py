"""``second_moment``: the public function, its operators of torch, its backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads, library
from torch._C import _increment_version

from ...backends import (
    Backend,
    dispatched,
    extension,
    extension_at_once,
    extension_reason,
    select,
    triton_declines,
    triton_interpreted,
    triton_reason,
)
from ...errors import whole_number
from ..memory import address, plain
from .problem import DTYPES, PRECISIONS, check, check_apart, check_types, shape_of_out


def second_moment(
    features: Tensor, out: Tensor | None = None, backend: str = "auto", precision: str = "x3", groups: int = 1
) -> Tensor:
    """The unnormalised, uncentred second moment of a batch of keys.

    features  [N, C, H, W] (each position is one key of C channels) or [N, C] (each row is one key);
              float32, float64, bfloat16 or float16; any strides: slices, transposes, channels_last and
              expanded tensors are read where they lie. N, H and W may be 0.
    out       float64 [C, C], contiguous, symmetric, on the same device: added to and returned. Only its lower
              triangle is read; the upper one is written as its mirror image.
    backend   "auto", "cuda", "triton", "cpp" or "reference" (see ``rc.explain()``)
    precision of float32 products on a GPU's tensor cores: "x3" (each number split into two, three products: float32
              level; the default, as a second moment is inverted afterwards), "tf32" (one product, 11 bits: relative
              error about 1e-3) or "ieee" (no tensor cores: slow). Nothing but "x3" is taken by other backends,
              all of which are at float32 level or above. 16-bit input has exact products whatever this says.
    groups    of channels, C / groups one after the other, as a convolution has them: only products within a group are
              made, and the result, and ``out``, are [groups, C / groups, C / groups] where there are several. On a GPU
              torch makes these, in float64.

    Returns float64 [C, C], exactly symmetric; NaN or infinity in channel c shows in row and column c only.
    Precision: float64 input is summed in float64. Other input is exact in float32, multiplied and summed
    there in short runs, and the runs are summed in float64: relative Frobenius error below 1e-6 for any
    number of keys, constant channels included (2e-6 was reached by keys made to round badly: in each run of 32
    one of 1 and 31 just under 2^-12). Magnitudes must be 0 or within 1e-18..1e18, where squares are
    normal float32 numbers.
    On a GPU ("triton") the error is below 2e-6 but for "tf32", as tensor cores truncate where they add; magnitudes with
    "x3" must be 0 or within 1e-15..1e18.
    "cpp" gives the same bits for any number of threads, "triton" from run to run on GPUs of one kind with one cache of
    measured configurations (``$XDG_CACHE_HOME/rewrite_core``). Not differentiable: gradients stop here.
    On a GPU it works on the current stream, waits for nothing, and can be captured in a CUDA graph, but for the first
    call on features of a kind, which compiles and measures.

    Raises ArgumentError for a wrong type, RewriteCoreError (a ValueError) for a wrong shape or ``out``, and where a
    graph is captured before such a first call.
    NumPy: ``x = features.transpose(0, 2, 3, 1).reshape(-1, C); x.T @ x``.
    """
    if out is not None and _done_at_once(features, out, backend, precision, groups):
        return out
    check_types(features, out, precision)  # the rest the ops check
    groups = whole_number("groups", groups)
    if features.requires_grad:
        features = features.detach()
    seen = dispatched(features) if out is None else dispatched(features, out)
    if out is None:
        add_up = torch.ops.rewrite_core.second_moment if seen else _add_up
        return add_up(features, backend, precision, groups)
    add_to = torch.ops.rewrite_core.second_moment_ if seen else _add_to
    add_to(out, features, backend, precision, groups)
    return out


def _done_at_once(features: Tensor, out: Tensor, backend: str, precision: str, groups: int) -> bool:
    """Most calls: plain tensors on the CPU, added to `out` by the C++ kernels. False, and nothing is done, where a call
    may be another one, or a mistake: the checks in full then say which.

    Few keys take less time than those checks do: after other work on the CPU, whose caches then hold nothing of them,
    they take a tenth of a millisecond."""
    if precision != PRECISIONS[0]:
        return False
    kernels = extension_at_once(_CPP, _CPP_KERNELS, backend)
    if kernels is None or not kernels.second_moment_at_once(features, out, groups, get_num_threads()):
        return False
    _increment_version((out,))  # as _add_to does
    return True


def run_cpp(features: Tensor, out: Tensor, isa: str = "", groups: int = 1) -> None:
    features = plain(features)
    extension().second_moment(
        features=address(features),
        dtype=DTYPES[features.dtype],
        sizes=(*features.shape, 1, 1)[:4],
        strides=(*features.stride(), 0, 0)[:4],
        out=address(out),
        threads=torch.get_num_threads(),
        isa=isa,
        groups=groups,
    )


def run_triton(features: Tensor, out: Tensor, precision: str = PRECISIONS[0]) -> None:
    from ...kernels.second_moment import launch

    launch(plain(features), out, precision)


def _run(features: Tensor, out: Tensor, backend: str, precision: str, groups: int) -> None:
    how: dict[str, Any] = {} if precision == PRECISIONS[0] else {"precision": precision}  # not every backend knows more
    if groups != 1:
        how["groups"] = groups
    select("second_moment", backend, features, out, **how).load()(features, out, **how)


def _default_precision(precision: str) -> str | None:
    if precision != PRECISIONS[0]:
        return f"it has no precision {precision!r}, which is for float32 products on GPUs"
    return None


def _cpp_supports(
    features: Tensor, out: Tensor | None = None, precision: str = PRECISIONS[0], groups: int = 1
) -> str | None:
    if not features.is_cpu:
        return f"it reads CPU tensors, and the features are on {features.device}"
    return extension_reason() or _default_precision(precision)


def _reference_supports(
    features: Tensor, out: Tensor | None = None, precision: str = PRECISIONS[0], groups: int = 1
) -> str | None:
    return _default_precision(precision)


def _triton_supports(
    features: Tensor, out: Tensor | None = None, precision: str = PRECISIONS[0], groups: int = 1
) -> str | None:
    reason = triton_reason()
    if reason is None and not features.is_cuda and not triton_interpreted():
        reason = f"it reads CUDA tensors, and the features are on {features.device}"
    if reason is None and features.dtype == torch.float64:
        reason = "it has no float64 mode"
    if reason is None and groups != 1:
        reason = "it has no groups of channels"
    return reason


def _triton_declines(
    features: Tensor, out: Tensor | None = None, precision: str = PRECISIONS[0], groups: int = 1
) -> str | None:
    return triton_declines(features.device)


_CPP_KERNELS = run_cpp  # whatever the name comes to mean
_CPP = Backend("second_moment", "cpp", f"{__name__}:run_cpp", _cpp_supports)
BACKENDS = (
    Backend("second_moment", "triton", f"{__name__}:run_triton", _triton_supports, _triton_declines),
    _CPP,
    Backend("second_moment", "reference", f"{__package__}.reference:run_reference", _reference_supports),
)


def example(device: str) -> tuple[Tensor]:
    return (torch.zeros(1, 8, 2, 2, device=device),)


# define + impl and not custom_op, whose first call imports torch._dynamo: more than a second of CPU time.
library.define(
    "rewrite_core::second_moment",
    "(Tensor features, str backend='auto', str precision='x3', int groups=1) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)

library.define(
    "rewrite_core::second_moment_",
    "(Tensor(a!) out, Tensor features, str backend='auto', str precision='x3', int groups=1) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def _add_up(features: Tensor, backend: str = "auto", precision: str = "x3", groups: int = 1) -> Tensor:
    check(features, None, precision, groups)
    out = features.new_zeros(shape_of_out(features.shape[1], groups), dtype=torch.float64)
    _run(features, out, backend, precision, groups)
    return out


library.impl("rewrite_core::second_moment", "CompositeExplicitAutograd", _add_up)


@library.register_fake("rewrite_core::second_moment")
def _(features: Tensor, backend: str = "auto", precision: str = "x3", groups: int = 1) -> Tensor:
    check(features, None, precision, groups)
    return features.new_empty(shape_of_out(features.shape[1], groups), dtype=torch.float64)


def _add_to(out: Tensor, features: Tensor, backend: str = "auto", precision: str = "x3", groups: int = 1) -> None:
    check(features, out, precision, groups)
    check_apart(features, out)
    _run(features, out, backend, precision, groups)
    torch.autograd.graph.increment_version(out)  # so that autograd notices the write, as custom_op would


library.impl("rewrite_core::second_moment_", "CompositeExplicitAutograd", _add_to)


@library.register_fake("rewrite_core::second_moment_")
def _(out: Tensor, features: Tensor, backend: str = "auto", precision: str = "x3", groups: int = 1) -> None:
    check(features, out, precision, groups)
