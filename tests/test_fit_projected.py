"""The fused kernel makes the steps of plain autograd in float64, on every instruction set, in every form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import read_npz
from helpers import reference
from helpers.projected_problems import agree, make, single

import rewrite_core as rc
from rewrite_core.backends import BackendUnavailable, backends_of, extension
from rewrite_core.ops import fit_projected
from rewrite_core.ops.fit_projected_op import register
from rewrite_core.ops.fit_projected_op.winograd import POINTS, transformed_maps, winograd_tile

ISAS = ["portable", "avx2", "avx512"]


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"size": (10, 10), "channels": 33},
        {"size": (4, 5)},
        {"size": (7, 6)},
        {"size": (1, 1)},
        {"size": (1, 9)},
        {"kernel": 1},
        {"kernel": 5, "size": (6, 7)},
        {"inputs": 1, "rank": 1},
        {"channels": 1, "inputs": 8},
        {"rank": 0},
        {"rank": 13},
    ],
    ids=str,
)
def test_steps_of_autograd(sizes, loss, demodulated):
    agree(*make(**sizes, demodulated=demodulated), loss=loss)


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize(("every", "steps"), [(10, 1), (10, 11), (1, 7), (5, 12)])
def test_projected_gradient_and_rhythm(every, steps, demodulated):
    arguments, options = make(demodulated=demodulated)
    options |= {"steps": steps, "project_every": every}
    for projected in (False, True):
        agree(arguments, options, project_gradient=projected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", [0, 2, 4, 5])
def test_every_instruction_set_and_tile(isa, tile):
    if ISAS.index(isa) > ISAS.index(extension().isa()):
        pytest.skip(f"this CPU has no {isa}")

    def run(*arguments, **options):
        problem = []

        class Catch:
            load = staticmethod(lambda: lambda given, _: problem.append(given) or (torch.empty(0), torch.empty(0)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(register, "select", lambda *_: Catch)
            fit_projected(*arguments, **options)
        return rc.ops.ProjectedResult(*register.run_cpp(problem[0], isa=isa, tile=tile))

    for demodulated in (False, True):
        agree(*make(channels=19, size=(6, 11), demodulated=demodulated), run=run)


def test_the_same_bits_for_any_number_of_threads():
    arguments, options = make(channels=40, size=(5, 5))
    arguments, options = single(arguments), {name: single(part) for name, part in options.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fit_projected(*arguments, **options, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    parts = []  # in parts, as for a progress bar: the same again
    watched = fit_projected(*arguments, **options, backend="cpp", progress=lambda ranges, n: parts.append(n) or ranges)
    assert parts[0] > 1
    for other in (*found[1:], watched):
        assert torch.equal(found[0].coefficients, other.coefficients) and torch.equal(found[0].losses, other.losses)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_goal_equal_to_the_value_pulls_at_nothing(slope):
    """The value as the layer computes it differs from ours by rounding: that must not become an l1 gradient."""
    arguments, options = make(demodulated=True)
    operator, base, _ = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"slope": slope}
    weight, style, eps = options["demodulation"]
    power = (weight * style[:, None, None]).square().sum((1, 2, 3)) + eps
    value = 1.4 * F.leaky_relu(base / power.sqrt()[:, None, None] + options["shift"], slope)
    fit = fit_projected(operator, base, value, value=value, **options, backend="cpp")
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()


def test_strides_and_padding_of_the_input_do_not_matter():
    arguments, options = make(demodulated=True)
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()}
    plain = fit_projected(operator, base, target, **options, backend="cpp")
    odd = [
        torch.stack([part, part], -1)[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2)
        for part in (base, target)
    ]
    options["shift"] = options["shift"].expand_as(base).transpose(1, 2).contiguous().transpose(1, 2)
    found = fit_projected(operator, *odd, **options, backend="cpp")
    assert torch.equal(plain.coefficients, found.coefficients) and torch.equal(plain.losses, found.losses)


def test_no_channels():
    operator = torch.randn(4, 3, 3, 5, 5)
    for backend in ("cpp", "reference"):
        fit = fit_projected(
            operator, torch.empty(0, 5, 5), torch.empty(0, 5, 5), directions=torch.eye(4)[:1], steps=2, backend=backend
        )
        assert fit.coefficients.shape == (0, 1, 3, 3)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_huge_and_tiny_numbers_stay_finite(scale):
    arguments, options = make()
    operator, base, target = (scale * part for part in single(arguments))
    options = {name: single(part) for name, part in options.items()}
    fit = fit_projected(operator, base, target, **options, backend="cpp")
    assert fit.coefficients.isfinite().all() and fit.losses.isfinite().all()


def test_dead_inputs_and_dead_channels():
    arguments, options = make(channels=20, demodulated=True)
    operator, base, target = arguments
    weight, style, eps = options["demodulation"]
    operator[3], weight[:, 3], base[4], weight[4] = 0, 0, 0, 0
    options |= {"demodulation": (weight, style, eps), "steps": 40}
    agree((operator, base, target), options, tolerance=1e-2)  # a weight of zero: its first steps turn on rounding


def test_nan_comes_out_as_losses():
    arguments, options = make()
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()}
    target[2, 3, 3] = torch.nan
    assert fit_projected(operator, base, target, **options, backend="cpp").losses.isnan().all()


def test_winograd_is_chosen_where_it_is_right():
    (operator, *_), _ = make(size=(10, 10))
    assert winograd_tile(operator) == 5 and winograd_tile(operator[:, :, :, :8, :8]) == 0  # cut: no zeros around
    assert winograd_tile(make(size=(8, 8))[0][0]) == 4 and winograd_tile(make(size=(4, 4))[0][0]) == 2
    assert winograd_tile(make(size=(1, 1))[0][0]) == 0
    assert winograd_tile(make(kernel=1)[0][0]) == 0
    operator[0, 0, 0, 5, 5] += 1e-9
    assert winograd_tile(operator) == 0


@pytest.mark.parametrize("tile", [2, 4, 5])
def test_transformed_maps_multiply_as_the_convolution_does(tile):
    (operator, *_), _ = make(inputs=8, size=(9, 11))
    weight = torch.randn(8, 3, 3, dtype=torch.float64)
    maps = transformed_maps(operator, tile).double()[0]  # [products, slots, 8]
    points = torch.tensor(POINTS[tile], dtype=torch.float64)
    n = tile + 2
    rows = torch.cat([points[:, None] ** torch.arange(3), torch.eye(3, dtype=torch.float64)[2:]])
    kernels = (rows @ weight @ rows.T).reshape(8, n * n)
    sums = torch.einsum("qsi,iq->qs", maps, kernels).reshape(n, n, -1, -(-11 // tile))
    out = torch.cat([points[:, None] ** torch.arange(tile), torch.eye(tile, dtype=torch.float64)[-1:]])
    tiles = torch.einsum("jk,jlab,lm->akbm", out, sums, out).flatten(0, 1).flatten(1)[:9, :11]
    wanted = torch.einsum("iyxhw,iyx->hw", operator, weight)
    torch.testing.assert_close(tiles, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"operator": torch.ones(3, 3, 5, 5)}, rc.RewriteCoreError, "kh, kw"),
        ({"operator": torch.ones(4, 3, 3, 5, 5, dtype=torch.int64)}, TypeError, "float32"),
        ({"base": torch.ones(5, 5)}, rc.RewriteCoreError, r"\[O, H, W\]"),
        ({"target": torch.ones(2, 5, 4)}, rc.RewriteCoreError, "target must be"),
        ({"target": torch.ones(2, 5, 5).double()}, TypeError, "target"),
        ({"directions": torch.ones(1, 3)}, rc.RewriteCoreError, "directions must be"),
        ({"shift": torch.ones(3)}, rc.RewriteCoreError, "broadcast"),
        ({"loss": "l3"}, rc.RewriteCoreError, "no loss"),
        ({"shift": [1.0]}, TypeError, "shift must be a tensor"),
        ({"steps": 0}, rc.RewriteCoreError, "at least 1"),
        ({"steps": 3.0}, rc.RewriteCoreError, "steps must be an integer"),
        ({"project_every": "2"}, rc.RewriteCoreError, "project_every must be an integer"),
        ({"project_every": 0}, rc.RewriteCoreError, "at least 1"),
        ({"directions": None, "project_gradient": True}, rc.RewriteCoreError, "needs directions"),
        ({"slope": float("nan")}, rc.RewriteCoreError, "finite"),
        ({"demodulation": (torch.ones(2, 4, 3, 3), torch.ones(3), 0.0)}, rc.RewriteCoreError, "style must be"),
        ({"operator": torch.tensor(1.0), "directions": None}, rc.RewriteCoreError, "kh, kw"),
        ({"directions": torch.tensor(1.0)}, rc.RewriteCoreError, "directions must be"),
        ({"operator": torch.ones(4, 3, 3, 5, 5).to_sparse()}, TypeError, "operator is .* must be dense"),
        ({"target": torch.zeros(2, 5, 5).to_sparse()}, TypeError, "target is .* must be dense"),
        ({"shift": torch.zeros(2, 5, 5).to_sparse()}, TypeError, "shift is .* must be dense"),
        ({"base": torch.nested.nested_tensor([torch.ones(5, 5)])}, TypeError, "base is a nested tensor"),
        ({"directions": torch.nested.nested_tensor([torch.ones(4)])}, TypeError, "directions is a nested tensor"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "operator": torch.ones(4, 3, 3, 5, 5),
        "base": torch.ones(2, 5, 5),
        "target": torch.zeros(2, 5, 5),
        "directions": torch.eye(4)[:1],
    }
    with pytest.raises(error, match=words):
        fit_projected(**(good | change))


def test_what_the_kernel_leaves_to_others():
    cpp = next(record for record in backends_of("fit_projected") if record.name == "cpp")

    def stub(*shape, **options):
        return torch.empty((), **options).expand(shape)

    assert cpp.supports(stub(512, 3, 3, 64, 64)) is None
    assert "256" in cpp.supports(stub(512, 3, 3, 256, 256)) or "at most" in cpp.supports(stub(512, 3, 3, 256, 256))
    assert "taps" in cpp.supports(stub(4, 9, 9, 5, 5))
    assert "float64" in cpp.supports(stub(4, 3, 3, 5, 5, dtype=torch.float64))
    assert "meta" in cpp.supports(stub(4, 3, 3, 5, 5, device="meta"))
    with pytest.raises(BackendUnavailable, match="float32"):
        arguments, options = make()
        fit_projected(*arguments, **options, backend="cpp")


@pytest.mark.parametrize("name", ["projected_rank1", "lowrankgrad_rank1"])
def test_golden_curve_of_the_reference(name, golden_moment, layer, edit, latents):
    """test_rewriting holds the others, fused; here the steps through autograd are held to the same."""
    golden = read_npz("proggan_expected.npz")
    solver = rc.Projected(steps=201, project_gradient=name.startswith("lowrank"))
    for backend, status in (("reference", "autograd"), ("cpp", "fused")):
        change = reference.rewrite(layer, golden_moment, edit, latents, solver=solver, backend=backend)
        curve = golden[f"{name}_loss"]
        assert ((torch.tensor(change.losses) - curve).abs() / curve).max() < 0.02
        assert change.solver == "projected" and change.status == {status: 48}
