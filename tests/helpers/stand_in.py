"""A GPU that is not there: tensors that say they are on it, and a count of what the host would wait for.

Each `Away` tensor says that it is on "cuda:0" (or another), holds its numbers on the CPU, and takes every operation of
torch's through its own dispatch. So no wait can be missed: numbers reach the host by an operation, and those that bring
them (`WAITS`, copies to the CPU, indexing with booleans) count; copies to the GPU count where they are not from pinned
memory, as torch waits for those, too. Operations that take tensors of two devices fail as they do on a GPU. Kernels of
ours are not run: `Machine` has the reference's numbers in their place, while all that the host does for a launch runs.
"""

from __future__ import annotations

import contextlib
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WAITS = {  # operations of torch's that look at a GPU's numbers on the host before they return
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "linalg_cholesky",
    "linalg_eig",
    "linalg_eigh",
    "linalg_inv",
    "linalg_lstsq",
    "linalg_solve",
    "linalg_svd",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
BETWEEN = {"_to_copy", "copy_", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_"}  # two devices
_machines: list[Machine] = []


def is_away(tensor: object) -> bool:
    return type(tensor) is Away or (isinstance(tensor, nn.Parameter) and hasattr(tensor, "held"))


class Away(torch.Tensor):
    """A tensor on the GPU that is not there; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device="cuda:0"):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride() if held.layout == torch.strided else None,
            storage_offset=held.storage_offset() if held.layout == torch.strided else 0,
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(device),
        )
        made.held = held
        return made

    def __repr__(self):
        return f"Away({self.held!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _machines[-1].operate(operation, args, kwargs or {})


def _gpus(arguments: object) -> set[torch.device]:
    return {each.device for each in tree_flatten(arguments)[0] if isinstance(each, Away)}


def _basic(tensor, index):
    """The view that whole numbers, slices, None and ... make, and the tensors that are left, one for each axis."""
    index = index if isinstance(index, tuple) else (index,)
    index = [torch.tensor(each, device="cpu") if isinstance(each, list) else each for each in index]
    places = [number for number, each in enumerate(index) if each is Ellipsis] or [len(index)]
    own = sum(each.ndim if _boolean(each) else 1 for each in index if each is not None and each is not Ellipsis)
    index[places[0] : places[0] + 1] = [slice(None)] * (tensor.ndim - own)
    axis, rest = 0, []
    for each in index:
        if isinstance(each, torch.Tensor):
            axes = each.ndim if _boolean(each) else 1
            rest += [each]
            axis += axes
            continue
        if isinstance(each, bool):
            raise NotImplementedError("an index that is a boolean")
        if each is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(each, slice):
            if each != slice(None):
                tensor = torch.ops.aten.slice(tensor, axis, each.start, each.stop, each.step or 1)
        else:
            tensor = torch.select(tensor, axis, int(each))
            continue
        rest.append(None)
        axis += 1
    return tensor, rest if any(each is not None for each in rest) else []


def _boolean(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _item(tensor, index):
    """tensor[index]; torch's own needs a GPU where the tensor says that it is on one."""
    view, rest = _basic(tensor, index)
    return torch.ops.aten.index(view, rest) if rest else torch.ops.aten.alias(view)


def _set_item(tensor, index, value):
    view, rest = _basic(tensor, index)
    if not rest:
        torch.ops.aten.copy_(view, value) if isinstance(value, torch.Tensor) else view.fill_(value)
    else:
        value = value if isinstance(value, torch.Tensor) else view.new_full((), value)
        torch.ops.aten.index_put_(view, rest, value)


FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.zeros,
}


class _Calls(TorchFunctionMode):
    """What torch's own functions would refuse without a GPU, before any operation: devices by name, pinned memory."""

    def __init__(self, machine):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if function is torch.Tensor.data_ptr and isinstance(args[0], Away):
            return args[0].held.data_ptr()
        if function is torch.Tensor.__getitem__ and isinstance(args[0], Away):
            return _item(*args)
        if function is torch.Tensor.__setitem__ and isinstance(args[0], Away):
            return _set_item(*args)
        if function is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].cpu().tolist()
        if function is torch.Tensor.cuda:
            return args[0].to(torch.device("cuda:0"))
        if function is torch.Tensor.to:
            return self.to(*args, **kwargs)
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        if device is not None and device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if function in (torch.tensor, torch.as_tensor, torch.asarray):
                if isinstance(args[0], torch.Tensor):
                    return self.to(args[0], device=device, dtype=kwargs.get("dtype"))
                self.machine.wait(f"{name} to the GPU")
                return Away(function(*args, **kwargs | {"device": "cpu"}), device)
            if function in FACTORIES:
                self.machine.launch_of_torch(name)
                return Away(function(*args, **kwargs | {"device": "cpu"}), device)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:  # of torch's Python methods, some ask for the GPU before they do anything
            if "not linked with support for cuda" not in str(error):
                raise
            if name in ("__int__", "__float__", "__bool__", "__index__"):
                return getattr(args[0].item(), name)()
            return getattr(torch.ops.aten, name)(*args, **kwargs)

    def to(self, tensor, *args, **kwargs):
        """torch.Tensor.to, for devices that are not there."""
        wanted, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for each in args:
            if isinstance(each, torch.Tensor):
                wanted, dtype = each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, str | torch.device):
                wanted = each
        device = tensor.device if wanted is None else torch.device(wanted)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        dtype = tensor.dtype if dtype is None else dtype
        copy = kwargs.get("copy", False)
        if device == tensor.device:
            return torch.ops.aten._to_copy(tensor, dtype=dtype) if copy or dtype != tensor.dtype else tensor
        if device.type == "cuda" and not isinstance(tensor, Away):
            if not (kwargs.get("non_blocking") and getattr(tensor, "pinned", False)):
                self.machine.wait("a copy to the GPU")
            self.machine.launch_of_torch("copy to the GPU")
            tensor = tensor if dtype == tensor.dtype else tensor.to(dtype)
            return Away(tensor.detach().clone(), device)
        return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)


class _Made(TorchDispatchMode):
    """Tensors that torch makes on the GPU from nothing, inside functions of its own."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __init__(self, machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda" or _gpus((args, kwargs)):
            return operation(*args, **kwargs)
        if any(isinstance(each, torch.Tensor) for each in tree_flatten((args, kwargs))[0]):
            raise RuntimeError(f"{operation}: a copy to the GPU that the stand-in does not know")
        self.machine.launch_of_torch(operation.overloadpacket.__name__)
        return Away(operation(*args, **kwargs | {"device": torch.device("cpu")}), device)


class Machine:
    """A context in which there seems to be a GPU. `waits` lists where the host waits for it, `kernels` the launches of
    ours, `launches` what torch launches."""

    def __init__(self, capability=(9, 0), devices=1):
        self.capability, self.devices = capability, devices
        self.waits: list[str] = []
        self.kernels: list[str] = []
        self.launches: list[str] = []
        self._patches = pytest.MonkeyPatch()

    # --- what happens there

    def wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "rewrite_core" in frame.filename]
        inner = [frame for frame in frames if "/rewrite_core/" in frame.filename or "/kernels/" in frame.filename]
        place = f"{inner[-1].filename.rpartition('/rewrite_core/')[2]}:{inner[-1].lineno}" if inner else "a test"
        self.waits.append(f"{what} at {place}")

    def launch_of_torch(self, name: str) -> None:
        self.launches.append(name)

    def clear(self) -> None:
        self.waits.clear(), self.kernels.clear(), self.launches.clear()

    def operate(self, operation, args, kwargs):
        """An operation of torch's on tensors of the GPU."""
        name = operation.overloadpacket.__name__
        devices = _gpus((args, kwargs))
        [device] = devices if len(devices) == 1 else [None]
        if device is None and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {devices}")
        here = [
            each
            for each in tree_flatten((args, kwargs))[0]
            if isinstance(each, torch.Tensor) and not isinstance(each, Away) and each.ndim
        ]
        if here and name not in BETWEEN:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {device} and cpu")
        kwargs = dict(kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted = torch.device(wanted)
            kwargs["device"] = torch.device("cpu")
        back = wanted is not None and wanted.type == "cpu"
        self._note(name, operation, args, here, back)
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        result = operation(*held_args, **held_kwargs)
        if name.endswith("_") and not name.startswith("__") and isinstance(args[0], torch.Tensor):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        if back or (name == "copy_" and not isinstance(args[0], Away)):
            return result
        place = device if wanted is None else wanted
        return tree_map(lambda each: Away(each, place) if isinstance(each, torch.Tensor) else each, result)

    def _note(self, name, operation, args, here, back):
        if name in WAITS or back:
            self.wait("a copy to the host" if back else name)
        elif name == "copy_" and here:
            down = not isinstance(args[0], Away)
            if down or not (len(args) > 2 and args[2] and getattr(args[1], "pinned", False)):
                self.wait("copy_ between host and GPU")
        elif name in BETWEEN and name not in ("_to_copy", "copy_"):
            indices = [each for each in args[1] if isinstance(each, torch.Tensor)]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.wait(f"{name} with booleans")
            if any(not isinstance(each, Away) and each.ndim for each in indices):
                self.wait(f"{name} with places of the host")
        if not operation.is_view and name not in (
            "empty",
            "new_empty",
            "empty_like",
            "detach",
            "alias",
            "_unsafe_view",
        ):
            self.launches.append(name)

    def launch(self, op, kernel, programs, arguments, constants):
        """In place of launching._launch: a launch is counted, and of the checksum made."""
        assert all(each is None or not isinstance(each, torch.Tensor) or isinstance(each, Away) for each in arguments)
        self.kernels.append(kernel.__name__)
        if kernel.__name__ == "checksum_kernel":
            _checksum(*arguments)
        return None if self._plain else (lambda *_: self.kernels.append(kernel.__name__))

    _plain = False

    # --- how it comes to be there

    def __enter__(self) -> Machine:
        from rewrite_core import backends
        from rewrite_core.kernels import launching
        from rewrite_core.ops.fit_low_rank_op import register as fit_low_rank
        from rewrite_core.ops.fit_projected_op import register as fit_projected
        from rewrite_core.ops.second_moment_op import register as second_moment
        from rewrite_core.ops.spd_solve_op import register as spd_solve

        patch = self._patches.setattr
        generators = [torch.Generator() for _ in range(self.devices)]
        major, minor = self.capability
        properties = SimpleNamespace(
            multi_processor_count=132, name="a GPU that is not there", total_memory=2**36, major=major, minor=minor
        )
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: self.devices,
            "is_current_stream_capturing": lambda: False,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: properties.name,
            "default_generators": generators,
            "get_rng_state": lambda device=0: generators[getattr(device, "index", device) or 0].get_state(),
            "set_rng_state": lambda state, device=0: generators[getattr(device, "index", device) or 0].set_state(state),
            "device": lambda index: contextlib.nullcontext(),
        }.items():
            patch(torch.cuda, name, value)
        for module in (fit_low_rank, fit_projected, second_moment, spd_solve):
            patch(module, "dispatched", lambda *tensors: False)
        patch(launching, "_launch", self.launch)
        patch(launching, "_compiled", {})
        patch(launching, "_plans", {})
        patch(fit_low_rank, "run_triton", self._instead(fit_low_rank, "fit_low_rank"))
        patch(second_moment, "run_triton", self._added(second_moment))
        for cached in (backends._load, backends._capability):
            cached.cache_clear()
        self._patches.setenv("REWRITE_CORE_TUNING", "0")
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Made(self))
        _machines.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        from rewrite_core import backends

        _machines.pop()
        self._modes.close()
        self._patches.undo()
        for cached in (backends._load, backends._capability):
            cached.cache_clear()

    @staticmethod
    def _instead(register, op):
        """The kernel's launch as it is, then the reference's numbers in its outputs."""
        from rewrite_core.ops.fit_low_rank_op.reference import run_reference

        run = register.run_triton

        def run_triton(problem):
            outputs = run(problem)
            held = problem._replace(**{k: _held(v) for k, v in problem._asdict().items()})
            for out, right in zip(outputs, run_reference(held), strict=True):
                out.held.copy_(right)
            return outputs

        return run_triton

    @staticmethod
    def _added(register):
        from rewrite_core.ops.second_moment_op.reference import run_reference

        run = register.run_triton

        def run_triton(features, out, precision="x3"):
            run(features, out, precision)
            run_reference(features.held, out.held)

        return run_triton

    # --- what is put there

    def put(self, tensor: torch.Tensor, device: str = "cuda:0") -> Away:
        return Away(tensor.detach().clone(), device)

    def move(self, module: nn.Module, device: str = "cuda:0") -> nn.Module:
        """The module with its weights on the GPU, in place. They ask for no gradient: autograd needs a GPU that is."""
        for part in module.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(self.put(tensor, device), False)
            for name, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[name] = self.put(tensor, device)
        return module


def _held(tensor: object) -> object:
    return tensor.held if isinstance(tensor, Away) else tensor


def _checksum(table, sums):
    """What the kernel computes, but for its mixing."""
    import ctypes

    for number, (start, words, before) in enumerate(table.held.tolist()):
        data = np.frombuffer(ctypes.string_at(start, 4 * words), np.uint32).astype(np.uint64)
        place = np.arange(before, before + words, dtype=np.uint64)
        mixed = (data + place * np.uint64(0x1E3779B97F4A7C15)) * np.uint64(0x4CF5AD432745937F)
        sums.held[number] = int((mixed ^ (mixed >> np.uint64(29))).sum().astype(np.int64))
