"""Layers that run several times in a forward pass: slices of the batch, tiles, loops, shared layers, guidance."""

import warnings

import pytest
import torch
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.layers.capture import run_to


class Decoder(nn.Module):
    """Maps [N, 4, 8, 8] to pictures [N, 3, 8, 8], in one run or in several."""

    def __init__(self, by=""):
        super().__init__()
        torch.manual_seed(0)
        self.by = by
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)
        )
        self.runs = 0
        self.body[2].register_forward_pre_hook(self.count)
        self.body[4].register_forward_pre_hook(self.count_ends)
        self.ends = 0

    def count(self, module, args):
        self.runs += 1

    def count_ends(self, module, args):
        self.ends += 1

    def forward(self, x):
        if self.by.startswith("slices of"):
            return torch.cat([self.body(part) for part in x.split(int(self.by.split()[-1]))])
        if self.by in ("tiles", "uneven tiles"):
            size = 4 if self.by == "tiles" else 5
            return torch.cat([torch.cat([self.body(t) for t in row.split(size, 3)], 3) for row in x.split(size, 2)], 2)
        if self.by == "loop":
            return self.body(torch.cat([self.body(x), x[:, :1]], 1))
        if self.by == "guidance":
            both = self.body(torch.cat([x, 0.5 * x]))
            return both[: len(x)] - both[len(x) :]
        if self.by == "guidance, one after the other":
            return self.body(x) - self.body(0.5 * x)
        return self.body(x)


def latents(count=20):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def bound(by, **options):
    return rc.bind(Decoder(by), "body.2", **options)


def collect(layer, z, **options):
    return rc.collect_second_moment(layer, z, progress=False, **options)


def edit():
    a, b = torch.zeros(2, 8, 8)
    a[1:4, 1:4] = b[4:7, 4:7] = 1
    context = [rc.Selection(1, b), rc.Selection(2, b)]
    return rc.Edit(copy=rc.Selection(0, a), paste=rc.Selection(1, b), context=context)


SLICES = ("slices of 1", "slices of 3", "slices of 16")
SEVERAL = ("tiles", "uneven tiles", "loop", "guidance, one after the other")


@pytest.mark.parametrize("by", SLICES)
def test_slices_of_the_batch_are_as_if_it_ran_once(by):
    whole, sliced, z = bound(""), bound(by), latents()
    assert torch.allclose(sliced.keys(z), whole.keys(z), atol=1e-6)
    assert torch.allclose(sliced.values(z), whole.values(z), atol=1e-6)
    moments = [collect(layer, z, batch_size=7) for layer in (whole, sliced)]
    assert moments[0].count == moments[1].count == 20 * 64
    assert torch.allclose(moments[0].matrix(), moments[1].matrix(), rtol=1e-6)
    changes = [
        reference.rewrite(layer, moment, edit(), z, loss="l2", region="map").weight_delta()
        for layer, moment in zip((whole, sliced), moments)
    ]
    assert torch.allclose(*changes, atol=1e-5)


@pytest.mark.parametrize("by", SLICES)
def test_a_value_is_given_to_the_slice_that_it_is_of(by):
    layer, z = bound(by), latents()
    images = layer.render(z)
    assert torch.allclose(layer.render(z, layer.values(z)), images, atol=1e-6)
    value = layer.values(z).flip(0)
    assert torch.allclose(layer.render(z, value), images.flip(0), atol=1e-6)
    with pytest.raises(rc.RewriteCoreError, match=r"\[20, 8, \*map\], not \[40, 8, 8, 8\]"):
        layer.render(z, torch.cat([value, value]))


@pytest.mark.parametrize("by", SEVERAL)
def test_the_keys_of_all_runs_are_collected(by):
    layer, z, seen = bound(by), latents(), []
    hook = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        layer.generator(z)
    hook.remove()
    wanted = rc.SecondMoment(8)
    for run in seen:
        wanted.update(run)
    for batch_size in (20, 7, 1):
        moment = collect(layer, z, batch_size=batch_size)
        assert moment.count == wanted.count > (20 * 64 if "tiles" not in by else 20 * 64 - 1)
        assert torch.allclose(moment.matrix(), wanted.matrix(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("by", SEVERAL)
def test_an_edit_there_is_refused_with_the_reason(by):
    layer, z = bound(by), latents()
    moment = collect(layer, z)
    for call in (
        lambda: layer.keys(z[:1]),
        lambda: layer.values(z[:1]),
        lambda: reference.rewrite(layer, moment, edit(), z),
        lambda: rc.search(layer, moment, rc.Selection(0, torch.ones(8, 8)), z),
        lambda: layer.value(layer.capture(z)),
    ):
        with pytest.raises(rc.RewriteCoreError, match=r"runs \d times"):
            call()
    with pytest.raises(rc.RewriteCoreError, match=r"sees \d+ maps for 20 latents"):
        layer.render(z, torch.zeros(20, 8, 8, 8))
    assert not layer.module._forward_hooks and len(layer.module._forward_pre_hooks) == 1


def test_guidance_in_one_run_is_collected_and_not_edited():
    layer, z = bound("guidance"), latents()
    assert collect(layer, z).count == 2 * 20 * 64
    with pytest.raises(rc.RewriteCoreError, match="sees 2 maps for 1 latents"):
        layer.keys(z[:1])


@pytest.mark.parametrize("by", ("", *SLICES, *SEVERAL))
def test_listing_says_which_run_several_times(by):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        names = [info.name for info in rc.list_layers(Decoder(by), latents(2))]
    if by in SEVERAL:
        assert names == [] and len(seen) == 3
        assert all("times in a forward pass" in str(warning.message) for warning in seen)
    else:
        assert names == ["body.0", "body.2", "body.4"] and not seen


def test_a_layer_that_runs_once_is_still_where_the_pass_stops():
    layer, z = bound(""), latents()
    layer.keys(z)
    generator = layer.generator
    generator.runs = generator.ends = 0
    layer.keys(z), layer.keys(z[:1]), collect(layer, z, batch_size=5)
    # twice 1 and 4 batches, and the trace of the fingerprint; none to the end
    assert (generator.runs, generator.ends) == (2 + 4 + 1, 0)


def test_slices_stop_after_the_last_of_them():
    layer, z = bound("slices of 1"), latents()
    layer.keys(z)
    layer.generator.runs = layer.generator.ends = 0
    layer.keys(z)
    assert (layer.generator.runs, layer.generator.ends) == (20, 19)


@pytest.mark.parametrize(
    ("first", "then"), [("", "tiles"), ("tiles", ""), ("", "slices of 3"), ("slices of 3", "tiles")]
)
def test_tiling_and_slicing_may_be_switched_after_binding(first, then):
    layer, z = bound(first), latents()
    layer.capture(z)
    layer.generator.by = then
    assert collect(layer, z).count == 20 * 64
    if then == "tiles":
        with pytest.raises(rc.RewriteCoreError, match="runs 4 times"):
            layer.keys(z)
    else:
        assert torch.allclose(layer.keys(z), bound("").keys(z), atol=1e-6)


def test_a_loop_that_is_switched_on_is_noticed_with_the_fingerprint():
    layer, z = bound(""), latents()
    assert collect(layer, z).count == 20 * 64
    layer.generator.by = "loop"
    assert collect(layer, z).count == 2 * 20 * 64


def test_a_layer_that_runs_more_often_than_it_did_is_not_missed_in_silence():
    layer, z = bound(""), latents()
    later = rc.bind(layer.generator, "body.4")
    layer.keys(z), later.keys(z)
    generator = layer.generator
    body = generator.body
    generator.forward = lambda x: body[4](body[2](body[2](body[1](body[0](x)))))
    with pytest.raises(rc.RewriteCoreError, match="runs more often"):
        run_to([layer, later], z, lambda number, capture: None)
    counts = []
    run_to([layer, later], z, lambda number, capture: counts.append(capture.runs))  # it was looked at again
    assert counts == [2, 1]


def test_a_generator_that_fails_after_the_layer_is_read_with_a_warning():
    generator = Decoder()
    generator.body[4] = nn.Conv2d(9, 3, 1)
    layer = rc.bind(generator, "body.2")
    with pytest.warns(UserWarning, match="fails after body.2 .*RuntimeError.*taken to"):
        keys = layer.keys(latents())
    assert torch.equal(keys, bound("").keys(latents()))


def test_several_layers_in_one_pass_have_their_own_runs():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.tiled, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            x = torch.cat([self.tiled(part) for part in x.split(4, 2)], 2)
            return self.last(x)

    generator, z = Mixed(), latents()
    layers = [rc.bind(generator, name) for name in ("last", "tiled", "first")]
    together = rc.collect_second_moments(layers, z, progress=False, batch_size=6)
    for layer, moment in zip(layers, together):
        alone = collect(rc.bind(generator, layer.name), z, batch_size=6)
        assert moment.count == alone.count == 20 * 64
        assert torch.equal(moment.matrix(), alone.matrix()) and moment.fingerprint == alone.fingerprint


def test_a_layer_with_one_map_for_all_latents_is_collected_once_per_batch():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.shared = nn.Parameter(torch.randn(1, 4, 8, 8)), nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return self.last(self.shared(self.start) + x)

    layer, z = rc.bind(Constant(), "shared"), latents()
    assert collect(layer, z, batch_size=5).count == 4 * 64
    with pytest.raises(rc.RewriteCoreError, match="sees 1 maps for 20 latents"):
        layer.keys(z)
    assert layer.keys(z[:1]).shape == (1, 4, 8, 8)


def test_no_latents_are_no_keys():
    assert bound("").keys(latents(0)).shape == (0, 8, 8, 8)
