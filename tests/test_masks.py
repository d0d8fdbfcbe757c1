"""Masks from what people draw them in."""

import numpy as np
import pytest
import torch
from PIL import Image

import rewrite_core as rc

MARKED = np.zeros((32, 32), bool)
MARKED[4:12, 6:20] = True


def drawing(mode):
    """A picture of that mode, white where marked and black elsewhere; opaque."""
    picture = Image.fromarray(MARKED.astype(np.uint8) * 255)
    if mode in ("La", "RGBa"):
        return picture.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", [picture, *[Image.new("L", picture.size, 128)] * 2])
    if mode == "HSV":
        return picture.convert("RGB").convert("HSV")
    if mode == "PA":
        return picture.convert("P").convert("PA")
    if mode == "F":
        return Image.fromarray(MARKED.astype(np.float32))
    if mode == "I":
        return Image.fromarray(MARKED.astype(np.int32) * 65535)
    if mode.startswith("I;16"):
        return Image.fromarray(MARKED.astype(np.uint16) * 65535).convert(mode)
    return picture.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBa", "La", "I;16"],
)
def test_the_brightness_of_an_opaque_picture_is_the_mask(mode):
    picture = drawing(mode)
    assert picture.mode == mode
    assert np.array_equal(rc.Selection(0, picture).mask, MARKED)


def test_brightness_may_be_between():
    grey = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8))
    assert np.array_equal(rc.Selection(0, grey).mask, np.asarray(grey, np.float32) / 255)
    sixteen = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    assert np.abs(rc.Selection(0, sixteen).mask - np.asarray(sixteen) / 65535).max() <= 0.5 / 255


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 10, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_what_is_painted_on_transparency_is_the_mask_in_any_colour(mode, colour):
    alpha = MARKED * np.uint8(128)
    picture = Image.fromarray(np.dstack([np.full((32, 32, 3), colour, np.uint8), alpha]))
    if mode in ("LA", "La"):
        picture = picture.convert("LA").convert(mode)
    elif mode == "RGBa":
        picture = picture.convert(mode)
    elif mode == "PA":
        palette = Image.new("P", (32, 32), 3)
        picture = Image.merge("PA", [Image.fromarray(np.zeros((32, 32), np.uint8)), Image.fromarray(alpha)])
        picture.putpalette(palette.getpalette() or [*colour] * 256)
    assert np.array_equal(rc.Selection(0, picture).mask, alpha.astype(np.float32) / 255)


def test_a_transparent_colour_is_transparency(tmp_path):
    picture = Image.fromarray(np.where(MARKED, 1, 0).astype(np.uint8), mode=None).convert("P")
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "mask.gif", transparency=0)
    assert np.array_equal(rc.Selection(0, tmp_path / "mask.gif").mask, MARKED)
    picture.save(tmp_path / "mask.png", transparency=0)
    assert np.array_equal(rc.Selection(0, str(tmp_path / "mask.png")).mask, MARKED)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "bmp", "gif", "ppm", "tga"])
def test_paths(tmp_path, suffix):
    drawing("RGB").save(tmp_path / f"mask.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(rc.Selection(0, tmp_path / f"mask.{suffix}").mask, MARKED)


def test_a_photo_is_turned_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    drawing("L").save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(rc.Selection(0, tmp_path / "mask.png").mask, np.rot90(MARKED, -1))


def test_paths_that_hold_no_mask(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture at .*none\.png"):
        rc.Selection(0, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(rc.MaskError, match=r"text\.png cannot be read as a picture"):
        rc.Selection(0, tmp_path / "text.png")
    with pytest.raises(rc.MaskError, match="empty"):
        rc.Selection(0, Image.new("RGBA", (8, 8)))


def test_boxes():
    assert rc.Selection.box(3, (4, 6, 12, 20), 32) == rc.Selection(3, MARKED)
    assert rc.Selection.box(3, np.array([4, 6, 12, 20]), (32, np.int64(32))) == rc.Selection(3, MARKED)
    assert rc.Selection.box(0, (2, 5), 9).mask.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0, 0]]
    volume = rc.Selection.box(0, (0, 1, 1, 2, 3, 4), (2, 4, 4)).mask
    assert volume.shape == (2, 4, 4) and volume[:, 1:3, 1:].all() and volume.sum() == 12


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((4, 6, 4, 20), 32),
        ((4, 6, 12, 33), 32),
        ((-1, 6, 12, 20), 32),
        ((4, 6, 12), 32),
        ((4, 6, 12, 20), (32,)),
        ((4.0, 6, 12, 20), 32),
        (7, 32),
        ((4, 6, 12, 20), "32"),
        ((4, 6, 12, 20), None),
        ((), 32),
    ],
)
def test_bad_boxes(box, size):
    with pytest.raises(rc.MaskError, match="box"):
        rc.Selection.box(0, box, size)


def test_a_mask_of_too_many_pixels_is_refused():
    with pytest.raises(rc.MaskError, match="scale it down"):
        rc.Selection(0, torch.ones(1, 1).expand(10_000, 10_000))
    with pytest.raises(rc.MaskError, match="scale it down"):
        rc.Selection(0, Image.new("1", (10_000, 10_000), 1))


def test_notebooks_show_them():
    edit = rc.Edit(copy=rc.Selection(1, MARKED), paste=[rc.Selection(2, MARKED), rc.Selection(5, MARKED.T)])
    page = edit._repr_html_()
    assert page.count("<img ") == 3 and "picture 5" in page and "<script" not in page and len(page) < 5000
    assert len(rc.Selection(0, np.random.RandomState(0).rand(2000, 500))._repr_html_()) < 40_000
    assert rc.Selection(0, MARKED[:1, :9] | True)._repr_html_().count("<img ") == 1
