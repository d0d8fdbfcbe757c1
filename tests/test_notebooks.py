"""The notebooks run from top to bottom, in a kernel of their own; they are kept without output."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FACES = ROOT.parent / "shared" / "generators" / "faces_dcgan.safetensors"
needs_faces = pytest.mark.skipif(not FACES.exists(), reason=f"{FACES.name} is not beside the checkout, in shared/")


def notebook(name):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


@pytest.mark.parametrize("name", ["chapels.ipynb", pytest.param("your_generator.ipynb", marks=needs_faces)])
def test_notebooks_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITE_WEIGHTS", str(FACES))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    made = notebook(name)
    where = {"metadata": {"path": os.fspath(tmp_path)}}
    NotebookClient(made, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


def test_notebooks_are_kept_without_output():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in notebook(path.name).cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in cells), path.name
