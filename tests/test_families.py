"""What every family promises, on a small generator of each kind (paper, sections 3.1 to 3.3)."""

import copy
import gc
import math
import weakref

import pytest
import test_families_biggan as biggan
import test_families_conv as conv
import test_families_diffusers as diffusers
import test_families_stylegan1 as stylegan1
import test_families_stylegan2 as stylegan2
import test_families_stylegan2_nvidia as nvidia
import test_families_stylegan3 as stylegan3
import test_families_transformers as transformers
import torch
from helpers import reference
from test_binding import make as make_own
from torch import nn
from torch.nn.utils import parametrizations, prune

import rewrite_core as rc
from rewrite_core.edits.goals import paste_goals
from rewrite_core.solvers.problem import basis_maps, combine


def normed(norm):
    """A DCGAN whose convolutions compute their weight."""
    generator = make_own("dcgan")
    for name in ("1", "4", "10"):
        norm(generator.get_submodule(name))
    with torch.no_grad():  # or torch could not copy it
        generator.eval()(torch.randn(2, 12))
    return generator


class Doubled(nn.Module):
    """Any parametrization."""

    def forward(self, weight):
        return 2 * weight.tanh()


def doubled(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


# name: make the generator, how to call it (None: generator(latents)), and the latents
KINDS = {
    "proggan": (lambda: make_own("proggan"), None),
    "stylegan2": (lambda: make_own("stylegan2"), None),
    "dcgan": (lambda: make_own("dcgan"), None),
    "stylegan1": (stylegan1.make, None),
    "stylegan2_grouped": (stylegan2.make, stylegan2.random_noise),
    "stylegan2_nvidia": (nvidia.make, None),
    "stylegan2_nvidia_unfused": (lambda: nvidia.make(fused=False, clamp=256), nvidia.const),
    "stylegan3": (stylegan3.make, None),
    **{f"biggan_{norm}": (lambda norm=norm: biggan.make(norm), biggan.labelled) for norm in biggan.NORMS},
    "unet": (diffusers.make, diffusers.denoise),
    "vae": (lambda: diffusers.make("vae"), diffusers.decode),
    "tiny_autoencoder": (lambda: diffusers.make("tiny"), diffusers.decode),
    **{kind: (lambda kind=kind: conv.make(kind), None) for kind in ("sequence", "volume", "grouped", "grid")},
    "language": (lambda: conv.make("language"), lambda model, z: model((z[:, :7].abs() * 9).long().clamp(max=19))),
    "gpt2": (lambda: transformers.make(tied=False), lambda model, z: model((z[:, :7].abs() * 9).long().clamp(max=19))),
    "weight_norm": (lambda: normed(parametrizations.weight_norm), None),
    "old_weight_norm": (lambda: normed(nn.utils.weight_norm), None),
    "orthogonal": (lambda: normed(parametrizations.orthogonal), None),
    "parametrized": (lambda: normed(doubled), None),
    "pruned": (lambda: normed(lambda module: prune.random_unstructured(module, "weight", 0.3)), None),
}

# every layer that list_layers names
CASES = []
for _kind, (_make, _forward) in KINDS.items():
    for _info in rc.list_layers(_make(), torch.randn(1, 12), _forward):
        CASES.append((_kind, _info.name))


def latents(count=24):
    return rc.sample_latents(12, count, seed=5)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def bound(kind, name, training=False):
    make, forward = KINDS[kind]
    generator = make().train(training)
    return generator, rc.bind(generator, name, forward)


def output(kind, generator, z):
    """What the generator makes, as a copy of it would: train mode changes running statistics and singular vectors."""
    torch.manual_seed(1)
    with torch.no_grad():
        return (KINDS[kind][1] or (lambda g, z: g(z)))(copy.deepcopy(generator), z)


def untouched(state, generator):
    now = generator.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(state[key], value) for key, value in now.items())


def simple_edit(layer):
    size = layer.values(latents(1)).shape[2:]
    mask = torch.zeros(size)
    mask[tuple(slice(0, max(1, side // 2)) for side in size)] = 1
    return rc.Edit(
        copy=rc.Selection(1, mask), paste=rc.Selection(2, mask), context=[rc.Selection(2, mask), rc.Selection(3, mask)]
    )


def test_every_kind_lists_its_layers():
    assert {kind for kind, _ in CASES} == set(KINDS)
    assert len(CASES) > 100


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_keys_times_weight_reproduce_the_linear_output(kind, name):
    """The basis of all one-hot directions times the weight is the linear operator on the key, and with what follows it
    the value is what the generator computes at that layer."""
    _generator, layer = bound(kind, name)
    z = latents(3)
    seen = []
    handle = layer._adapter.site.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    images = layer.render(z)
    handle.remove()
    with torch.no_grad():
        capture = layer.capture_each(z)
        keys = capture.key
        assert keys.shape[:2] == (3, layer.in_channels)
        basis = basis_maps(layer, keys, torch.eye(layer.in_channels))
        product = torch.einsum("oj,nj...->no...", layer.weight.flatten(1), basis)
        linear = layer.linear(keys, layer.weight)
        assert relative(product, linear) < 1e-5
        value = layer.value(capture)
        assert relative(layer._adapter.replace_value(seen[0], value), seen[0]) < 1e-5
        after = layer.post_operation(capture)
        if after is not None:  # it says how the value follows from the linear output
            if after.style is not None:
                norm = (layer.weight[None] * after.style[:, None, :, None, None]).square().sum((2, 3, 4)) + after.eps
                linear = linear * norm.rsqrt()[:, :, None, None]
            linear = linear if after.shift is None else linear + after.shift
            assert relative(after.gain * nn.functional.leaky_relu(linear, after.slope), value) < 1e-5
    assert torch.allclose(layer.render(z, value), images, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_applied_change_is_what_the_solver_predicted(kind, name):
    generator, layer = bound(kind, name)
    z = latents()
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = simple_edit(layer)
    state, before = copy.deepcopy(generator.state_dict()), output(kind, generator, z)
    weight = layer.weight.clone()
    change = reference.rewrite(layer, moment, edit, z, loss="l2", region="map")
    assert change.solver in ("closed_form", "lm") and change.final_loss <= change.losses[0]
    capture = layer.capture_each(z[2:3])
    with torch.no_grad():
        predicted = layer.value(capture, weight + combine(change.coefficients, change.directions))
    goal = paste_goals(layer, edit, z, region="map")[0].target
    with change:
        assert relative(layer.values(z[2:3]), predicted) < 1e-4
        reached = (layer.values(z[2:3]).double() - goal).square().mean().item()
        assert reached == pytest.approx(change.final_loss, rel=1e-2, abs=1e-6 * goal.square().mean().item())
        if change.coefficients.any():
            assert not torch.equal(output(kind, generator, z), before) or name == "linear"
    untouched(state, generator)
    assert torch.equal(output(kind, generator, z), before) and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_binding_leaves_the_generator_as_it_was(kind, training):
    make, forward = KINDS[kind]
    generator = make().train(training)
    z = latents(6)
    state, before = copy.deepcopy(generator.state_dict()), output(kind, generator, z)
    parameters = [id(parameter) for parameter in generator.parameters()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in generator.modules()]
    names = [info.name for info in rc.list_layers(generator, z, forward)]
    random = torch.get_rng_state()
    for name in names:
        layer = rc.bind(generator, name, forward)
        layer.values(z), layer.fingerprint(z), layer.render(z)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training == training for module in generator.modules())
    untouched(state, generator)
    assert torch.equal(output(kind, generator, z), before)
    layer = rc.bind(generator, names[-1], forward)
    moment = rc.collect_second_moment(layer, latents(), progress=False)
    change = reference.rewrite(layer, moment, simple_edit(layer), latents(), loss="l2", region="map")
    change.apply()
    change.revert()
    untouched(state, generator)
    assert torch.equal(output(kind, generator, z), before)
    assert [id(parameter) for parameter in generator.parameters()] == parameters
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in generator.modules()] == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_keeps_the_generator_alive(kind):
    make, forward = KINDS[kind]
    generator = make()
    name = rc.list_layers(generator, latents(1), forward)[-1].name
    layer = rc.bind(generator, name, forward)
    moment = rc.collect_second_moment(layer, latents(), progress=False)
    change = reference.rewrite(layer, moment, simple_edit(layer), latents(), loss="l2", region="map")
    change.apply().revert()
    loose, alive, owner = copy.copy(change), weakref.ref(generator), weakref.ref(layer.module)
    del generator, layer, change
    gc.collect()
    assert alive() is None and owner() is None and math.isfinite(loose.final_loss)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("biggan_hook", "block.conv2"),
        ("biggan_method", "block.conv2"),
        ("biggan_parametrization", "block.conv2"),
        ("old_weight_norm", "4"),
        ("stylegan1", "progression.1.conv2.conv"),
        ("stylegan3", "L1"),
    ],
)
def test_what_was_compiled_follows_a_change(kind, name):
    """Folding takes hooks off and puts methods in, which code compiled before must notice."""
    torch._dynamo.reset()
    make, forward = KINDS[kind]
    generator, z = make().eval(), latents()
    compiled = torch.compile(generator, backend="eager")

    def run(module):
        torch.manual_seed(0)
        with torch.no_grad():
            return (forward or (lambda g, z: g(z)))(module, z)

    before = run(compiled)
    assert torch.equal(before, run(generator))
    layer = rc.bind(compiled, name, forward)
    moment = rc.collect_second_moment(layer, z, progress=False)
    with reference.rewrite(layer, moment, simple_edit(layer), z, loss="l2", region="map"):
        assert relative(run(compiled), run(generator)) < 1e-6 and relative(run(compiled), before) > 1e-3
    assert torch.equal(run(compiled), before)
