"""What a CUDA graph cannot take in is refused, against what Triton itself says that it would compile."""

import random
import weakref

import pytest
import torch
from conftest import needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite_core.errors import RewriteCoreError

pytestmark = needs_triton


class GPU:
    """In place of Triton's launches: what is compiled, by Triton's own rules, and whether a graph is captured."""

    def __init__(self):
        self.compiled, self.capturing, self.fused, self.binders, self.launched = set(), False, {}, {}, []

    def key(self, kernel, *arguments, **constants):
        """What Triton keeps a compiled kernel under."""
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature

        if kernel not in self.binders:
            backend = CUDABackend(GPUTarget("cuda", 90, 32))
            self.binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, options = self.binders[kernel](*arguments, **constants)
        return kernel, str(specialisation), str(options)

    def launch(self, kernel, *arguments, **constants):
        self.launched.append(kernel.__name__)
        key = self.key(kernel, *arguments, **constants)
        assert not self.capturing or key in self.compiled, "an error of CUDA's: a kernel is loaded inside a capture"
        self.compiled.add(key)
        self.fused[kernel.__name__] = constants.get("enable_fp_fusion")
        options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
        return Compiled(self, kernel, key, options)


class Compiled:
    """In place of machine code: what it is launched with must be what it was compiled for."""

    def __init__(self, gpu, kernel, key, options):
        self.gpu, self.kernel, self.wanted, self.options = gpu, kernel, key, options

    def __getitem__(self, programs):
        assert len(programs) == 3 and all(count > 0 for count in programs), "machine code has three axes"

        def run(*arguments):
            assert len(arguments) == len(self.kernel.arg_names), "Triton's launcher takes constants, too"
            assert self.gpu.key(self.kernel, *arguments, **self.options) == self.wanted
            self.gpu.launched.append(self.kernel.__name__)

        return run


class Watched:
    """A kernel whose launches go to the stand-in."""

    def __init__(self, kernel, gpu):
        self.kernel, self.gpu = kernel, gpu
        self.arg_names, self.do_not_specialize = kernel.arg_names, kernel.do_not_specialize

    def __getitem__(self, programs):
        assert all(count > 0 for count in programs)
        return lambda *arguments, **constants: self.gpu.launch(self.kernel, *arguments, **constants)


DESCENDS = "update_kernel", "compare_kernel", "project_kernel", "lean_kernel"
FITS = "share_kernel", "scale_kernel", "fit_kernel", "exact_kernel"
KERNELS = "second_moment_kernel", "add_partials_kernel", *FITS, *DESCENDS


@pytest.fixture
def gpu(monkeypatch):
    from rewrite_core.kernels import launching, second_moment
    from rewrite_core.kernels.fit_low_rank import host as fit_low_rank
    from rewrite_core.kernels.fit_projected import host as fit_projected

    gpu = GPU()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_plans", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    for module in (second_moment, fit_low_rank, fit_projected):
        for name in KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Watched(getattr(module, name), gpu))
    return gpu


class Draw:
    """Random values by name; the second of a pair has most of them from the first."""

    def __init__(self):
        self.random, self.first = random.Random(0), {}

    def pair(self, make):
        self.first = {}
        first = make(self)
        return first, make(self)

    def __call__(self, name, values):
        value = self.random.choice(values)
        return self.first.setdefault(name, value) if self.random.random() < 0.85 else value


def moment_call(draw):
    from rewrite_core.kernels import second_moment

    channels = draw("channels", (1, 16, 64, 96, 100, 112, 128, 200, 513))
    sizes = draw("batch", (1, 2, 3, 16)), channels, draw("height", (1, 7, 8, 16)), draw("width", (2, 8, 9, 16))
    features = torch.empty(sizes, dtype=draw("dtype", (torch.float32, torch.bfloat16)))
    if draw("layout", ("map", "map", "channels_last")) == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    features = features[..., draw("crop", (0, 0, 0, 1)) :]
    out = torch.empty(channels * channels + 1, dtype=torch.float64)[draw("misaligned", (0, 0, 0, 1)) :]
    out = out[: channels * channels].view(channels, channels)
    precision = draw("precision", ("x3", "x3", "ieee"))
    return lambda: second_moment.launch(features, out, precision)


def fit_call(draw):
    from rewrite_core.kernels import fit_low_rank
    from rewrite_core.ops.fit_low_rank_op.problem import FitLowRankProblem

    edits, channels, pixels = draw("edits", (1, 2)), draw("channels", (1, 8, 33)), draw("pixels", (4, 16, 100, 130))
    dtype = draw("dtype", (torch.float32, torch.float64))
    basis = torch.ones(edits, draw("unknowns", (9, 16, 18)), pixels, dtype=dtype)
    maps = torch.ones(edits, channels, pixels, dtype=dtype)
    shift = {"none": None, "bias": maps[..., :1].expand_as(maps), "noise": maps}[
        draw("shift", ("none", "bias", "noise"))
    ]
    target = torch.ones(maps.numel() + 1, dtype=dtype)[draw("misaligned", (0, 0, 0, 1)) :][: maps.numel()].view_as(maps)
    loss, slope, steps = draw("loss", ("l1", "l2")), draw("slope", (0.2, 1.0)), draw("steps", (5, 60))
    unknowns, wide = basis.shape[1], {"dtype": torch.float64}
    square, each = torch.ones(edits, unknowns, unknowns, **wide), torch.ones(edits, channels, **wide)
    linear = torch.ones(edits, channels, unknowns, **wide)
    demodulation = draw("demodulation", ((None,) * 3, (each, linear, square)))
    penalty = draw("penalty", ((None, None), (square, each)))
    problem = FitLowRankProblem(
        basis, maps, target, shift, *demodulation, slope, 1.0, None, *penalty, loss, steps, 1e-5
    )
    return lambda: fit_low_rank.launch(problem)


def projected_call(draw):
    from rewrite_core.kernels import fit_projected
    from rewrite_core.ops.fit_projected_op.problem import FitProjectedProblem

    inputs, side, channels = (
        draw("inputs", (1, 13, 32, 100)),
        draw("side", (1, 4, 10, 13)),
        draw("channels", (1, 5, 16)),
    )
    operator, base = torch.ones(inputs, 3, 3, side, side), torch.ones(channels, side, side)
    directions = torch.ones(draw("rank", (0, 1, 17)), inputs)
    shift = base[:, :1, :1].expand_as(base) if draw("shift", (True, False)) else None
    loss, steps = draw("loss", ("l1", "l2")), draw("steps", (1, 20))
    maps = (operator, base, base, base, shift, None, None)
    problem = FitProjectedProblem(*maps, 0.0, 0.2, 1.0, directions, loss, steps, 0.05, 10, False)
    problem = problem._replace(project_gradient=problem.steps == 1 and len(directions) > 0)
    return lambda: fit_projected.launch(problem)


@pytest.mark.parametrize("make", [moment_call, fit_call, projected_call])
def test_captures_are_refused_or_right(gpu, make):
    """50 pairs of random shapes, the first warm: the second is refused just where Triton would compile."""
    from rewrite_core.kernels import launching

    draw = Draw()
    refused = 0
    for _ in range(50):
        warm, captured = draw.pair(make)
        gpu.compiled.clear()
        launching.forget()
        gpu.capturing = False
        warm()
        warmed = set(gpu.compiled)
        gpu.capturing = True
        warm()  # the same again goes in
        try:
            captured()
            assert gpu.compiled == warmed
        except RewriteCoreError as error:
            assert "call it once before the capture" in str(error)
            refused += 1
            gpu.capturing = False
            captured()
            assert gpu.compiled > warmed, "nothing had to be compiled"
    assert 5 <= refused <= 45, "the pairs show nothing"


class Operations(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel of their own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in operation._schema.returns)
        if not views and not operation._schema.name.split("::")[1].startswith(("empty", "new_empty")):
            self.names.append(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def test_a_second_moment_is_two_launches_and_a_plan(gpu):
    """From the second call of a kind on nothing is worked out again, and torch is asked for memory alone."""
    from rewrite_core.kernels import launching, second_moment

    features, out = torch.ones(8, 64, 16, 16), torch.zeros(64, 64).double()
    second_moment.launch(features, out, "x3")
    plans = dict(launching._plans)
    gpu.launched.clear()
    with Operations() as operations:
        for _ in range(3):
            second_moment.launch(features, out, "x3")
    assert gpu.launched == ["second_moment_kernel", "add_partials_kernel"] * 3 and not operations.names
    assert launching._plans == plans and len(plans) == 1
    second_moment.launch(torch.empty(8 * 64 * 256 + 1)[1:].view(8, 64, 16, 16), out, "x3")  # at another alignment
    assert len(launching._plans) == 2


def test_plans_do_not_pile_up_and_keep_no_tensor(gpu, monkeypatch):
    from rewrite_core.kernels import launching, second_moment

    monkeypatch.setattr(launching, "MOST_PLANS", 3)
    for size in range(4, 12):
        features = torch.ones(1, 16, size, size)
        gone = weakref.ref(features)
        second_moment.launch(features, torch.zeros(16, 16).double(), "x3")
        del features
        assert gone() is None and len(launching._plans) <= 3


def test_what_must_not_be_fused(gpu):
    """As the tests that compile ahead of time have it. A fused sum would round otherwise than its copies."""
    for make in (fit_call, projected_call):
        draw = Draw()
        for _ in range(30):
            for call in draw.pair(make):
                call()
    assert set(gpu.fused) == {*FITS, *DESCENDS} and not any(gpu.fused.values())
    assert None not in gpu.fused.values()


def test_two_launches_a_step(gpu):
    """And three more where it projects, at steps 0, 10 and the last."""
    from rewrite_core.kernels import fit_projected
    from rewrite_core.ops.fit_projected_op.problem import FitProjectedProblem

    operator, base = torch.ones(32, 3, 3, 4, 4), torch.ones(16, 4, 4)
    maps = (operator, base, base, base, None, None, None)
    problem = FitProjectedProblem(*maps, 0.0, 0.2, 1.0, torch.ones(1, 32), "l1", 14, 0.05, 10, False)
    fit_projected.launch(problem)
    first, *steps = "".join(name[0] for name in gpu.launched).split("c")
    assert first == "u", "demodulation's norm before the first step"
    assert steps == ["upu", *["u"] * 9, "upu", *["u"] * 2, "up"]


def test_repeated_launches_go_straight_to_what_is_compiled(monkeypatch):
    from rewrite_core.kernels import launching

    calls = []

    class Kernel:
        arg_names, do_not_specialize = ("x", "size", "step", "TILE"), ("step",)

        def __getitem__(self, programs):
            def launch(*arguments, **constants):
                calls.append(("searched", programs, arguments, constants))
                return Compiled()

            return launch

    class Compiled:
        def __getitem__(self, programs):
            return lambda *arguments: calls.append(("straight", programs, arguments))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.zeros(3)
    launch = launching.repeated("fit", Kernel(), (2, 1, 1), x, 16, num_warps=4, TILE=32)
    for step in (0, 1, 2):
        launch(step)
    assert calls == [
        ("searched", (2, 1, 1), (x, 16, 0), {"num_warps": 4, "TILE": 32}),
        ("straight", (2, 1, 1), (x, 16, 1, 32)),
        ("straight", (2, 1, 1), (x, 16, 2, 32)),
    ]


def test_divisibility_counts_and_not_the_size(gpu):
    from rewrite_core.kernels import second_moment

    def call(channels):
        second_moment.launch(torch.ones(2, channels, 8, 8), torch.ones(channels, channels).double(), "x3")

    call(96)
    gpu.capturing = True
    call(112)
    with pytest.raises(RewriteCoreError, match="second_moment has not yet run .* call it once before the capture"):
        call(100)
    gpu.capturing = False
    call(100)
    gpu.capturing = True
    call(100)


def test_a_fit_is_three_launches_and_a_plan(gpu):
    """Scales and weights, quadratic forms, the fit: from the second call on torch is asked for memory alone."""
    from rewrite_core.kernels import fit_low_rank, launching
    from rewrite_core.ops.fit_low_rank_op.problem import FitLowRankProblem

    basis, base = torch.ones(1, 9, 100), torch.ones(1, 32, 100)
    forms = torch.ones(1, 32).double(), torch.zeros(1, 32, 9).double(), torch.eye(9)[None].double()
    none = (None,) * 3
    problem = FitLowRankProblem(basis, base, base, None, *forms, 0.2, 1.0, *none, "l1", 60, 1e-5)
    linear = problem._replace(constant=None, linear=None, quadratic=None)
    for each, launches in (
        (problem, ["share_kernel", "scale_kernel", "fit_kernel"]),
        (linear, ["share_kernel", "fit_kernel"]),
    ):
        fit_low_rank.launch(each)
        plans = set(launching._plans)
        gpu.launched.clear()
        with Operations() as operations:
            fit_low_rank.launch(each)
        assert gpu.launched == launches and not operations.names
        assert set(launching._plans) == plans
    fit_low_rank.launch(linear._replace(slope=1.0, loss="l2"))
    assert gpu.launched[-2:] == ["share_kernel", "exact_kernel"]
