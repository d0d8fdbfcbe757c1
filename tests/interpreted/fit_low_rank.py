"""The kernels take the steps of the reference: see tests/test_interpreted.py."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import fit_problems as t

from rewrite_core.kernels.fit_low_rank import host, launch
from rewrite_core.kernels.fit_low_rank.structs import Mode, scratch_of, scratch_size, sizes_of
from rewrite_core.ops import fit_low_rank
from rewrite_core.ops.fit_low_rank_op import problem as facts

LOSSES = pytest.mark.parametrize("loss", ["l1", "l2"])


@pytest.fixture(autouse=True)
def unwritten_shows():
    """What is allocated is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def agree(problem, channels=2, tolerance=1e-7, config=None, max_iterations=5, **options):
    def kernel(given):
        return launch(given, config)

    return t.agree(kernel, t.few(problem, channels), tolerance, max_iterations=max_iterations, **options)


@LOSSES
@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("demodulated", [True, False])
def test_every_mode(loss, slope, demodulated):
    """Tiles and blocks that are not whole."""
    penalty = t.linear_problem(3, unknowns=18)["basis"]
    penalty = {"penalty": 1e-3 * penalty @ penalty.T, "penalty_scale": torch.linspace(1, 0, 32).double()}
    weights = torch.arange(48.0).remainder(5)
    problem = t.random_problem(2, 2, (6, 8), demodulated, slope)
    agree(problem, loss=loss, channels=1, max_iterations=3)
    agree({**problem, **penalty, "pixel_weights": weights}, channels=1, loss=loss, max_iterations=2)


@LOSSES
def test_sizes(loss):
    agree(t.random_problem(6, 3, (4, 4)), loss=loss, max_iterations=3)  # over pixels, one block of them
    agree(t.random_problem(7, 4, (5, 5), demodulated=False), channels=1, loss=loss, max_iterations=3)  # and two
    agree(t.random_problem(8, 1, (13, 12)), channels=1, loss=loss, max_iterations=3)  # two tiles
    agree(t.random_problem(11, 4, (7, 6), channels=3), channels=1, loss=loss, max_iterations=3)  # blocks of unknowns
    small = t.random_problem(5, 1, (1, 1), False)
    agree({name: small[name] for name in ("basis", "base", "target")}, loss=loss, gain=2.0)


def test_closed_form_of_many_unknowns():
    agree(t.linear_problem(unknowns=70, pixels=90), loss="l2")


@pytest.mark.parametrize("config", host.CANDIDATES, ids=str)
def test_configurations(config):
    for rank, size in ((2, (4, 3)), (3, (6, 6))):
        agree(t.random_problem(12, rank, size), channels=1, config=config, max_iterations=2)
    agree(t.linear_problem(unknowns=20, pixels=37), channels=1, config=config, loss="l2")


@pytest.mark.parametrize("kind", ["golden", "float32", "runaway"])
def test_the_same_path_to_the_end(kind):
    problem = {
        "golden": lambda: t.proggan_problem(1)[0],
        "float32": lambda: t.cast(t.random_problem(4, 1, (6, 6)), torch.float32),
        "runaway": t.runaway_problem,
    }[kind]()
    agree(problem, channels=1, tolerance=1e-5, max_iterations=60)


def test_more_channels_than_programs(monkeypatch):
    """Edits of unequal size in one launch, broadcast shift; twice the same bits."""
    monkeypatch.setattr(host, "SCRATCH", 20000)
    batch, weights = t.batch_of_unequal_edits(3)
    both = [t.agree(launch, batch, pixel_weights=weights, max_iterations=2) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(both[0][:5], both[1][:5]))


@pytest.mark.parametrize("number", range(len(t.HOSTILE)), ids=t.HOSTILE)
def test_hostile(number):
    """See test_hostile_float32_input for what each is."""
    kind, size = t.HOSTILE[number], (1e-8, 1e8)[number % 2]
    demodulated = kind != "one huge row"
    problem = t.cast(t.hostile_problem(kind, demodulated, size), torch.float32)
    problem = {name: part[4:] if name in ("base", "target", "shift") else part for name, part in problem.items()}
    if demodulated:
        problem["demodulation"] = *(part[4:] for part in problem["demodulation"][:2]), problem["demodulation"][2]
    ours = t.run(launch, **t.few(problem, 2), max_iterations=3)
    theirs = t.run(t.CPU["reference"], **t.few(problem, 2), max_iterations=3)
    t.assert_sound(ours)
    assert torch.equal(ours.status, theirs.status)
    assert ((ours.loss - theirs.loss).abs() <= 1e-3 * theirs.initial_loss).all()


@LOSSES
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_nothing_to_fit(loss, slope):
    problem = t.linear_problem()
    agree(problem, slope=slope, loss=loss, gain=0.0)
    agree({**problem, "basis": 0 * problem["basis"]}, slope=slope, loss=loss)
    agree({**problem, "target": problem["base"]}, slope=1.0, loss=loss)
    agree(problem, slope=slope, loss=loss, pixel_weights=torch.zeros(40))
    tiny = t.cast({**problem, "basis": problem["basis"] * 1e-30, "target": problem["target"] * 1e30}, torch.float32)
    found = t.run(launch, **t.few(tiny, 2), slope=slope, loss=loss, max_iterations=5)
    assert (found.status == facts.NONFINITE).all() and not found.coefficients.any() and found.loss.isfinite().all()


@pytest.mark.parametrize("kind", ["twin rows", "zero row", "constant maps"])
def test_rank_deficient_basis(kind):
    problem = t.linear_problem()
    basis = problem["basis"]
    basis[4] = basis[2] if kind == "twin rows" else 0
    basis[:] = basis[:, :1] if kind == "constant maps" else basis
    found = agree(problem, loss="l2", tolerance=0.1)  # what nothing determines differs
    assert (found.status == facts.SHIFTED).all()


@pytest.mark.parametrize("name", ["basis", "base", "target", "shift", "constant", "linear", "quadratic"])
def test_nan_and_wrong_signs_come_out_as_a_status(name):
    """On a GPU nothing is looked into."""
    good = t.prepared(max_iterations=2, **t.few(t.random_problem(0, 1, (4, 4)), 3))
    data = getattr(good, name).clone()
    data.view(-1)[0] = float("nan") if name != "constant" else -1.0
    statuses = launch(good._replace(**{name: data}))[4][0]
    assert statuses[0] == facts.NONFINITE
    assert name in ("basis", "quadratic") or (statuses[1:] != facts.NONFINITE).all()


def test_the_public_function():
    found = fit_low_rank(**t.few(t.linear_problem(), 2), backend="triton", loss="l2")
    assert found.status.eq(0).all()


@triton.jit
def scratch_kernel(scratch, out, unknowns, pixels, DUAL_FORM: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    sizes = sizes_of(unknowns, pixels, Mode(False, False, False, False, False, False, DUAL_FORM, BLOCK, PIXELS, PIXELS))
    parts = scratch_of(scratch, sizes, Mode(False, False, False, False, False, False, DUAL_FORM, BLOCK, PIXELS, PIXELS))
    end = parts.turned + sizes.tiles * PIXELS
    tl.store(out, (end.to(tl.int64) - scratch.to(tl.int64)) // 8)


@pytest.mark.parametrize(("unknowns", "pixels", "dual_form"), [(9, 100, False), (18, 7, True), (70, 300, False)])
def test_scratch_is_as_large_as_its_parts(unknowns, pixels, dual_form):
    for config in host.CANDIDATES:
        out = torch.zeros(1, dtype=torch.int64)
        scratch_kernel[(1,)](
            torch.zeros(1, dtype=torch.float64), out, unknowns, pixels, dual_form, config.block, config.pixels
        )
        order = pixels if dual_form else unknowns
        assert out.item() == scratch_size(unknowns, pixels, order, config.block, config.pixels)
