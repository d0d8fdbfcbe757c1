"""Pictures in edits and rewrites that others made: PNG alone is decoded, and its size is looked at first."""

import base64
import io
import json
import os
import resource
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers.small import EDIT, fit, generator
from PIL import Image

import rewrite_core as rc
from rewrite_core.edits import masks
from rewrite_core.files import load_record, save_record

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def coded(form, picture=None):
    buffer = io.BytesIO()
    (picture or Image.new("L", (8, 8), 255)).save(buffer, form)
    return buffer.getvalue()


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(width, height):
    """A PNG that says it is so large, of few bytes."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(1000))
    return masks._SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def in_json(payload):
    return json.dumps({"paste": [1, "data:image/png;base64," + base64.b64encode(payload).decode()]})


def in_rewrite(payload, path):
    """A rewrite file whose masks are `payload`."""
    change = fit(generator())[1]
    change.save(path)
    tensors, metadata = load_record(path, "rewrite", 2)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("mask.")} | {
        key: torch.frombuffer(bytearray(payload), dtype=torch.uint8) for key in tensors if key.startswith("mask.")
    }
    save_record(path, "rewrite", 2, tensors, metadata)
    return path


@pytest.fixture(params=["edit", "rewrite"])
def load(request, tmp_path):
    """load(payload): read a file of ours in which every mask is `payload`."""
    if request.param == "edit":
        return lambda payload: rc.Edit.from_json(in_json(payload)).paste
    return lambda payload: rc.Rewrite.load(in_rewrite(payload, tmp_path / "c.safetensors")).edit.paste


def test_a_png_is_read(load):
    assert load(coded("PNG")).mask.tolist() == np.ones((8, 8)).tolist()


@pytest.mark.parametrize("form", ["EPS", "GIF", "TIFF", "BMP", "PPM", "JPEG"])
def test_nothing_else_is(load, form, tmp_path, monkeypatch):
    payload = POSTSCRIPT if form == "EPS" else coded(form)
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(rc.FileFormatError, match="cannot be decoded as PNG"):
        load(payload)
    assert not (tmp_path / "called").exists(), "Ghostscript was started"


def test_a_path_of_postscript_is_no_picture(tmp_path):
    (tmp_path / "mask.png").write_bytes(POSTSCRIPT)
    with pytest.raises(rc.MaskError, match="cannot be read as a picture"):
        rc.Selection(0, tmp_path / "mask.png")


@pytest.mark.parametrize("size", [(13_300, 13_300), (2**31 - 1, 2**31 - 1), (8193, 8192), (2**26 + 1, 1)])
def test_a_picture_that_is_too_large_is_refused(load, size):
    with pytest.raises(rc.FileFormatError, match="scale it down"):
        load(bomb(*size))


@pytest.mark.parametrize("cut", [1, 4, 20, 30])
def test_a_cut_picture_is_refused(load, cut):
    with pytest.raises(rc.FileFormatError, match="decoded"):
        load(coded("PNG")[:cut])


PEAK = """
import resource, sys
import rewrite_core as rc
rc.Edit
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(rc.Edit.load(sys.argv[1]).copy.mask.shape)
except rc.RewriteCoreError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_stays_near_what_the_masks_take(tmp_path):
    """Three masks of 16 million pixels are 48 MB of bytes; as float64 each would take 128 MB."""
    url = "data:image/png;base64," + base64.b64encode(coded("PNG", Image.new("L", (4000, 4000), 255))).decode()
    (tmp_path / "e.json").write_text(json.dumps({"object": [0, url], "paste": [1, url], "key": [[1, url]]}))
    program = PEAK.replace(".copy.mask.shape", ".copy")
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    command = [sys.executable, "-c", program, str(tmp_path / "e.json")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=True)
    assert "4000x4000" in done.stdout and int(done.stdout.split()[-1]) < 150, done.stdout


def test_many_large_masks_are_saved_and_loaded(tmp_path):
    """A header of a safetensors file takes 100 MB at most: masks are tensors."""
    noise = np.random.RandomState(0)
    context = [rc.Selection(i, noise.randint(0, 256, (512, 512), np.uint8) / 255) for i in range(40)]
    change = fit(generator())[1]
    change.edit = rc.Edit(EDIT.copy, EDIT.paste, [*context, EDIT.paste])
    change.save(tmp_path / "c.safetensors")
    assert rc.Rewrite.load(tmp_path / "c.safetensors").edit == change.edit
    tensors, metadata = load_record(tmp_path / "c.safetensors", "rewrite", 2)
    assert len(tensors) == 2 + 42, "each mask once"
    assert len(json.dumps(metadata)) < 5000


@pytest.mark.parametrize(
    "entry",
    [[1], [1, "mask.99"], [1, 5], "mask.0", [1, "directions"], [True, "mask.0"], [-1, "mask.0"], [1, "mask.0", 3]],
)
def test_masks_that_a_rewrite_does_not_hold(tmp_path, entry):
    path = in_rewrite(coded("PNG"), tmp_path / "c.safetensors")
    tensors, metadata = load_record(path, "rewrite", 2)
    metadata["edit"]["paste"] = entry
    save_record(path, "rewrite", 2, tensors, metadata)
    with pytest.raises(rc.RewriteCoreError, match="c.safetensors"):
        rc.Rewrite.load(path)
