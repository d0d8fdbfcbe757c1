"""Replay: a forward pass that runs only what follows a layer.

One pass is recorded: what the largest modules that do not contain the layer put out before it is reached. A replayed
pass runs the generator's own ``forward`` again with those modules answering from the record, so that nothing before the
layer is computed twice, whatever the generator is written like. :meth:`Record.follow` does so from a value that is
given in place of the layer's own, with gradients.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import RewriteCoreError
from ..modes import repeatable
from .bound import BoundLayer
from .latents import for_generator
from .passes import Hooks, Stop


def modules_before(layer: BoundLayer) -> list[nn.Module]:
    """The largest modules of the generator that do not contain the layer; those of them that run before it are what a
    record holds. The modules on the way to the layer run themselves."""
    generator, site = layer.generator, layer._adapter.site
    around = {module for module in generator.modules() if any(part is site for part in module.modules())}
    children = {child: None for module in around if module is not site for child in module.children()}
    return [child for child in children if child not in around]


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes no memory: for what nothing will read."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class _Output:
    """What one call of a module put out; its tensors are held only once something outside the record reads them."""

    def __init__(self, output: Any):
        leaves, self._shape = tree_flatten(output)
        self._tensors = {i: weakref.ref(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._leaves = [_stand_in(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._held: set[int] = set()

    def hold(self, tensor: Tensor) -> None:
        """Keep `tensor`, one of the output's own, as it is now: what follows may write to it."""
        for i, reference in self._tensors.items():
            if i not in self._held and reference() is tensor:
                self._leaves[i] = tensor.detach().clone()
                self._held.add(i)

    def tensors(self) -> Iterator[Tensor]:
        """The output's tensors that are still alive."""
        for reference in self._tensors.values():
            tensor = reference()
            if tensor is not None:
                yield tensor

    @property
    def nbytes(self) -> int:
        return sum(self._leaves[i].numel() * self._leaves[i].element_size() for i in self._held)

    def answer(self) -> Any:
        """The output, in copies."""
        leaves = [leaf.clone() if i in self._held else leaf for i, leaf in enumerate(self._leaves)]
        return tree_unflatten(leaves, self._shape)


class _Reads(TorchDispatchMode):
    """Sees which recorded outputs are read by operations that a replayed pass runs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0  # how many recorded modules are running, one in another
        self._outputs: dict[int, list[tuple[weakref.ref[Tensor], _Output]]] = {}

    def watch(self, output: _Output) -> None:
        for tensor in output.tensors():  # several modules put out one tensor where one of them works in place
            self._outputs.setdefault(id(tensor), []).append((weakref.ref(tensor), output))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, Tensor):
                    self.read(leaf)
        return operation(*args, **(kwargs or {}))

    def read(self, tensor: Tensor) -> None:
        for reference, output in self._outputs.get(id(tensor), ()):
            if reference() is tensor:
                output.hold(tensor)


class Record:
    """What the modules before a layer put out for one batch of latents; made by :func:`record`.

    Attributes: ``images``, what the generator painted in the recorded pass; ``nbytes``, the memory it holds.
    """

    def __init__(self, layer: BoundLayer, latents: Tensor):
        self._layer, self._latents = layer, latents
        self._outputs: dict[nn.Module, list[_Output]] = {}
        self._random: list[Tensor] | None = None
        self._site: tuple[_Output, list[Tensor]] | None = None  # what the layer put out, and the random states then
        self.images: Tensor
        self._record()

    @property
    def nbytes(self) -> int:
        held = sum(output.nbytes for outputs in self._outputs.values() for output in outputs)
        return held + self._latents.numel() * self._latents.element_size() + self.images.nbytes

    def touches(self, module: nn.Module) -> bool:
        """Whether a change of this module's weights would make the record wrong."""
        return any(part is module for recorded in self._outputs for part in recorded.modules())

    def _pass(self, gradients: bool = False) -> Tensor:
        layer = self._layer
        with torch.set_grad_enabled(gradients), repeatable(layer.generator, id(layer.own_forward)):
            images = layer._forward(layer.generator, for_generator(self._latents, layer.generator))
        if not isinstance(images, Tensor):
            raise RewriteCoreError(
                f"The generator returns a {type(images).__name__} and not images alone; bind it with a `forward` "
                "that does."
            )
        return images

    def _record(self) -> None:
        reads, reached = _Reads(), False

        def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not reached:
                reads.inside += 1

        def left(module: nn.Module, args: tuple, output: Any) -> None:
            if reached:
                return
            reads.inside -= 1
            if not reads.inside:
                told = _Output(output)
                self._outputs.setdefault(module, []).append(told)
                reads.watch(told)

        def reach(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal reached
            if not reached:
                reached = True
                self._random = _random_states(self._layer.generator)

        def passed(module: nn.Module, args: tuple, output: Any) -> None:
            if self._site is None:
                self._site = _Output(output), _random_states(self._layer.generator)

        with Hooks() as hooks, reads:
            for module in modules_before(self._layer):
                hooks.before(module, entered)
                hooks.after(module, left)
            hooks.before(self._layer._adapter.site, reach, first=True)
            hooks.after(self._layer._adapter.site, passed)
            self.images = self._pass()
        if not reached:
            raise RewriteCoreError(
                f"The forward pass never called {self._layer.name!r} as a module, so it cannot be replayed from there."
            )

    def replay(self) -> Tensor:
        """The images with the generator as it is now: only what follows the layer is computed."""
        with self._answers():
            return self._pass()

    def follow(self, value: Tensor, to: str = "pictures") -> Tensor:
        """What follows from a value of the layer, differentiable in it; the layer itself is not run.

        Args:
            value: [N, O, *map] for the N recorded latents.
            to: "pictures", the images; or "activation", what the next module that has a weight matrix is given: the
                value after its norm and activation.

        Returns what the generator makes, in its own precision. Raises RewriteCoreError where the value has another
        shape, or where no module with a weight matrix follows.
        """
        wanted = value.requires_grad and torch.is_grad_enabled()
        if value.ndim < 2 or value.shape[:2] != (len(self._latents), self._layer.out_channels):
            raise RewriteCoreError(
                f"A value of {self._layer.name!r} for {len(self._latents)} latents is [{len(self._latents)}, "
                f"{self._layer.out_channels}, *map], not {list(value.shape)}."
            )
        if to == "pictures":
            with self._answers(value):
                images = self._pass(gradients=wanted)
            if wanted and not images.requires_grad:
                raise RewriteCoreError(
                    "The generator makes its images without gradients (it switches them off in its forward pass); use "
                    "objective='value'.",
                    advice={"objective": "value"},
                )
            return images
        found = self._next(value if wanted else value.detach().requires_grad_())
        return found if wanted else found.detach()

    def _next(self, value: Tensor) -> Tensor:
        """What the first module with a weight matrix after the layer is given of what is made from the value."""
        found: list[Tensor] = []

        def arrives(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:  # made from the value
                    found.append(leaf)
                    raise Stop

        inside = set(self._layer._adapter.site.modules())
        with self._answers(value) as hooks, contextlib.suppress(Stop):
            for module in self._layer.generator.modules():
                if module not in inside and any(own.ndim > 1 for own in module.parameters(recurse=False)):
                    hooks.before(module, arrives)
            self._pass(gradients=True)
        if not found:
            raise RewriteCoreError(
                f"Nothing with a weight matrix follows {self._layer.name!r}, so it has no next activation; use "
                "objective='pictures'.",
                advice={"objective": "pictures"},
            )
        return found[0]

    @contextlib.contextmanager
    def _answers(self, value: Tensor | None = None) -> Iterator[Hooks]:
        """Inside, the recorded modules answer from the record; the layer itself with `value`, where one is given."""
        site, reached = self._layer._adapter.site, False

        def reach(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal reached
            if not reached and self._random is not None:
                reached = True
                _set_random_states(self._layer.generator, self._random)

        with contextlib.ExitStack() as stack:
            hooks = stack.enter_context(Hooks())
            if value is None:
                hooks.before(site, reach, first=True)
            else:
                stack.enter_context(_answering(site, [_Given(self, value)], hooks))
            for module, outputs in self._outputs.items():
                stack.enter_context(_answering(module, list(outputs), hooks))
            yield hooks


class _Given:
    """The answer of the layer itself: a value in the place of its own."""

    def __init__(self, record: Record, value: Tensor):
        self._record, self._value = record, value

    def answer(self) -> Any:
        layer, site = self._record._layer, self._record._site
        assert site is not None  # the recorded pass has run the layer
        _set_random_states(layer.generator, site[1])
        return layer._adapter.replace_value(site[0].answer(), self._value)


@contextlib.contextmanager
def _answering(module: nn.Module, outputs: list[Any], hooks: Hooks) -> Iterator[None]:
    """In the pass of `hooks`, a module that answers from a record as long as there are answers, then runs again."""
    own, forward = module.__dict__.get("forward"), module.forward
    told: list[Any] = []

    def skip(*args: Any, **kwargs: Any) -> Any:
        if not hooks.running or not outputs:
            return forward(*args, **kwargs)
        told.append(outputs.pop(0).answer())
        return told[-1]

    def give(module: nn.Module, args: tuple, output: Any) -> Any:
        """The last hook of the module: hooks of the user have changed the output before it was recorded."""
        return told.pop() if told else None

    hooks.after(module, give)
    module.forward = skip
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _devices(generator: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in generator.parameters() if p.device.type == "cuda"})


def _random_states(generator: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _devices(generator))]


def _set_random_states(generator: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_devices(generator), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def record(layer: BoundLayer, latents: Tensor) -> Record:
    """Run the generator on latents [N, ...] to its end and keep what the modules before `layer` put out.

    Raises RewriteCoreError where the generator returns anything but images, or never calls the layer as a module.
    """
    return Record(layer, latents)
