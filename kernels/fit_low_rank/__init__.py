"""The coefficients of a rank-R change on a GPU: one program per (edit, output channel), all iterations inside it.

The algorithm, its constants and its status codes are those of rewrite_core/ops/fit_low_rank_op/problem.py, name for
name. All arithmetic is float64: a fit reads little, and CPU and GPU are to take the same path.

**Work.** As many programs as fit the GPU each take every n-th channel. What they share, the unknowns' sizes and the
quadratic forms in scaled unknowns, a few torch operations make before the launch; nothing waits for the GPU. Ours to
keep is little (some vectors of pixels and of unknowns, the matrix and its factor), it lies in a piece of global memory
per program, and a multiprocessor's own cache serves it. Pixels are walked in tiles, unknowns in blocks of BLOCK, so
neither rank nor region has a limit but that memory.

**Linear systems** are over unknowns, or over pixels where these are fewer (and there is no penalty): L D L^T by blocks,
left-looking. A block on the diagonal is eliminated in registers together with the identity, which becomes L^-1, so that
everything else is products of tiles. These are float64 tensor-core products where the GPU has them and Triton makes
them: 3.9 does for sm_80, sm_90 and sm_100 (m8n8k4), 3.6 for sm_80 (m8n8k4) and sm_90 (m16n8k16), while for sm_100 it
multiplies in registers.

**Floor**, J unknowns, P pixels, O channels, S the smaller of J and P: P J (S + 5) + S^3 / 3 + 2 S^2 operations per step
and channel, 4 bytes per number read and written. At 512 channels, 3x3, 10x10 and rank 1 that is 0.3 GFLOP for 40
steps: nothing beside the latency of some ten dependent passes per step, so the time to expect is that of one program's
steps, about 10^4 cycles each, as all 512 run at once.
"""

from .host import launch

__all__ = ["launch"]
