"""Builds rewrite_core._C by driving CMake with Ninja; everything else is in pyproject.toml.

Where the kernels are not for this machine (anything but 64-bit Linux on x86-64 and aarch64) the Python package alone.

REWRITE_CORE_CUDA=1 also compiles csrc/*.cu, and then a missing nvcc is an error.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

version = runpy.run_path(str(Path(__file__).resolve().parent / "rewrite_core" / "version.py"))
source_digest, no_kernels = version["source_digest"], version["no_kernels"]()
if no_kernels:
    print(f"rewrite_core is installed without its C++ kernels: {no_kernels}. Everything works, more slowly.")

for stale in Path(__file__).resolve().parent.glob("build/lib*"):  # else modules deleted since would be packed too
    shutil.rmtree(stale)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError:
            sys.exit(
                "rewrite_core needs pybind11 to build: install it, or run `pip install .` with build isolation on."
            )
        source = Path(__file__).resolve().parent
        # resolve(): an editable build asks for a path relative to the source tree
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", source, "-B", build, "--fresh"),
            *(("-G", "Ninja") if shutil.which("ninja") else ()),  # an isolated build has it
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DREWRITE_CORE_SOURCE={source_digest(source)}",
            f"-DREWRITE_CORE_CUDA={'ON' if os.environ.get('REWRITE_CORE_CUDA') == '1' else 'OFF'}",
        ]
        for step in (configure, ["cmake", "--build", build]):  # CMAKE_BUILD_PARALLEL_LEVEL limits the jobs
            try:
                subprocess.run([str(word) for word in step], check=True)
            except FileNotFoundError:
                sys.exit(
                    "rewrite_core needs CMake 3.24 or newer to build: install it, "
                    "or run `pip install .` with build isolation on."
                )
            except subprocess.CalledProcessError:
                sys.exit("rewrite_core's C++ extension did not build: CMake's or the compiler's message is above.")


setup(
    # rewrite_core/kernels and rewrite_core/benchmarks are links to the folders at the root
    packages=find_packages(include=["rewrite_core", "rewrite_core.*"]),
    package_data={
        "rewrite_core": ["py.typed", "__init__.pyi"],
        "rewrite_core.benchmarks": ["README.md", "pytest.ini"],
        "rewrite_core.benchmarks.gpu": ["*.npz"],
        "rewrite_core.benchmarks.rules": ["*.json"],
        "rewrite_core.demo": ["*.safetensors", "*.json"],
        "rewrite_core.studio": ["page/*"],
    },
    ext_modules=[] if no_kernels else [Extension("rewrite_core._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
