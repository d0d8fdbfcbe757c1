import pytest
import torch

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
    direction = rc.context_directions(moment, *rc.context_keys(layer, edit.keys, latents))[0]
    assert len(rc.search(layer, moment, direction, latents, top=1000).indices) == len(latents)


def test_bad_input(generator, layer, moment, edit, latents):
    with pytest.raises(rc.RewriteCoreError, match="top"):
        rc.search(layer, moment, edit.copy, latents, top=0)
    with pytest.raises(rc.RewriteCoreError, match="64"):
        rc.search(layer, moment, torch.ones(63), latents)
    with pytest.raises(rc.SelectionError, match="out of range"):
        rc.search(layer, moment, rc.Selection(200, edit.copy.mask), latents)
    with pytest.raises(rc.MismatchError):
        rc.search(rc.bind(generator, "layer4.conv"), moment, edit.copy, latents)
