"""setup.py on machines that the kernels are not for: the Python package alone, and one sentence that says so."""

import platform
import runpy
import shutil
from pathlib import Path

import pytest
import setuptools

from rewrite_core import backends, version

ROOT = Path(__file__).parent.parent


def set_up(folder, monkeypatch):
    """What a copy of setup.py hands to setuptools."""
    (folder / "rewrite_core").mkdir()
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "rewrite_core" / "version.py", folder / "rewrite_core")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(folder / "setup.py"))
    return given


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "i686")])
def test_other_machines_get_the_python_package(system, machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert set_up(tmp_path, monkeypatch)["ext_modules"] == []
    said = capsys.readouterr().out
    assert said.startswith("rewrite_core is installed without its C++ kernels: they are for 64-bit Linux")
    assert f"{system} on {machine}" in said and said.count("\n") == 1


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_linux_builds_the_kernels(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (extension,) = set_up(tmp_path, monkeypatch)["ext_modules"]
    assert extension.name == "rewrite_core._C" and not capsys.readouterr().out


def test_explain_says_why_there_are_none(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    probe = backends._probe_extension.__wrapped__
    assert "they are for 64-bit Linux on x86-64 and aarch64, and this is" in probe()[1] and version.no_kernels()
    monkeypatch.undo()
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    assert "not built" in probe()[1]
