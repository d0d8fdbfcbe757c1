"""Weights that are not there, or stored otherwise: offloaded, sharded, in 8 bits. Refused with the right advice."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import PROGRAMS
from torch import nn

import rewrite_core as rc


class Converting(nn.Conv2d):
    """Stores its weight in another type than it computes in."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)).eval()


def maps(count=4):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def offload(module):
    weight, empty = module.weight, nn.Parameter(module.weight.to("meta"))
    module.weight = empty
    module.register_forward_pre_hook(lambda module, args: setattr(module, "weight", weight))
    module.register_forward_hook(lambda module, args, output: setattr(module, "weight", empty))


def calls(generator, name="2"):
    return (
        lambda: rc.collect_second_moment(rc.bind(generator, name), maps(), progress=False),
        lambda: rc.bind(generator, name).fingerprint(maps()),
    )


def test_an_offloaded_layer_is_refused():
    generator = make()
    offload(generator[2])
    with pytest.raises(rc.UnknownLayerError, match="offloaded.*without offloading") as caught:
        rc.bind(generator, "2")
    assert "to_empty" not in str(caught.value)
    with pytest.warns(UserWarning, match="no layer that can be bound.*offloaded"):
        assert rc.list_layers(nn.Sequential(generator[2]), torch.randn(1, 4, 6, 6)) == []


def test_what_is_offloaded_before_the_layer_is_refused():
    generator = make()
    offload(generator[0])
    assert torch.equal(rc.bind(generator, "2").keys(maps()), rc.bind(make(), "2").keys(maps()))
    for call in calls(generator):
        with pytest.raises(rc.RewriteCoreError, match="'0' runs before the layer.*offloaded"):
            call()
    later = make()
    offload(later[3])
    for call in calls(later):
        call()  # the key does not depend on it


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_refused_at_the_layer_and_taken_before_it(dtype):
    generator = make()
    generator[0] = Converting(3, 4, 1)
    generator[0].weight.data = generator[0].weight.data.to(dtype)
    with pytest.raises(rc.UnknownLayerError, match="float8.*no arithmetic.*bfloat16 or float32"):
        rc.bind(generator, "0")
    layer = rc.bind(generator, "2")
    assert layer.keys(maps()).dtype == torch.float32
    moment = rc.collect_second_moment(layer, maps(), progress=False)
    moment.check(layer, maps())


def test_a_weight_that_is_empty_between_passes_is_refused():
    generator = make()
    generator[2].weight.data = torch.empty(0)
    with pytest.raises(rc.UnknownLayerError, match=r"shape \[0\] between passes.*not sharded"):
        rc.bind(generator, "2")


def test_weights_sharded_over_processes_are_refused_with_what_to_do(tmp_path):
    """Of FSDP2, in two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, PROGRAMS / "sharded.py", str(rank), tmp_path / "store", tmp_path],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err[-2000:]
    assert rc.SecondMoment.load(tmp_path / "moment").count == 4 * 36


def test_a_sharded_generator_lists_no_layers(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        generator = make()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (generator[0], generator[2], generator[3]):
            fully_shard(module, mesh=mesh)
        with pytest.warns(UserWarning, match="no layer that can be bound"):
            assert rc.list_layers(generator, maps()) == []
    finally:
        dist.destroy_process_group()


def test_a_quantised_weight_is_refused():
    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            return Packed(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            args = [each.inner if isinstance(each, Packed) else each for each in args]
            return function(*args, **(kwargs or {}))

    generator = make()
    packed = Packed(torch.zeros(4, 4, 3, 3))
    packed._is_param = True
    generator[2]._parameters["weight"] = packed
    with pytest.raises(rc.UnknownLayerError, match="Packed, not a plain tensor"):
        rc.bind(generator, "2")
