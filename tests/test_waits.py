"""What the host waits for where an edit is solved on a GPU: counted with one that is not there, helpers/stand_in.py."""

import threading

import pytest
import torch
from conftest import needs_triton
from helpers import small
from helpers.stand_in import Away, Machine
from torch import nn

import rewrite_core as rc
from rewrite_core import waits
from rewrite_core.generators.stylegan2 import StyleGAN2

pytestmark = needs_triton
LATENTS = rc.sample_latents(16, 64)
MASKS = [rc.Selection.box(number, box, 16) for number, box in enumerate([(2, 2, 7, 7), (8, 8, 13, 13), (8, 8, 13, 13)])]
EDIT = rc.Edit(MASKS[0], MASKS[1], MASKS[1:], latents=LATENTS)


def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2(16, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8}).eval()


def pointwise():
    """Edited at a 1x1 convolution, whose `preserve` term is exact."""
    return small.generator(lambda conv: nn.Conv2d(8, 8, 1))


KINDS = {
    "stylegan2": (stylegan2, "convs.0.conv", EDIT, LATENTS),
    "conv": (small.generator, small.LAYER, small.EDIT, small.Z),
    "pointwise": (pointwise, small.LAYER, small.EDIT, small.Z),
}
# Each channel's fit has one minimum, so that the CPU's kernel and the reference, which stands for the GPU's, find it.
HOW = {
    "reference": {"region": "box", "loss": "l1", "rank": 1, "preserve": 0.3},
    "rank 4": {"region": "map", "loss": "l2", "rank": 4, "preserve": 0.0},
    "rank 4, preserve": {"region": "map", "loss": "l2", "rank": 4, "preserve": 0.3},
    "any rank": {"region": "map", "loss": "l2", "rank": None, "preserve": 0.3},
}
HOW = {name: {"trust": None, **options} for name, options in HOW.items()}


@pytest.fixture
def gpu():
    with Machine() as machine:
        yield machine


def ready(kind, machine=None):
    """(layer, moment, edit, latents); on the GPU where there is one, with the moment of the CPU."""
    make, name, edit, latents = KINDS[kind]
    layer = rc.bind(make(), name)
    moment = rc.SecondMoment(layer.in_channels)
    moment.update(layer.keys(latents))
    if machine is not None:
        layer = rc.bind(machine.move(make()), name)
    moment.layer, moment.fingerprint = layer.name, layer.fingerprint(latents)
    return layer, moment, edit, latents


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_waits_twice(kind, how, gpu):
    """And finds what it finds on a CPU, by the same fit."""
    there = ready(kind, gpu)
    gpu.clear()
    rc.rewrite(*there, **HOW[how])
    assert 2 < len(gpu.waits) <= 10, gpu.waits  # the first time: fingerprint, moment, factor, weight
    gpu.clear()
    change = rc.rewrite(*there, **HOW[how])
    assert len(gpu.waits) <= 2, gpu.waits
    gpu.clear()
    rc.rewrite(*there, **HOW[how] | {"trust": 1e6})
    assert len(gpu.waits) <= 2, gpu.waits  # the bound on the size comes with the fit's own numbers
    here = ready(kind)
    plain = rc.rewrite(*here, **HOW[how], backend="reference")
    assert isinstance(change.coefficients, Away)
    assert relative(change.weight_delta().cpu(), plain.weight_delta()) <= 1e-4
    assert change.size == pytest.approx(plain.size, rel=1e-4)
    assert change.fitted_to == plain.fitted_to and change.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_as_supposed_is_looked_at_where_it_stands(gpu):
    """Weights before the layer that changed, keys that are no numbers, a context that spans fewer directions."""
    layer, moment, edit, latents = ready("conv", gpu)
    rc.rewrite(layer, moment, edit, latents, rank=1)
    weight = layer.generator[1].weight
    before = weight.held.clone()
    weight.held.mul_(2)
    with pytest.raises(rc.MismatchError, match="other weights before"):
        rc.rewrite(layer, moment, edit, latents, rank=1)
    weight.held.fill_(torch.nan)
    moment.fingerprint = None
    with pytest.raises(rc.NonFiniteError, match="keys of '4' hold NaN"):
        rc.rewrite(layer, moment, edit, latents, rank=1)
    weight.held.zero_()
    with pytest.raises(rc.RewriteCoreError, match="Every context key is zero|span"):
        rc.rewrite(layer, moment, edit, latents, rank=4)
    weight.held.copy_(before)
    rc.rewrite(layer, moment, edit, latents, rank=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_weight_that_was_changed_is_known_as_such(gpu):
    """Also one that was written to without torch's knowledge."""
    layer, moment, edit, latents = ready("conv", gpu)
    first = rc.rewrite(layer, moment, edit, latents, rank=1).fitted_to
    assert rc.rewrite(layer, moment, edit, latents, rank=1).fitted_to == first
    layer.generator[4].weight.held[0, 0, 0, 0] += 1
    other = rc.rewrite(layer, moment, edit, latents, rank=1).fitted_to
    assert other != first and other == layer.weight_fingerprint(layer.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_moment_is_kept_on_the_layers_gpu_until_it_changes(gpu):
    layer, moment, edit, latents = ready("conv", gpu)
    rc.rewrite(layer, moment, edit, latents, rank=1)
    kept = moment.on(torch.device("cuda:0"))
    assert (
        isinstance(kept._sum, Away) and moment.on(torch.device("cuda:0")) is kept and moment._sum.device.type == "cpu"
    )
    moment.update(torch.randn(100, 8))
    again = moment.on(torch.device("cuda:0"))
    assert again is not kept and torch.equal(again._sum.cpu(), moment._sum)
    other = moment.on(torch.device("cuda:1"))
    assert other._sum.device.index == 1 and moment.on(torch.device("cuda:0")) is again
    moment.merge(moment.to("cuda:1"))
    assert torch.equal(moment.on(torch.device("cuda:1")).matrix().cpu(), moment.matrix())
    assert again.on(torch.device("cpu")).count == 64 * 64 + 100  # what it was
    with pytest.raises(rc.ArgumentError, match="meta device, where it has no numbers"):
        rc.rewrite(layer, moment.to("meta"), edit, latents, rank=1)


def test_a_factor_of_a_sum_that_was_is_not_kept():
    """A thread that is at it while another adds keys."""
    moment = rc.SecondMoment(4)
    moment.update(torch.eye(4))
    made, started, go = moment._made, threading.Event(), threading.Event()
    blocks = moment.blocks

    def slow():
        found = blocks()
        started.set()
        go.wait(10)
        return found

    moment.blocks = slow
    thread = threading.Thread(target=lambda: moment.factor)
    thread.start()
    assert started.wait(10)
    moment.blocks = blocks
    moment.update(3 * torch.eye(4))
    go.set()
    thread.join()
    assert made.factor is not None and moment._made.factor is None
    assert torch.allclose(moment.factor.lower @ moment.factor.lower.mT, moment.matrix())


def test_a_moment_of_a_gpu_is_as_good(gpu, tmp_path):
    """The same file, the same checks, the same directions but for rounding."""
    layer, moment, _, latents = ready("stylegan2", gpu)
    moved = moment.to("cuda:0")
    assert isinstance(moved._sum, Away) and moved.to("cuda:0") is moved
    moved.check(layer, latents)
    moment.save(tmp_path / "one"), moved.save(tmp_path / "other")
    one, other = rc.SecondMoment.load(tmp_path / "one"), rc.SecondMoment.load(tmp_path / "other")
    assert torch.equal(one._sum, other._sum) and one._facts() == other._facts() and other._sum.device.type == "cpu"
    rows = torch.randn(50, moment.channels, dtype=torch.float64)
    moment.update(rows), moved.update(gpu.put(rows))
    assert relative(moved._sum.cpu(), moment._sum) <= 1e-14 and moment.count == moved.count
    one, other = moment.solve(rows[:3]), moved.solve(gpu.put(rows[:3]))
    assert isinstance(other, Away) and relative(other.cpu(), one) <= 1e-10
    one = rc.context_directions(moment, rows[:9], rank=4)
    for own in (moment, moved):
        other = rc.context_directions(own, gpu.put(rows[:9]), rank=4)
        assert isinstance(other, Away) and relative(other.cpu(), one) <= 1e-9
    other = rc.context_directions(moved, rows[:9], rank=4)
    assert not isinstance(other, Away) and relative(other, one) <= 1e-9


LOOKS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "place of the host": lambda x: x[torch.tensor([0, 1])],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "eigh": lambda x: torch.linalg.eigh(x @ x.mT),
    "svd": lambda x: torch.linalg.svd(x),
    "inv": lambda x: torch.linalg.inv(x @ x.mT + torch.eye(3, device=x.device)),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "sent as it is": lambda x: torch.ones(3).to(x.device),
    "sent from pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "copy_": lambda x: torch.ones(3, 4).copy_(x),
    "copied to": lambda x: x.copy_(torch.ones(3, 4)),
}
NO_LOOKS = {
    "sums": lambda x: (x @ x.mT).sum(),
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(x @ x.mT),
    "places of its own": lambda x: x[x.argmax(0)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "views": lambda x: x[None, 1:, ..., 0],
    "pinned": lambda x: waits.sent(torch.ones(3), x.device),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_the_stand_in_misses_none(kind, gpu):
    x = gpu.put(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    gpu.clear()
    LOOKS[kind](x)
    assert gpu.waits


@pytest.mark.parametrize("kind", NO_LOOKS)
def test_the_stand_in_invents_none(kind, gpu):
    x = gpu.put(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    gpu.clear()
    NO_LOOKS[kind](x)
    assert not gpu.waits and (gpu.launches or kind == "views")


def test_looks_are_put_off_and_come_with_the_next_wait(gpu):
    x, runs = gpu.put(torch.arange(3.0)), []
    gpu.clear()

    def work():
        runs.append(waits.unlikely((x > 5).any()))
        asked = waits.later(x.sum())
        first = waits.on_host(x[1:])
        return first.tolist(), asked().item(), waits.likely((x >= 0).all())

    assert waits.supposing(work) == ([1.0, 2.0], 3.0, True) and runs == [False]
    assert len(gpu.waits) == 2  # with what was asked for, and at the end
    x.held[0] = 9
    assert waits.supposing(work) == ([1.0, 2.0], 12.0, True) and runs == [False, False, True]  # it ran again

    def fails():
        waits.unlikely((x > 5).any())
        raise ValueError("of what is not so")

    with pytest.raises(ValueError, match="not so"):
        waits.supposing(fails)
    assert waits._running.get() is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (8, 6), (8, 9), (10, 3), (12, 0)])
def test_a_gpu_that_is_slow_in_float64_is_told_of(capability):
    """No kernel is passed over for it, as what else there is computes in float64 as well."""
    slow = capability not in [(8, 0), (9, 0), (10, 0)]
    with Machine(capability):
        told = rc.explain()
    here = {choice.op: choice for choice in told.choices if choice.device == "cuda"}
    name = ".".join(map(str, capability))
    for op, choice in here.items():
        assert bool(choice.note) == (slow and op in ("spd_solve", "fit_low_rank")), op
        assert choice.note is None or (name in choice.note and "few float64 units" in choice.note)
    assert here["fit_low_rank"].backend == "triton"
    assert ("note" in told._repr_html_()) == slow
