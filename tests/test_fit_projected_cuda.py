"""The backend "cuda" of fit_projected: what nvcc makes of its kernels, and when it is taken."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.gpu_kernels import Looks, compile_by_nvcc, imagined, instructions, resources, stand_in

from rewrite_core.backends import BackendUnavailable, select
from rewrite_core.errors import RewriteCoreError
from rewrite_core.ops import cuda_kernels, fit_projected
from rewrite_core.ops.fit_projected_op import cuda, register

# --- what nvcc makes of it ---


@pytest.fixture(scope="module", params=["80", "90a", "100"])
def compiled(request, tmp_path_factory):
    """The architecture, ptxas's words of each kernel, and the machine code."""
    target, said = compile_by_nvcc("fit_projected", request.param, tmp_path_factory.mktemp("nvcc"))
    return request.param, said, target


@pytest.mark.slow
def test_the_kernels_fit_their_registers(compiled):
    """Few weights to one block, few and many to a cluster; and as many for projected gradients."""
    _, said, _ = compiled
    spills, registers = resources(said)
    assert len(spills) == 6, said
    assert all(found == (0, 0, 0) for found in spills), said
    assert all(count <= 255 for count in registers), said
    assert " smem" not in said, said


@pytest.mark.slow
def test_the_tensor_cores_do_the_products(compiled):
    arch, _, cubin = compiled
    kernels = instructions(cubin)
    assert len(kernels) == 6, list(kernels)
    for name, code in kernels.items():
        many, leans = (flag == "1" for flag in re.search(r"Lb(\d)ELb(\d)E", name).groups())
        if arch == "80" and many:  # there are no clusters: nothing launches it
            assert "HMMA" not in code, name
            continue
        assert len(re.findall(r"\bHMMA\.1688\.F32\.TF32", code)) >= (21 if leans else 39), name
        assert not re.search(r"\b(LDL|STL)\b", code), name  # local memory
        # a cluster's barriers and the addresses of other blocks' memory; below sm_90 there is none
        assert bool(re.search(r"\bUCGABAR|\bMAPA\b|\bUMAPA\b", code)) == many, name


# --- when it is taken ---


def on_gpu(inputs=512, side=10, kernel=3, dtype=torch.float32):
    """What the choice of a backend looks at."""
    shape = torch.Size((inputs, kernel, kernel, side, side))
    return SimpleNamespace(device=torch.device("cuda", 0), shape=shape, dtype=dtype, numel=lambda: shape.numel())


@pytest.fixture
def gpu(monkeypatch):
    imagined(monkeypatch, cuda, SimpleNamespace(fit_projected_cuda=None))
    monkeypatch.setattr(cuda, "_plan", lambda weights, pixels, taps, index: (9, 16) if weights <= 4608 else (0, 0))


def test_by_name_it_runs_or_says_why_not():
    operator = torch.ones(4, 3, 3, 5, 5)
    with pytest.raises(BackendUnavailable, match="cuda: it works on GPU tensors, and the operator is on cpu"):
        select("fit_projected", "cuda", operator)


def test_auto_waits_for_the_gpu_check(gpu, monkeypatch):
    assert "no GPU check" in cuda.declines(on_gpu())
    assert select("fit_projected", "cuda", on_gpu()).name == "cuda"
    monkeypatch.setattr(cuda, "FASTER_ON", frozenset({(9, 0)}))
    assert select("fit_projected", "auto", on_gpu()).name == "cuda"
    assert cuda.supports(on_gpu(inputs=513)) is not None


def test_reasons(gpu, monkeypatch):
    assert cuda.supports(on_gpu()) is None
    assert "461700 numbers is more than the shared memory" in cuda.supports(on_gpu(inputs=513))
    assert "float64" in cuda.supports(on_gpu(dtype=torch.float64))
    assert "taps" in cuda.supports(on_gpu(inputs=4, kernel=9))

    def too_old(*given):
        raise RuntimeError("an old driver")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_plan", too_old)
        assert "do not run what nvcc has built (an old driver)" in cuda.supports(on_gpu())
    imagined(monkeypatch, cuda, SimpleNamespace(fit_projected_cuda=None), capability=(7, 5))
    assert "8.0 or newer, and this GPU has 7.5" in cuda.supports(on_gpu())
    imagined(monkeypatch, cuda, SimpleNamespace())
    assert "REWRITE_CORE_CUDA=1" in cuda.supports(on_gpu())
    monkeypatch.setattr(cuda_kernels, "extension_reason", lambda: "the extension is not built")
    assert cuda.supports(on_gpu()) == "the extension is not built"


class Extension:
    """Counts launches, which write nothing."""

    def __init__(self):
        self.launched = []

    def fit_projected_plan(self, weights, **rest):
        return (3 if weights <= 1536 else 9), 1 if weights <= 96 else 16

    def fit_projected_parts(self, blocks, **rest):
        return blocks

    def fit_projected_cuda(self, **given):
        self.launched.append((given["tiles"], given["blocks"] > 1, given["basis"] is not None))


def test_captures_are_refused_or_right(monkeypatch):
    """50 pairs of random shapes, the first warm: the second is one launch, or refused where its kernel is another."""
    chance, made, capturing, refused = random.Random(0), Extension(), [False], 0
    stand_in(monkeypatch, "fit_projected", cuda, made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(register, "dispatched", lambda *tensors: False)  # not for the mode that counts

    def call():
        inputs, kernel, side = chance.choice((4, 30, 200)), chance.choice((1, 3)), chance.choice((1, 4))
        operator, base = torch.ones(inputs, kernel, kernel, side, side), torch.ones(chance.choice((1, 70)), side, side)
        options = {"steps": chance.choice((1, 12)), "loss": chance.choice(("l1", "l2"))}
        options |= {"directions": torch.ones(chance.choice((1, 17)), inputs), "project_gradient": chance.random() < 0.2}
        return lambda: fit_projected(operator, base, base, **options, backend="cuda")

    for _ in range(50):
        monkeypatch.setattr(cuda_kernels, "_launched", set())
        cuda._plan.cache_clear()
        warm, captured = call(), call()
        made.launched.clear()
        capturing[0] = False
        warm()
        capturing[0] = True
        with Looks():
            warm()  # the same again goes in
            assert made.launched[0] == made.launched[1]
            try:
                captured()
                assert len(made.launched) == 3 and made.launched[2] == made.launched[0]
                continue
            except RewriteCoreError as error:
                assert "call it once before the capture" in str(error) and len(made.launched) == 2
        refused += 1
        capturing[0] = False
        captured()
        assert made.launched[2] != made.launched[0]
    cuda._plan.cache_clear()
    assert 5 <= refused <= 45, "the pairs show nothing"
