import numpy as np
import pytest
import torch
from PIL import Image

import rewrite_core as rc
from rewrite_core import pictures


class Doubler(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, latents):
        assert latents.dtype == self.weight.dtype
        return (self.weight * latents)[:, None, :, None].expand(-1, 3, -1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_painting_casts_latents_and_scales_images(dtype):
    latents = torch.tensor([[0.0, 0.5], [-0.5, 0.25], [0.5, 0.5]])
    for span, shown in (((-1.0, 1.0), latents + 0.5), ((0.0, 1.0), 2 * latents), ((0.0, 255.0), latents / 127.5)):
        painted = pictures.paint(Doubler(dtype), latents, batch_size=2, span=span)
        assert painted.shape == (3, 3, 2, 4) and painted.dtype == torch.float32
        assert torch.allclose(painted[:, 0, :, 0], shown)


def test_pictures_of_zero_and_one_are_black_and_white():
    image = pictures.to_image(torch.tensor([0.0, 1.0]).reshape(1, 1, 2), 8)
    assert image.size == (8, 4) and np.unique(np.asarray(image)).tolist() == [0, 255]
    with pytest.raises(ValueError, match="shape"):
        pictures.to_image(torch.zeros(2, 4, 4))


def test_an_outline_stays_on_its_side_of_the_picture():
    mask = np.zeros((16, 16))
    mask[4:8, 10:] = 1
    marked = np.asarray(pictures.outline(Image.new("RGB", (16, 16)), mask)).any(2)
    assert marked[4:8, 9].all() and not marked[:, :9].any() and not marked[4:8, 10:].any()


def test_heat_is_strong_where_the_match_is_and_nowhere_else():
    heatmap = torch.zeros(8, 8)
    heatmap[2, 2] = 1.0
    heated = np.asarray(pictures.heat(torch.full((3, 64, 64), 0.5), heatmap, 64, level=0.5, high=1.0)).astype(int)
    change = np.abs(heated - 128).sum(2)
    assert change[16:24, 16:24].min() > 30 and change[40:, 40:].max() <= 3
    assert (heated == 255).all(2).any(), "the outline at the level"


def test_no_progress_bar_where_nobody_watches(capsys):
    pictures.paint(Doubler(torch.float32), torch.zeros(3, 2), progress=True)
    assert capsys.readouterr().err == ""


def columns_with_ink(sheet, top, bottom):
    """The columns in which something is drawn on the white between two rows of pixels."""
    return np.flatnonzero((np.asarray(sheet)[top:bottom] < 200).any((0, 2)))


@pytest.mark.parametrize("title", ["short", "before | after " + "a_rather_long_name.safetensors, " * 3, "x" * 300])
def test_no_title_or_label_is_cut(title):
    """Text goes on in another line where it would leave its place; words that have no room at all are broken."""
    black = Image.new("RGB", (64, 64))
    label = "synthesis.layer4.conv: 0.123"
    sheet = pictures.grid([[(black, label), (black, label), (black, "7")]], title, ["a note " * 40])
    pixels = np.asarray(sheet)
    assert (pixels[:, :5] == 255).all() and (pixels[:, -5:] == 255).all() and (pixels[-2:] == 255).all()
    assert sheet.width <= pictures._LEAST_TITLE + 12
    rows = np.flatnonzero((pixels[:, 6:70] == 0).all((1, 2)))  # of the first picture
    below = columns_with_ink(sheet, rows[-1] + 1, sheet.height)
    assert below.min() >= 6 and not np.isin(np.arange(70, 76), below).any(), "a label reaches into the next cell"
    for text, kind, room in ((title, pictures._TITLE, sheet.width - 12), (label, pictures._LABEL, 64)):
        lines = kind.wrap(text, room)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(kind.width(line) <= room for line in lines)


def test_nan_is_drawn_black_and_infinity_as_the_end_of_the_range():
    picture = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5]).expand(3, 1, 4)
    assert np.asarray(pictures.to_image(picture))[0, :, 0].tolist() == [0, 255, 0, 128]


def test_errors_are_the_librarys_own():
    class Pair(torch.nn.Module):
        def forward(self, latents):
            return latents, latents

    with pytest.raises(rc.RewriteCoreError, match="needs at least one image"):
        rc.pictures.grid([[(None, "nothing")]])
    with pytest.raises(rc.RewriteCoreError, match="shape"):
        rc.pictures.to_image(torch.zeros(2, 4, 4))
    with pytest.raises(rc.ArgumentError, match="returns a tuple and not images alone"):
        rc.pictures.paint(Pair(), torch.zeros(1, 2))


def test_pairs_for_a_notebook():
    before, after = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    rows = rc.pictures.before_after(before, after, 16, ["a", "b", "c"], columns=2)
    assert [[label for _, label in row] for row in rows] == [["a", "b"], ["c"]]
    assert np.asarray(rows[0][0][0])[8, [0, 15, 18, 33], 0].tolist() == [0, 0, 255, 255]
    assert rc.pictures.grid(rows, "title").width >= 2 * 34
