"""Linear systems: matrix and factor are squares of BLOCK x BLOCK tiles, of which the lower ones are used."""

from __future__ import annotations

import triton
import triton.language as tl

from .model import basis_tile


@triton.jit
def tile_at(i, k, blocks, BLOCK: tl.constexpr):
    """Offsets of the numbers of tile (i, k)."""
    index = tl.arange(0, BLOCK)
    return (i * blocks + k) * (BLOCK * BLOCK) + index[:, None] * BLOCK + index[None, :]


@triton.jit
def transposed_at(i, k, blocks, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return (i * blocks + k) * (BLOCK * BLOCK) + index[None, :] * BLOCK + index[:, None]


# --- factor and solve ---


@triton.jit
def eliminate(tile, count, least, BLOCK: tl.constexpr):
    """tile = L D L^T for a symmetric tile of `count` rows and columns: L^-1, D, whether all of D is above `least`."""
    index = tl.arange(0, BLOCK)
    rows = index[:, None]
    columns = index[None, :]
    inverse = (rows == columns).to(tl.float64)
    pivots = tl.full((BLOCK,), 1.0, tl.float64)
    good = count > 0
    for k in range(0, count):
        row = tl.sum(tl.where(rows == k, tile, 0.0), 0)
        column = tl.sum(tl.where(columns == k, tile, 0.0), 1)
        under = tl.sum(tl.where(rows == k, inverse, 0.0), 0)
        pivot = tl.sum(tl.where(index == k, row, 0.0), 0)
        good = good & (pivot > least) & (pivot - pivot == 0.0)
        factor = tl.where(index > k, column * (1.0 / pivot), 0.0)
        tile -= factor[:, None] * row[None, :]
        inverse -= factor[:, None] * under[None, :]
        pivots = tl.where(index == k, pivot, pivots)
    return inverse, pivots, good


@triton.jit
def left_over(scratch, i, k, blocks, BLOCK: tl.constexpr):
    """Tile (i, k) of the matrix less what the columns before k account for."""
    tile = tl.load(scratch.matrix + tile_at(i, k, blocks, BLOCK))
    for j in range(0, k):
        left = tl.load(scratch.factor + tile_at(i, j, blocks, BLOCK))
        right = tl.load(scratch.factor + transposed_at(k, j, blocks, BLOCK))
        scale = tl.load(scratch.pivots + j * BLOCK + tl.arange(0, BLOCK))
        tile -= tl.dot(left / scale[None, :], right, input_precision="ieee", out_dtype=tl.float64)
    return tile


@triton.jit
def factorise(scratch, shift, least, sizes, BLOCK: tl.constexpr):
    """matrix + shift I = L D L^T: L^-1 of the diagonal tiles, and L D below. Whether all pivots are above `least`."""
    index = tl.arange(0, BLOCK)
    blocks = sizes.order_blocks
    good = sizes.order > 0
    for k in range(0, blocks):
        tile = left_over(scratch, k, k, blocks, BLOCK)
        tile += tl.where(index[:, None] == index[None, :], shift, 0.0)
        inverse, values, fine = eliminate(tile, tl.minimum(sizes.order - k * BLOCK, BLOCK), least, BLOCK)
        good = good & fine
        tl.store(scratch.factor + tile_at(k, k, blocks, BLOCK), inverse)
        tl.store(scratch.pivots + k * BLOCK + index, values)
        tl.debug_barrier()
        for i in range(k + 1, blocks):
            tile = left_over(scratch, i, k, blocks, BLOCK)
            turned = tl.load(scratch.factor + transposed_at(k, k, blocks, BLOCK))
            tile = tl.dot(tile, turned, input_precision="ieee", out_dtype=tl.float64)
            tl.store(scratch.factor + tile_at(i, k, blocks, BLOCK), tile)
        tl.debug_barrier()
    return good


@triton.jit
def solve(scratch, right, blocks, BLOCK: tl.constexpr):
    """scratch.solution of the factored system for the right-hand side `right`."""
    index = tl.arange(0, BLOCK)
    for k in range(0, blocks):
        value = tl.load(right + k * BLOCK + index)
        for j in range(0, k):
            before = tl.load(scratch.half + j * BLOCK + index) / tl.load(scratch.pivots + j * BLOCK + index)
            value -= tl.sum(tl.load(scratch.factor + tile_at(k, j, blocks, BLOCK)) * before[None, :], 1)
        inverse = tl.load(scratch.factor + tile_at(k, k, blocks, BLOCK))
        tl.store(scratch.half + k * BLOCK + index, tl.sum(inverse * value[None, :], 1))
        tl.debug_barrier()
    for step in range(0, blocks):
        k = blocks - 1 - step
        value = tl.load(scratch.half + k * BLOCK + index)
        for i in range(k + 1, blocks):
            after = tl.load(scratch.solution + i * BLOCK + index)
            value -= tl.sum(tl.load(scratch.factor + tile_at(i, k, blocks, BLOCK)) * after[:, None], 0)
        value = value / tl.load(scratch.pivots + k * BLOCK + index)
        inverse = tl.load(scratch.factor + tile_at(k, k, blocks, BLOCK))
        tl.store(scratch.solution + k * BLOCK + index, tl.sum(inverse * value[:, None], 0))
        tl.debug_barrier()


# --- matrix and gradient of a step; the Jacobian m basis + dm lin^T is never formed ---


@triton.jit
def gram_tile(channel, curvature, i, k, sizes, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """sum_p curvature_p basis_ip basis_kp in scaled unknowns, a tile of it."""
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = k * BLOCK + tl.arange(0, BLOCK)
    tile = tl.zeros((BLOCK, BLOCK), tl.float64)
    for first in range(0, sizes.pixels, TILE):
        p = first + tl.arange(0, TILE)
        left = basis_tile(channel, rows[:, None], p[None, :], sizes) * tl.load(curvature + p)[None, :]
        right = basis_tile(channel, columns[None, :], p[:, None], sizes)
        tile = tl.dot(left, right, tile, input_precision="ieee", out_dtype=tl.float64)
    return tile * tl.load(channel.inverse_size + rows)[:, None] * tl.load(channel.inverse_size + columns)[None, :]


@triton.jit
def assemble_gradient(channel, scratch, point, m, along, sizes, mode):
    """The gradient, and what else of it demodulation needs: basis (curvature lin), or in dual form |dm|^2."""
    index = tl.arange(0, mode.BLOCK)
    length = tl.zeros((), tl.float64)
    for i in range(0, sizes.blocks):
        rows = i * mode.BLOCK + index
        turn = tl.zeros((mode.BLOCK,), tl.float64)
        lean = tl.zeros((mode.BLOCK,), tl.float64)
        for first in range(0, sizes.pixels, mode.TILE):
            p = first + tl.arange(0, mode.TILE)
            part = basis_tile(channel, rows[:, None], p[None, :], sizes)
            turn += tl.sum(part * tl.load(scratch.slopes + p)[None, :], 1)
            if mode.DEMODULATED and not mode.DUAL_FORM:
                lean += tl.sum(part * (tl.load(scratch.curvature + p) * tl.load(point.lin + p))[None, :], 1)
        inverse = tl.load(channel.inverse_size + rows)
        turn *= m * inverse
        if mode.DEMODULATED:
            slant = tl.load(point.dm + rows)
            turn += along * slant
            if mode.DUAL_FORM:
                length += tl.sum(slant * slant, 0)
            else:
                tl.store(scratch.leaning + rows, lean * inverse)
        if mode.PENALISED:
            turn += 2.0 * channel.penalty_scale * tl.load(point.penalised + rows)
        tl.store(scratch.gradient + rows, turn)
    return length


@triton.jit
def assemble(channel, scratch, point, m, along, bent, sizes, mode):
    """Matrix and gradient over unknowns; returns the matrix's trace."""
    index = tl.arange(0, mode.BLOCK)
    assemble_gradient(channel, scratch, point, m, along, sizes, mode)
    tl.debug_barrier()
    trace = tl.zeros((), tl.float64)
    for i in range(0, sizes.blocks):
        for k in range(0, i + 1):
            rows = i * mode.BLOCK + index
            columns = k * mode.BLOCK + index
            tile = gram_tile(channel, scratch.curvature, i, k, sizes, mode.BLOCK, mode.TILE)
            if mode.DEMODULATED:
                left = tl.load(point.dm + rows)[:, None]
                top = tl.load(point.dm + columns)[None, :]
                leans = tl.load(scratch.leaning + rows)[:, None]
                leaning = tl.load(scratch.leaning + columns)[None, :]
                tile = m * m * tile + m * left * leaning + (m * leans + bent * left) * top
            if mode.PENALISED:
                inside = (rows < sizes.unknowns)[:, None] & (columns < sizes.unknowns)[None, :]
                at = channel.penalty + rows[:, None] * sizes.unknowns + columns[None, :]
                tile += 2.0 * channel.penalty_scale * tl.load(at, mask=inside, other=0.0)
            tl.store(scratch.matrix + tile_at(i, k, sizes.blocks, mode.BLOCK), tile)
            trace += tl.sum(tl.sum(tl.where(rows[:, None] == columns[None, :], tile, 0.0), 1), 0)
    return trace


@triton.jit
def assemble_dual_form(channel, scratch, point, m, along, sizes, mode):
    """The same over pixels: S rows^T rows S with S = sqrt(curvature), right-hand side S^-1 slopes; rows = m basis +
    dm lin^T, and gram = basis^T basis in scaled unknowns."""
    index = tl.arange(0, mode.BLOCK)
    length = assemble_gradient(channel, scratch, point, m, along, sizes, mode)
    for i in range(0, sizes.order_blocks):
        p = i * mode.BLOCK + index
        root = tl.sqrt(tl.load(scratch.curvature + p))
        tl.store(scratch.right + p, tl.where(root > 0.0, tl.load(scratch.slopes + p) / root, 0.0))
        if mode.DEMODULATED:
            turned = tl.zeros((mode.BLOCK,), tl.float64)
            for k in range(0, sizes.blocks):
                rows = k * mode.BLOCK + index
                scaled = tl.load(point.dm + rows) * tl.load(channel.inverse_size + rows)
                turned += tl.sum(basis_tile(channel, rows[:, None], p[None, :], sizes) * scaled[:, None], 0)
            tl.store(scratch.turned + p, turned)
    tl.debug_barrier()
    trace = tl.zeros((), tl.float64)
    for i in range(0, sizes.order_blocks):
        for k in range(0, i + 1):
            p = i * mode.BLOCK + index
            q = k * mode.BLOCK + index
            inside = (p < sizes.pixels)[:, None] & (q < sizes.pixels)[None, :]
            tile = tl.load(channel.gram + p[:, None] * sizes.pixels + q[None, :], mask=inside, other=0.0) * (m * m)
            if mode.DEMODULATED:
                mine = tl.load(point.lin + p)[:, None]
                other = tl.load(point.lin + q)[None, :]
                turned = m * tl.load(scratch.turned + p)[:, None]
                tile += m * mine * tl.load(scratch.turned + q)[None, :] + (turned + length * mine) * other
            tile *= tl.sqrt(tl.load(scratch.curvature + p))[:, None] * tl.sqrt(tl.load(scratch.curvature + q))[None, :]
            tl.store(scratch.matrix + tile_at(i, k, sizes.order_blocks, mode.BLOCK), tile)
            trace += tl.sum(tl.sum(tl.where(p[:, None] == q[None, :], tile, 0.0), 1), 0)
    return trace


@triton.jit
def damped_step(channel, scratch, point, m, mu, sizes, mode):
    """scratch.step and scratch.trial_x: -(matrix + mu I)^-1 gradient, and where that leads from `point`.

    Returns whether there is one, and by how much it is to lower the objective."""
    index = tl.arange(0, mode.BLOCK)
    zero = tl.zeros((), tl.float64)
    good = factorise(scratch, mu, zero, sizes, mode.BLOCK)
    if mode.DUAL_FORM:
        solve(scratch, scratch.right, sizes.order_blocks, mode.BLOCK)
        turn = zero
        for i in range(0, sizes.order_blocks):  # the step is unknowns times this
            p = i * mode.BLOCK + index
            y = -tl.load(scratch.solution + p) * tl.sqrt(tl.load(scratch.curvature + p))
            tl.store(scratch.half + p, y)
            turn += tl.sum(y * tl.load(point.lin + p), 0)
        tl.debug_barrier()
        for i in range(0, sizes.blocks):
            j = i * mode.BLOCK + index
            total = tl.zeros((mode.BLOCK,), tl.float64)
            for k in range(0, sizes.order_blocks):
                p = k * mode.BLOCK + index
                part = basis_tile(channel, j[:, None], p[None, :], sizes)
                total += tl.sum(part * tl.load(scratch.half + p)[None, :], 1)
            total *= m * tl.load(channel.inverse_size + j)
            if mode.DEMODULATED:
                total += turn * tl.load(point.dm + j)
            tl.store(scratch.step + j, total)
    else:
        solve(scratch, scratch.gradient, sizes.order_blocks, mode.BLOCK)
        for i in range(0, sizes.blocks):
            j = i * mode.BLOCK + index
            tl.store(scratch.step + j, -tl.load(scratch.solution + j))
    tl.debug_barrier()
    predicted = zero
    wild = zero
    for i in range(0, sizes.blocks):
        j = i * mode.BLOCK + index
        step = tl.load(scratch.step + j)
        wild += tl.sum(step - step, 0)  # NaN of infinity and NaN
        predicted += 0.5 * tl.sum(mu * step * step - tl.load(scratch.gradient + j) * step, 0)
        tl.store(scratch.trial_x + j, tl.load(point.x + j) + step)
    tl.debug_barrier()
    return good & (wild == 0.0), predicted
