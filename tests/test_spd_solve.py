import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import library
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import rewrite_core as rc
from rewrite_core import backends as backends_module
from rewrite_core import ops
from rewrite_core.backends import backends_of, extension
from rewrite_core.errors import NonFiniteError, RewriteCoreError
from rewrite_core.ops.spd_solve_op import factor as factor_module
from rewrite_core.ops.spd_solve_op import register

spd_factor, spd_solve, DiagonalShiftWarning = ops.spd_factor, ops.spd_solve, ops.DiagonalShiftWarning

EPSILON = np.finfo(np.float64).eps
ISAS = ("portable", "avx2", "avx512")
backends = pytest.mark.parametrize("backend", ["cpp", "reference"])


@pytest.fixture(autouse=True)
def no_unexpected_shift():
    """A shift that a test did not ask for is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiagonalShiftWarning)
        yield


def second_moment(n, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(keys or 3 * n + 5, n, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def right_sides(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def residual(matrix, x, b):
    return ((matrix @ x - b).norm() / b.norm()).item()


@backends
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 31, 63, 64, 65, 127, 128, 129, 257, 331])
def test_solves(n, backend):
    matrix = second_moment(n)
    for m in (1, 2, 3, 4, 5, 11):
        b = right_sides(n, m)
        x = spd_solve(matrix, b, backend=backend)
        assert x.dtype == torch.float64 and x.shape == b.shape
        assert residual(matrix, x, b) < 1e-12
        np.testing.assert_allclose(x, np.linalg.solve(matrix.numpy(), b.numpy()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("n", [1, 5, 64, 67, 200, 300, 1101])
def test_every_instruction_set(n, isa):
    if ISAS.index(isa) > ISAS.index(extension().isa()):
        pytest.skip(f"this CPU has no {isa}")
    count = 3 if n < 1000 else 1
    matrix = torch.stack([second_moment(n, seed=seed) for seed in range(count)])
    lower, info = register._cpp_factor(matrix, 1e-13, isa)
    assert info.tolist() == [0] * count
    assert torch.equal(lower, lower.tril())
    assert ((lower @ lower.mT - matrix).norm() / matrix.norm()).item() < 1e-14
    for sides in (1, 3, 4, 6, 25, 70):  # a few, one a row; many, one a lane, in panels
        b = right_sides(count, n, sides)
        x = register._cpp_solve(matrix, lower, b, isa=isa)
        assert ((matrix @ x - b).norm() / b.norm()).item() < 1e-12
        vectors = register._cpp_solve(matrix, lower, b[..., 0].contiguous(), isa=isa)
        torch.testing.assert_close(vectors, x[..., 0], rtol=1e-11, atol=1e-13)


@backends
@pytest.mark.parametrize("condition", [1e2, 1e8, 1e13])
@pytest.mark.parametrize("sides", [1, 5, 40])
def test_solved_to_rounding_whatever_the_condition(sides, condition, backend):
    """No entry of the residual is above a few eps of what it is the difference of (Oettli and Prager 1964)."""
    n = 90
    q = torch.linalg.qr(right_sides(n, n)).Q
    scales = torch.logspace(0, -3, n, dtype=torch.float64)  # channels of other sizes, too
    matrix = scales[:, None] * (q * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ q.T * scales
    matrix = (matrix + matrix.T) / 2
    b = right_sides(n, sides)
    for x in (spd_solve(matrix, b, backend=backend), spd_factor(matrix, backend=backend).solve(b)):
        size = matrix.abs() @ x.abs() + b.abs()
        assert ((matrix @ x - b).abs() <= 64 * EPSILON * size).all()


OFF = {
    "all": lambda lower: lower * (1 + 1e-9),
    "a row": lambda lower: lower + 1e-9 * lower * (torch.arange(len(lower)) == len(lower) // 2)[:, None],
    "a column": lambda lower: lower + 1e-9 * lower * (torch.arange(len(lower)) == 3),
    "an entry": lambda lower: with_entry(lower, -1, 0, lower[-1, 0].item() + 1e-7 * lower[-1, -1].item()),
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("n", [80, 401, 1030])
@pytest.mark.parametrize("sides", [1, 9])
def test_a_factor_that_is_a_little_off_is_made_up_for(sides, n, off):
    """The look at the residual sees it, by all of the matrix or by its sketch, whatever the channels' scales."""
    scales = torch.logspace(-70, 70, n, dtype=torch.float64)  # their squares: almost all that float64 has
    matrix, b = second_moment(n) * scales[:, None] * scales, right_sides(n, sides) * scales[:, None]
    factor = spd_factor(matrix)
    exact, lower = factor.solve(b) * scales[:, None], OFF[off](factor.lower)
    for sketch in (None, register._cpp_sketch(matrix)):
        x = register._cpp_solve(matrix, lower, b, sketch) * scales[:, None]
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-13 * exact.abs().max().item() * math.sqrt(n))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("n", [1, 5, 64, 67, 385, 500])
def test_a_sketch_is_sums_of_the_equations(n, isa):
    if ISAS.index(isa) > ISAS.index(extension().isa()):
        pytest.skip(f"this CPU has no {isa}")
    matrix = torch.stack([second_moment(n, seed=seed) * 10**seed for seed in range(3)])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(register._cpp_sketch(matrix, isa))
            assert torch.equal(register._cpp_sketch(matrix[1], isa), found[-1][1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    weights, sums = found[0].unbind(2)  # [3, n, 2] each
    sizes = weights.abs() * matrix.diagonal(dim1=1, dim2=2).sqrt()[..., None]
    assert ((sizes >= 1 - 1e-15) & (sizes <= 2)).all()
    assert n < 64 or (weights.sign().mean((0, 1)).abs() < 4 / math.sqrt(n)).all()
    assert n < 64 or (torch.corrcoef(weights[0].T) - torch.eye(2)).abs().max() < 5 / math.sqrt(n)
    wanted = matrix.tril() @ weights + matrix.tril(-1).mT @ weights  # as the lower triangle alone is read
    assert ((sums - wanted).abs() <= 1e-14 * (matrix.abs() @ weights.abs())).all()


@pytest.mark.parametrize("n", [3, 64, 300, 385, 1101])
@pytest.mark.parametrize("sides", [1, 3, 4, 30])
def test_a_solve_has_the_same_bits_with_a_sketch_and_without(sides, n):
    matrix, b = second_moment(n), right_sides(n, sides)
    factor = spd_factor(matrix)
    assert (factor._sketch is None) == (n < register.SKETCHED_FROM)
    x = register._cpp_solve(matrix, factor.lower, b, register._cpp_sketch(matrix))
    assert torch.equal(x, register._cpp_solve(matrix, factor.lower, b))
    assert torch.equal(x, factor.solve(b)) and torch.equal(x, spd_solve(matrix, b))
    assert ((matrix @ x - b).abs() <= 64 * EPSILON * (matrix.abs() @ x.abs() + b.abs())).all()


def test_a_sketch_is_made_once_and_of_this_matrix():
    first, second, b = second_moment(300), second_moment(300, seed=1), right_sides(300)
    factor = spd_factor(first)
    x = factor.solve(b)
    assert factor._sketch is factor._sketch
    other = dataclasses.replace(factor, matrix=second, lower=spd_factor(second).lower)
    torch.testing.assert_close(other.solve(b), torch.linalg.solve(second, b))
    assert torch.equal(factor.solve(b), x)


@pytest.mark.parametrize("size", [1e-290, 1e-30, 1e30, 1e290])
def test_a_sketch_of_any_size_serves(size):
    matrix, b = size * second_moment(256), right_sides(256, 2)
    factor = spd_factor(matrix)
    assert factor._sketch.isfinite().all()
    for side in (size * b, math.sqrt(size) * b, b):  # solutions of all sizes that float64 has
        assert torch.equal(factor.solve(side), register._cpp_solve(matrix, factor.lower, side))
        assert factor.solve(side).isfinite().all()
    if size < 1:
        assert not factor.solve(1e300 * b).isfinite().any()  # as the solution is too large


@pytest.mark.parametrize("n", [70, 300])
def test_same_bits_for_any_number_of_threads(n):
    matrix = torch.stack([second_moment(n, seed=seed) for seed in range(5)])
    b = right_sides(5, n, 9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for batch in (slice(None), slice(0, 1)):
                lower, _info = register._cpp_factor(matrix[batch], 1e-13)
                results.append((lower[0], register._cpp_solve(matrix[batch], lower, b[batch])[0]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@backends
def test_real_second_moment(backend):
    """C of a pretrained kitchen generator (condition number 2.6e3) and its recorded solution."""
    with np.load(Path(__file__).parent / "data/kitchen_second_moment.npz") as data:
        matrix = torch.from_numpy(data["mom2"]).double() / float(data["count"])
        keys, solution = (torch.from_numpy(data[name]).double() for name in ("keys", "solution"))
    factor = spd_factor(matrix, backend=backend)
    x = factor.solve(keys)  # [512, 3]: recorded as columns
    assert factor.shift == 0
    assert residual(matrix, x, keys) <= 1e-10
    assert ((x - solution).norm() / solution.norm()).item() <= 1e-9
    assert factor.condition == pytest.approx(np.linalg.cond(matrix.numpy(), 1), rel=0.5)


@backends
def test_ill_conditioned(backend):
    """Hilbert's matrix, condition number 1.5e10: a small residual, and a solution as good as that allows."""
    i = torch.arange(8, dtype=torch.float64)
    matrix = 1 / (i[:, None] + i + 1)
    b = matrix @ torch.ones(8, dtype=torch.float64)
    x = spd_solve(matrix, b, backend=backend)
    assert residual(matrix, x, b) < 1e-14
    assert (x - 1).abs().max() < 1.5e10 * EPSILON * 8


@backends
def test_mixed_scales_need_no_shift(backend):
    scale = torch.logspace(-6, 6, 40, dtype=torch.float64)
    matrix = second_moment(40) * scale[:, None] * scale
    b = matrix @ torch.ones(40, dtype=torch.float64)
    x = spd_solve(matrix, b, backend=backend)
    assert (scale * (x - 1)).norm() / scale.norm() < 1e-12


@backends
def test_shapes(backend):
    matrix = torch.stack([second_moment(6, seed=seed) for seed in range(4)])
    b = right_sides(4, 6, 3)
    want = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(spd_solve(matrix, b, backend=backend), want)
    torch.testing.assert_close(spd_solve(matrix, b[..., 0], backend=backend), want[..., 0])
    torch.testing.assert_close(spd_solve(matrix[0], b[0], backend=backend), want[0])
    torch.testing.assert_close(spd_solve(matrix[0], b[0, :, 0], backend=backend), want[0, :, 0])
    torch.testing.assert_close(
        spd_solve(matrix[0], b[0, :, 0].float(), backend=backend), want[0, :, 0], atol=1e-5, rtol=0
    )
    strided = torch.zeros(4, 12, 12, dtype=torch.float64)[:, ::2, 1::2].copy_(matrix)
    torch.testing.assert_close(spd_solve(strided, b.mT.contiguous().mT, backend=backend), want)
    assert spd_solve(matrix, b[..., :0], backend=backend).shape == (4, 6, 0)
    assert spd_solve(matrix[:0], b[:0], backend=backend).shape == (0, 6, 3)


@backends
@pytest.mark.parametrize("n", [60, 200, 300])
def test_a_factor_of_a_strided_matrix_solves(n, backend):
    """Its look at the residual reads the matrix, not memory that has been given back."""
    matrix, b = second_moment(n), right_sides(n, 3)
    strided = torch.zeros(2 * n, 3 * n, dtype=torch.float64)[::2, 1::3].copy_(matrix)
    want = torch.linalg.solve(matrix, b)
    factor = spd_factor(strided, backend=backend)
    by_hand = dataclasses.replace(factor, matrix=strided, lower=factor.lower.mT.contiguous().mT)
    for each in (factor, by_hand, spd_factor(matrix.mT, backend=backend)):
        for _ in range(3):
            torch.testing.assert_close(each.solve(b), want)
            assert each.condition > 1


@backends
@pytest.mark.parametrize("n", [60, 300])
def test_a_factor_that_has_solved_can_be_pickled_and_copied(n, backend):
    b = right_sides(n, 2)
    factor = spd_factor(second_moment(n), backend=backend)
    x = factor.solve(b)
    for other in (pickle.loads(pickle.dumps(factor)), copy.deepcopy(factor), dataclasses.replace(factor)):
        assert torch.equal(other.solve(b), x)


@backends
def test_float32_matrix_is_solved_in_float64(backend):
    matrix = second_moment(50).float()
    b = right_sides(50, 2)
    x = spd_solve(matrix, b, backend=backend)
    assert x.dtype == torch.float64
    assert residual(matrix.double(), x, b) < 1e-12


def rank_deficient(kind):
    if kind == "dead channels":
        matrix = second_moment(40)
        matrix[[3, 17, 39]] = 0
        matrix[:, [3, 17, 39]] = 0
        return matrix
    if kind == "duplicated channels":
        rows = right_sides(200, 40)
        rows[:, 20:25] = rows[:, :5]
        return rows.T @ rows / 200
    if kind == "fewer keys than channels":
        return second_moment(40, keys=7)
    if kind == "one key":
        return second_moment(40, keys=1)
    return second_moment(300, keys=250)  # "large"


@backends
@pytest.mark.parametrize(
    "kind", ["dead channels", "duplicated channels", "fewer keys than channels", "one key", "large"]
)
def test_rank_deficient_gets_the_smallest_shift_that_serves(kind, backend):
    matrix = rank_deficient(kind)
    n = len(matrix)
    with pytest.warns(DiagonalShiftWarning, match="rank-deficient.* added to its diagonal") as caught:
        factor = spd_factor(matrix, backend=backend)
    assert caught[0].filename == __file__
    assert f"{factor.shift:.3e}" in str(caught[0].message)
    unit = EPSILON * matrix.diagonal().mean().item()
    steps = math.log10(factor.shift.item() / unit)
    assert abs(steps - round(steps)) < 1e-9 and -1e-9 < steps < 6, "not on the ladder, or far up"
    assert (factor.lower.diagonal() ** 2 > n * EPSILON * factor.matrix.diagonal()).all(), "a pivot is noise"
    if steps > 0.5:  # a step lower the smallest pivot was rounding error
        lower = torch.linalg.cholesky_ex(matrix + 0.1 * (factor.matrix - matrix))[0]
        assert not (lower.diagonal() ** 2 > n * EPSILON * matrix.diagonal()).all()
    x = factor.solve(matrix @ right_sides(n, 3))
    assert x.isfinite().all()
    diagonal, mean = matrix.diagonal(), matrix.diagonal().mean()
    shifted = matrix + torch.diag(factor.shift / mean * torch.where(diagonal > 0, diagonal, mean))
    torch.testing.assert_close(factor.matrix, shifted, rtol=1e-15, atol=0)
    assert residual(shifted, x, matrix @ right_sides(n, 3)) < 1e-6


@backends
def test_a_shift_keeps_the_digits_of_small_channels(backend):
    rows = right_sides(2000, 24)
    rows[:, :3] *= 1e4
    rows[:, 2] = rows[:, 0]
    kept = [i for i in range(24) if i != 2]
    b = right_sides(24)
    b[:3] = 0
    matrix = rows.T @ rows / 2000
    with pytest.warns(DiagonalShiftWarning):
        x = spd_factor(matrix, backend=backend, noise=2**-24).solve(b)
    wanted = torch.linalg.solve(matrix[kept][:, kept], b[kept])
    assert (x[3:] - wanted[2:]).norm() < 1e-5 * wanted[2:].norm()


@backends
def test_shift_only_where_needed_in_a_batch(backend):
    good, bad = second_moment(40), rank_deficient("dead channels")
    with pytest.warns(DiagonalShiftWarning, match="matrix 1 of the batch is rank-deficient"):
        factor = spd_factor(torch.stack([good, bad, good]), backend=backend)
    assert (factor.shift == 0).tolist() == [True, False, True]
    b = right_sides(40, 2)
    x = factor.solve(torch.stack([b, b, b]))
    assert x.isfinite().all()
    torch.testing.assert_close(x[0], spd_solve(good, b, backend=backend), rtol=0, atol=1e-14)
    torch.testing.assert_close(x[2], x[0], rtol=0, atol=0)


@backends
def test_solve_warns_as_factor_does(backend):
    with pytest.warns(DiagonalShiftWarning):
        x = spd_solve(rank_deficient("dead channels"), right_sides(40), backend=backend)
    assert x.isfinite().all()


@backends
def test_the_shift_is_warned_of_at_the_users_line(backend):
    dead = torch.ones(3, 3, dtype=torch.float64)
    moment = rc.SecondMoment(3)
    moment.update(torch.ones(2, 3))
    for call in (
        lambda: spd_factor(dead, backend=backend),
        lambda: spd_solve(dead, torch.ones(3), backend=backend),
        lambda: spd_solve(torch.nn.Parameter(dead), torch.ones(3), backend=backend),  # by way of torch's dispatcher
        lambda: moment.merge(rc.SecondMoment(3)).solve(torch.ones(3)),
    ):
        with pytest.warns(DiagonalShiftWarning) as caught:
            call()
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


@backends
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e9])
def test_condition_estimate(condition, backend):
    q = torch.linalg.qr(right_sides(60, 60))[0]
    matrix = q @ torch.diag(torch.logspace(0, -math.log10(condition), 60, dtype=torch.float64)) @ q.T
    matrix = (matrix + matrix.T) / 2
    factor = spd_factor(torch.stack([matrix, torch.eye(60, dtype=torch.float64)]), backend=backend)
    exact = np.linalg.cond(matrix.numpy(), 1)
    assert exact / 3 <= factor.condition[0] <= exact * (1 + 1e-6)
    assert factor.condition[1] == pytest.approx(1)
    assert spd_factor(matrix[None][:0], backend=backend).condition.shape == (0,)
    assert spd_factor(matrix, backend=backend).condition == factor.condition[0]


def with_entry(matrix, i, j, value):
    matrix = matrix.clone()
    matrix[i, j] = value
    return matrix


SMALL = second_moment(5)


@backends
@pytest.mark.parametrize(
    ("matrix", "rhs", "error", "words"),
    [
        (with_entry(SMALL, 1, 2, math.nan), torch.ones(5), NonFiniteError, "matrix holds NaN"),
        (with_entry(SMALL, 2, 2, math.inf), torch.ones(5), NonFiniteError, "matrix holds NaN"),
        (SMALL, torch.tensor([1, 2, math.nan, 3, 4]), NonFiniteError, "right-hand side holds NaN"),
        (with_entry(SMALL, 1, 2, 7.0), torch.ones(5), RewriteCoreError, "not symmetric"),
        (SMALL.tril(), torch.ones(5), RewriteCoreError, "not symmetric"),
        (-SMALL, torch.ones(5), RewriteCoreError, "mean diagonal.*positive"),
        (0 * SMALL, torch.ones(5), RewriteCoreError, "collect keys"),
        (with_entry(SMALL, 3, 3, -1.0), torch.ones(5), RewriteCoreError, "not positive semidefinite"),
        (1e-315 * SMALL, torch.ones(5), RewriteCoreError, "scale the keys up"),
        (torch.stack([SMALL, 0 * SMALL]), torch.ones(2, 5), RewriteCoreError, "matrix 1 of the batch"),
        (SMALL[:4], torch.ones(4), RewriteCoreError, r"\[n, n\].*\[4, 5\]"),
        (SMALL[0], torch.ones(5), RewriteCoreError, r"\[5\]"),
        (SMALL[:0, :0], torch.ones(0), RewriteCoreError, "n >= 1"),
        (SMALL, torch.ones(4), RewriteCoreError, r"\[5\] or \[5, m\], not \[4\]"),
        (SMALL, torch.ones(3, 5), RewriteCoreError, "keys.T"),
        (SMALL.expand(2, 5, 5), torch.ones(5), RewriteCoreError, r"\[2, 5\]"),
        (SMALL.long(), torch.ones(5), TypeError, "int64.*double"),
        (SMALL.tolist(), torch.ones(5), TypeError, "list"),
        (SMALL, torch.ones(5, dtype=torch.int32), TypeError, "int32"),
        (SMALL, [1.0] * 5, TypeError, "list"),
        (SMALL, torch.ones(5, device="meta"), RewriteCoreError, "meta.*cpu"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_refused_with_advice(matrix, rhs, error, words, backend):
    with pytest.raises(error, match=words):
        spd_solve(matrix, rhs, backend=backend)


def test_what_is_raised_is_a_value_error():
    with pytest.raises(ValueError):
        spd_solve(with_entry(SMALL, 1, 1, math.nan), torch.ones(5))


def test_input_is_not_written_and_gradients_stop():
    matrix, b = SMALL.clone().requires_grad_(), torch.ones(5, requires_grad=True)
    x = spd_solve(matrix, b)
    assert not x.requires_grad
    assert torch.equal(matrix.detach(), SMALL) and torch.equal(b.detach(), torch.ones(5))


@backends
def test_is_a_well_behaved_torch_op(backend):
    library.opcheck(torch.ops.rewrite_core.spd_solve, (SMALL, right_sides(5, 2), backend))
    library.opcheck(torch.ops.rewrite_core.spd_solve, (SMALL.expand(2, 5, 5), right_sides(2, 5), backend))


def test_info_names_the_first_bad_pivot():
    matrix = torch.eye(150, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1, 100, 100] = -1
    matrix[2, 0, 0] = math.nan
    for isa in ("portable", ""):
        assert register._cpp_factor(matrix, 1e-13, isa)[1].tolist() == [0, 101, 1]


@backends
def test_another_default_device(backend):
    matrix, b = second_moment(7), right_sides(7, 2)
    plain = spd_factor(matrix, backend)
    x, condition = plain.solve(b), plain.condition
    with torch.device("meta"):
        factor = spd_factor(matrix, backend)
        assert torch.equal(factor.solve(b), x) and torch.equal(factor.condition, condition)
        with pytest.warns(DiagonalShiftWarning):
            assert spd_factor(torch.ones_like(matrix), backend).solve(b).isfinite().all()


@pytest.mark.parametrize("n", [16, 128, 512])
def test_float32_sums_need_not_be_symmetric_to_the_last_bit(n):
    """BLAS may sum the two triangles in different orders; float32 rounding of either is no reason to refuse."""
    generator = torch.Generator().manual_seed(n)
    rows = 3 + torch.randn(4 * n, n, generator=generator)
    exact = rows.T @ rows
    uneven = exact * (1 + 1.2e-7 * torch.randn(n, n, generator=generator).clamp(-2, 2))
    assert not torch.equal(uneven, uneven.T)
    factor = ops.spd_factor(uneven)
    assert torch.equal(factor.matrix, factor.matrix.T)
    with pytest.raises(RewriteCoreError, match="not symmetric"):
        ops.spd_factor(uneven.double() + 1e-3 * exact.double().amax() * torch.eye(n).roll(1, 0).double())


def test_asymmetry_in_a_pattern_is_seen():
    ramp = torch.tensor([[0.0, 2, -1], [-2, 0, 0.5], [1, -0.5, 0]], dtype=torch.float64)
    skew = torch.zeros(3, 3, dtype=torch.float64)
    skew[0, 1], skew[1, 2], skew[2, 0] = 2, 1, 1.5  # skew - skew.T times (1, 1.5, 2) vanishes
    skew = skew - skew.T
    for part in (ramp, skew):
        with pytest.raises(RewriteCoreError, match="not symmetric"):
            ops.spd_factor(5 * torch.eye(3, dtype=torch.float64) + part)


def test_on_a_gpu_it_says_why_torch_linalg_solves():
    """As `rc.explain()` shows it there."""
    cpp = next(record for record in backends_of("spd_solve") if record.name == "cpp")
    reason = cpp.supports(types.SimpleNamespace(device=torch.device("cuda:0")))
    assert "on cuda:0" in reason and "cuda or torch.linalg (cuSOLVER)" in reason


def test_fewer_threads_than_asked_for(tmp_path):
    """OpenMP may give a call fewer: what the missing ones would have written is not read (here it would be 1e306)."""
    code = """
import torch
from rewrite_core.ops import spd_factor
torch.set_num_threads(4)
factor = spd_factor(4 * torch.eye(300, dtype=torch.float64))
assert torch.equal(factor.lower, 2 * torch.eye(300, dtype=torch.float64))
"""
    variables = {"OMP_THREAD_LIMIT": "1", "MALLOC_PERTURB_": "128", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("n", "sides"), [(n, sides) for n in (385, 1101) for sides in (1, 3, 4, 7, 20)] + [(1601, 3), (2051, 90)]
)
def test_threads_that_share_sides_change_no_bit(n, sides):
    """From 1024 rows on they share the substitutions; without a sketch, from 384 on, the look at the residual. From
    2048 rows on they share those of several panels, and of up to 72 sides at once."""
    ramp = torch.linspace(1, 3, n, dtype=torch.float64)
    matrix = torch.diag(ramp) + torch.outer(ramp, ramp) / n
    factor, b = spd_factor(matrix), right_sides(n, sides)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for sketch in (None, factor._sketch):
                results += [register._cpp_solve(matrix, factor.lower, b, sketch) for _ in range(20 if n < 2000 else 2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert (matrix @ results[0] - b).abs().max() < 1e-12 * b.abs().max()


def test_what_one_thread_finds_is_not_lost_among_others():
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for place in (0, 63, 64, 150, 256, 299) * 5:
            matrix = torch.eye(300, dtype=torch.float64)
            matrix[place, 299] = math.nan  # above the diagonal, where Cholesky does not look, or on it
            with pytest.raises(NonFiniteError):
                spd_factor(matrix)
    finally:
        torch.set_num_threads(threads)


RECORDERS = {
    "jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False)(x),
    "make_fx": lambda f, x: make_fx(f)(x)(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None])[0],
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("how", RECORDERS)
def test_what_torch_records_is_refused_or_right(how):
    """A factor's kernels read memory that torch does not follow: such a call once gave what lay there before."""
    record, matrix = RECORDERS[how], second_moment(6)
    rhs, factor = torch.ones(6, dtype=torch.float64), spd_factor(matrix)
    calls = (
        lambda x: factor.solve(x),
        lambda x: spd_factor(matrix).solve(x),
        lambda x: spd_factor(matrix + x[0]).lower,
    )
    for call in calls:
        with pytest.raises(RewriteCoreError, match="recorded or transformed.*spd_solve"):
            record(call, rhs)
    wanted = torch.zeros_like(rhs) if how == "grad" else torch.linalg.solve(matrix, rhs)
    torch.testing.assert_close(record(lambda x: spd_solve(matrix, x), rhs), wanted)
    torch.testing.assert_close(factor.solve(rhs), torch.linalg.solve(matrix, rhs))


def test_a_factor_is_made_and_solved_with_beside_other_modes():
    """What only watches records nothing."""
    matrix, rhs = second_moment(6), torch.ones(6, dtype=torch.float64)
    wanted = torch.linalg.solve(matrix, rhs)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(spd_factor(matrix).solve(rhs), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(spd_factor(matrix).solve(rhs), wanted)


@pytest.mark.parametrize("name", ["matrix", "right-hand side"])
@pytest.mark.parametrize("kind", ["nested tensor", "sparse"])
def test_what_is_not_dense_is_refused_in_a_sentence(name, kind):
    matrix, rhs = second_moment(4), torch.ones(4, 1, dtype=torch.float64)
    odd = matrix if name == "matrix" else rhs
    odd = odd.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([*odd])
    matrix, rhs = (odd, rhs) if name == "matrix" else (matrix, odd)
    for call in (spd_solve, lambda matrix, rhs: spd_factor(matrix).solve(rhs)):
        with pytest.raises(rc.ArgumentError, match=f"{name} is .*{kind}"):
            call(matrix, rhs)


has_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch does not show its tensors to C"
)


def at_once(matrix, rhs):
    limits = register.ASYMMETRY, register.SMALLEST, register.EPSILON
    return extension().spd_solve_at_once(matrix, rhs, *limits, torch.get_num_threads())


def spread(tensor):
    """The same numbers, not one after the other."""
    wide = tensor.new_zeros([2 * size for size in tensor.shape])
    return wide[(slice(None, None, 2),) * tensor.ndim].copy_(tensor)


USUAL = {
    "[n]": lambda: (second_moment(7), right_sides(7)),
    "[n, m]": lambda: (second_moment(7), right_sides(7, 3)),
    "[n, n] sides": lambda: (second_moment(7), right_sides(7, 7)),
    "one": lambda: (second_moment(1), right_sides(1)),
    "a batch of [n]": lambda: (torch.stack([second_moment(5), SMALL]), right_sides(2, 5)),
    "a batch of [n, m]": lambda: (torch.stack([second_moment(5), SMALL]), right_sides(2, 5, 4)),
    "as many matrices as rows": lambda: (SMALL.expand(5, 5, 5), right_sides(5, 5)),
    "rows as sides": lambda: (SMALL, right_sides(4, 5).T),
    "a row as a side": lambda: (SMALL, right_sides(1, 5).T),
    "spread": lambda: (spread(SMALL), spread(right_sides(5, 2))),
    "float32": lambda: (SMALL, right_sides(5).float()),
    "bfloat16 rows": lambda: (SMALL, right_sides(4, 5).bfloat16().T),
    "float16, a batch": lambda: (SMALL.expand(2, 5, 5), spread(right_sides(2, 5, 3).half())),
    "with gradients": lambda: (second_moment(7).requires_grad_(), right_sides(7, 3).requires_grad_()),
    "narrow, with gradients": lambda: (spread(SMALL).requires_grad_(), right_sides(4, 5).float().requires_grad_().T),
}


@has_exchange
@pytest.mark.parametrize("name", USUAL)
def test_usual_calls_are_made_at_once(name, monkeypatch):
    matrix, rhs = USUAL[name]()
    given = matrix.detach().clone(), rhs.detach().clone()
    x = at_once(matrix, rhs)
    assert x.dtype == torch.float64 and x.shape == rhs.shape and x.is_contiguous() and not x.requires_grad
    assert torch.equal(x, register._cpp_direct(matrix.detach(), rhs.detach()))
    torch.testing.assert_close(x, torch.linalg.solve(given[0], given[1].double()))
    assert torch.equal(matrix, given[0]) and torch.equal(rhs, given[1])
    monkeypatch.setattr(register, "check_matrix", None)  # which only other calls meet
    assert torch.equal(spd_solve(matrix, rhs), x) and torch.equal(spd_solve(matrix, rhs, backend="cpp"), x)
    with pytest.raises(TypeError, match="NoneType"):
        spd_solve(matrix, rhs, backend="reference")


def factor_at_once(factor, rhs, **other):
    given = {"matrix": factor.matrix, "lower": factor.lower, "sketch": factor._sketch} | other
    return register._cpp_at_once(*given.values(), rhs)


@has_exchange
@pytest.mark.parametrize("name", USUAL)
def test_usual_solves_with_a_factor_are_made_at_once(name, monkeypatch):
    matrix, rhs = USUAL[name]()
    factor, given = spd_factor(matrix.detach().contiguous()), rhs.detach().clone()
    wanted = register._cpp_solve(factor.matrix, factor.lower, given.double())
    sketch = register._cpp_sketch(factor.matrix)
    for x in (factor_at_once(factor, rhs), factor_at_once(factor, rhs, sketch=sketch)):
        assert x.dtype == torch.float64 and x.is_contiguous() and not x.requires_grad
        assert torch.equal(x, wanted)
    assert torch.equal(rhs, given)
    monkeypatch.setattr(factor_module, "check_rhs", None)  # which only other calls meet
    assert torch.equal(factor.solve(rhs), wanted)
    with pytest.raises(TypeError, match="NoneType"):
        spd_factor(factor.matrix, backend="reference").solve(rhs)


UNUSUAL = {
    "a list": lambda: (SMALL, [1.0] * 5),
    "no tensors": lambda: (None, None),
    "float32": lambda: (SMALL.float(), right_sides(5)),
    "whole numbers": lambda: (SMALL, torch.ones(5, dtype=torch.int64)),
    "8 bits": lambda: (SMALL, torch.ones(5).to(torch.float8_e5m2)),
    "complex": lambda: (SMALL, torch.ones(5, dtype=torch.complex128)),
    "a parameter": lambda: (torch.nn.Parameter(SMALL), right_sides(5)),
    "a parameter as sides": lambda: (SMALL, torch.nn.Parameter(right_sides(5))),
    "meta": lambda: (SMALL.to("meta"), right_sides(5).to("meta")),
    "sides on meta": lambda: (SMALL, right_sides(5).to("meta")),
    "negated": lambda: (torch.complex(SMALL, -SMALL).conj().imag, right_sides(5)),
    "negated sides": lambda: (SMALL, torch.complex(right_sides(5), right_sides(5)).conj().imag),
    "sparse": lambda: (SMALL.to_sparse(), right_sides(5)),
    "nested": lambda: (SMALL, torch.nested.nested_tensor([*right_sides(5, 1)])),
    "a vector": lambda: (SMALL[0], right_sides(5)),
    "a number": lambda: (SMALL[0, 0], right_sides(5)),
    "a number as sides": lambda: (SMALL, right_sides(5)[0]),
    "4 axes": lambda: (SMALL[None, None], right_sides(1, 1, 5)),
    "not square": lambda: (SMALL[:4], right_sides(4)),
    "too few rows": lambda: (SMALL, right_sides(4)),
    "too many rows": lambda: (SMALL, right_sides(6)),
    "rows for columns": lambda: (SMALL, right_sides(3, 5)),
    "too many axes": lambda: (SMALL, right_sides(5, 5, 5)),
    "no batch of sides": lambda: (SMALL.expand(2, 5, 5), right_sides(5)),
    "another batch": lambda: (SMALL.expand(2, 5, 5), right_sides(3, 5)),
    "no sides": lambda: (SMALL, right_sides(5, 0)),
    "no rows": lambda: (SMALL[:0, :0], right_sides(0)),
    "no matrices": lambda: (SMALL.expand(0, 5, 5), right_sides(0, 5)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_meets_the_checks_in_full(name):
    matrix, rhs = UNUSUAL[name]()
    assert at_once(matrix, rhs) is NotImplemented
    assert register._cpp_at_once(matrix, matrix, None, rhs) is NotImplemented


@pytest.mark.parametrize("n", [5, 300])
def test_parts_of_a_factor_that_do_not_fit_are_not_solved_with(n):
    factor, rhs = spd_factor(second_moment(n)), right_sides(n)
    sketch = register._cpp_sketch(factor.matrix)
    for part in (factor.matrix, factor.lower, sketch):
        name = "matrix" if part is factor.matrix else "lower" if part is factor.lower else "sketch"
        odd = [part.float(), part[:-1], part[None], part[None].expand(2, *part.shape), part.tolist(), spread(part)]
        odd += [part.to("meta"), part[..., :1], torch.nn.Parameter(part)] + ([] if part is sketch else [None])
        for other in odd:
            assert factor_at_once(factor, rhs, **{name: other}) is NotImplemented
    assert factor_at_once(factor, rhs * math.nan) is None


@has_exchange
def test_a_factors_solve_that_is_recorded_or_sent_elsewhere_meets_the_checks_in_full(monkeypatch):
    matrix, rhs = second_moment(6), right_sides(6)
    factor, other = spd_factor(matrix), spd_factor(matrix, backend="reference")
    wanted = factor.solve(rhs)
    monkeypatch.setattr(factor_module, "check_rhs", None)
    assert torch.equal(factor.solve(rhs), wanted)
    for record in RECORDERS.values():
        with pytest.raises(TypeError, match="NoneType"):
            record(lambda rhs: factor.solve(rhs), rhs)
    with FlopCounterMode(display=False), pytest.raises(TypeError, match="NoneType"):
        factor.solve(rhs)
    with pytest.raises(TypeError, match="NoneType"):
        other.solve(rhs)


@has_exchange
@pytest.mark.parametrize(
    ("matrix", "rhs"),
    [
        (with_entry(SMALL, 0, 4, math.nan), right_sides(5)),  # above the diagonal
        (with_entry(SMALL, 2, 2, math.inf), right_sides(5)),
        (with_entry(SMALL, 1, 2, 7.0), right_sides(5)),
        (with_entry(SMALL, 3, 3, -1.0), right_sides(5)),
        (1e-315 * SMALL, right_sides(5)),
        (rank_deficient("one key"), right_sides(40)),
        (torch.stack([SMALL, 0 * SMALL]), right_sides(2, 5)),
        (SMALL, right_sides(5) * math.inf),
        (SMALL, right_sides(5).float() * math.nan),
    ],
    ids=lambda value: "",
)
def test_what_is_outside_the_limits_is_looked_at_in_full(matrix, rhs):
    assert at_once(matrix, rhs) is None


@has_exchange
def test_what_is_recorded_or_sent_elsewhere_meets_the_checks_in_full(monkeypatch):
    matrix, rhs = second_moment(6), right_sides(6)
    wanted = spd_solve(matrix, rhs)
    with monkeypatch.context() as patch:
        patch.setattr(register, "run_cpp", register.run_cpp._replace(direct=lambda matrix, rhs: rhs + 2))
        patch.setattr(backends_module, "_load", backends_module._load.__wrapped__)  # which finds it
        assert torch.equal(spd_solve(matrix, rhs), rhs + 2)
    monkeypatch.setattr(register, "check_matrix", None)
    assert torch.equal(spd_solve(matrix, rhs), wanted)
    with FlopCounterMode(display=False), pytest.raises(TypeError, match="NoneType"):
        spd_solve(matrix, rhs)
    for record in RECORDERS.values():
        with pytest.raises(TypeError, match="NoneType"):
            record(lambda rhs: spd_solve(matrix, rhs), rhs)
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "reference")
    with pytest.raises(TypeError, match="NoneType"):
        spd_solve(matrix, rhs)
    assert torch.equal(spd_solve(matrix, rhs, backend="cpp"), wanted)


@has_exchange
def test_reading_tensors_from_c_leaves_no_reference():
    matrix, rhs, narrow = SMALL.clone(), right_sides(5), right_sides(2, 5).float().T
    factor = spd_factor(matrix)
    lower, sketch = factor.lower, register._cpp_sketch(matrix)
    counted = matrix, rhs, narrow, lower, sketch, None, NotImplemented, torch.empty_like
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(100):
        x, y, fresh = at_once(matrix, rhs), at_once(matrix, narrow), rhs.clone()
        z = factor_at_once(factor, narrow, sketch=sketch)
        references = sys.getrefcount(x), sys.getrefcount(y), sys.getrefcount(z), sys.getrefcount(fresh)
        assert len(set(references)) == 1
        assert at_once(matrix, rhs * math.nan) is None and at_once(None, rhs) is NotImplemented
    assert all(abs(sys.getrefcount(a) - b) < 50 for a, b in zip(counted, before, strict=True))


def test_values_by_place_are_counted():
    with pytest.raises(TypeError, match="6 values"):
        extension().spd_solve_at_once(SMALL, right_sides(5))
    with pytest.raises(TypeError, match="5 values"):
        extension().cholesky_solve_at_once(SMALL, SMALL, None, right_sides(5))
