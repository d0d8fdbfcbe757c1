"""Adam on a layer's whole weight with projection, on a GPU: two launches a step, each with the whole GPU at work.

The trajectory is that of rewrite_core/ops/fit_projected_op/problem.py, whose names are used here. Launches follow each
other in the order of a stream, which is all that holds them together: no atomics, no waiting inside a kernel. Sums are
added up in a fixed order: the same bits from run to run.

**A step.** ``update_kernel``: a program has some output channels and a slice of the weights. It makes the gradient as
a product of the slopes (the loss's gradient by the linear output) with the operator's maps, takes Adam's step, and
writes what its new weights add to the outputs and to demodulation's norm. ``compare_kernel``: a program has few
channels and all their pixels. It adds up the slices, compares with the goal, and writes the loss and the slopes.
Before the first step, and after a projection, ``update_kernel`` runs without Adam. ``project_kernel`` makes the change
its projection; ``lean_kernel`` makes the gradient's products with the directions, where the gradient is projected too.

Products are of float32 numbers in three TF32 ones ("tf32x3"), which is float32 level.

**Launches.** Two a step, at some microseconds of the host's time each, since all but the first go straight to the
compiled kernel. No CUDA graph is made here: these kernels last longer than their launch, and plain launches go into a
caller's own capture.

**Floor**, I inputs, T taps, P pixels, O channels: 4 I T P O operations (times three in TF32) and about 16 I T O for
Adam per step. 28 I T O bytes of change, means, powers and (with demodulation) weights, which do not quite stay in the
level-2 cache: 66 MB for 512 -> 512 channels and 3x3 taps, and about 25 MB of slices' outputs.
"""

from .host import launch

__all__ = ["launch"]
