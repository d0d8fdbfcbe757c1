"""The backend "cuda" of spd_solve: what nvcc makes of the kernel, and Python's side with the kernel run on the CPU."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.gpu_kernels import (
    Looks,
    build,
    compile_by_nvcc,
    imagined,
    instructions,
    launch,
    numbers,
    resources,
    stand_in,
)
from helpers.spd_solve_kernel import Call

from rewrite_core.backends import BackendUnavailable, select
from rewrite_core.errors import DiagonalShiftWarning, NonFiniteError, RewriteCoreError
from rewrite_core.ops import cuda_kernels, spd_factor, spd_solve
from rewrite_core.ops.spd_solve_op import cuda
from rewrite_core.ops.spd_solve_op.factor import SPDFactor

# --- what nvcc makes of it ---

ARCHITECTURES = ("80", "90a", "100")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """The architecture, ptxas's words of each kernel, and the machine code."""
    target, said = compile_by_nvcc("spd_solve", request.param, tmp_path_factory.mktemp("nvcc"))
    return request.param, said, target


@pytest.mark.slow
def test_the_kernels_fit_their_registers(compiled):
    """Two kernels: a matrix to one block, and one to a cluster. Shared memory is asked for at the launch."""
    _, said, _ = compiled
    spills, registers = resources(said)
    assert len(spills) == 2, said
    assert all(found == (0, 0, 0) for found in spills), said
    assert all(count <= 255 for count in registers), said
    assert " smem" not in said, said


@pytest.mark.slow
def test_the_tensor_cores_do_the_products(compiled):
    arch, _, cubin = compiled
    kernels = instructions(cubin)
    assert len(kernels) == 2, list(kernels)
    for name, code in kernels.items():
        assert len(re.findall(r"\bDMMA", code)) >= 40, name
        assert not re.search(r"\b(LDL|STL)\b", code), name  # local memory
        # a cluster's barriers and the addresses of other blocks' memory; below sm_90 there is none
        assert bool(re.search(r"\bUCGABAR|\bMAPA\b|\bUMAPA\b", code)) == (arch != "80" and "Lb1" in name), name


# --- Python's side ---


class Extension:
    """The extension as REWRITE_CORE_CUDA=1 builds it, whose launches run on the CPU at once."""

    def __init__(self, program, folder, blocks):
        self.program, self.folder, self.blocks, self.launches = program, folder, blocks, []

    def spd_solve_blocks(self, n, device):
        return self.blocks if n <= 512 else 0

    def spd_solve_cuda(self, **given):
        self.launches.append(given)
        batch, n, sides = (given[name] for name in ("batch", "n", "sides"))
        parts = {
            name: numbers(given[name], batch, n, n) for name in ("matrix", "given", "factor") if given[name] is not None
        }
        call = Call(
            rhs=numbers(given["rhs"], batch, n, sides),
            lower=given["lower"] is not None,
            blocks=given["blocks"],
            first_shift=given["first_shift"],
            limit=given["asymmetry"],
            smallest=given["smallest_mean"],
            **parts,
        )
        assert given["least"] in (0.0, n * np.finfo(np.float64).eps) and given["largest_shift"] == 1e-2
        x, facts, lower = launch(self.program, [call], self.folder)[0]
        numbers(given["x"], *x.shape)[:] = x
        numbers(given["facts"], *facts.shape)[:] = facts
        if call.lower:
            numbers(given["lower"], *lower.shape)[:] = lower


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build("spd_solve", [], tmp_path_factory.mktemp("kernel"))


@pytest.fixture(params=[1, 2])
def extension(request, program, tmp_path, monkeypatch):
    """CPU tensors stand for a GPU's."""
    made = Extension(program, tmp_path, request.param)
    cuda._blocks.cache_clear()
    stand_in(monkeypatch, "spd_solve", cuda, made)
    yield made
    cuda._blocks.cache_clear()


def moment(*batch, n=37, keys=120):
    rows = torch.randn(*batch, keys, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return rows.mT @ rows / keys


@pytest.mark.parametrize("batch", [(), (3,), (0,)])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (0,)])
def test_a_solve_is_one_launch(batch, shape, extension):
    matrix = moment(*batch)
    b = torch.randn(*batch, 37, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = spd_solve(matrix, b, backend="cuda")
    assert len(extension.launches) == 1
    assert x.shape == b.shape
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-11)


def test_layouts_and_types(extension):
    matrix = moment(2).mT  # not contiguous
    b = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(1)).mT.bfloat16()
    want = torch.linalg.solve(matrix, b.double())
    torch.testing.assert_close(spd_solve(matrix, b, backend="cuda"), want, rtol=0, atol=1e-11)
    single = matrix.float()
    found = spd_solve(single, b, backend="cuda")
    full = (single.double() + single.double().mT) / 2
    torch.testing.assert_close(found, torch.linalg.solve(full, b.double()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_factor_and_its_solves(batch, extension):
    matrix = moment(*batch)
    b = torch.randn(*batch, 37, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = spd_factor(matrix, backend="cuda")
    assert len(extension.launches) == 1 and not factor.shifted
    torch.testing.assert_close(factor.lower, torch.linalg.cholesky(matrix), rtol=0, atol=1e-14)
    torch.testing.assert_close(factor.solve(b), torch.linalg.solve(matrix, b), rtol=0, atol=1e-11)
    assert len(extension.launches) == 2
    rows = b[..., 0].contiguous()
    torch.testing.assert_close(factor.solve(rows), factor.solve(b)[..., 0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_what_is_rank_deficient_says_what_the_reference_says(batch, extension):
    matrix = moment(*batch, keys=12)
    b = torch.randn(*batch, 37, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    said = []
    for call in (
        lambda: spd_solve(matrix, b, backend="cuda"),
        lambda: spd_factor(matrix, backend="cuda"),
        lambda: spd_factor(matrix, backend="reference"),
    ):
        with pytest.warns(DiagonalShiftWarning) as caught:
            call()
        said.append(str(caught[0].message))
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        ((2, 1), float("nan"), NonFiniteError, "holds NaN"),
        ((1, 2), float("nan"), NonFiniteError, "holds NaN"),
        ((3, 3), float("inf"), NonFiniteError, "holds NaN"),
        ((1, 2), 7.0, RewriteCoreError, "not symmetric"),
        ((3, 3), -1.0, RewriteCoreError, "not positive semidefinite"),
    ],
)
def test_what_is_wrong_is_told(place, value, error, words, extension):
    matrix = moment(2)
    matrix[(1, *place)] = value
    for call in (
        lambda: spd_solve(matrix, torch.ones(2, 37, dtype=torch.float64), backend="cuda"),
        lambda: spd_factor(matrix, backend="cuda"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_a_right_hand_side_that_is_not_finite_comes_out_as_nan(extension):
    b = torch.ones(37, 3, dtype=torch.float64)
    b[4, 1] = float("inf")
    x = spd_solve(moment(), b, backend="cuda")
    assert x[:, 1].isnan().all() and x[:, [0, 2]].isfinite().all()


class Counted:
    """Counts launches, which write nothing."""

    def __init__(self):
        self.launched = []

    def spd_solve_blocks(self, n, device):
        return 1 if n <= 200 else 16

    def spd_solve_cuda(self, **given):
        self.launched.append((given["n"], given["batch"], given["sides"], given["blocks"]))


def test_captures_are_refused_or_right(monkeypatch):
    """50 pairs of factors of random shapes, the first warm: a solve of the second is one launch that waits for nothing,
    or refused where its kernel is another."""
    chance, made, capturing, refused = random.Random(0), Counted(), [False], 0
    stand_in(monkeypatch, "spd_solve", cuda, made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def solve():
        n, batch, sides = chance.choice((1, 37, 200, 201, 512)), chance.choice(((), (3,))), chance.choice((1, 5))
        matrix = torch.eye(n, dtype=torch.float64).expand(*batch, n, n)
        factor = SPDFactor(matrix, matrix, torch.zeros(batch), "cuda")
        b = torch.ones(*batch, n, sides, dtype=torch.float64)
        return (n, *(batch or (1,)), sides, made.spd_solve_blocks(n, 0)), lambda: factor.solve(b)

    for _ in range(50):
        monkeypatch.setattr(cuda_kernels, "_launched", set())
        cuda._blocks.cache_clear()
        (one, warm), (other, captured) = solve(), solve()
        made.launched.clear()
        capturing[0] = False
        warm()
        capturing[0] = True
        with Looks():
            warm()  # the same again goes in
            try:
                captured()
                assert made.launched == [one, one, other] and (one[3] > 1) == (other[3] > 1)
                continue
            except RewriteCoreError as error:
                assert "call it once before the capture" in str(error) and made.launched == [one, one]
        refused += 1
        capturing[0] = False
        captured()
        assert made.launched[2] == other and (one[3] > 1) != (other[3] > 1)
    cuda._blocks.cache_clear()
    assert 5 <= refused <= 45, "the pairs show nothing"


# --- when it is taken ---


def test_by_name_it_runs_or_says_why_not():
    matrix = torch.eye(4, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="cuda: it works on GPU tensors, and the matrix is on cpu"):
        select("spd_solve", "cuda", matrix)


def on_gpu(n):
    """What the choice of a backend looks at."""
    return SimpleNamespace(device=torch.device("cuda", 0), shape=(n, n))


@pytest.fixture
def gpu(monkeypatch):
    imagined(monkeypatch, cuda, SimpleNamespace(spd_solve_cuda=None))
    monkeypatch.setattr(cuda, "_blocks", lambda n, index: 1 if n <= 200 else 16 if n <= 512 else 0)


def test_auto_waits_for_the_gpu_check(gpu, monkeypatch):
    for n in (64, 512):
        assert select("spd_solve", "auto", on_gpu(n)).name == "reference"
        assert select("spd_solve", "cuda", on_gpu(n)).name == "cuda"
    monkeypatch.setattr(cuda, "FASTER_UP_TO", {(9, 0): 256})
    assert select("spd_solve", "auto", on_gpu(256)).name == "cuda"
    assert select("spd_solve", "auto", on_gpu(257)).name == "reference"


def test_reasons(gpu, monkeypatch):
    assert cuda.supports(on_gpu(512)) is None
    assert "n = 513" in cuda.supports(on_gpu(513))
    assert "no GPU check" in cuda.declines(on_gpu(64))

    def too_old(n, index):
        raise RuntimeError("an old driver")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_blocks", too_old)
        assert "do not run what nvcc has built (an old driver)" in cuda.supports(on_gpu(64))
        assert select("spd_solve", "auto", on_gpu(64)).name == "reference"
    imagined(monkeypatch, cuda, SimpleNamespace(spd_solve_cuda=None), capability=(7, 5))
    assert "8.0 or newer, and this GPU has 7.5" in cuda.supports(on_gpu(64))
    imagined(monkeypatch, cuda, SimpleNamespace())
    assert "REWRITE_CORE_CUDA=1" in cuda.supports(on_gpu(64))
    monkeypatch.setattr(cuda_kernels, "extension_reason", lambda: "the extension is not built")
    assert cuda.supports(on_gpu(64)) == "the extension is not built"
