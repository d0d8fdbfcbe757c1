"""One copy in many places: where the patch lands, what is left out, and what search adds."""

import numpy as np
import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.edits.goals import bounding_box, paste_goals
from rewrite_core.edits.spreading import aligned, find_places


def box(index, top, left, side=8, size=32):
    return rc.Selection.box(index, (top, left, top + side, left + side), size)


class Blobs(nn.Module):
    """Latents [N, 2] in 0..1 -> 16x16 maps of 4 channels with one 2x2 pattern where the latent says, and noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2)
        self.register_buffer("pattern", torch.randn(4, 2, 2))

    def forward(self, z):
        maps = 0.05 * torch.sin(z.sum(1)[:, None, None, None] * torch.arange(1.0, 1025).reshape(4, 16, 16))
        for own, (down, right) in zip(maps, (z * 14.99).long().tolist()):
            own[:, down : down + 2, right : right + 2] += 3 * self.pattern
        return self.up(self.conv(maps))


@pytest.fixture(scope="module")
def blobs():
    z = torch.rand(60, 2, generator=torch.Generator().manual_seed(2))
    layer = rc.bind(Blobs().eval(), "conv")
    return layer, rc.collect_second_moment(layer, z, batch_size=60, progress=False), z


def corner(z, row):
    """Of the pattern in picture `row`, in cells."""
    return (z[row] * 14.99).long().tolist()


def cells(index, top, left):
    return box(index, top, left, side=2, size=16)


def marked(z, row):
    return cells(row, *corner(z, row))


@pytest.mark.parametrize(("off", "lands"), [((0, 0), (0, 0)), ((4, 8), (1, 2)), ((5, 7), (1, 2)), ((-4, 0), (-1, 0))])
def test_a_patch_moves_by_whole_cells_to_the_centre_of_the_mask(off, lands):
    copy, place = box(1, 8, 8), box(2, 8 + off[0], 8 + off[1])
    landing = aligned(copy, place, (8, 8), 0.3)
    assert landing == box(2, 8 + 4 * lands[0], 8 + 4 * lands[1])
    # the middle of a larger mask is meant, not its corner
    wide = rc.Selection.box(2, (place_top := 4 + off[0], 4 + off[1], place_top + 16, 20 + off[1]), 32)
    assert aligned(copy, wide, (8, 8), 0.3) == landing


def test_a_place_between_cells_or_beyond_the_edge_is_left_out():
    copy = box(1, 8, 8)
    assert aligned(copy, box(2, 10, 8), (8, 8), 0.3) is None  # half a cell of 4 pixels
    assert aligned(copy, box(2, 10, 8), (8, 8), 0.5) is not None
    assert aligned(copy, box(2, 10, 8), (16, 16), 0.3) == box(2, 10, 8)  # a whole cell of a larger map
    assert aligned(rc.Selection.box(1, (0, 0, 16, 16), 32), box(2, 0, 0, 4), (8, 8), 0.5) is None


def test_an_edit_is_spread_to_its_context(blobs):
    layer, moment, z = blobs
    copy, paste = cells(0, 2, 2), marked(z, 1)
    edit = rc.Edit(copy, paste, [paste, marked(z, 2), marked(z, 3)], latents=z)
    spread = edit.spread(layer, moment, z)
    assert spread.pastes == (paste, marked(z, 2), marked(z, 3)) and spread.where == edit.where
    assert spread.copy == copy and spread.rows and edit.pastes == (paste,)
    goals = paste_goals(layer, spread, z, "map")
    assert len(goals) == 3
    value = layer.values(z)
    for row, goal in zip((1, 2, 3), goals):  # the patch is where the pattern was
        down, right = corner(z, row)
        changed = bounding_box((goal.target[0] - value[row]).abs().sum(0) > 1e-6)
        assert changed == (down, right, down + 2, right + 2)
        assert torch.equal(goal.target[0, :, down : down + 2, right : right + 2], value[0, :, 2:4, 2:4])
    many = rc.rewrite(layer, moment, spread, z, rank=2, loss="l2", region="map", objective="value")
    one = rc.rewrite(layer, moment, edit, z, rank=2, loss="l2", region="map", objective="value")
    assert many.edit == spread and not torch.equal(many.coefficients, one.coefficients)


def test_places_that_the_patch_cannot_meet_are_left_out_with_a_word(blobs):
    layer, moment, z = blobs
    paste = box(1, 4, 4, side=4)
    between, good = box(2, 5, 8, side=4), box(3, 8, 8, side=4)
    edit = rc.Edit(box(0, 4, 4, side=4), paste, [between, good], latents=z)
    with pytest.warns(UserWarning, match="1 of 2 places were left out.*whole cells of the 16x16 map"):
        assert edit.spread(layer, moment, z).pastes == (paste, good)
    with pytest.raises(rc.SelectionError, match="larger map, or mark more"):
        rc.Edit(edit.copy, paste, [between], latents=z).spread(layer, moment, z)
    with pytest.raises(rc.SelectionError, match="no copy"):
        rc.Edit(paste=paste, latents=z).spread(layer, moment, z)
    with pytest.raises(rc.RewriteCoreError, match="slack"):
        edit.spread(layer, moment, z, slack=-1)


def test_search_matches_become_context_where_the_thing_is(blobs):
    layer, moment, z = blobs
    edit = rc.Edit(cells(0, 2, 2), marked(z, 1), [marked(z, 1), marked(z, 2)], latents=z)
    more = edit.with_matches(layer, moment, z, 9)
    added = more.where[2:]
    assert more.where[:2] == edit.where and len(added) == 9 and more.pastes == edit.pastes
    assert not {0, 1, 2} & {place.index for place in added} and len({place.index for place in added}) == 9
    assert all(place == marked(z, place.index) for place in added)
    spread = edit.spread(layer, moment, z, matches=9)
    assert len(spread.pastes) == 11 and spread.where == more.where
    with pytest.raises(rc.SelectionError, match="60 pictures, 3 of them in the edit"):
        edit.with_matches(layer, moment, z, 58)
    assert len(find_places(layer, moment, edit.where[0], edit.selections, z, 57)) == 57


def test_a_mask_that_cells_do_not_divide_is_kept_at_the_maps_resolution():
    copy = rc.Selection.box(1, (3, 3, 13, 13), 30)
    landing = aligned(copy, rc.Selection.box(2, (7, 7, 17, 17), 30), (8, 8), 0.5)
    assert landing.mask.shape == (8, 8)
    np.testing.assert_array_equal(landing.mask[1:, 1:], copy.area((8, 8)).numpy()[:-1, :-1])


def test_the_preview_is_what_the_pasted_value_renders(blobs):
    layer, _, z = blobs
    edit = rc.Edit(cells(0, 2, 2), [cells(1, 4, 4), cells(4, 4, 4)], latents=z)
    images = rc.preview(layer, edit, z)
    assert images.shape == (2, 3, 32, 32)
    with torch.no_grad():
        wanted = layer.generator(z[[1]])[0].clone()
        wanted[:, 8:12, 8:12] = layer.generator(z[[0]])[0][:, 4:8, 4:8]
    torch.testing.assert_close(images[0], wanted)
    with pytest.raises(rc.MismatchError):
        rc.preview(layer, edit, z + 1)
    with pytest.raises(rc.ArgumentError):
        rc.preview(layer.generator, edit, z)
