import base64
import io
import json

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

import rewrite_core as rc


def box(size=32, top=4, left=6, bottom=12, right=20):
    mask = np.zeros((size, size))
    mask[top:bottom, left:right] = 1
    return mask


def test_masks_are_read_as_the_reference_reads_them(edit):
    record = json.loads((DATA / "proggan_edit.json").read_text())
    index, url = record["object"]
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
    wanted = np.asarray(image.resize((16, 16), Image.BILINEAR))[:, :, 0] / 255
    assert edit.copy.index == index
    assert np.allclose(edit.copy.area((16, 16)).numpy(), wanted)


@pytest.mark.parametrize(
    "fields",
    [
        ("object", "paste", "key"),
        ("object", "paste"),
        ("object", "paste", "query"),
        ("key",),
        ("key", "query"),
        ("object", "key"),
        ("paste", "key"),
        ("object", "paste", "key", "query"),
        ("query",),
    ],
)
def test_every_variant_of_the_json_is_read_and_written(tmp_path, fields):
    record = json.loads((DATA / "proggan_edit.json").read_text())
    record["query"] = record["object"]
    text = json.dumps({field: record[field] for field in fields})
    edit = rc.Edit.from_json(text)
    edit.save(tmp_path / "edit.json")
    assert rc.Edit.load(tmp_path / "edit.json") == edit
    assert list(json.loads(edit.to_json())) == list(fields)
    assert (edit.copy is None) == ("object" not in fields) and (edit.context is None) == ("key" not in fields)
    if "key" in fields:
        assert [s.index for s in edit.where] == [3, 11, 19]
    elif "paste" in fields:
        assert edit.where == [edit.paste]
    else:
        with pytest.raises(rc.SelectionError, match="no context"):
            _ = edit.where


@pytest.mark.parametrize(("mode", "channels"), [("L", None), ("RGB", 3), ("RGBA", 4), ("1", None)])
def test_png_modes(mode, channels):
    image = Image.fromarray((box() * 255).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert np.array_equal(rc.Edit.from_json(json.dumps({"paste": [1, url]})).paste.mask, box())


@pytest.mark.parametrize(
    "mask",
    [
        box(),
        box().astype(bool),
        box().astype(int),
        torch.tensor(box()),
        torch.tensor(box()) > 0,
        box().astype(np.float16),
        torch.tensor(box()).bfloat16(),
        torch.tensor(box()).half().requires_grad_(),
        box().tolist(),
    ],
)
def test_mask_types(mask):
    assert np.array_equal(rc.Selection(0, mask).mask, box())


def test_masks_survive_the_json_to_the_bit():
    soft = np.random.RandomState(0).rand(37, 53)
    edit = rc.Edit(paste=rc.Selection(2, soft))
    again = rc.Edit.from_json(edit.to_json())
    assert again == edit and np.array_equal(again.paste.mask, edit.paste.mask)
    assert again.paste.area((5, 9)).shape == (5, 9)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((8, 8)), "empty"),
        (np.full((8, 8), 1e-4), "empty"),
        (np.ones((2, 8, 8, 3)), "not one of shape"),
        (np.ones((0, 8)), "not one of shape"),
        (np.full((8, 8), 255), "0..1"),
        (np.full((8, 8), -0.5), "0..1"),
        (np.full((8, 8), np.nan), "0..1"),
        (np.full((8, 8), "a"), "numbers"),
        (np.full((8, 8), 1j), "numbers"),
        ([[1, 0], [1]], "rows of one length"),
    ],
)
def test_bad_masks(mask, words):
    with pytest.raises(rc.MaskError, match=words):
        rc.Selection(0, mask)


@pytest.mark.parametrize("index", [-1, 1.5, "3", None, True])
def test_bad_indices(index):
    with pytest.raises(rc.SelectionError, match="row of the latents"):
        rc.Selection(index, box())


def test_bad_edits():
    with pytest.raises(rc.SelectionError, match="at least one"):
        rc.Edit()
    with pytest.raises(rc.SelectionError, match="rc.Selection"):
        rc.Edit(copy=(3, box()))
    with pytest.raises(rc.SelectionError, match="a list of rc.Selection"):
        rc.Edit(context=rc.Selection(3, box()))
    with pytest.raises(rc.SelectionError, match="rc.Selection"):
        rc.Edit(context=[rc.Selection(3, box()), 4])


def _golden_text():
    return (DATA / "proggan_edit.json").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        (_golden_text()[:300], "cannot be read as JSON"),
        ("[1, 2]", "JSON object"),
        ("{}", "nothing"),
        ('{"126": {"value": "-5.0"}}', "126"),
        ('{"paste": 3}', "index, PNG"),
        ('{"paste": [3, null]}', "index, PNG"),
        ('{"paste": [3, "http://example.org/mask.png"]}', "data URL"),
        ('{"paste": [3, "data:image/png;base64,@@@"]}', "cannot be decoded"),
        ('{"paste": [3, "data:image/png;base64,aGVsbG8="]}', "cannot be decoded"),
        ('{"key": [1, 2]}', "index, PNG"),
        ('{"key": "x"}', "list"),
        ("[" * 100_000, "cannot be read"),
        ('{"paste": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_bad_json(tmp_path, text, words):
    path = tmp_path / "edit.json"
    path.write_text(text)
    with pytest.raises(rc.FileFormatError, match=words) as caught:
        rc.Edit.load(path)
    assert "edit.json" in str(caught.value)


def test_every_error_in_a_file_names_it(tmp_path):
    path = tmp_path / "edit.json"
    record = json.loads(_golden_text())
    path.write_text(json.dumps({"paste": [-1, record["paste"][1]]}))
    with pytest.raises(rc.SelectionError, match="edit.json.*row of the latents"):
        rc.Edit.load(path)
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, format="png")
    black = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    path.write_text(json.dumps({"paste": [1, black]}))
    with pytest.raises(rc.MaskError, match="edit.json.*empty"):
        rc.Edit.load(path)


def test_a_truncated_png_in_the_json():
    record = json.loads(_golden_text())
    record["paste"][1] = record["paste"][1][:-60]
    with pytest.raises(rc.FileFormatError):
        rc.Edit.from_json(json.dumps(record))


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "edit.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(rc.FileFormatError, match="not text"):
        rc.Edit.load(tmp_path / "edit.json")
    with pytest.raises(FileNotFoundError):
        rc.Edit.load(tmp_path / "none.json")


def test_edits_make_no_half_files(tmp_path, monkeypatch):
    path = tmp_path / "edit.json"
    edit = rc.Edit(paste=rc.Selection(0, box()))
    edit.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(rc.Edit, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
