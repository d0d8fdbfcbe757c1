"""Generators in wrappers, compiled, in half precision, scripted in part, with methods of their own."""

import copy

import pytest
import torch
from helpers import reference
from test_binding import latents, make, maps, relative
from torch import nn

import rewrite_core as rc


def edited(generator, name, z, forward=None):
    layer = rc.bind(generator, name, forward)
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    return layer, reference.rewrite(layer, moment, edit, z, loss="l2", region="map")


@pytest.mark.parametrize(
    ("wrap", "prefix"), [(nn.DataParallel, "module."), (lambda g: torch.compile(g, backend="eager"), "_orig_mod.")]
)
@pytest.mark.parametrize(("kind", "name"), [("proggan", "layer5.conv"), ("stylegan2", "convs.1.conv")])
def test_wrapped_generators(kind, name, wrap, prefix):
    inside, z = make(kind).eval(), latents()
    generator = wrap(inside)
    with torch.no_grad():
        before = generator(z)
    layer, change = edited(generator, name, z)
    assert layer.generator is inside and layer.name == name == rc.bind(generator, prefix + name).name
    assert [info.name for info in rc.list_layers(generator, z)] == [info.name for info in rc.list_layers(inside, z)]
    same = edited(make(kind).eval(), name, z)[1]
    assert torch.equal(change.weight_delta(), same.weight_delta())
    with change, torch.no_grad():
        assert torch.allclose(generator(z), inside(z), atol=1e-5) and not torch.allclose(
            generator(z), before, atol=1e-3
        )
    with torch.no_grad():
        assert torch.equal(generator(z), before)
    with same.apply(generator), torch.no_grad():
        assert not torch.allclose(generator(z), before, atol=1e-3)


def test_a_generator_that_was_compiled_in_place():
    generator, z = make("proggan").eval(), latents()
    generator.compile(backend="eager")
    generator.layer5.compile(backend="eager")
    with torch.no_grad():
        before = generator(z)
    _layer, change = edited(generator, "layer5.conv", z)
    with change, torch.no_grad():
        assert not torch.allclose(generator(z), before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(generator(z), before)


@pytest.mark.parametrize(("name", "prefix"), [("layer5.conv", "")])
def test_a_compiled_part(name, prefix):
    generator, z = make("proggan").eval(), latents()
    generator.layer5 = torch.compile(generator.layer5, backend="eager")
    with torch.no_grad():
        before = generator(z)
    _layer, change = edited(generator, "layer5._orig_mod.conv", z)
    with change, torch.no_grad():
        assert not torch.allclose(generator(z), before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(generator(z), before)


def test_float16_generators():
    for kind, name in (("proggan", "layer5.conv"), ("dcgan", "4"), ("stylegan2", "convs.1.conv")):
        generator, z = make(kind).half().eval(), latents()
        with torch.no_grad():
            before = generator(z.half())
        layer, change = edited(generator, name, z)
        assert layer.parameter.dtype == torch.float16 and change.coefficients.dtype == torch.float32
        with change, torch.no_grad():
            assert not torch.equal(generator(z.half()), before)
        with torch.no_grad():
            assert torch.equal(generator(z.half()), before)


def test_channels_last_generators_are_edited_in_their_format():
    for kind, name in (("proggan", "layer5.conv"), ("dcgan", "4"), ("dcgan", "10")):
        generator, z = make(kind).eval().to(memory_format=torch.channels_last), latents()
        strides = generator.get_submodule(name).weight.stride()
        with torch.no_grad():
            before = generator(z)
        layer, change = edited(generator, name, z)
        plain = edited(make(kind).eval(), name, z)[1]
        assert relative(change.weight_delta(), plain.weight_delta()) < 1e-2
        with change, torch.no_grad():
            assert layer.parameter.stride() == strides and not torch.equal(generator(z), before)
        assert layer.parameter.stride() == strides
        with torch.no_grad():
            assert torch.equal(generator(z), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_opaque_generators_are_refused_with_advice():
    generator = make("dcgan").eval()
    for opaque in (torch.jit.trace(generator, latents(2)), torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))):
        for call, argument in ((rc.bind, "1"), (rc.list_layers, latents(2))):
            with pytest.raises(rc.RewriteCoreError, match="bind the module that it was made from"):
                call(opaque, argument)
    partly = nn.Sequential(nn.Conv2d(5, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 3, 1))))
    with pytest.raises(rc.UnknownLayerError, match="Layer '1.0' is scripted.*did you mean '0'"):
        rc.bind(partly, "1.0")
    assert [info.name for info in rc.list_layers(partly, maps())] == ["0"]


def test_a_generator_with_a_scripted_part_is_edited():
    # the trace of a part that takes no hooks
    generator = nn.Sequential(
        nn.Conv2d(5, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())), nn.Conv2d(8, 3, 1)
    )
    layer = rc.bind(generator, "2")
    moment = rc.collect_second_moment(layer, maps(), progress=False)
    moment.check(layer, maps())
    with torch.no_grad():
        generator[2].weight.mul_(2)
    moment.check(layer, maps())
    with torch.no_grad():
        next(generator[1].parameters()).mul_(2)
    with pytest.raises(rc.MismatchError, match="weights"):
        moment.check(layer, maps())
    assert not any(module._forward_pre_hooks for module in generator if not isinstance(module, torch.jit.ScriptModule))
    assert all(module.training for module in generator.modules())


def test_a_train_method_of_the_users_own_is_not_called():
    class Merging(nn.Linear):  # as a LoRA layer that merges its weights for inference, and takes them apart again
        def train(self, mode=True):
            self.weight.data += 1 if not mode else -1
            return super().train(mode)

    generator = nn.Sequential(Merging(6, 6), nn.Dropout(), nn.Linear(6, 4)).requires_grad_(False)
    before, keys = copy.deepcopy(generator.state_dict()), generator[0](maps())
    assert torch.equal(rc.bind(generator, "2").keys(maps()), keys.movedim(-1, 1))  # eval mode: nothing drops out
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(module.training for module in generator.modules())
