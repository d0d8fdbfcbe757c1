"""What a layer remembers of its fingerprint; tests/test_binding.py tests what a fingerprint is of."""

import copy
import gc
import hashlib
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton_compiler
from helpers.triton_compiler import compile_kernel, resources
from torch import nn

import rewrite_core as rc
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.layers import bits, bound, capture, fingerprints
from rewrite_core.layers.fingerprints import tensor_fingerprint


def maps():
    return torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(1))


class Branching(nn.Module):
    """What it runs before `conv` depends on attributes of several kinds. Counts its passes."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
        self.conv, self.last = nn.Conv2d(5, 6, 3), nn.Conv2d(6, 3, 1)
        self.which, self.options, self.activation, self.unknown = "a", {"order": ["a"]}, F.relu, None

    def forward(self, x):
        Branching.runs += 1
        for name in [self.which, *self.options["order"]]:
            x = self.activation(getattr(self, name)(x))
        return self.last(self.conv(x))


class Strange:
    """As torch's script objects, such as the weights of a quantised layer: hashing, comparing or measuring it fails."""

    def __len__(self):
        raise NotImplementedError

    __eq__ = __hash__ = __bool__ = __len__


def unversioned(tensor):
    """Memory to write to that tells nobody."""
    return tensor.detach().numpy().reshape(-1)


CHANGES = {
    "in place": lambda g: g.a.weight.detach().mul_(1.5),
    "data, in place": lambda g: g.a.weight.data.mul_(1.5),
    "data, assigned": lambda g: setattr(g.a.weight, "data", g.a.weight.data * 1.5),
    "numpy, one bit": lambda g: unversioned(g.a.weight)[7:8].view("uint32").__ixor__(1),
    "numpy, two swapped": lambda g: unversioned(g.a.weight).__setitem__([0, 1], unversioned(g.a.weight)[[1, 0]]),
    "numpy, negated": lambda g: unversioned(g.a.weight).__imul__(-1),
    "load_state_dict": lambda g: g.load_state_dict({k: v + 1 for k, v in g.state_dict().items()}),
    "optimizer": lambda g: (
        g(maps()).sum().backward(),
        torch.optim.SGD([p for p in g.parameters() if p.grad is not None], 0.1).step(),
    ),
    "parameter, replaced": lambda g: setattr(g.a, "bias", nn.Parameter(g.a.bias.detach() + 1)),
    "module, replaced": lambda g: setattr(g, "a", nn.Conv2d(5, 5, 1)),
    "string": lambda g: setattr(g, "which", "b"),
    "nested": lambda g: g.options["order"].append("b"),
    "hook": lambda g: g.a.register_forward_hook(lambda module, args, output: g.b(output)),
    "class": lambda g: setattr(g.a, "__class__", type("Twice", (nn.Conv2d,), {"forward": lambda m, x: g.b(g.b(x))})),
}


def passes(layer):
    """How many forward passes a fingerprint takes, and the fingerprint."""
    before = Branching.runs
    fingerprint = layer.fingerprint(maps())
    return Branching.runs - before, fingerprint


@pytest.mark.parametrize("change", CHANGES)
def test_a_remembered_fingerprint_sees_every_change(change):
    torch.manual_seed(0)
    generator = Branching().eval()
    layer = rc.bind(generator, "conv")
    keys, (first, before) = layer.keys(maps()), passes(layer)
    assert (first, passes(layer)) == (1, (0, before))
    CHANGES[change](generator)
    assert not torch.equal(layer.keys(maps()), keys), "the test itself"
    runs, after = passes(layer)
    assert runs == 1 and after != before
    assert after == rc.bind(generator, "conv").fingerprint(maps()), "as one who remembers nothing"
    assert passes(layer) == (0, after)


def test_a_remembered_fingerprint_leaves_out_what_follows_the_layer():
    generator = Branching().eval()
    layer = rc.bind(generator, "conv")
    before = layer.fingerprint(maps())
    generator.conv.weight.data.mul_(2)
    generator.last.weight.data.mul_(2)
    generator.train()
    generator(maps()).sum().backward()
    assert passes(layer) == (0, before)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert copied.fingerprint(maps()) == pickled.fingerprint(maps()) == before
    generator.unknown = object()  # whatever that may mean to the generator
    assert [passes(layer), passes(layer)] == [(1, before), (1, before)]
    generator.unknown = Strange()
    assert [passes(layer), passes(layer)] == [(1, before), (1, before)]


def test_a_collection_leaves_the_fingerprint_behind():
    layer = rc.bind(Branching().eval(), "conv")
    before = Branching.runs
    moment = rc.collect_second_moment(layer, maps(), batch_size=2, progress=False)
    looks = 2  # how often the layer runs, and (with the fingerprint) whether rows depend on each other
    assert Branching.runs - before == len(maps()) // 2 + looks
    assert passes(layer) == (0, moment.fingerprint)
    assert rc.bind(layer.generator, "conv").fingerprint(maps()) == moment.fingerprint


def test_nothing_is_kept_alive():
    generator = Branching().eval()
    layer = rc.bind(generator, "conv")
    layer.fingerprint(maps())
    old = [weakref.ref(generator.a), weakref.ref(generator.a.weight)]
    generator.a = nn.Conv2d(5, 5, 1)
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.parametrize("family", [ProgGAN, StyleGAN2])
def test_tracing_leaves_the_bits_of_the_keys(family):
    torch.manual_seed(0)
    sizes = {ProgGAN: ([12, 16, 16],), StyleGAN2: (8, 12, 2, {4: 16, 8: 12})}
    generator = family(*sizes[family])
    latents = rc.sample_latents(12, 6)
    layers = [rc.bind(generator, info.name) for info in rc.list_layers(generator, latents)]
    caught, parts = {}, {}
    capture._run(layers, latents, lambda number, each: caught.setdefault(number, each.key) is None, parts=parts)
    for number, layer in enumerate(layers):
        assert torch.equal(caught[number], layer.keys(latents))
        found = parts[number].fingerprint(generator, layer._forward)
        assert found == layer.fingerprint(latents) == rc.bind(generator, layer.name).fingerprint(latents)
    assert capture.fingerprints(layers, latents) == [layer.fingerprint(latents) for layer in layers]


def test_buffers_of_other_layouts():
    generator = Branching().eval()
    layer, prints = rc.bind(generator, "conv"), []
    for scale in (1, 2, 1):
        generator.a.register_buffer("sparse", scale * torch.eye(3).to_sparse())
        generator.a.register_buffer("conjugate", torch.tensor([1j]).conj())
        prints.append(layer.fingerprint(maps()))
    assert prints[0] == prints[2] != prints[1]
    generator.a.register_buffer("conjugate", torch.tensor([1j]))
    assert layer.fingerprint(maps()) != prints[0]


def test_a_weight_is_known_again_by_its_bits(monkeypatch):
    layer = rc.bind(Branching(), "conv")
    weight = layer.weight.detach().clone()
    wanted, other = tensor_fingerprint(weight), tensor_fingerprint(weight + 1)
    seen = []
    monkeypatch.setattr(bound, "tensor_fingerprint", lambda data: seen.append(data) or tensor_fingerprint(data))
    assert layer.weight_fingerprint(layer.weight) == layer.weight_fingerprint(weight) == wanted and len(seen) == 1
    assert layer.weight_fingerprint(weight + 1) == other and len(seen) == 2
    with torch.no_grad():
        layer.weight.data[0, 0, 0, 0] += 1e-6  # a write that no version counter tells of
    changed = layer.weight_fingerprint(layer.weight)
    assert changed == tensor_fingerprint(layer.weight) != wanted
    for view in (weight.double(), weight.flatten(), weight.mT, weight.bfloat16()):
        assert layer.weight_fingerprint(view) == tensor_fingerprint(view)


@pytest.fixture
def gpu(monkeypatch):
    """Tensors are taken to be on a GPU, which adds up their bits: the list of what the host waits for."""
    waits = []
    fetched = bits.fetched
    for module in (bits, fingerprints):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(module, "fetched", lambda tensor: waits.append(tensor.nbytes) or fetched(tensor))

    def summed(tensors):
        digest = hashlib.blake2b()
        for tensor in tensors:
            digest.update(bits._words(tensor).numpy())
        return [torch.tensor(list(digest.digest()))]

    monkeypatch.setattr(fingerprints, "summed", summed)
    monkeypatch.setattr(fingerprints, "all_on_host", lambda tensors: waits.append(len(tensors)) or tensors)
    monkeypatch.setattr(fingerprints, "suppose", lambda tensor, expected: waits.append(1) is None and expected(tensor))
    return waits


@pytest.mark.parametrize("together", [1, 100, 1 << 26])
def test_a_gpu_is_waited_for_once_for_all_its_tensors(together, gpu, monkeypatch):
    """And the fingerprint is that of the same weights on a CPU, whatever is copied at a time."""
    monkeypatch.setattr(bits, "TOGETHER", together)
    monkeypatch.setattr(fingerprints, "TOGETHER", together)
    generator = Branching().eval()
    generator.a.register_buffer("sparse", torch.eye(3).to_sparse())
    generator.a.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))
    layer = rc.bind(generator, "conv")
    before = layer.fingerprint(maps())
    copies = len(gpu)
    assert copies == 1 if together > 100 else copies > 1
    with monkeypatch.context() as patch:
        for module in (bits, fingerprints):
            patch.setattr(module, "on_gpu", lambda tensor: False)
        assert rc.bind(generator, "conv").fingerprint(maps()) == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_gpus_sums_see_every_change(change, gpu):
    generator = Branching().eval()
    layer = rc.bind(generator, "conv")
    before = layer.fingerprint(maps())
    for waits in (2, 1, 1):  # the fingerprint and the sums; the sums alone
        gpu.clear()
        assert passes(layer) == (0, before) and len(gpu) == waits
    CHANGES[change](generator)
    runs, after = passes(layer)
    assert runs == 1 and after != before and after == rc.bind(generator, "conv").fingerprint(maps())
    assert passes(layer) == (0, after)


def test_without_triton_every_check_reads_all_weights(gpu, monkeypatch):
    monkeypatch.setattr(fingerprints, "summed", lambda tensors: None)
    generator = Branching().eval()
    layer = rc.bind(generator, "conv")
    before = layer.fingerprint(maps())
    assert [passes(layer), passes(layer)] == [(0, before)] * 2
    generator.a.weight.data.mul_(2)
    assert passes(layer)[0] == 1


@needs_triton_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_summing_kernel_compiles_ahead_of_time(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from rewrite_core.kernels.checksum import STEP, checksum_kernel

    types, constants = {"table": "*i64", "sums": "*i64"}, {"STEP": STEP}
    compiled = compile_kernel(
        checksum_kernel, capability, types, constants, ("table", "sums"), num_warps=4, enable_fp_fusion=False
    )
    registers, stack, local = resources(compiled, tmp_path)
    assert stack == local == 0 and registers <= 128 and "atom" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("change", ["in place", "data, in place", "load_state_dict", "parameter, replaced", "string"])
def test_gpu_fingerprints_are_those_of_a_cpu(change):
    generator = Branching().eval()
    wanted = rc.bind(copy.deepcopy(generator), "conv").fingerprint(maps())
    layer = rc.bind(generator.cuda(), "conv")
    z = maps().cuda()
    assert [layer.fingerprint(z) for _ in range(3)] == [wanted] * 3
    CHANGES[change](generator)
    after = layer.fingerprint(z)
    assert after != wanted and after == rc.bind(copy.deepcopy(generator).cpu(), "conv").fingerprint(maps())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_waits_for_its_sums_alone(monkeypatch):
    """From the third look on."""
    layer = rc.bind(Branching().eval().cuda(), "conv")
    wanted, waits, fetched = layer.fingerprint(maps().cuda()), [], bits.fetched
    layer.fingerprint(maps().cuda())
    monkeypatch.setattr(bits, "fetched", lambda tensor: waits.append(tensor.nbytes) or fetched(tensor))
    assert layer.fingerprint(maps().cuda()) == wanted and len(waits) == 1
