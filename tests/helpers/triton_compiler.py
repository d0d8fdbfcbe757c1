"""Triton's kernels compiled ahead of time, for GPUs that this machine lacks, and what their machine code takes."""

from __future__ import annotations

import os
import re
import subprocess

# KiB per multiprocessor and, but for 1 KiB each, per program
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}
ATOMICS = re.compile(r"^\s*(@\S+\s+)?(atom|red)\.", re.MULTILINE)  # with them sums have another order each time


def compile_kernel(kernel, capability, types, constants, known=(), **options):
    """The kernel as a launch would compile it for sm_<capability>.

    types     by argument; int32 where there is none
    constants by argument: tl.constexpr ones, pointers that are None, and numbers that are 1
    known     arguments that are multiples of 16, or aligned to 16 bytes
    options   num_warps, num_stages, enable_fp_fusion
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    known = set(known) - set(constants)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in known}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, folder):
    """Registers, stack (spills) and local memory of machine code, by cuobjdump, which comes with Triton."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    text = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return tuple(map(int, found.groups()))
