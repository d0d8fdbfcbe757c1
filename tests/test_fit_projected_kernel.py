"""The GPU kernel of fit_projected (csrc/fit_projected_cuda/) on the CPU, a fiber a thread: steps, races, memory."""

import pytest
import torch
from helpers.fit_projected_kernel import Extension
from helpers.gpu_kernels import ADDRESS, Failed, barriers_of, build, stand_in
from helpers.projected_problems import agree, make, single

from rewrite_core.ops import fit_projected
from rewrite_core.ops.fit_projected_op import cuda

SEEDS = range(4)  # of the order that threads run in
BARRIERS = barriers_of("fit_projected_cuda/layout.h")
OF_CLUSTERS = "products_there"
STEPS = 7  # with two projections, and the last step's


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build("fit_projected", ADDRESS, tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return build("fit_projected", [], tmp_path_factory.mktemp("fast"))


@pytest.fixture
def by(tmp_path, monkeypatch):
    """Calls the kernel in a form and with so many blocks."""

    def function(program, form, blocks, **options):
        made = Extension(program, tmp_path, form, blocks, options)
        stand_in(monkeypatch, "fit_projected", cuda, made)

        def call(*arguments, **more):
            cuda._plan.cache_clear()
            try:
                return fit_projected(*arguments, **more, backend="cuda")
            finally:
                cuda._plan.cache_clear()

        call.launches = made.launches
        return call

    return function


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize(
    ("sizes", "form", "blocks", "loss"),
    [
        ({}, 0, 16, "l2"),
        ({}, 1, 4, "l1"),
        ({"channels": 33, "size": (5, 5)}, 1, 4, "l2"),
        ({"inputs": 3, "size": (10, 10)}, 1, 1, "l1"),
        ({"inputs": 3, "size": (1, 1)}, 1, 2, "l2"),
        ({"inputs": 100, "kernel": 1, "size": (1, 9), "channels": 70}, 2, 2, "l1"),
        ({"inputs": 5, "kernel": 5, "size": (6, 7)}, 1, 4, "l2"),
        ({"inputs": 1, "rank": 1, "channels": 1}, 1, 2, "l1"),
        ({"inputs": 7, "rank": 0, "size": (4, 5)}, 1, 2, "l2"),
        ({"inputs": 7, "rank": 7, "size": (4, 5)}, 1, 2, "l1"),
    ],
    ids=str,
)
def test_steps_of_autograd(sizes, form, blocks, loss, demodulated, by, program):
    arguments, options = make(**sizes, demodulated=demodulated)
    options |= {"steps": STEPS, "project_every": 3, "loss": loss}
    call = by(program, form, blocks)
    agree(arguments, options, run=call)
    assert len(call.launches) == 1


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize(("rank", "blocks"), [(2, 1), (3, 2)])
def test_projected_gradient(rank, blocks, demodulated, by, program):
    """Three directions of nine taps are more than the buffer holds at a time."""
    arguments, options = make(inputs=5 * blocks, size=(4, 5), rank=rank, demodulated=demodulated)
    options |= {"steps": STEPS, "project_every": 4}
    agree(arguments, options, project_gradient=True, run=by(program, 1, blocks))


@pytest.mark.parametrize(("every", "steps"), [(10, 1), (1, 3), (2, 5)])
def test_rhythm(every, steps, by, program):
    arguments, options = make(inputs=3, demodulated=True)
    agree(arguments, options | {"steps": steps, "project_every": every}, run=by(program, 1, 2))


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_goal_equal_to_the_value_pulls_at_nothing(slope, by, program):
    """The value as the layer computes it differs from ours by rounding: that must not become an l1 gradient."""
    arguments, options = make(inputs=3, demodulated=True)
    operator, base, _ = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"slope": slope, "steps": 3}
    call = by(program, 1, 2)
    value = base * 1.000001
    fit = call(operator, base, value, value=value, **options)
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()


def test_strides_and_progress(by, program):
    arguments, options = make(inputs=3, demodulated=True)
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"steps": 3}
    call = by(program, 1, 2)
    plain = call(operator, base, target, **options)
    odd = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (base, target)]
    seen = []
    found = call(operator, *odd, **options, progress=lambda ranges, count: seen.append(count) or ranges)
    assert seen == [1] and len(call.launches) == 2
    assert torch.equal(plain.coefficients, found.coefficients) and torch.equal(plain.losses, found.losses)


def test_nan_comes_out_as_losses(by, program):
    arguments, options = make(inputs=3)
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"steps": 3}
    target[2, 3, 3] = torch.nan
    fit = by(program, 1, 2)(operator, base, target, **options)
    assert fit.losses.isnan().all()
    others = [channel for channel in range(len(base)) if channel != 2]
    assert fit.coefficients[others].isfinite().all() and fit.coefficients[2].isnan().all()


def test_no_channels(by, program):
    call = by(program, 1, 2)
    nothing = torch.empty(0, 5, 5)
    fit = call(torch.randn(4, 3, 3, 5, 5), nothing, nothing, directions=torch.eye(4)[:1], steps=2)
    assert fit.coefficients.shape == (0, 1, 3, 3) and fit.losses.isnan().all() and not call.launches


# --- races ---

RACES = [(1, False), (1, True), (2, False), (2, True)]  # blocks; whether the gradient is projected


def race(by, fast, blocks, projects, **options):
    """Bits of a call that comes by every barrier of its kind."""
    arguments, settings = make(inputs=5 * blocks, size=(4, 5), rank=2, demodulated=True)
    settings = {name: single(part) for name, part in settings.items()} | {"steps": 4, "project_every": 2}
    fit = by(fast, 1, blocks, **options)(*single(arguments), **settings, project_gradient=projects)
    return fit.coefficients.numpy().tobytes(), fit.losses.numpy().tobytes()


@pytest.mark.parametrize(("blocks", "projects"), RACES)
def test_same_bits_in_whatever_order_threads_run(blocks, projects, by, fast):
    assert len({race(by, fast, blocks, projects, seed=seed) for seed in SEEDS}) == 1


@pytest.mark.parametrize(
    ("barrier", "blocks"),
    [(name, blocks) for name in BARRIERS[:-1] for blocks in (1, 2) if blocks > 1 or name != OF_CLUSTERS],
)
def test_no_barrier_can_be_missed(barrier, blocks, by, fast):
    """With any one taken out, some order of the threads has other results, or a thread waits in vain."""
    for projects in (False, True):
        right = race(by, fast, blocks, projects)
        for seed in SEEDS:
            try:
                if race(by, fast, blocks, projects, seed=seed, removed=BARRIERS.index(barrier)) != right:
                    return
            except Failed:
                return
    pytest.fail(f"without {barrier} nothing changes: it is not needed, or this test is blind")
