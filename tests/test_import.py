"""``import rewrite_core`` costs nothing: each public name brings what it needs when it is first used."""

import subprocess
import sys

import pytest

import rewrite_core as rc

HEAVY = ("torch", "numpy", "matplotlib", "PIL", "safetensors", "tqdm")


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    done = python(f"import sys, rewrite_core; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there_without_a_warning():
    done = python("from rewrite_core import *; import rewrite_core as rc; print(len(rc.__all__))", "-W", "error")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(rc.__all__) > 30
    assert set(rc.__all__) <= set(dir(rc))


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="'rewrite_core' has no attribute 'rewritten'"):
        rc.rewritten  # noqa: B018
    with pytest.raises(ImportError, match="rewritten"):
        from rewrite_core import rewritten  # noqa: F401
