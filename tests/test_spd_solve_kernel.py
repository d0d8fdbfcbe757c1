"""The GPU kernel of spd_solve (csrc/spd_solve/) on the CPU, a fiber a thread: numbers, races, memory."""

import numpy as np
import pytest
import torch
from helpers.gpu_kernels import ADDRESS, Failed, barriers_of, build, launch
from helpers.spd_solve_kernel import EPSILON, FACTS, Call

from rewrite_core.ops.spd_solve_op.problem import Facts
from rewrite_core.ops.spd_solve_op.reference import _factor

SEEDS = range(4)  # of the order that threads run in
BARRIERS = barriers_of("spd_solve/layout.h")
OF_CLUSTERS = ("sides_there", "mails_sent", "before_reload", "before_end")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build("spd_solve", ADDRESS, tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return build("spd_solve", [], tmp_path_factory.mktemp("fast"))


def moments(batch, n, keys=None):
    rows = np.random.default_rng(n).standard_normal((batch, keys or 3 * n + 5, n))
    return rows.transpose(0, 2, 1) @ rows / rows.shape[1]


def sides(batch, n, m):
    return np.random.default_rng(m).standard_normal((batch, n, m))


def ill_conditioned(n, condition=1e13):
    """Channels of other sizes, too."""
    generator = np.random.default_rng(1)
    q = np.linalg.qr(generator.standard_normal((n, n)))[0]
    scales = np.logspace(0, -3, n)
    matrix = scales[:, None] * (q * np.logspace(0, -np.log10(condition), n)) @ q.T * scales
    return (matrix + matrix.T)[None] / 2


def check_solved(matrix, x, b):
    """To rounding error, entry by entry, as the op's own test has it (Oettli and Prager 1964)."""
    size = abs(matrix) @ abs(x) + abs(b)
    assert (abs(matrix @ x - b) <= 64 * EPSILON * size).all()


SIZES = [
    # n, batch, sides, blocks, threads, passes
    (1, 1, 1, 1, 64, 1),
    (2, 3, 1, 1, 32, 1),
    (8, 1, 8, 1, 64, 1),
    (9, 2, 3, 1, 256, 1),
    (31, 1, 1, 1, 64, 1),
    (32, 1, 17, 1, 64, 2),
    (33, 1, 2, 1, 96, 1),
    (65, 2, 9, 1, 64, 2),
    (131, 1, 64, 1, 64, 8),
    (200, 1, 8, 1, 256, 1),
    (3, 1, 1, 2, 32, 1),
    (9, 1, 2, 8, 32, 1),
    (64, 2, 9, 2, 64, 1),
    (97, 1, 11, 4, 64, 2),
    (203, 1, 5, 8, 64, 1),
]


@pytest.mark.parametrize(("n", "batch", "m", "blocks", "threads", "passes"), SIZES)
def test_solves(n, batch, m, blocks, threads, passes, program, tmp_path):
    matrix, b = moments(batch, n), sides(batch, n, m)
    call = Call(matrix, b, blocks=blocks, threads=threads, passes=passes, seed=n, lower=True)
    again = Call(
        matrix, b, blocks=blocks, threads=threads, passes=passes, seed=n + 1, factor=np.linalg.cholesky(matrix)
    )
    (x, facts, lower), (with_factor, _, _) = launch(program, [call, again], tmp_path)
    for found in (x, with_factor):
        check_solved(matrix, found, b)
        np.testing.assert_allclose(found, np.linalg.solve(matrix, b), rtol=0, atol=1e-11)
    assert (lower == np.tril(lower)).all()
    assert np.linalg.norm(lower @ lower.transpose(0, 2, 1) - matrix) <= 1e-14 * np.linalg.norm(matrix)
    data = torch.from_numpy(matrix)
    for row, wanted in zip(facts, _factor(data, data, n * EPSILON)[1], strict=True):
        np.testing.assert_allclose(row[: len(Facts._fields)], wanted, rtol=1e-14)
        assert (row[len(Facts._fields) :] == 0).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_is_not_solved_to_rounding_is_refined(blocks, program, tmp_path):
    """Without the refinement an entry of the residual is beyond what is allowed."""
    matrix, b = ill_conditioned(70), sides(1, 70, 9)
    off = np.linalg.cholesky(moments(1, 70)) * (1 + 1e-9)
    calls = [Call(matrix, b, blocks=blocks), Call(moments(1, 70), b, blocks=blocks, passes=2, factor=off)]
    (x, facts, _), (made_up_for, _, _) = launch(program, calls, tmp_path)
    assert facts[0, FACTS.index("shift")] == 0
    check_solved(matrix, x, b)
    np.testing.assert_allclose(made_up_for, np.linalg.solve(moments(1, 70), b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
def test_rank_deficient(blocks, program, tmp_path):
    """The shift is the smallest of eps, 10 eps, ... of each diagonal entry that makes a factor fit to solve with."""
    n = 40
    few, dead, fine = moments(1, n, keys=12), moments(1, n), moments(1, n)
    dead[:, 5] = dead[:, :, 5] = 0
    matrix, b = np.concatenate([few, dead, fine]), sides(3, n, 2)
    x, facts, lower = launch(program, [Call(matrix, b, blocks=blocks, lower=True)], tmp_path)[0]
    found = dict(zip(FACTS, facts.T, strict=True))
    assert (found["verdict"] == 0).all() and found["shift"][2] == 0 and found["pivot"][2] == 0
    assert found["pivot"][0] == 13 and found["pivot"][1] == 6
    for i in range(2):
        shift, diagonal = found["shift"][i], np.diag(matrix[i])
        assert 0 < shift <= 1e3 * n * EPSILON
        assert round(np.log10(shift / EPSILON), 6) % 1 == 0
        sizes = np.where(diagonal > 0, diagonal, found["mean"][i])
        whole = matrix[i] + np.diag(shift * sizes)
        assert abs(lower[i] @ lower[i].T - whole).max() <= 1e-14
        check_solved(whole, x[i], b[i])
        pivots = np.diag(lower[i]) ** 2
        assert (pivots > n * EPSILON * np.diag(whole)).all()
        less = matrix[i] + np.diag(shift / 10 * sizes) if shift > 2 * EPSILON else matrix[i]
        _, (facts_of_less,) = _factor(*2 * [torch.from_numpy(less)[None]], n * EPSILON)
        assert facts_of_less.pivot


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    ("place", "value", "verdict"),
    [
        ((2, 1), np.nan, 1),
        ((1, 2), np.nan, 1),  # above the diagonal, where no factor looks
        ((3, 3), np.inf, 1),
        ((30, 2), -np.inf, 1),
        ((1, 2), 7.0, 1),  # not symmetric
        ((3, 3), -1.0, 2),  # a negative eigenvalue
        ((35, 35), -1e-1, 2),
    ],
)
def test_what_is_wrong_is_told(place, value, verdict, blocks, program, tmp_path):
    matrix, b = moments(2, 36), sides(2, 36, 3)
    matrix[(1, *place)] = value
    x, facts, _ = launch(program, [Call(matrix, b, blocks=blocks)], tmp_path)[0]
    assert facts[:, FACTS.index("verdict")].tolist() == [0, verdict]
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all()
    assert np.isnan(facts[1, FACTS.index("difference")]) == (not np.isfinite(value))


@pytest.mark.parametrize("scale", [0.0, 1e-300])
def test_too_small_a_matrix_is_told(scale, program, tmp_path):
    x, facts, _ = launch(program, [Call(scale * moments(1, 10), sides(1, 10, 1))], tmp_path)[0]
    assert facts[0, FACTS.index("verdict")] == 1 and np.isnan(x).all()


def test_only_the_matrix_given_is_examined(program, tmp_path):
    """A sum in float32 need not be symmetric to the last bit; what is factored is."""
    matrix = moments(1, 40)
    given = matrix.copy()
    given[0, 3, 2] += 1e-3
    call = Call(matrix, sides(1, 40, 0), given=given, lower=True, limit=np.inf, smallest=-np.inf, first_shift=0)
    _, facts, lower = launch(program, [call], tmp_path)[0]
    assert facts[0, FACTS.index("difference")] == pytest.approx(1e-3)
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), atol=1e-14)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_right_hand_side_that_is_not_finite_spoils_no_other(blocks, program, tmp_path):
    matrix, b = moments(1, 50), sides(1, 50, 10)
    b[0, 7, 2] = np.nan
    x = launch(program, [Call(matrix, b, blocks=blocks)], tmp_path)[0][0]
    assert np.isnan(x[0, :, 2]).all()
    rest = [side for side in range(10) if side != 2]
    check_solved(matrix, x[..., rest], b[..., rest])


def test_no_right_hand_side_and_no_matrix(program, tmp_path):
    none, empty = launch(
        program, [Call(moments(2, 9), sides(2, 9, 0)), Call(np.empty((0, 9, 9)), np.empty((0, 9, 2)))], tmp_path
    )
    assert none[1].shape == (2, len(FACTS)) and (none[1][:, -1] == 0).all()
    assert empty[0].shape == (0, 9, 2)


def racing(blocks, **options):
    """A call that comes by every barrier: a fine matrix, and one that is shifted; both refined; the factor written."""
    rows = np.random.default_rng(3).standard_normal((1, 200, 75)) * np.logspace(0, -5, 75)
    matrix = np.concatenate([rows.transpose(0, 2, 1) @ rows / 200, moments(1, 75, keys=30)])
    return Call(matrix, sides(2, 75, 10), blocks=blocks, threads=96, passes=2, lower=True, **options)


def bits(results):
    return [part.tobytes() for part in results if part is not None]


@pytest.fixture(scope="module")
def in_order(fast, tmp_path_factory):
    """The racing calls' results, by the number of blocks."""
    folder = tmp_path_factory.mktemp("in_order")
    return {blocks: bits(launch(fast, [racing(blocks)], folder)[0]) for blocks in (1, 3)}


@pytest.mark.parametrize("blocks", [1, 3])
def test_same_bits_in_whatever_order_threads_run(blocks, in_order, fast, tmp_path):
    for found in launch(fast, [racing(blocks, seed=seed) for seed in SEEDS], tmp_path):
        assert bits(found) == in_order[blocks]


@pytest.mark.parametrize(
    ("barrier", "blocks"),
    [(name, blocks) for name in BARRIERS[:-1] for blocks in (1, 3) if blocks > 1 or name not in OF_CLUSTERS],
)
def test_no_barrier_can_be_missed(barrier, blocks, in_order, fast, tmp_path):
    """With any one taken out, some order of the threads has other results, or a thread waits in vain."""
    for seed in SEEDS:
        try:
            found = launch(fast, [racing(blocks, seed=seed, removed=BARRIERS.index(barrier))], tmp_path)
        except Failed:
            return
        if bits(found[0]) != in_order[blocks]:
            return
    pytest.fail(f"without {barrier} nothing changes: it is not needed, or this test is blind")
