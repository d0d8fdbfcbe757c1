"""Collection on a real GPU (make gpu-check). What needs none, such as its two streams' order: test_cuda_streams.py."""

import contextlib
import functools

import pytest
import torch
from conftest import DATA

import rewrite_core as rc
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.statistics import cuda_streams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
GPU = "cuda"


@pytest.fixture(autouse=True)
def deterministic():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def proggan():
    return rc.load_proggan(DATA / "proggan_state.npz").to(GPU)


def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2(32, style_dim=64, n_mlp=2, channels={4: 128, 8: 128, 16: 96, 32: 48}).to(GPU)


GENERATORS = {
    "proggan": (proggan, "layer5.conv", "layer4.conv"),
    "stylegan2": (stylegan2, "convs.4.conv", "convs.1.conv"),
}


def bound(kind="stylegan2", several=False, change=None):
    make, *names = GENERATORS[kind]
    generator = make()
    generator = generator if change is None else change(generator)
    return [rc.bind(generator, name) for name in names[: 1 + several]]


LATENTS = rc.sample_latents(64, 92, seed=1)
collect = functools.partial(rc.collect_second_moment, batch_size=8, progress=False)
collect_all = functools.partial(rc.collect_second_moments, batch_size=8, progress=False)


def oracle(layer, latents=LATENTS, batch_size=8):
    """From the same keys, in float64 on the CPU."""
    total, count = 0, 0
    for batch in latents.split(batch_size):
        rows = layer.keys(batch).cpu().movedim(1, -1).flatten(0, -2).double()
        total, count = total + rows.T @ rows, count + len(rows)
    return total / count


def assert_right(moment, layer, latents=LATENTS):
    want = oracle(layer, latents)
    scale = want.diagonal().sqrt().clamp_min(1e-300)
    assert moment.matrix().device.type == "cpu"
    assert (moment.matrix() - want).norm() <= 2e-6 * want.norm()
    assert ((moment.matrix() - want).abs() / torch.outer(scale, scale)).max() <= 2e-6


def assert_same(one, other):
    assert torch.equal(one._sum, other._sum), (one._sum - other._sum).abs().max()
    assert one._facts() == other._facts()
    assert (one.key_errors is None) == (other.key_errors is None)
    assert one.key_errors is None or torch.equal(one.key_errors, other.key_errors)


@contextlib.contextmanager
def late(monkeypatch, cycles=20_000_000):
    """The side stream sleeps, some 10 ms, before each update: passes overtake it."""
    after = cuda_streams.SideStream.after

    @contextlib.contextmanager
    def asleep(self, origin):
        with after(self, origin):
            torch.cuda._sleep(cycles)
            yield

    with monkeypatch.context() as patch:
        patch.setattr(cuda_streams.SideStream, "after", asleep)
        yield


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_against_float64(kind, several):
    layers = bound(kind, several)
    for moment, layer in zip(collect_all(layers, LATENTS), layers, strict=True):
        assert_right(moment, layer)
        moment.check(layer, LATENTS)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_the_same_bits_as_batch_by_batch(kind, several, monkeypatch):
    """From run to run, and as `update` gives, which waits for each batch; also when the side stream is late."""
    layers = bound(kind, several)
    keys = [torch.randn(2, layer.in_channels, generator=torch.Generator().manual_seed(1)) for layer in layers]
    first = collect_all(layers, LATENTS, keys=keys)
    with late(monkeypatch):
        delayed = collect_all(layers, LATENTS, keys=keys)
    for one, other, layer in zip(first, delayed, layers, strict=True):
        assert_same(one, other)
        plain = rc.SecondMoment(layer.in_channels)
        for batch in LATENTS.split(8):
            plain.update(layer.keys(batch))
        assert torch.equal(plain._sum, one._sum)
        assert (plain.count, plain.standard_error) == (one.count, one.standard_error)


class Kept(torch.nn.Module):
    """Keys in a CUDA graph's own memory, written to by every replay."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(
            torch.nn.Conv2d(64, 96, 1), torch.nn.ReLU(), torch.nn.Conv2d(96, 96, 3, padding=1)
        )
        self.conv = torch.nn.Conv2d(96, 8, 3)
        self.requires_grad_(False).to(GPU)
        self.input = torch.zeros(8, 64, 32, 32, device=GPU)
        self.trunk(self.input)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.trunk(self.input)

    def forward(self, z):
        self.input.copy_(z[:, :, None, None].expand(-1, -1, 32, 32))
        self.graph.replay()
        return self.conv(self.output)


def test_a_generator_in_a_cuda_graph(monkeypatch):
    layer, latents = rc.bind(Kept(), "conv"), LATENTS[:88]
    with late(monkeypatch):
        moment = collect(layer, latents)
    assert_right(moment, layer, latents)


def half(generator):
    return generator.half()


def channels_last(generator):
    for weight in generator.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return generator


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("change", [half, channels_last, torch.compile], ids=lambda change: change.__name__)
def test_kinds_of_generators(kind, change):
    (layer,) = bound(kind, change=change)
    moment = collect(layer, LATENTS)
    assert_right(moment, layer)
    assert layer.keys(LATENTS[:2]).dtype == (torch.float16 if change is half else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", GENERATORS)
def test_autocast_and_inference_mode(kind, dtype):
    (layer,) = bound(kind)
    with torch.autocast(GPU, dtype):
        moment = collect(layer, LATENTS)
        assert_right(moment, layer)
    with torch.inference_mode():
        moment = collect(layer, LATENTS)
        assert_right(moment, layer)
    moment.update(layer.keys(LATENTS[:2]))


@pytest.mark.parametrize(
    "how", [{}, {"skip_nonfinite": True}, {"keys": True}], ids=lambda how: "-".join(how) or "plain"
)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("where", ["cpu", GPU])
def test_no_host_synchronisation_between_batches(where, several, how, monkeypatch):
    """From the third batch to the last but one, but where an error of keys falls due (the 8th batch)."""
    layers, passes, waits = bound("stylegan2", several), [], []
    if "keys" in how:
        how = {"keys": [torch.eye(layer.in_channels)[:2] for layer in layers]}
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: (waits.append(len(passes)), synchronize(self))[1])

    def watch(module, args):
        passes.append(0)
        strict = 3 <= len(passes) <= 12 and not ("keys" in how and len(passes) == 8)
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    layers[0].generator.register_forward_pre_hook(watch)
    latents = rc.sample_latents(64, 8 * 13).to(where)
    try:
        collect_all(layers, latents)  # compiles and chooses
        passes.clear(), waits.clear()
        collect_all(layers, latents, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(passes) == 13
    assert all(wait in ([8, 13] if "keys" in how else [13]) for wait in waits), waits


def test_memory_is_constant(monkeypatch):
    """However far the host is ahead."""
    (layer,) = bound()
    peaks = []
    with late(monkeypatch, 5_000_000):
        for batches in (4, 40):
            latents = rc.sample_latents(64, 8 * batches)
            collect(layer, latents[:16])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            collect(layer, latents)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.02 * peaks[0], peaks


def test_nonfinite_images_are_skipped_and_named(monkeypatch):
    (layer,) = bound("proggan")
    bad = LATENTS.clone()
    bad[[3, 37]] = torch.nan
    bad[16:24] = torch.inf  # all of a batch
    good = LATENTS[[i for i in range(92) if i not in (3, 37, *range(16, 24))]]
    with late(monkeypatch):
        moment = collect(layer, bad, skip_nonfinite=True)
        assert moment.skipped == 10 and moment.count == 82 * 256
        assert_right(moment, layer, good)
        with pytest.raises(rc.NonFiniteError, match=r"'layer5.conv', batch 0 \(latents 0 to 7\).*NaN or infinity"):
            collect(layer, bad)
        with pytest.raises(rc.NonFiniteError, match=r"batch 4 \(latents 32 to 39\)"):
            collect(layer, torch.cat([LATENTS[:32], bad[32:]]))
    plain = rc.SecondMoment(64)
    for batch in bad.split(8):
        plain.update(layer.keys(batch), skip_nonfinite=True)
    assert torch.equal(plain._sum, moment._sum) and plain.skipped == 10
    linear = rc.bind(torch.nn.Sequential(torch.nn.Linear(64, 3)).to(GPU), "0")
    with pytest.raises(rc.NonFiniteError, match="batch 0 .*as large as 1e.20 and their squares overflow torch.float32"):
        collect(linear, torch.full((40, 64), 1e20))


def test_interrupted_collections_resume_to_the_same_bits(tmp_path, monkeypatch):
    layers = bound("stylegan2", several=True)
    keys = [None, torch.eye(layers[1].in_channels)[:2]]
    latents = rc.sample_latents(64, 8 * 40)
    ask = {"layers": layers, "latents": latents, "keys": keys, "until": 0.02}
    want = collect_all(**ask)
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        "rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks)
    )  # about every 6 batches
    paths, left = [tmp_path / "one", tmp_path / "two"], 0

    def interrupt(module, args):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    layers[0].generator.register_forward_pre_hook(interrupt)
    interruptions = 0
    while True:
        left = 9 + interruptions % 3
        try:
            with late(monkeypatch, 2_000_000):
                got = collect_all(**ask, checkpoints=paths)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert 2 <= interruptions < 40
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def test_update_of_features_on_the_gpu():
    features = torch.randn(5, 70, 9, 7, generator=torch.Generator().manual_seed(0))
    for given in (
        features,
        features.to(memory_format=torch.channels_last),
        features[:, :, 1:, 2:],
        features[:, :, 0, 0],
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            moment = rc.SecondMoment(70)
            moment.update(given.to(dtype).to(GPU))
            rows = given.to(dtype).double().movedim(1, -1).reshape(-1, 70)
            assert moment.count == len(rows)
            assert (moment._sum - rows.T @ rows).norm() <= 2e-6 * (rows.T @ rows).norm()


def test_a_moment_on_a_gpu_is_as_good(tmp_path):
    """The same file, the same checks; what it solves agrees with the CPU to rounding times the condition."""
    [layer] = bound()
    moment = collect(layer, LATENTS)
    moved = moment.to(GPU)
    assert moved is not moment and moved.to(GPU) is moved and moved.matrix().is_cuda
    moved.check(layer, LATENTS)
    paths = [tmp_path / "one", tmp_path / "other"]
    moment.save(paths[0]), moved.save(paths[1])
    assert_same(*map(rc.SecondMoment.load, paths))
    rows = torch.randn(5, moment.channels, device=GPU)
    moment.update(rows), moved.update(rows)
    assert torch.equal(moment._sum, moved._sum.cpu()) and moment.count == moved.count
    plain = rc.SecondMoment(48)
    plain.update(torch.randn(1000, 48, generator=torch.Generator().manual_seed(0)))
    keys = torch.randn(3, 48, dtype=torch.float64)
    one, other = plain.solve(keys), plain.to(GPU).solve(keys.to(GPU))
    assert other.is_cuda and (one - other.cpu()).norm() <= 1e-13 * one.norm()
