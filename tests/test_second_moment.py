import functools
import sys

import pytest
import torch
from helpers.moment_features import LAYOUTS, assert_close, features_of, normal, oracle, prefilled, rows_of
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

from rewrite_core import backends, ops
from rewrite_core.backends import BackendUnavailable, extension
from rewrite_core.errors import RewriteCoreError
from rewrite_core.ops.second_moment_op import problem, reference, register

second_moment = ops.second_moment


ISAS = ("portable", "avx2", "avx512")


CPU = {
    "reference": reference.run_reference,
    **{f"cpp-{isa}": functools.partial(register.run_cpp, isa=isa) for isa in ISAS},
}


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@pytest.fixture(params=CPU)
def accumulate(request):
    isa = request.param.removeprefix("cpp-")
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    return CPU[request.param]


@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, accumulate):
    features = features_of(layout, dtype)
    out = prefilled(features.shape[1])
    accumulate(features, out)
    rows = rows_of(features)
    assert_close(out, oracle(features) if len(rows) < 5000 else rows.T @ rows, TOLERANCE[dtype])


def test_layouts_stay_strided():
    """The cases above would show little if PyTorch had made them contiguous."""
    assert sum(not features_of(layout).is_contiguous() for layout in LAYOUTS) >= 13
    assert sum(0 in features_of(layout).stride() for layout in LAYOUTS) == 3


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 3), (2, 5, 0, 3), (2, 5, 3, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_no_positions(shape, backend):
    assert torch.equal(second_moment(torch.empty(shape), backend=backend), prefilled(5))
    out = torch.eye(5, dtype=torch.float64)
    assert second_moment(torch.empty(shape), out=out, backend=backend) is out
    assert torch.equal(out, torch.eye(5, dtype=torch.float64))


def test_mixed_scales(accumulate):
    """Channels from 1e-6 to 1e6: each entry is right on its own channels' scale."""
    scales = torch.logspace(-6, 6, 45, dtype=torch.float64)
    features = (normal(700, 45) * scales).float()
    out = prefilled(45)
    accumulate(features, out)
    assert_close(out, oracle(features), 1e-6)


def test_large_mean(accumulate):
    """A mean 1000 times the deviation, correlated channels: C is ill-conditioned, its entries are right."""
    features = 1000 + normal(4, 20, 16, 16)
    features[:, 10:] = features[:, :10] + 1e-3 * features[:, 10:]
    out = prefilled(20)
    accumulate(features, out)
    rows = rows_of(features)
    assert_close(out, rows.T @ rows, 1e-6)


def test_constant_channels_do_not_drift(accumulate):
    """Equal terms round the same way each time; straight float32 runs of 256 reach 3.8e-6 here."""
    values = torch.linspace(1, 2, 500)
    features = values.expand(4096, -1)
    out = prefilled(500)
    accumulate(features, out)
    assert_close(out, 4096 * torch.outer(values.double(), values.double()), 1e-6)


def test_ten_million_vectors_however_batched():
    generator = torch.Generator().manual_seed(5)
    once, batched, want = prefilled(4), prefilled(4), prefilled(4)
    for _ in range(10):
        features = torch.randn(1_000_000, 4, generator=generator)
        features[:, 1] += 30
        features[:, 2] = 0.1
        second_moment(features, out=once)
        for part in features.split(99_991):
            assert second_moment(part, out=batched) is batched
        rows = features.double()
        want += rows.T @ rows
    assert_close(once, want, 1e-6)
    assert_close(batched, want, 1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_many_small_batches(backend):
    features = normal(60, 21, 3, 3)
    out = prefilled(21)
    for one in features:
        second_moment(one[None], out=out, backend=backend)
    assert_close(out, second_moment(features, backend=backend), 1e-6)
    assert_close(out, oracle(features), 1e-6)


def test_out_is_added_to_and_mirrored(accumulate):
    """The documented contract: the lower triangle of out is read, the upper one written."""
    features = normal(50, 40)
    out = torch.arange(1600, dtype=torch.float64).view(40, 40)
    want = oracle(features) + out.tril() + out.tril(-1).T
    accumulate(features, out)
    assert torch.equal(out, out.T)
    assert (out - want).abs().max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 63, 64, 65, 100, 143])
@pytest.mark.parametrize("keys", [1, 2, 8, 13, 64])
def test_few_keys(keys, channels, accumulate):
    """Of any number, and whole rows or not: all within their own channels, what lies above the diagonal left aside."""
    features = normal(keys, channels)
    features[:, channels // 2] = float("inf")
    start = normal(channels, channels).double()
    start[0, channels - 1] = float("nan") if channels > 1 else 0.0
    out = start.clone()
    accumulate(features, out)
    want = oracle(features) + start.tril() + start.tril(-1).T
    seen = torch.isfinite(want)
    assert seen.sum() == (channels - 1) ** 2
    assert torch.equal(out.isfinite(), seen) and torch.equal(out[seen], out.T[seen])
    assert torch.allclose(out[seen], want[seen], rtol=0, atol=1e-5)


NEIGHBOURS = {  # layouts whose channels are neighbours, of any number of them
    "rows": lambda channels: normal(71, channels),
    "every third row": lambda channels: normal(211, channels)[::3],
    "some channels of rows": lambda channels: normal(39, channels + 5)[:, 3 : channels + 3],
    "channels_last": lambda channels: normal(3, channels, 15, 17).to(memory_format=torch.channels_last),
    "cropped": lambda channels: normal(2, channels, 9, 40).to(memory_format=torch.channels_last)[:, :, 1:, 2:-1],
}


@pytest.mark.parametrize("layout", NEIGHBOURS)
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 8, 15, 16, 34, 66, 136])
def test_groups_of_neighbours(channels, dtype, layout, accumulate):
    features = NEIGHBOURS[layout](channels).to(dtype)
    assert features.stride(1) == 1
    features[0, 1] = float("nan")
    rows = rows_of(features)
    for size in (size for size in (1, 2, 8) if channels % size == 0 and size < channels):
        out = torch.ones(channels // size, size, size, dtype=torch.float64)
        accumulate(features, out, groups=channels // size)
        keys = rows.unflatten(1, (-1, size)).permute(1, 2, 0)
        want = keys @ keys.mT + 1
        seen = want.isfinite()
        assert torch.equal(out.isfinite(), seen) and not seen.all()
        assert torch.allclose(out[seen], want[seen], rtol=1e-6, atol=1e-5 * len(rows) ** 0.5)


@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_neighbours_have_the_same_bits_for_any_number_of_threads(size):
    features = normal(7, 200, 30, 31).to(memory_format=torch.channels_last)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(second_moment(features, backend="cpp", groups=200 // size))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_constant_neighbours_do_not_drift():
    values = torch.linspace(1, 2, 77)
    got = second_moment(values.expand(4096, -1).contiguous(), backend="cpp", groups=77)
    assert torch.allclose(got[:, 0, 0], 4096 * values.double() ** 2, rtol=1e-6)


def test_nothing_hides_nan_in_out(accumulate):
    out = prefilled(40, float("nan"))
    accumulate(normal(50, 40), out)
    assert out.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_channels_stay_apart(value, accumulate):
    features = normal(3, 37, 7, 11)
    features[1, 20, 3, 3] = value
    out = prefilled(37)
    accumulate(features, out)
    touched = torch.zeros(37, 37, dtype=torch.bool)
    touched[20] = touched[:, 20] = True
    assert not out[touched].isfinite().any()
    assert out[~touched].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_value_is_read_exactly(dtype, accumulate):
    """A channel of ones beside every number of the type: C_01 is the sum of the latter."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    size = every.double().abs()
    every = every[((size > 1e-18) & (size < 1e18)) | (size == 0)]  # the documented range; NaN fails both
    ones = torch.ones_like(every)
    for strided in (torch.stack([ones, every]), torch.stack([ones, every], 1).T):
        for k in range(0, strided.shape[1], 4999):  # a few alone, as single keys
            out = prefilled(2)
            accumulate(strided[:, k : k + 1].T, out)
            assert out[0, 1] == every[k].double()
        out = prefilled(2)
        accumulate(strided.T, out)
        want = every.double()
        assert abs(out[0, 1] - want.sum()) <= 1e-6 * want.abs().sum()
        assert abs(out[1, 1] - (want**2).sum()) <= 1e-6 * (want**2).sum()


# in groups of runs with many threads and few, in blocks of channels, and few keys
@pytest.mark.parametrize(
    "shape",
    [(2, 24, 96, 96), (3, 150, 40, 41), (5, 300, 16, 16), (3000, 1000), (8, 700, 1, 1), (5, 253, 3, 3)],
    ids=str,
)
@pytest.mark.parametrize("isa", ["portable", ""])
def test_same_bits_for_any_number_of_threads(shape, isa):
    features = normal(*shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(prefilled(shape[1]))
            register.run_cpp(features, results[-1], isa)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_features_are_not_written_and_gradients_stop():
    features = normal(4, 9, 5, 5).requires_grad_()
    before = features.detach().clone()
    result = second_moment(features)
    assert not result.requires_grad
    assert torch.equal(features.detach(), before)


def test_lazily_negated_features():
    features = torch.complex(normal(20, 6), normal(21, 6)[:20]).conj().imag
    assert features.is_neg()
    assert_close(second_moment(features), oracle(features.resolve_neg().clone()), 1e-6)


@pytest.mark.parametrize(
    ("features", "out", "error", "words"),
    [
        ([[1.0]], None, TypeError, "list.*as_tensor"),
        (torch.ones(3, 3, dtype=torch.int64), None, TypeError, "int64.*float"),
        (torch.ones(3, 3, dtype=torch.complex64), None, TypeError, "complex64"),
        (torch.eye(3).to_sparse(), None, TypeError, "sparse.*to_dense"),
        (torch.ones(3), None, RewriteCoreError, r"\[N, C, H, W\].*\[3\]"),
        (torch.ones(2, 3, 4), None, RewriteCoreError, r"\[2, 3, 4\]"),
        (torch.ones(2, 0), None, RewriteCoreError, "at least one channel"),
        (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]), None, TypeError, "nested tensor"),
        (torch.ones(2, 3), torch.zeros(3, 3), TypeError, "float64.*float32"),
        (torch.ones(2, 3), prefilled(4), RewriteCoreError, r"\[3, 3\].*\[4, 4\]"),
        (torch.ones(2, 3), prefilled(6)[::2, ::2], RewriteCoreError, "contiguous"),
        (torch.ones(2, 3), prefilled(3).requires_grad_(), RewriteCoreError, "detach"),
        (torch.ones(2, 3), prefilled(3).to("meta"), RewriteCoreError, "meta.*cpu"),
        (torch.ones(2, 3), torch.nested.nested_tensor([*prefilled(3)]), TypeError, "out is a nested tensor"),
        (torch.ones(2, 3), prefilled(3).to_sparse(), TypeError, "out is .*to_dense"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_refused_with_advice(features, out, error, words):
    with pytest.raises(error, match=words):
        second_moment(features, out=out)


def test_the_torch_op_checks_too():
    """The kernels trust sizes and pointers, so no way in may skip the checks."""
    with pytest.raises(RewriteCoreError, match="contiguous"):
        torch.ops.rewrite_core.second_moment_(prefilled(2), torch.ones(2, 3))
    with pytest.raises(TypeError, match="int32"):
        torch.ops.rewrite_core.second_moment(torch.ones(2, 3, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autograd_notices_the_write(backend):
    out = prefilled(5)
    y = (torch.ones(5, 5, dtype=torch.float64, requires_grad=True) * out).sum()
    second_moment(normal(20, 5), out=out, backend=backend)
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_output_over_the_features_is_refused(backend):
    memory = torch.eye(6, dtype=torch.float64).flatten()
    out, apart = memory[:9].view(3, 3), memory[9:18].view(3, 3)
    second_moment(apart, out=out, backend=backend)
    with pytest.raises(RewriteCoreError, match="shares memory"):
        second_moment(memory[6:12].view(2, 3), out=out, backend=backend)


def test_subnormal_halves_survive_flushing_to_zero():
    features = torch.tensor([[3e-5, 1.0, 6e-8]], dtype=torch.float16).expand(10, 3)
    exact = oracle(features)
    assert torch.set_flush_denormal(True)
    try:
        got = second_moment(features, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert_close(got, exact, 1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_is_a_well_behaved_torch_op(backend):
    features = normal(2, 5, 3, 4)
    library.opcheck(torch.ops.rewrite_core.second_moment, (features, backend))
    library.opcheck(torch.ops.rewrite_core.second_moment_, (prefilled(5), features, backend))


def test_shape_without_computing():
    result = second_moment(torch.empty(2, 5, 3, 4, dtype=torch.bfloat16, device="meta"))
    assert result.shape == (5, 5) and result.dtype == torch.float64 and result.device.type == "meta"


@pytest.mark.parametrize(
    ("features", "words"),
    [(torch.ones(2, 3), "cpp: .*no precision 'tf32'.*GPUs"), (torch.ones(2, 3).double(), "no precision 'tf32'")],
    ids=["float32", "float64"],
)
def test_precisions_are_for_gpus(features, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(second_moment(features, precision="x3"), second_moment(features))
    with pytest.raises(BackendUnavailable, match=words):
        second_moment(features, precision="tf32")
    with pytest.raises(BackendUnavailable, match="reference.*'ieee'"):
        second_moment(features, backend="reference", precision="ieee")
    with pytest.raises(RewriteCoreError, match="precision='half'.*x3, tf32, ieee"):
        second_moment(features, precision="half")


def over_itself(out):
    return {"features": out.view(2, 4, 1, 2), "out": out}


UNUSUAL = {  # what `second_moment` takes, of calls that may not be made at once
    "subclass": lambda: {"features": torch.nn.Parameter(normal(5, 4))},
    "subclass of out": lambda: {"out": torch.nn.Parameter(prefilled(4), requires_grad=False)},
    "meta": lambda: {"features": torch.empty(5, 4, device="meta"), "out": prefilled(4).to("meta")},
    "nested": lambda: {"features": torch.nested.nested_tensor([normal(2, 4), normal(3, 4)])},
    "sparse": lambda: {"features": normal(5, 4).to_sparse()},
    "negated": lambda: {"features": torch.complex(normal(5, 4), normal(5, 4)).conj().imag},
    "negated out": lambda: {"out": torch.complex(prefilled(4), prefilled(4)).conj().imag},
    "integers": lambda: {"features": normal(5, 4).int()},
    "no positions": lambda: {"features": normal(5, 4)[:0]},
    "three axes": lambda: {"features": normal(5, 4, 3)},
    "another type of out": lambda: {"out": prefilled(4).float()},
    "another shape of out": lambda: {"out": prefilled(3)},
    "slices of out": lambda: {"out": prefilled(8)[::2, ::2]},
    "gradients of out": lambda: {"out": prefilled(4).requires_grad_()},
    "the same memory": lambda: over_itself(prefilled(4)),
    "no divisor": lambda: {"groups": 3},
    "no groups": lambda: {"groups": 0},
    "a truth value": lambda: {"groups": True},
    "more groups than fit 64 bits": lambda: {"groups": 2**64},
    "less": lambda: {"groups": -(2**64)},
    "another precision": lambda: {"precision": "tf32"},
    "another backend": lambda: {"backend": "reference"},
    "no backend": lambda: {"backend": "none"},
}


def at_once(features=None, out=None, backend="auto", precision="x3", groups=1):
    features = normal(5, 4, 3, 3) if features is None else features
    return register._done_at_once(features, prefilled(4) if out is None else out, backend, precision, groups)


has_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch does not show its tensors to C"
)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_meets_the_checks_in_full(name):
    given = UNUSUAL[name]()
    assert not at_once(**given)
    if name not in ("meta", "nested", "sparse"):
        assert not given.get("out", prefilled(1)).any()


@has_exchange
def test_what_is_recorded_or_sent_elsewhere_meets_the_checks_in_full(monkeypatch):
    with FakeTensorMode():
        assert not at_once(normal(5, 4), prefilled(4))
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(prefilled(4))
    assert second_moment(normal(5, 4), fake) is fake
    with monkeypatch.context() as patch:
        patch.setattr(register, "run_cpp", lambda features, out: out.fill_(2))
        patch.setattr(backends, "_load", backends._load.__wrapped__)  # which finds it
        assert not at_once()
    assert at_once()
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "reference")
    assert not at_once()
    assert at_once(backend="cpp")


@has_exchange
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_calls_are_made_at_once(layout, dtype):
    features = features_of(layout, dtype).requires_grad_()
    channels = features.shape[1]
    for groups in {1, channels}:
        size = channels // groups
        want = torch.zeros((size, size) if groups == 1 else (groups, size, size), dtype=torch.float64)
        register.run_cpp(features.detach(), want, groups=groups)
        out = torch.zeros_like(want)
        version = out._version
        assert at_once(features, out, groups=groups)
        assert torch.equal(out, want) and out._version > version


def test_reading_tensors_from_c_leaves_no_reference():
    features, out = normal(5, 4), prefilled(4)
    before = [sys.getrefcount(one) for one in (features, out, False, True)]
    for _ in range(100):
        at_once(features, out)
        at_once(features, out.requires_grad_())
        out = out.detach()
    after = [sys.getrefcount(one) for one in (features, out, False, True)]
    assert all(abs(a - b) < 50 for a, b in zip(after, before))


def test_values_by_place_are_counted():
    with pytest.raises(TypeError, match="4 values"):
        extension().second_moment_at_once(normal(5, 4), prefilled(4), 1)
