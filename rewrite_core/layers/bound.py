"""A layer of a generator that is bound for rewriting: its keys, its values and its weight.

A bound layer gives the *key* (the feature vector that the layer's weight really multiplies), the *value* (the layer's
output) and the editable weight as [O, I, *kernel]. A *map* has the axes that the layer's data has: (h, w) of an image,
(L,) of a sequence, (d, h, w) of a volume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..adapters.base import Box, Capture, LayerAdapter, PostOperation
from ..clock import stage
from ..errors import RewriteCoreError
from ..modes import repeatable
from ..waits import later, on_gpu, on_host
from .bits import summed
from .capture import Tap, fingerprints, maps_of, run_to
from .fingerprints import Forward, is_of, plain_call, rounded_fingerprint, tensor_fingerprint
from .latents import for_generator
from .passes import Hooks


class BoundLayer(Tap):
    """One editable layer of a generator; make it with :func:`rewrite_core.bind`.

    Attributes: ``generator``, ``name`` (path of the module that owns the weight), ``family``,
    ``in_channels``, ``out_channels``, ``kernel_size``, ``groups`` (of a grouped convolution; its weight is given as the
    dense one, [O, I, *kernel], with zeros between groups, and what a change has there is not used).
    """

    def __init__(self, generator: nn.Module, adapter: LayerAdapter, forward: Forward | None = None):
        super().__init__(generator, adapter, forward or plain_call)
        self.family = adapter.family
        self.groups = adapter.groups
        self.out_channels, self.in_channels, *self.kernel_size = adapter.canonical(adapter.weight).shape
        self._known_weights: dict[bool, tuple[bytes, str]] = {}  # the last one's digest and fingerprint; own or given
        self._summed_weight: tuple[tuple, Tensor, str] | None = (
            None  # a GPU's: facts, the sums of its bits, fingerprint
        )

    def __repr__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        return f"BoundLayer({self.name!r}, {self.family}, {self.in_channels} -> {self.out_channels}, {kernel})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_remembered": None}  # it holds weak references

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        module: nn.Module = self._adapter.module
        return module

    @property
    def own_forward(self) -> Forward | None:
        """How the generator is called, where the user said so."""
        return None if self._forward is plain_call else self._forward

    # --- the weight

    @property
    def parameter(self) -> Tensor:
        """The weight that the generator uses, in its own layout: a parameter, but for one that is computed (spectral
        norm, parametrizations) and not folded by a rewrite, which is a tensor."""
        return self._adapter.weight

    @property
    def weight(self) -> Tensor:
        """The weight as [O, I, *kernel] (detached; a view, but for grouped convolutions and computed weights)."""
        return self._adapter.canonical(self._adapter.weight.detach())

    @property
    def own_weight(self) -> Tensor:
        """The weight without the zeros between groups, [O, I / groups, *kernel] (detached)."""
        return self._adapter.own(self._adapter.weight.detach())

    def to_native(self, weight: Tensor) -> Tensor:
        """A weight [O, I, *kernel] in the layout the generator stores."""
        return self._adapter.native(weight)

    def inside_groups(self, weight: Tensor) -> Tensor:
        """What of a weight [O, I, *kernel] is inside the layer's groups, [O, I / groups, *kernel]."""
        return self._adapter.inside_groups(weight)

    def from_native(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`to_native`."""
        return self._adapter.canonical(weight)

    def fold(self) -> None:
        """Where the weight is computed (spectral norm, parametrizations), make it a parameter with what is computed."""
        if self._adapter.computed is not None:
            self._adapter.computed.fold()

    def unfold(self) -> None:
        """Undo :meth:`fold`, bit for bit; what has become of the parameter is lost."""
        if self._adapter.computed is not None:
            self._adapter.computed.unfold()

    def weight_fingerprint(self, weight: Tensor | None = None) -> str:
        """A fingerprint of a weight [O, I, *kernel] of this layer (None: of its own): :func:`tensor_fingerprint`, and
        where the weight is computed, what :meth:`is_weight` knows it by on another CPU. The last one is known again by
        a digest at the speed of memory, a tenth of the time."""
        data = (self.own_weight if weight is None else weight).detach().cpu().contiguous()
        digest = xxhash.xxh3_128(f"{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
        told, computed = digest.digest(), self._adapter.computed is not None
        own = weight is None and self.groups > 1
        known = self._known_weights.get(own)
        if known is None or known[0] != told or ("~" in known[1]) != computed:
            text = (rounded_fingerprint if computed else tensor_fingerprint)(self.weight if weight is None else weight)
            self._known_weights[own] = known = told, text
        return known[1]

    def weight_as_it_is(self) -> Callable[[], str]:
        """A function that returns :meth:`weight_fingerprint` of the weight. On a GPU the weight's bits are added up
        there at once, and it is copied only where that sum is not the one of the last weight that was."""
        if not on_gpu(self.parameter):
            return self.weight_fingerprint
        weight = self.weight
        sums = summed([weight])
        if sums is None:
            return self.weight_fingerprint
        asked, facts = later(sums[0]), (weight.dtype, weight.shape, self._adapter.computed is not None)

        def fingerprint() -> str:
            known, found = self._summed_weight, asked()
            if known is not None and known[0] == facts and torch.equal(known[1], found):
                return known[2]
            text = self.weight_fingerprint(weight)
            again = summed([weight])
            if again is not None and torch.equal(on_host(again[0]), found):  # else it was written to meanwhile
                self._summed_weight = facts, found, text
            return text

        return fingerprint

    def is_weight(self, weight: Tensor | None, fingerprint: str) -> bool:
        """Whether a fingerprint that :meth:`weight_fingerprint` made, here or elsewhere, is that of a weight."""
        own = self.weight_fingerprint(weight)
        return own == fingerprint or is_of(
            self.weight if weight is None else weight, fingerprint, bits=own.partition("~")[0]
        )

    # --- keys

    def capture(self, latents: Tensor) -> Capture:
        """Run the generator up to the layer: the key map and what else the value depends on.

        Of a layer that runs for one part of the latents after the other these are the maps of all. Of one that runs
        several times for each (tiles, a loop, guidance, a layer in two places) they are the keys of all runs, which
        :meth:`value` does not take. Noise that the generator draws is the same in every call on as many latents.
        """
        caught: list[Capture] = []
        with stage("generator"):
            run_to([self], latents, lambda number, capture: caught.append(capture))
        return caught[0]

    def capture_each(self, latents: Tensor) -> Capture:
        """:meth:`capture` with one map per latent.

        Raises RewriteCoreError where the layer sees more or fewer of them, so that none can be told apart.
        """
        capture = self.capture(latents)
        if capture.runs > 1:
            raise RewriteCoreError(
                f"{self.name!r} runs {capture.runs} times in a forward pass (for tiles, in a loop, or in several "
                "places), so "
                "a latent has no one map there; switch tiling off, give a `forward` that runs it once per latent, or "
                "choose "
                "a layer that list_layers names."
            )
        if len(capture.key) != len(latents):
            raise RewriteCoreError(
                f"{self.name!r} sees {len(capture.key)} maps for {len(latents)} latents, so it is not known whose is "
                "whose; give a `forward` that runs it once per latent (such as one without guidance), or another layer."
            )
        return capture

    def keys(self, latents: Tensor) -> Tensor:
        """Key maps [N, I, *map] of latents [N, ...]."""
        return self.capture_each(latents).key

    def fingerprint(self, latents: Tensor) -> str:
        """A fingerprint of all that the key depends on in the generator: every parameter and buffer that an
        operation before the layer takes, and the parameters, buffers and plain attributes (slopes, strides, modes, a
        truncation; not those that a pass writes, nor lists) of every module that starts before it. An edit of this
        layer, or of a later one, leaves it as it is, unless the weight is tied to one that is used earlier. Of a
        `forward` of your own the tensors, numbers and strings that it holds are seen (a label, a truncation). A buffer
        that passes write to (a counter, an observer's range) is not seen.

        The first call runs the generator on one latent, or on two; later ones only read the weights, every bit of them,
        as long as the generator's modules and their attributes are the same.

        Raises RewriteCoreError where weights before the layer are offloaded or sharded.
        """
        return fingerprints([self], latents)[0]

    # --- values

    @property
    def known(self) -> bool:
        """Whether what the layer does with its weight is known, so that :meth:`linear` runs on any channels."""
        return self._adapter.known

    @property
    def pointwise(self) -> bool:
        """Whether the value at a position follows from the key there alone, and nothing else."""
        return self._adapter.pointwise

    def values(self, latents: Tensor) -> Tensor:
        """Value maps [N, O, *map] of latents [N, ...]."""
        with torch.no_grad():
            return self.value(self.capture_each(latents))

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator on key [N, I', *map] with weight [O', I', *kernel]."""
        return self._adapter.linear(key, weight)

    def used(self, key: Tensor, weight: Tensor) -> Tensor:
        """:meth:`linear` on all of the layer's channels, in the time of its own groups: weights between them are not
        used, and need not be there."""
        return self._adapter.used(key, weight)

    def taps(self, maps: Tensor) -> Tensor:
        """:meth:`linear` on maps [M, *map], each by itself, with every one-hot kernel: [M, taps, *map']."""
        return self._adapter.taps(maps, self.kernel_size)

    def value(self, capture: Capture, weight: Tensor | None = None) -> Tensor:
        """The value of a capture under `weight` [O, I, *kernel], or [O, I / groups, *kernel] (default: the current
        one), differentiable."""
        if capture.runs > 1:
            raise RewriteCoreError(
                f"{self.name!r} runs {capture.runs} times in this capture, so it has no one value there."
            )
        weight = self.own_weight if weight is None else weight
        return self._adapter.value(capture, weight.to(capture.key.dtype))  # under autocast, not the weight's own

    def post_operation(self, capture: Capture) -> PostOperation | None:
        """What the layer does per channel after its linear operator; None where unknown."""
        return self._adapter.post_operation(capture)

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        """A capture restricted to a box of the map (the convolution zero-pads at its edge)."""
        return self._adapter.crop(capture, key_box, value_box)

    def render(self, latents: Tensor, value: Tensor | None = None) -> Tensor:
        """Images of latents [N, ...]; with `value` [N, O, *map], the images that follow from that value at this layer.

        Raises RewriteCoreError where the value has another shape, or the layer sees more or fewer maps than latents.
        """
        if value is None:
            return self._images(latents)
        maps = maps_of(self, latents)
        if maps is not None and maps != len(latents):
            raise RewriteCoreError(
                f"{self.name!r} sees {maps} maps for {len(latents)} latents in a forward pass, so it has no one value "
                "to "
                "replace; choose a layer that list_layers names."
            )
        if value.ndim < 2 or value.shape[:2] != (len(latents), self.out_channels):
            raise RewriteCoreError(
                f"A value of {self.name!r} for {len(latents)} latents is [{len(latents)}, {self.out_channels}, *map], "
                "not "
                f"{list(value.shape)}."
            )
        return self._images(latents, value)

    def _images(self, latents: Tensor, value: Tensor | None = None) -> Tensor:
        rows = 0

        def swap(whole: Tensor, output: Any) -> Any:
            nonlocal rows
            part = whole[rows : rows + len(output)]  # of slices of the batch, this one's
            rows += len(part)
            if not len(part):
                raise RewriteCoreError(f"{self.name!r} runs more often than it did, so it has no one value to replace.")
            return self._adapter.replace_value(output, part)

        with Hooks() as hooks:
            if value is not None:
                hooks.after(self._adapter.site, lambda module, args, output: swap(value, output))
            with torch.no_grad(), repeatable(self.generator, ("render", id(self._forward))):
                images: Tensor = self._forward(self.generator, for_generator(latents, self.generator))
        return images
