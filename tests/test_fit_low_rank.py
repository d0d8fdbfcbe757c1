import functools
import math

import numpy as np
import pytest
import torch
from helpers.fit_problems import (
    AGREEMENT,
    CPU,
    HOSTILE,
    ISAS,
    NO_GPU,
    ROUNDING_ALONE,
    UNEQUAL,
    agree,
    assert_sound,
    batch_of_unequal_edits,
    cast,
    hostile_problem,
    linear_problem,
    losses_of,
    on_gpu,
    prepared,
    proggan_problem,
    random_problem,
    run,
    runaway_problem,
    stack,
    stylegan2_problem,
    value_of,
)
from torch import library

from rewrite_core import ops
from rewrite_core.backends import backends_of, extension
from rewrite_core.ops.fit_low_rank_op import problem as facts
from rewrite_core.ops.fit_low_rank_op.model import Model

# The kernel is compiled anew for every mode: it takes part where a mode, a size or hostile data is its own.
# It has no segments.
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
ON_GPU_TOO = pytest.mark.parametrize("fit", [*CPU, pytest.param("triton", marks=ON_GPU)], indirect=True)


@pytest.fixture(params=CPU)
def fit(request):
    """The public function on one implementation; with ON_GPU_TOO also on a GPU."""
    if request.param == "triton":
        return functools.partial(run, on_gpu)
    isa = request.param.removeprefix("cpp-")
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    return functools.partial(run, CPU[request.param])


SIZES = ((4, 4), (5, 5), (6, 8), (8, 8), (10, 10), (12, 12))


RANDOM = [(seed, 1 + seed % 4, SIZES[seed % 6], seed % 8 != 7) for seed in range(20)]


def adam(problem, weights=None, loss="l1"):
    """The yardstick: the final loss of 2001 steps of Adam on Lambda from zero, lr 0.05; one number per edit
    where the problem is batched. weights [B, P] sum to 1."""
    problem = cast(problem, torch.float32)
    x = torch.zeros(*problem["base"].shape[:-1], problem["basis"].shape[-2], requires_grad=True)
    optimiser = torch.optim.Adam([x], lr=0.05)

    def objective():
        r = value_of(x, **problem) - problem["target"]
        rho = r.abs() if loss == "l1" else r.square()
        return (rho.mean(-1) if weights is None else (weights[:, None] * rho).sum(-1)).mean(-1)

    for _ in range(2001):
        optimiser.zero_grad()
        objective().sum().backward()
        optimiser.step()
    return objective().detach().double()


@functools.cache
def adam_on_random(loss):
    return adam(*stack([random_problem(*case) for case in RANDOM]), loss=loss)


def test_demodulated_change_keeps_a_share_of_the_weight(fit):
    problem = runaway_problem()
    constant, _, quadratic = problem["demodulation"]
    for loss in ("l1", "l2"):
        result = fit(**problem, loss=loss)
        x = result.coefficients
        reach = ((x @ quadratic) * x).sum(-1).div(constant).sqrt()
        assert reach.max() < facts.REACH * (1 + 1e-9)
        bounded = result.status == facts.BOUNDED
        assert bounded.any() and (reach[bounded] > 0.99 * facts.REACH).all()
        assert_sound(result, problem, loss)


def test_problems_are_the_recorded_ones():
    for kind in ("same", "up"):
        problem, value, linear_loss = stylegan2_problem(kind)
        zero = torch.zeros(len(problem["base"]), len(problem["basis"]), dtype=torch.float64)
        torch.testing.assert_close(value_of(zero, **problem), value, rtol=0, atol=1e-5)
        assert losses_of(zero, problem).mean().item() == pytest.approx(linear_loss[0].item(), rel=1e-5)
    problem, first_loss = proggan_problem(1)
    assert (problem["base"] - problem["target"]).abs().mean().item() == pytest.approx(first_loss, rel=1e-5)


GOLDEN = {
    "stylegan2-same": lambda: stylegan2_problem("same")[0],
    "stylegan2-up": lambda: stylegan2_problem("up")[0],
    "proggan-1": lambda: proggan_problem(1)[0],
    "proggan-3": lambda: proggan_problem(3)[0],
}


@functools.cache
def adam_on_golden(name):
    return adam(GOLDEN[name]()).item()


@pytest.mark.parametrize("name", GOLDEN)
def test_l1_is_no_worse_than_adam_on_golden_layers(fit, name):
    problem = GOLDEN[name]()
    result = fit(**problem)
    assert_sound(result, problem)
    assert result.loss.mean().item() <= 1.001 * adam_on_golden(name)
    assert (result.status == facts.CONVERGED).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    "number", range(len(RANDOM)), ids=lambda i: "seed{}-rank{}-{}-demodulated={}".format(*RANDOM[i])
)
def test_no_worse_than_adam_on_random_layers(number, loss):
    problem = random_problem(*RANDOM[number])
    result = ops.fit_low_rank(**problem, loss=loss)
    assert_sound(result, problem, loss)
    assert result.loss.mean().item() <= 1.01 * adam_on_random(loss)[number].item()


@pytest.mark.parametrize("rank", [1, 3])
def test_linear_l1_is_optimal(fit, rank):
    """A linear program, so duality certifies the optimum: any |z| <= 1 with basis z = 0 bounds the loss from
    below by z . r0. At the optimum J residuals vanish, and there z is whatever makes basis z = 0."""
    problem, _ = proggan_problem(rank)
    basis = problem["basis"]
    result = fit(**problem)
    r0 = problem["base"] - problem["target"]
    r = r0 + result.coefficients @ basis
    zero = r.abs().argsort(-1)[:, : len(basis)]
    z = r.sign().scatter(1, zero, 0.0)
    solved = torch.linalg.solve(basis.T[zero].mT, -(z @ basis.T))
    z = z.scatter(1, zero, solved)
    assert (z @ basis.T).abs().max() < 1e-6
    bound = (z / z.abs().amax(-1, keepdim=True).clamp_min(1.0) * r0).mean(-1)
    assert (result.loss <= (1 + 1e-4) * bound).all()


@ON_GPU_TOO
@pytest.mark.parametrize("unknowns", [1, 9, 36, 100])
def test_closed_form_is_least_squares(fit, unknowns):
    problem = linear_problem(unknowns=unknowns, pixels=120)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = fit(**problem, gain=1.7, pixel_weights=weights, loss="l2")
    root = weights.sqrt()
    wanted = root * (problem["target"] - 1.7 * problem["base"])
    exact = torch.linalg.lstsq((1.7 * root * problem["basis"]).T, wanted.T).solution.T
    torch.testing.assert_close(result.coefficients, exact, rtol=1e-8, atol=1e-10)
    assert (result.status == facts.CONVERGED).all() and result.solver == "closed_form"
    assert (result.iterations == 1).all()


@ON_GPU_TOO
@pytest.mark.parametrize("kind", ["fewer pixels", "twin rows", "zero row", "constant maps", "nearly twin rows"])
def test_closed_form_of_rank_deficient_basis(fit, kind):
    problem = linear_problem(pixels=5 if kind == "fewer pixels" else 40)
    basis = problem["basis"]
    if kind == "twin rows":
        basis[4] = basis[2]
    elif kind == "nearly twin rows":
        basis[4] = basis[2] + 1e-9 * basis[4]
    elif kind == "zero row":
        basis[4] = 0
    elif kind == "constant maps":
        basis[:] = basis[:, :1]
    result = fit(**problem, loss="l2")
    wanted = problem["target"] - problem["base"]
    best = (wanted - wanted @ torch.linalg.pinv(basis, rtol=1e-7) @ basis).square().mean(-1)
    assert_sound(result, None)
    assert (result.status == facts.SHIFTED).all()
    # what tells nearly equal rows apart is fitted a little too, with coefficients that stay bounded
    torch.testing.assert_close(result.loss, best, rtol=1e-5 if kind == "nearly twin rows" else 1e-8, atol=1e-20)
    assert result.coefficients.abs().max() < 1e3 * wanted.abs().max()


@ON_GPU_TOO
@pytest.mark.parametrize("same_scale", [True, False])
def test_closed_form_with_penalty(fit, same_scale):
    problem = linear_problem()
    factor = linear_problem(1)["basis"]
    penalty = factor @ factor.T / 40
    scale = torch.full((7,), 0.3, dtype=torch.float64)
    if not same_scale:
        scale = scale * torch.arange(7)
    result = fit(**problem, loss="l2", penalty=penalty, penalty_scale=scale)
    gram = problem["basis"] @ problem["basis"].T / 40
    right = (problem["target"] - problem["base"]) @ problem["basis"].T / 40
    exact = torch.linalg.solve(gram + scale[:, None, None] * penalty, right)
    torch.testing.assert_close(result.coefficients, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_of_a_channel_is_the_same_alone(fit, dtype):
    """Channels that share vectors, and of one penalty scale a factor, do not see each other."""
    parts = [linear_problem(), linear_problem(1), linear_problem(2)]
    data = {"basis": parts[0]["basis"].to(dtype)}
    for name in ("base", "target"):
        data[name] = torch.cat([part[name] for part in parts])[:19].to(dtype)
    factor = parts[1]["basis"]
    scale = torch.tensor([0.3, 0.3, 0.1], dtype=torch.float64).repeat(7)[:19]
    how = {"loss": "l2", "penalty": factor @ factor.T / 40}
    together = fit(**data, **how, penalty_scale=scale)
    for o in range(19):
        one = {name: value if name == "basis" else value[o : o + 1] for name, value in data.items()}
        alone = fit(**one, **how, penalty_scale=scale[o : o + 1])
        torch.testing.assert_close(alone.coefficients[0], together.coefficients[o], rtol=1e-6, atol=1e-9)
        if fit.args[0] is not CPU["reference"]:
            assert alone.loss[0] == together.loss[o] and (alone.coefficients[0] == together.coefficients[o]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("name", AGREEMENT)
def test_cpp_agrees_with_reference(isa, loss, name):
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    problem = AGREEMENT[name]()
    ours, theirs = run(CPU[f"cpp-{isa}"], **problem, loss=loss), run(CPU["reference"], **problem, loss=loss)
    assert_sound(ours, problem, loss)
    torch.testing.assert_close(ours.initial_loss, theirs.initial_loss, rtol=1e-12, atol=0)
    # near a kink a rounding error can send a channel down another slope: the typical channel agrees to the
    # last digits, every one in what it reached
    gap = (ours.loss - theirs.loss).abs() / theirs.initial_loss
    assert gap.median() < 1e-9 and gap.max() < 5e-3, f"worst channel {gap.argmax()}"
    little = 1e-5 * theirs.initial_loss.mean().item()  # where next to nothing is left
    assert ours.loss.mean().item() == pytest.approx(theirs.loss.mean().item(), rel=1e-3, abs=little)
    assert (ours.status == theirs.status).double().mean() > 0.9
    apart = (ours.coefficients - theirs.coefficients).norm(dim=-1) / (theirs.coefficients.norm(dim=-1) + 1e-300)
    assert (apart < 1e-3).double().mean() > 0.75
    if name == "proggan-3":  # well-conditioned and convex: the same path
        assert (apart < 1e-6).all() and torch.equal(ours.iterations, theirs.iterations)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("rank", "isa"), [(2, "avx512"), *((5, isa) for isa in ISAS), (6, "avx512")])
def test_cpp_takes_the_steps_of_reference(steps, rank, isa):
    """A few steps leave no time for rounding to matter, so every piece of the step must agree: with few unknowns, with
    a quadratic that is read by half (45, a number of odd rows), and with more unknowns than pixels."""
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    problem = random_problem(2, rank, (6, 8))
    spread = linear_problem(3, unknowns=9 * rank)["basis"]
    extra = {
        "pixel_weights": torch.arange(48.0).remainder(5),
        "penalty": 1e-3 * spread @ spread.T,
        "penalty_scale": torch.linspace(0, 1, 32),
    }
    for more in ({}, extra):
        for loss in ("l1", "l2"):
            ours, theirs = (
                run(CPU[name], **problem, **more, loss=loss, max_iterations=steps)
                for name in (f"cpp-{isa}", "reference")
            )
            torch.testing.assert_close(ours.coefficients, theirs.coefficients, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=0)


def test_threads_do_not_change_a_bit():
    problem = cast(random_problem(9, 2, (8, 8), channels=256), torch.float32)  # work enough for three threads
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.fit_low_rank(**problem, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, theirs in zip(results[0][:5], result[:5]):
            assert torch.equal(ours, theirs)


def test_more_edits_than_one_group():
    """Prepared arrays of 2^24 doubles at most are held at a time; a later group must find its own edits."""
    generator = torch.Generator().manual_seed(11)
    basis = torch.randn(64, 576, 60, generator=generator)
    base, target = torch.randn(2, 64, 2, 60, generator=generator)
    assert 64 * 576 * 576 > 1 << 24
    together = ops.fit_low_rank(basis, base, target, backend="cpp", max_iterations=2)
    for i in (0, 43, 44, 63):
        alone = ops.fit_low_rank(basis[i], base[i], target[i], backend="cpp", max_iterations=2)
        assert torch.equal(together.coefficients[i], alone.coefficients)


def segmented_problem(seed=0, rank=2, sizes=((6, 6), (4, 5), (5, 5)), **options):
    """Regions of pictures with styles of their own, side by side; the first problem's size of the coefficients. Also
    the problems they are made of."""
    parts = [random_problem(seed + i, rank, size, **options) for i, size in enumerate(sizes)]
    parts = [part | {"shift": part["shift"].expand_as(part["base"])} for part in parts]
    together = {name: torch.cat([part[name] for part in parts], -1) for name in ("basis", "base", "target", "shift")}
    together["demodulation"] = tuple(map(torch.stack, zip(*(part["demodulation"] for part in parts))))
    counts = torch.tensor([part["base"].shape[1] for part in parts])
    together["segments"] = torch.arange(len(parts)).repeat_interleave(counts)
    return together | {"slope": parts[0]["slope"], "gain": parts[0]["gain"]}, parts


def shared_losses(x, parts, loss="l1"):
    counts = [part["base"].shape[1] for part in parts]
    return sum(count * losses_of(x, part, loss) for count, part in zip(counts, parts)) / sum(counts)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize(
    ("rank", "sizes"), [(1, ((9, 9), (9, 9))), (2, ((6, 6), (4, 5), (5, 5))), (4, ((3, 3), (4, 4)))]
)
def test_segments_have_their_own_demodulation(fit, rank, sizes, slope, loss):
    problem, parts = segmented_problem(3, rank, sizes, slope=slope)
    result = fit(**problem, loss=loss)
    zero = torch.zeros_like(result.coefficients)
    torch.testing.assert_close(result.initial_loss, shared_losses(zero, parts, loss), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.loss, shared_losses(result.coefficients, parts, loss), rtol=1e-9, atol=1e-12)
    assert (result.loss <= result.initial_loss).all() and result.loss.mean() < 0.9 * result.initial_loss.mean()
    theirs = run(CPU["reference"], **problem, loss=loss)
    gap = (result.loss - theirs.loss).abs() / theirs.initial_loss
    assert gap.median() < 1e-8 and gap.max() < 0.02


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_segments_are_no_worse_than_adam(loss):
    problem, parts = segmented_problem(11, 1, ((8, 8), (6, 7)))
    result = ops.fit_low_rank(**problem, loss=loss)
    x = torch.zeros_like(result.coefficients).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)
    for _ in range(2001):
        optimiser.zero_grad()
        shared_losses(x, parts, loss).sum().backward()
        optimiser.step()
    assert result.loss.mean().item() <= 1.01 * shared_losses(x.detach(), parts, loss).mean().item()


def test_equal_segments_are_none(fit):
    problem = random_problem(5, 2, (6, 7))
    alone = fit(**problem)
    constant, linear, quadratic = problem["demodulation"]
    for places in (torch.zeros(42), torch.arange(42) % 3, torch.ones(42)):
        three = torch.stack([constant] * 3), torch.stack([linear] * 3), torch.stack([quadratic] * 3)
        parted = fit(**problem | {"demodulation": three, "segments": places.int()})
        torch.testing.assert_close(parted.initial_loss, alone.initial_loss, rtol=1e-12, atol=0)
        gap = (parted.loss - alone.loss).abs() / alone.initial_loss
        assert gap.median() < 1e-9 and gap.max() < 5e-3


def test_segments_in_any_order_batch_and_weight(fit):
    problem, parts = segmented_problem(7, 1)
    alone = fit(**problem)
    order = torch.randperm(problem["base"].shape[1], generator=torch.Generator().manual_seed(0))
    moved = {
        k: v[..., order] if k in ("basis", "base", "target", "shift", "segments") else v for k, v in problem.items()
    }
    gap = (fit(**moved).loss - alone.loss).abs() / alone.initial_loss
    assert gap.median() < 1e-9 and gap.max() < 5e-3
    # weight zero removes a segment; a batch has edits with fewer of them
    first = parts[0]["base"].shape[1]
    weights = torch.stack([torch.ones(len(order)), (torch.arange(len(order)) < first).float()])
    batch = {k: v if k in ("slope", "gain") else torch.stack([v, v]) for k, v in problem.items() if k != "demodulation"}
    batch["demodulation"] = tuple(torch.stack([part, part]) for part in problem["demodulation"])
    both = fit(**batch, pixel_weights=weights)
    torch.testing.assert_close(both.loss[0], alone.loss, rtol=1e-6, atol=1e-9)
    gap = (both.loss[1] - fit(**parts[0]).loss).abs() / both.initial_loss[1]
    assert gap.median() < 1e-9 and gap.max() < 5e-3


def test_derivative_of_segments_against_finite_differences():
    problem, _ = segmented_problem(3, 1)
    names = ("basis", "base", "target", "shift")
    rest = (problem[name] for name in ("demodulation", "slope", "gain", "segments"))
    model = Model(*(problem[name] for name in names), *rest)
    x = 0.02 * torch.randn(32, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(x):
        lin, m, _ = model.linearise(x)
        return model.spread(m) * lin

    jacobian, h = model.jacobian(*model.linearise(x)), 1e-6
    for j in range(9):
        side = torch.zeros_like(x)
        side[:, j] = h
        torch.testing.assert_close((value(x + side) - value(x - side)) / (2 * h), jacobian[:, j], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("demodulated", [True, False])
def test_derivative_against_finite_differences(demodulated):
    problem = random_problem(3, 2, (5, 5), demodulated)
    demodulation = problem.get("demodulation")
    model = Model(
        problem["basis"],
        problem["base"],
        problem["target"],
        problem["shift"].expand_as(problem["base"]),
        None if demodulation is None else tuple(part[None] for part in demodulation),
        problem["slope"],
        problem["gain"],
    )
    x = 0.05 * linear_problem(2, unknowns=18, pixels=32)["basis"].T.contiguous()
    kink = torch.full((32,), 0.1, dtype=torch.float64)

    def residual(x):
        lin, m, dm = model.linearise(x)
        return model.residual(lin, m, kink), (lin, m, dm)

    (_, steep, bend), (lin, m, dm) = residual(x)
    jacobian = steep[:, None] * model.jacobian(lin, m, dm)
    h = 1e-6
    for j in range(18):
        side = torch.zeros_like(x)
        side[:, j] = h
        (above, steep_above, _), (lin_above, m_above, _) = residual(x + side)
        (below, steep_below, _), (lin_below, m_below, _) = residual(x - side)
        torch.testing.assert_close((above - below) / (2 * h), jacobian[:, j], rtol=1e-6, atol=1e-7)
        turn = (m_above * lin_above - m_below * lin_below) / (2 * h)
        torch.testing.assert_close((steep_above - steep_below) / (2 * h), bend * turn, rtol=1e-4, atol=1e-4)


def test_sharp_kink_is_the_limit_of_the_rounded_one():
    problem = random_problem(3, 2, (5, 5))
    model = Model(*(problem[k] for k in ("basis", "base", "target", "shift")), None, 0.2, 1.4)
    lin, m, _ = model.linearise(torch.zeros(32, 18, dtype=torch.float64))
    rounded = model.residual(lin, m, torch.full((32,), 1e-9, dtype=torch.float64))
    for ours, sharp in zip(rounded[:2], model.residual(lin, m)[:2]):
        torch.testing.assert_close(ours, sharp, rtol=0, atol=1e-6)


@ON_GPU_TOO
def test_batch_of_padded_edits_equals_single_ones(fit):
    problems = [random_problem(*case) for case in UNEQUAL]
    batch, weights = batch_of_unequal_edits()
    kwargs = {"slope": 0.2, "gain": math.sqrt(2.0), "max_iterations": 8}
    together = fit(**{**batch, **kwargs}, pixel_weights=weights)
    assert together.coefficients.shape == (3, 32, 9) and together.loss.shape == (3, 32)
    for i, problem in enumerate(problems):
        alone = fit(**{**problem, **kwargs})
        torch.testing.assert_close(together.loss[i], alone.loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together.initial_loss[i], alone.initial_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(together.coefficients[i], alone.coefficients, rtol=1e-5, atol=1e-7)


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_zero_weight_removes_a_pixel(fit, loss):
    problem = proggan_problem(1)[0]
    keep = torch.arange(problem["base"].shape[1]).remainder(3) > 0
    less = {name: item[:, keep] for name, item in problem.items()}
    weighted = fit(**problem, pixel_weights=7.0 * keep, loss=loss)
    torch.testing.assert_close(weighted.coefficients, fit(**less, loss=loss).coefficients, rtol=1e-6, atol=1e-9)


def test_integer_weight_is_a_repeated_pixel(fit):
    problem = linear_problem()
    weights = torch.arange(40).remainder(3)
    repeated = {name: item.repeat_interleave(weights, 1) for name, item in problem.items()}
    for loss in ("l1", "l2"):
        one, other = fit(**problem, pixel_weights=weights.double(), loss=loss), fit(**repeated, loss=loss)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=0)


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("linear", [True, False])
def test_penalty_trades_loss_for_preservation(fit, loss, linear):
    problem = proggan_problem(1)[0] if linear else random_problem(1, 1, (8, 8))
    basis = problem["basis"]
    penalty = basis @ basis.T / basis.shape[1]
    penalties, losses = [], []
    for strength in (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e3):
        scale = torch.full((len(problem["base"]),), strength)
        result = fit(**problem, loss=loss, penalty=penalty, penalty_scale=scale, max_iterations=100)
        x = result.coefficients
        penalties.append(torch.einsum("oj,jk,ok->o", x, penalty, x).mean().item())
        losses.append(result.loss.mean().item())
        assert_sound(result, problem, loss)
    slack = 1e-4 if linear else 1e-2  # other minima when nonconvex
    for i in range(1, len(penalties)):
        assert penalties[i] <= (1 + slack) * penalties[i - 1]
        assert losses[i] >= (1 - slack) * losses[i - 1]
    assert penalties[-1] < 1e-2 * penalties[0]
    free = fit(**problem, loss=loss, max_iterations=100)
    assert losses[0] == pytest.approx(free.loss.mean().item(), rel=1e-2)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("demodulated", [True, False])
def test_zero_residual_is_left_alone(fit, loss, demodulated):
    problem = dict(random_problem(0, 1, (4, 4), demodulated))
    zero = torch.zeros(32, 9, dtype=torch.float64)
    met = value_of(zero, **problem)
    problem["target"] = torch.cat([met[:16], problem["target"][16:]])
    result = fit(**problem, loss=loss)
    assert_sound(result, problem, loss)
    assert (result.status[:16] == facts.ZERO_RESIDUAL).all() and not result.coefficients[:16].any()
    assert (result.loss[16:] < 0.8 * result.initial_loss[16:]).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_reachable_target_is_reached(fit, loss):
    problem = dict(random_problem(0, 1, (6, 6)))
    x = 0.1 * linear_problem(5, pixels=32)["basis"].T
    problem["target"] = value_of(x, **problem)
    result = fit(**problem, loss=loss, max_iterations=200)
    found = result.loss < 1e-4 * result.initial_loss ** (1 if loss == "l1" else 2)
    assert found.double().mean() > 0.8
    torch.testing.assert_close(result.coefficients[found], x[found], rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize("kind", ["constant maps", "twin rows", "zero basis", "one pixel", "relu", "zero gain"])
def test_degenerate_problems(fit, loss, slope, kind):
    problem = dict(random_problem(0, 1, (4, 4)), slope=slope)
    if kind == "constant maps":
        problem = {k: v[:, :1].expand_as(v) if k in ("basis", "base", "target") else v for k, v in problem.items()}
    elif kind == "twin rows":
        problem["basis"] = problem["basis"][:1].expand(9, -1)
        problem["demodulation"] = None
    elif kind == "zero basis":
        problem["basis"] = torch.zeros_like(problem["basis"])
        problem["demodulation"] = None
    elif kind == "one pixel":
        problem = {k: v[:, :1] if k in ("basis", "base", "target", "shift") else v for k, v in problem.items()}
    elif kind == "relu":
        problem["slope"] = 0.0
    elif kind == "zero gain":
        problem["gain"] = 0.0
    result = fit(**problem, loss=loss)
    assert_sound(result, problem, loss)
    if kind in ("zero basis", "zero gain"):
        assert (result.status == facts.DEGENERATE).all() and not result.coefficients.any()
    elif kind == "one pixel":  # bounded by demodulation, so not always reachable
        assert (result.loss < 0.5 * result.initial_loss).double().mean() > 0.5
    else:
        assert result.loss.mean() < 0.99 * result.initial_loss.mean()


@ON_GPU_TOO
def test_no_pixel_counts(fit):
    """All weights zero in one edit of a batch."""
    problem = random_problem(0, 1, (4, 4))
    batch = {name: problem[name].expand(2, -1, -1) for name in ("basis", "base", "target")}
    weights = torch.tensor([0.0, 1.0])[:, None].expand(2, 16)
    for slope, loss in ((0.2, "l1"), (0.2, "l2"), (1.0, "l1"), (1.0, "l2")):
        result = fit(**batch, slope=slope, pixel_weights=weights, loss=loss)
        assert_sound(result)
        assert (result.status[0] == facts.DEGENERATE).all() and not result.coefficients[0].any()
        assert not result.loss[0].any() and (result.status[1] != facts.DEGENERATE).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("what", ["values", "basis"])
def test_scales(fit, dtype, size, what):
    """The result scales as it should, so the algorithm sees the same problem at any scale."""
    problem = dict(random_problem(0, 1, (6, 6)), shift=None)
    plain = fit(**problem, max_iterations=12)
    scaled = dict(problem)
    constant, linear, quadratic = problem["demodulation"]
    if what == "values":  # demodulation forgets the scale of the weights, so put it into the gain
        scaled.update(gain=problem["gain"] * size, target=problem["target"] * size)
    else:
        scaled.update(basis=problem["basis"] * size, demodulation=(constant, linear * size, quadratic * size**2))
    result = fit(**cast(scaled, dtype), max_iterations=12)
    assert_sound(result)
    ratio = size if what == "values" else 1.0
    rtol = 1e-6 if dtype == torch.float64 else 1e-3
    assert (result.loss / ratio / plain.loss - 1).abs().median() < rtol
    assert result.coefficients.dtype == dtype and result.loss.dtype == torch.float64


def single(item):
    if isinstance(item, tuple):
        return tuple(map(single, item))
    return item.float() if isinstance(item, torch.Tensor) else item


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("demodulated", [True, False])
def test_float32_input_leads_to_the_same_optimum(fit, loss, rank, demodulated):
    """The normal equations of float32 input may be summed in float32; what they lead to is as good."""
    problem = random_problem(3, rank, (8, 9), demodulated)
    wide = fit(**problem, loss=loss)
    narrow = fit(**{name: single(item) for name, item in problem.items()}, loss=loss)
    assert_sound(narrow)
    assert narrow.loss.mean() <= 1.01 * wide.loss.mean()  # not convex: rounding may lead to another minimum
    convex = random_problem(3, rank, (8, 9), False, slope=1.0)
    wide, narrow = (fit(**{n: cast(i) for n, i in convex.items()}, loss=loss) for cast in (lambda i: i, single))
    torch.testing.assert_close(narrow.loss, wide.loss, rtol=1e-4, atol=0)


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("demodulated", [True, False])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_float32_input(fit, kind, size, demodulated, loss):
    problem = hostile_problem(kind, demodulated, size)
    result = fit(**{name: single(item) for name, item in problem.items()}, loss=loss)
    assert_sound(result)
    assert (result.status != facts.NONFINITE).all()
    if kind == "zero residual":  # but for its rounding to float32
        assert (result.loss <= 1e-5 * size * (1 if loss == "l1" else size)).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_numbers_too_large_are_reported(fit, loss, slope):
    problem = linear_problem()
    huge = {name: item * 1e300 for name, item in problem.items()}
    result = fit(**huge, slope=slope, loss=loss)
    assert result.coefficients.isfinite().all() and not result.loss.isnan().any()
    tiny = cast({**problem, "basis": problem["basis"] * 1e-30, "target": problem["target"] * 1e30}, torch.float32)
    result = fit(**tiny, slope=slope, loss=loss)  # the answer does not fit float32
    assert (result.status == facts.NONFINITE).all() and not result.coefficients.any()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_many_unknowns(fit, loss):
    """Rank 20 and more unknowns than pixels, both ways of solving."""
    problem = random_problem(11, 20, (7, 7), channels=3)
    assert_sound(fit(**problem, loss=loss, max_iterations=20), problem, loss)
    weights = torch.ones(49)
    weights[10:] = 0
    few = fit(**problem, loss=loss, pixel_weights=weights)
    assert (few.loss < 0.2 * few.initial_loss).all()
    assert_sound(fit(**random_problem(11, 4, (12, 12), channels=3), loss=loss, max_iterations=10))


def test_unbatched_batched_and_broadcast_shift():
    problem = random_problem(1, 1, (4, 4))
    alone = ops.fit_low_rank(**problem)
    assert alone.coefficients.shape == (32, 9) and alone.status.shape == (32,) and alone.solver == "lm"
    batch = dict(problem, **{k: problem[k][None] for k in ("basis", "base", "target")})
    batch["demodulation"] = tuple(item[None] for item in problem["demodulation"])
    full = problem["shift"].expand(1, 32, 16).contiguous()
    for shift in (problem["shift"], problem["shift"][None], full, full.mT.contiguous().mT):
        result = ops.fit_low_rank(**dict(batch, shift=shift))
        for ours, theirs in zip(result[:5], alone[:5]):
            assert torch.equal(ours[0], theirs)
    noise = dict(problem, shift=problem["shift"][:1])
    same = dict(problem, shift=problem["shift"][:1].expand(32, 16).contiguous())
    assert torch.equal(ops.fit_low_rank(**noise).coefficients, ops.fit_low_rank(**same).coefficients)


def test_no_channels():
    problem = linear_problem()
    empty = {name: item if name == "basis" else item[:0] for name, item in problem.items()}
    for backend in ("cpp", "reference"):
        assert ops.fit_low_rank(**empty, backend=backend).coefficients.shape == (0, 9)


def test_strides_and_gradients_are_accepted():
    problem = cast(proggan_problem(1)[0], torch.float32)
    plain = ops.fit_low_rank(**problem)
    odd = {name: item.T.contiguous().T.requires_grad_() for name, item in problem.items()}
    result = ops.fit_low_rank(**odd)
    assert torch.equal(result.coefficients, plain.coefficients) and not result.coefficients.requires_grad


def test_custom_op_contract():
    problem = cast(random_problem(1, 1, (4, 4)), torch.float32)
    keys = ("basis", "base", "target", "shift", "demodulation", "slope", "gain")
    args = prepared(**{k: problem[k] for k in keys}, max_iterations=5)
    library.opcheck(torch.ops.rewrite_core.fit_low_rank, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.zeros(1, 1, 1)}, r"target must be \[B, O, P\]"),
        ({"basis": torch.zeros(1, 9, 99)}, r"base must be \[B, O, P\]"),
        ({"basis": torch.zeros(9, 16)}, r"\[B, J, P\]"),
        ({"basis": torch.zeros(1, 9, 16, dtype=torch.float64)}, "convert one to the other"),
        ({"linear": None}, "three tensors"),
        ({"penalty": torch.eye(9, dtype=torch.float64)[None]}, "without a penalty_scale"),
        ({"constant": torch.ones(1, 32)}, "constant is torch.float32"),
        ({"constant": torch.ones(1, 31).double()}, r"constant must be \[B, O\]"),
        ({"loss": "huber"}, "no loss 'huber'"),
        ({"segments": torch.zeros(1, 16).long()}, r"\[B, G, O\]"),
    ],
)
def test_the_raw_op_checks_too(change, words):
    problem = cast(random_problem(1, 1, (4, 4)), torch.float32)
    keys = ("basis", "base", "target", "shift", "demodulation", "slope", "gain")
    good = prepared(**{k: problem[k] for k in keys}, max_iterations=5)
    with pytest.raises(ValueError, match=words):
        torch.ops.rewrite_core.fit_low_rank(*good._replace(**change))


GOOD = linear_problem()


NAN = torch.full((7, 40), float("nan"), dtype=torch.float64)


SEGMENTED = {
    "demodulation": (torch.ones(2, 7), torch.zeros(2, 7, 9), torch.zeros(2, 9, 9)),
    "segments": torch.ones(40).long(),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"basis": [1.0]}, TypeError, "basis must be a torch tensor"),
        ({"base": [1.0]}, TypeError, "base must be a torch tensor, not list"),
        ({"base": GOOD["base"].numpy()}, TypeError, "base must be a torch tensor, not ndarray"),
        ({"target": torch.nested.nested_tensor([torch.ones(40)])}, TypeError, "target is a nested tensor"),
        ({"shift": NAN.to_sparse()}, TypeError, "shift is torch.sparse_coo, and must be dense"),
        ({"base": GOOD["base"].half()}, TypeError, "base is torch.float16"),
        ({"target": GOOD["target"].float()}, TypeError, "convert one to the other"),
        ({"basis": GOOD["basis"][0]}, ValueError, r"basis must be \[B, J, P\]"),
        ({"basis": GOOD["basis"][:0]}, ValueError, "at least one row"),
        ({"base": GOOD["base"][None]}, ValueError, r"base must be \[O, P\]"),
        ({"target": GOOD["target"][:, 1:]}, ValueError, r"target must be \[O, P\] = \[7, 40\]"),
        ({"target": NAN}, ValueError, "target holds NaN"),
        ({"base": NAN / 0}, ValueError, "base holds NaN or infinity"),
        ({"shift": torch.zeros(6, 40, dtype=torch.float64)}, ValueError, "shift must be"),
        ({"loss": "huber"}, ValueError, "no loss 'huber'"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
        (
            {"max_iterations": 2**40},
            ValueError,
            "max_iterations must be an integer of at least 1, and at most 2147483647",
        ),
        ({"max_iterations": 5.0}, ValueError, "max_iterations must be an integer"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"slope": float("nan")}, ValueError, "slope"),
        ({"pixel_weights": -torch.ones(40)}, ValueError, "pixel_weights has a negative"),
        ({"pixel_weights": torch.ones(39)}, ValueError, r"pixel_weights must be \[P\]"),
        ({"penalty": torch.eye(8)}, ValueError, r"penalty must be \[J, J\]"),
        ({"penalty_scale": torch.ones(7)}, ValueError, "without a penalty"),
        ({"penalty": torch.eye(9), "penalty_scale": -torch.ones(7)}, ValueError, "penalty_scale has a neg"),
        ({"demodulation": (torch.ones(7),)}, ValueError, "three tensors"),
        ({"demodulation": (torch.ones(7), None, None)}, ValueError, "three tensors"),
        ({"demodulation": (None, torch.zeros(7, 9), torch.eye(9))}, ValueError, "three tensors"),
        ({"demodulation": (torch.zeros(7), torch.zeros(7, 9), torch.eye(9))}, ValueError, "must be positive"),
        ({"segments": torch.zeros(40).long()}, ValueError, "pass demodulation too"),
        (SEGMENTED | {"segments": torch.zeros(40)}, TypeError, "must hold integers"),
        (SEGMENTED | {"segments": torch.zeros(39).long()}, ValueError, r"segments must be \[P\]"),
        (SEGMENTED | {"segments": torch.full((40,), 2)}, ValueError, "from 0 to 1"),
        (SEGMENTED | {"segments": torch.full((40,), -1)}, ValueError, "from 0 to 1"),
        (SEGMENTED | {"demodulation": (torch.ones(7), torch.zeros(7, 9), torch.eye(9))}, ValueError, r"\[B, G, O\]"),
        (SEGMENTED | {"segments": None}, ValueError, r"constant must be \[O\]"),
        ({"backend": "abacus"}, ValueError, "no backend"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words) as caught:
        ops.fit_low_rank(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy():
    one, other = (ops.fit_low_rank(**GOOD, max_iterations=number) for number in (np.int64(5), 5))
    assert torch.equal(one.coefficients, other.coefficients)


def test_explained():
    assert {record.name for record in backends_of("fit_low_rank")} >= {"cpp", "reference"}
    assert all(isinstance(code, int) and word for code, word in facts.STATUS.items())


@pytest.mark.parametrize("name", CPU)
def test_what_rounding_does_where_pixels_do_not_determine_the_coefficients(name):
    """The closed form with 18 unknowns and 12 pixels: one bit of the input moves the reference's own coefficients by
    1e-3, and nothing of what they do. So much is no fault of another implementation; a wrong coefficient is."""
    problem = random_problem(12, 2, (4, 3), False, 1.0, channels=8)
    found = agree(CPU[name], problem, loss="l2")
    generator = torch.Generator().manual_seed(1)
    ulp = {
        key: part * (1 + 2.0**-52 * (2 * torch.rand(part.shape, generator=generator, dtype=part.dtype) - 1))
        for key, part in problem.items()
        if isinstance(part, torch.Tensor)
    }
    moved = run(CPU[name], **{**problem, **ulp}, loss="l2")
    apart = (moved.coefficients - found.coefficients).norm(dim=-1) / found.coefficients.norm(dim=-1)
    assert 1e-5 < apart.max() <= 2 * ROUNDING_ALONE
    assert (moved.loss <= 1e-20 * found.initial_loss).all()

    def wrong(given):
        result = list(CPU[name](given))
        assert result[0].shape == found.coefficients.shape
        result[0] = result[0].clone()
        result[0][..., 3, 7] *= 1 + 1e-5
        return result

    with pytest.raises(AssertionError):
        agree(wrong, problem, loss="l2")
