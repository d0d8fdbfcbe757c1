"""Adam on a layer's whole weight with projection, on a GPU: all steps in one launch, a few channels a program.

The trajectory is that of rewrite_core/ops/fit_projected_op/problem.py, whose names are used here. Channels never
meet but in the loss that is reported: every program writes the sum over its channels at each step, and these are added
up in a fixed order. No atomics: the same bits from run to run.

**Work.** A program has `channels` output channels, so that what it reads of the operator serves all of them: with one
each, a step would read the operator 512 times. Its channels' change, running means and running powers lie in a piece of
global memory that stays in the caches (Triton cannot index registers by a loop's variable, and three times 4608 numbers
for each of 8 channels are more than a multiprocessor has). A step walks blocks of weights: gradient as a product of
tiles with the slopes, Adam's update, and, where all pixels are one tile, what the new weights add to the output, while
the operator's tile is at hand; with more pixels the outputs take a second walk. Where it projects, the output comes
from the basis maps instead. Products are of float32 numbers in three TF32 ones ("tf32x3"), which is float32 level.

**Floor**, I inputs, T taps, P pixels, O channels: 4 I T P O operations and about 16 I T O for Adam per step, and I T P
numbers of the operator for each program. 512 -> 512 channels, 3x3, 10x10 and 2001 steps: 1.9 TFLOP, times three in
TF32, and 0.24 TB of the operator at 8 channels a program, from the level-2 cache.
"""

from .host import launch

__all__ = ["launch"]
