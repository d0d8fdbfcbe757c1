"""A GPU that is not there, for Triton: kernels are compiled as at a launch, from tensors on the CPU, and not run."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

import torch


def resources(kernel: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of machine code, by cuobjdump, which comes with Triton."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def compile_only(capability: int = 90) -> None:
    """From now on, in this process."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Utilities:
        def get_device_properties(self, device):
            return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}

        def load_binary(self, name, kernel, shared, device):
            registers, stack = resources(kernel)
            return object(), 1, registers, stack // 4, 1024

        def unload_module(self, module):
            pass

    class Driver(DriverBase):
        utils = Utilities()

        def __init__(self):
            pass

        @classmethod
        def is_active(cls):
            return True

        def launcher_cls(self, source, metadata):
            return lambda *arguments: None

        def map_python_to_cpp_type(self, name):
            return name

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(Driver())
    torch.cuda.is_current_stream_capturing = lambda: False  # which torch for CPUs does not know
