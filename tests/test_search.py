import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rewrite_core as rc


def test_search_ranks_all_latents_by_their_best_match(layer, moment, edit, latents):
    found = rc.search(layer, moment, edit.context[0], latents, top=7, batch_size=9)
    key = rc.query_key(layer, moment, edit.context[0], latents)
    heat = torch.einsum("nihw,i->nhw", layer.keys(latents), key.float())
    scores = heat.amax((1, 2))
    assert found.indices.tolist() == scores.argsort(descending=True)[:7].tolist()
    assert torch.allclose(found.scores, scores[found.indices], atol=1e-5)
    assert torch.allclose(found.heatmaps, heat[found.indices], atol=1e-4)
    assert found.level == pytest.approx(heat.quantile(0.999).item(), rel=1e-3)


def test_search_takes_a_direction_and_any_top(layer, moment, edit, latents):
    direction = rc.context_directions(moment, *rc.context_keys(layer, edit.where, latents))[0]
    assert len(rc.search(layer, moment, direction, latents, top=1000).indices) == len(latents)


def test_bad_input(generator, layer, moment, edit, latents):
    with pytest.raises(rc.RewriteCoreError, match="top"):
        rc.search(layer, moment, edit.copy, latents, top=0)
    with pytest.raises(rc.RewriteCoreError, match="there are none"):
        rc.search(layer, moment, torch.ones(64), latents[:0])
    with pytest.raises(TypeError, match="torch.as_tensor"):
        rc.search(layer, moment, edit.copy, latents.numpy())
    with pytest.raises(rc.RewriteCoreError, match="64"):
        rc.search(layer, moment, torch.ones(63), latents)
    with pytest.raises(rc.SelectionError, match="out of range"):
        rc.search(layer, moment, rc.Selection(200, edit.copy.mask), latents)
    with pytest.raises(rc.MismatchError):
        rc.search(rc.bind(generator, "layer4.conv"), moment, edit.copy, latents)


class Stripes(nn.Module):
    """Latents [N, 4] -> key maps [N, 4, 64, 64] whose first channel is large in one column only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 1)

    def forward(self, z):
        maps = 0.01 * torch.sin(z.sum(1)[:, None, None, None] * torch.arange(4 * 64 * 64.0).reshape(4, 64, 64))
        maps[:, 0, :, 5] = 100 * torch.sin(z[:, :1] * torch.arange(64.0)).abs()
        return self.conv(maps)


@pytest.mark.parametrize("batch_size", [16, 7])
@pytest.mark.parametrize("positions", [4_000_000, 100_000])
def test_the_level_does_not_depend_on_where_matches_lie(monkeypatch, batch_size, positions):
    import rewrite_core.edits.matches as search_module

    monkeypatch.setattr(search_module, "_LEVEL_POSITIONS", positions)
    layer = rc.bind(Stripes(), "conv")
    z = rc.sample_latents(4, 160)
    moment = rc.SecondMoment(4)
    key = torch.tensor([1.0, 0, 0, 0])
    found = rc.search(layer, moment, key, z, top=160, batch_size=batch_size)
    wanted = np.quantile(found.heatmaps.numpy(), 0.999)
    assert wanted > 50
    assert found.level == pytest.approx(wanted, rel=1e-6 if positions > found.heatmaps.numel() else 0.05)
    again = rc.search(layer, moment, key, z, batch_size=batch_size)
    assert again.level == found.level


def test_nan_is_refused_not_ranked_first(layer, moment, edit, latents):
    bad = latents.clone()
    bad[37] = torch.nan
    with pytest.raises(rc.NonFiniteError, match="batch 3 .*30 to 39"):
        rc.search(layer, moment, edit.context[0], bad, batch_size=10)
    with pytest.raises(rc.NonFiniteError, match="key to search for"):
        rc.search(layer, moment, torch.full((64,), torch.nan), latents)


def test_another_default_device(layer, moment, edit, latents):
    plain = rc.search(layer, moment, edit.context[0], latents[:40], top=3)
    with torch.device("meta"):
        found = rc.search(layer, moment, edit.context[0], latents[:40], top=3)
    assert found.indices.tolist() == plain.indices.tolist() and found.level == plain.level


def test_a_notebook_shows_where_pictures_match():
    heat = torch.zeros(25, 4, 6)
    heat[0, 1, 2], heat[1, 3, 5] = 2.0, 1.0
    page = rc.SearchResult(torch.arange(25) + 7, torch.linspace(2, 1, 25), heat, 0.5)._repr_html_()
    shown = re.findall(r'base64,([^"]+)" width="80" height="53"', page)
    first, second = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in shown[:2])
    assert first.shape == (4, 6) and first[1, 2] == 255 and second[3, 5] == 128 and first.sum() == 255
    assert len(shown) == 20 and "picture 7<" in page and "picture 27<" not in page and "of 25" in page
    large = rc.SearchResult(torch.arange(20), torch.ones(20), torch.rand(20, 900, 300), 0.5)._repr_html_()
    assert len(large) < 300_000
    volume = rc.SearchResult(torch.arange(1), torch.ones(1), torch.rand(1, 2, 4, 4), 0.5)._repr_html_()
    assert 'width="40" height="80"' in volume
