"""Convolutions of any dimension, with groups, and linear layers. See ``test_families.py``."""

import pytest
import torch
import torch.nn.functional as F
from conftest import solver_of
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.solvers.problem import basis_maps


class Sequence(nn.Module):
    """[N, 12] -> waves [N, 1, 48]."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(12, 10 * 6)
        self.up = nn.ConvTranspose1d(10, 8, 4, 2, 1)
        self.conv = nn.Conv1d(8, 9, 5, padding=4, dilation=2)
        self.out = nn.ConvTranspose1d(9, 1, 4, 4)

    def forward(self, z):
        x = F.relu(self.up(self.start(z).unflatten(1, (10, 6))))
        return self.out(torch.tanh(self.conv(x)))


class Volume(nn.Module):
    """[N, 12] -> volumes [N, 1, 4, 8, 6]."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(12, 8, (2, 4, 3))
        self.conv = nn.Conv3d(8, 8, 3, padding=1)
        self.twice = nn.ConvTranspose3d(8, 6, 4, 2, 1)
        self.out = nn.Conv3d(6, 1, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate")

    def forward(self, z):
        x = F.relu(self.up(z[:, :, None, None, None]))
        return self.out(F.relu(self.twice(F.relu(self.conv(x)))))


class Grouped(nn.Module):
    """[N, 12] -> images [N, 3, 8, 8], with grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(12, 8, 4, groups=4)
        self.conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.twice = nn.ConvTranspose2d(12, 6, 4, 2, 1, groups=3)
        self.out = nn.Conv2d(6, 3, 1, groups=3)

    def forward(self, z):
        x = torch.tanh(self.conv(torch.tanh(self.up(z[:, :, None, None]))))
        return self.out(torch.tanh(self.twice(torch.tanh(self.depthwise(x)))))


class Language(nn.Module):
    """Tokens [N, 7] -> logits [N, 7, 20]: attention and an MLP, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 20, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


class Grid(nn.Module):
    """Linear layers on channels-last maps [N, h, w, C] and on plain vectors [N, C]."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 30), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, z):
        return self.third(torch.relu(self.second(torch.relu(self.first(z)).reshape(-1, 2, 3, 5)))).movedim(-1, 1)


def make(kind):
    torch.manual_seed(0)
    return {"sequence": Sequence, "volume": Volume, "grouped": Grouped, "language": Language, "grid": Grid}[kind]()


def tokens(count=24):
    return torch.randint(20, (count, 7), generator=torch.Generator().manual_seed(0))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_maps_have_the_axes_of_their_layer():
    sizes = {
        info.name: (info.key_size, info.value_size, info.kernel_size)
        for info in rc.list_layers(make("sequence"), torch.randn(1, 12))
    }
    assert sizes == {
        "start": ((1,), (1,), ()),
        "up": ((6,), (12,), (4,)),
        "conv": ((12,), (12,), (5,)),
        "out": ((12,), (48,), (4,)),
    }
    sizes = {info.name: (info.key_size, info.value_size) for info in rc.list_layers(make("volume"), torch.randn(1, 12))}
    assert sizes["twice"] == ((2, 4, 3), (4, 8, 6))
    infos = rc.list_layers(make("language"), tokens(1))
    assert [(info.name, info.key_size, info.family) for info in infos] == [
        ("fc1", (7,), "linear"),
        ("fc2", (7,), "linear"),
        ("head", (7,), "linear"),
    ]
    assert [info.key_size for info in rc.list_layers(make("grid"), torch.randn(1, 12))] == [(1,), (2, 3), (2, 3)]


def test_a_linear_layer_is_the_1x1_convolution():
    """The same edit of the same weights gives the same change."""

    class Same(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if isinstance(self.layer, nn.Linear):
                return self.layer(x.movedim(1, -1)).movedim(-1, 1)
            return self.layer(x)

    torch.manual_seed(0)
    linear, conv = Same(nn.Linear(6, 9)), Same(nn.Conv2d(6, 9, 1))
    conv.layer.load_state_dict({"weight": linear.layer.weight[:, :, None, None], "bias": linear.layer.bias})
    z, mask = torch.randn(20, 6, 5, 4), torch.zeros(5, 4)
    mask[1:4, 1:3] = 1
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask), context=[rc.Selection(3, mask)])
    changes = []
    for generator in (linear, conv):
        layer = rc.bind(generator, "layer")
        moment = rc.collect_second_moment(layer, z, progress=False)
        changes.append(reference.rewrite(layer, moment, edit, z, rank=2, loss="l2", preserve=0.1))
    assert changes[0].solver == changes[1].solver == "closed_form"
    assert changes[0].coefficients.shape == (9, 2) and changes[1].coefficients.shape == (9, 2, 1, 1)
    assert relative(changes[0].weight_delta(), changes[1].weight_delta()[:, :, 0, 0]) < 1e-4


def test_an_edit_at_token_positions():
    """Copy what the MLP writes at one token to another, in every text with the same context: it is what comes out."""
    model, z = make("language").eval(), tokens(64)
    layer = rc.bind(model, "fc2")
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(
        copy=rc.Selection(4, [0, 0, 0, 1, 0, 0, 0]),
        paste=rc.Selection(9, [0, 0, 0, 0, 0, 1, 0]),
    )
    change = reference.rewrite(layer, moment, edit, z, loss="l2")
    wanted, before = layer.values(z[4:5])[0, :, 3], layer.values(z[9:10])
    with change:
        after = layer.values(z[9:10])
    assert relative(after[0, :, 5], wanted) < 1e-4
    others = [0, 1, 2, 3, 4, 6]
    assert relative(after[0][:, others], before[0][:, others]) < 0.5 * relative(wanted, before[0, :, 5])


@pytest.mark.parametrize("solver", ["lm", "adam", "projected"])
@pytest.mark.parametrize("name", ["up", "conv", "depthwise", "twice", "out"])
def test_groups(name, solver):
    """The solver's unknowns are those that the grouped weight has: what it predicts is what comes out, and every group
    takes part. "lm" is exact: no other solver ends lower."""
    generator, z = make("grouped").eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, name)
    moment = rc.collect_second_moment(layer, z, progress=False)
    side = layer.values(z[:1]).shape[2]
    mask = torch.zeros(side, side)
    mask[: side // 2] = 1
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    change = reference.rewrite(layer, moment, edit, z, loss="l2", region="map", solver=solver_of(solver, 200))
    best = reference.rewrite(layer, moment, edit, z, loss="l2", region="map")
    assert best.solver == "closed_form" and best.final_loss <= change.final_loss * (1 + 1e-4)
    assert best.final_loss < best.losses[0]
    before = layer.parameter.detach().clone()
    value, target = layer.values(z[2:3]), layer.values(z[1:2])
    wanted = value.clone()
    wanted[:, :, : side // 2] = target[:, :, : side // 2]
    with change:
        assert F.mse_loss(layer.values(z[2:3]), wanted).item() == pytest.approx(change.final_loss, rel=1e-3, abs=1e-9)
        moved = (layer.parameter.detach() - before).flatten(1).abs().amax(1)
        assert (moved > 0).all()
    assert torch.equal(layer.parameter, before)


def test_directions_within_groups_are_those_of_each_group():
    generator, z = make("grouped").eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, "conv")
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(4, 4)
    rows, _weights = rc.context_keys(layer, [rc.Selection(2, mask)], z)
    both = moment.within_groups(2)
    for half in (slice(0, 4), slice(4, 8)):
        alone = rc.SecondMoment(4)
        alone.update(layer.keys(z)[:, half])
        assert torch.allclose(both.solve(rows)[:, half], alone.solve(rows[:, half]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(1, 1, 4, stride=3, padding=2), (11,)),
        (nn.Conv1d(1, 1, 4, padding="same"), (9,)),
        (nn.Conv2d(1, 1, (3, 5), padding=(1, 4), dilation=(1, 2)), (8, 7)),
        (nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="reflect"), (6, 5)),
        (nn.Conv2d(1, 1, 3, padding="valid"), (6, 5)),
        (nn.Conv2d(1, 1, 1), (6, 5)),
        (nn.Conv3d(1, 1, (2, 3, 1), padding=(1, 0, 0), padding_mode="circular"), (4, 5, 3)),
        (nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1), (5, 4)),
    ],
)
def test_maps_of_single_taps_are_those_of_one_hot_kernels(module, size):
    layer, maps = rc.bind(nn.Sequential(module), "0"), torch.randn(3, *size)
    taps = torch.eye(module.weight.numel()).reshape(-1, 1, *module.kernel_size)
    assert torch.equal(layer.taps(maps), layer.linear(maps[:, None], taps))


def test_a_weight_inside_groups_is_used_as_the_dense_one():
    generator, z = make("grouped").eval(), rc.sample_latents(12, 2)
    for name in ("up", "conv", "depthwise", "twice", "out"):
        layer = rc.bind(generator, name)
        capture, own, fingerprint = layer.capture(z), layer.own_weight, layer.weight_fingerprint()
        assert own.shape == (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        assert torch.equal(layer.inside_groups(layer.weight), own)
        assert torch.equal(layer.value(capture, own), layer.value(capture, layer.weight))
        assert layer.weight_fingerprint(layer.weight) == fingerprint and layer.is_weight(None, fingerprint)
        with torch.no_grad():
            layer.parameter.add_(1)
        assert layer.weight_fingerprint() == layer.weight_fingerprint(layer.weight) != fingerprint


def test_zero_of_a_grouped_layer_leaves_nothing_of_the_context_in_any_group():
    generator, z = make("grouped").eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, "conv")
    moment = rc.collect_second_moment(layer, z, progress=False)
    change = rc.zero(layer, moment, rc.Edit(paste=rc.Selection(2, torch.ones(4, 4))), z, rank=2)
    with change:
        for half in (0, 1):
            rows = change.directions[:, 4 * half : 4 * half + 4]
            left = torch.einsum("oiyx,ri->oryx", layer.weight[6 * half : 6 * half + 6, 4 * half : 4 * half + 4], rows)
            assert left.abs().max() < 1e-5


class Apart(nn.Module):
    """The groups of a convolution as convolutions of their own."""

    def __init__(self, conv):
        super().__init__()
        self.parts = nn.ModuleList()
        for weight, bias in zip(conv.weight.chunk(conv.groups), conv.bias.chunk(conv.groups)):
            part = nn.Conv2d(weight.shape[1], len(weight), conv.kernel_size, padding=conv.padding)
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            self.parts.append(part)

    def forward(self, x):
        return torch.cat([part(piece) for part, piece in zip(self.parts, x.chunk(len(self.parts), 1))], 1)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "l2"},
        {},
        {"loss": "l2", "preserve": 0.3},
        {"preserve": 0.3},
        {"loss": "l2", "preserve": 0.3, "solver": rc.Adam(steps=400)},
    ],
)
@pytest.mark.parametrize("name", ["conv", "out"])
def test_groups_are_convolutions_of_their_own(name, options):
    """An edit of a grouped convolution along C^-1 k* is the edits of its groups, each with its own second moment."""
    generator, z = make("grouped").eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, name)
    side = layer.values(z[:1]).shape[2]
    mask = torch.zeros(side, side)
    mask[: side // 2] = 1
    edits = [
        rc.Edit(
            copy=rc.Selection(1, mask),
            paste=rc.Selection(2, mask),
            context=[rc.Selection(2, mask), rc.Selection(3, mask)],
        ),
        rc.Edit(copy=rc.Selection(4, mask), paste=rc.Selection(5, mask)),
    ]
    moment = rc.collect_second_moment(layer, z, progress=False)
    options = {"region": "map", "directions": "mean", **options}
    together = reference.rewrite_many(layer, moment, edits, z, **options)
    apart = make("grouped").eval()
    setattr(apart, name, Apart(apart.get_submodule(name)))
    for change, edit in zip(together, edits):
        found = layer.to_native(change.weight_delta())
        wanted = []
        for number in range(layer.groups):
            part = rc.bind(apart, f"{name}.parts.{number}")
            own = rc.collect_second_moment(part, z, progress=False)
            wanted.append(reference.rewrite(part, own, edit, z, **options).weight_delta())
        # the loss is the same, and so is the solution where it is unique
        tolerance = 0.1 if "solver" in options else 1e-3 if options.get("loss") == "l2" else 0.2
        assert (found - torch.cat(wanted)).norm() <= tolerance * torch.cat(wanted).norm()
        assert found.any() or (name == "out" and "loss" not in options), "the l1 optimum can be no change at all"


@pytest.mark.parametrize("size", [12, 11])
def test_an_output_size_is_the_layers_own_or_refused(size):
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(5, 8, 3, 2, 1), nn.ConvTranspose2d(8, 3, 3, 2, 1)

        def forward(self, x):
            return self.up(self.down(x), output_size=x.shape[-2:])

    generator, x = UNet(), torch.randn(2, 5, size, size)
    layer = rc.bind(generator, "up")
    if size == 11:  # as the layer makes it by itself
        assert torch.allclose(layer.values(x), generator(x), atol=1e-6)
        assert [info.name for info in rc.list_layers(generator, x)] == ["down", "up"]
        return
    with pytest.raises(rc.RewriteCoreError, match=r"output_size=\[12, 12\] and makes maps of \[11, 11\]"):
        layer.keys(x)
    with pytest.warns(UserWarning, match="'up' is left out.*output_padding"):
        assert [info.name for info in rc.list_layers(generator, x)] == ["down"]


@pytest.mark.parametrize(
    ("kind", "name"), [("sequence", "conv"), ("volume", "conv"), ("volume", "twice"), ("grid", "second")]
)
def test_tight_edits_of_other_dimensions(kind, name):
    """A tight region is what it is on the whole map with zeros outside."""
    generator, z = make(kind).eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, name)
    size = layer.values(z[:1]).shape[2:]
    mask = torch.zeros(size)
    mask[tuple(slice(0, max(1, side // 2)) for side in size)] = 1
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    change = reference.rewrite(layer, moment, edit, z, loss="l2")
    box = change.box
    assert box[: len(size)] == (0,) * len(size) and all(0 < stop <= side for stop, side in zip(box[len(size) :], size))
    found = rc.search(layer, moment, rc.Selection(2, mask), z, top=3)
    assert found.heatmaps.shape == (3, *layer.keys(z[:1]).shape[2:])


def test_masks_of_other_axes():
    line, block = torch.zeros(7), torch.zeros(2, 4, 6)
    line[2], block[1, 1:3] = 1, 1
    selection = rc.Selection(0, line)
    assert torch.equal(selection.area((7,)), line) and selection == rc.Selection(0, line[None])
    volume = rc.Selection(0, block)
    assert torch.equal(volume.area((2, 4, 6)), block)
    assert (
        volume.area((4, 2, 3)).shape == (4, 2, 3)
        and volume.area((4, 2, 3))[-1].mean() > volume.area((4, 2, 3))[0].mean()
    )
    assert torch.equal(rc.Selection(0, block[1]).area((5, 4, 6)), block[1].expand(5, 4, 6)), "the same in every slice"
    for one in (selection, volume):
        edit = rc.Edit(paste=one)
        assert rc.Edit.from_json(edit.to_json()) == edit
    with pytest.raises(rc.MaskError, match="axes of that map"):
        rc.Selection(0, block[1]).area((7,))
    with pytest.raises(rc.MaskError, match="axes of that map"):
        volume.area((4, 6))
    with pytest.raises(rc.FileFormatError, match="slices"):
        rc.Edit.from_json(rc.Edit(paste=volume).to_json().replace(", 2]", ", 3]"))


def test_a_basis_of_all_directions_is_the_dense_operator():
    layer = rc.bind(make("volume"), "conv")
    keys = layer.keys(rc.sample_latents(12, 2))
    basis = basis_maps(layer, keys, torch.eye(8))
    product = torch.einsum("oj,nj...->no...", layer.weight.flatten(1), basis)
    assert relative(product, layer.linear(keys, layer.weight)) < 1e-5


def test_more_maps_than_latents_are_not_taken_apart():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 3, padding=1)

        def forward(self, x):
            with_label, without = self.conv(torch.cat([x, 0 * x])).chunk(2)
            return without + 3 * (with_label - without)

    layer, z = rc.bind(Guided(), "conv"), torch.randn(3, 5, 6, 6)
    with pytest.raises(rc.RewriteCoreError, match="sees 6 maps for 3 latents"):
        layer.keys(z)
    assert rc.collect_second_moment(layer, z, progress=False).count == 2 * 3 * 36, "but they are pooled"


@pytest.mark.parametrize(
    ("kind", "name"), [("sequence", "conv"), ("volume", "conv"), ("grouped", "conv"), ("grid", "second")]
)
def test_every_method_and_erasure(kind, name):
    generator, z = make(kind).eval(), rc.sample_latents(12, 64)
    layer = rc.bind(generator, name)
    mask = torch.ones(layer.values(z[:1]).shape[2:])
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    before = layer.parameter.detach().clone()
    for change in (
        reference.rewrite(layer, moment, edit, z, rank=2, directions="svd", loss="l2", region="map"),
        reference.rewrite(layer, moment, edit, z, rank=2, directions="units", loss="l2", region="map"),
        reference.rewrite(layer, moment, edit, z, directions="mean", loss="l2", region="map"),
        reference.rewrite(layer, moment, edit, z, solver=rc.Unconstrained(steps=50), loss="l2", region="map"),
        rc.erase(layer, moment, edit, z, units=2, loss="l2"),
    ):
        assert change.final_loss < change.losses[0]
        with change:
            assert not torch.equal(layer.parameter, before)
        assert torch.equal(layer.parameter, before)
