"""What the tests of ``second_moment`` share: features in every layout, and their second moment in float64."""

import torch


def rows_of(features):
    return features.movedim(1, -1).reshape(-1, features.shape[1]).double()


def oracle(features):
    """Independent of the library: exact products, one long float64 sum per entry."""
    rows = rows_of(features)
    return (rows[:, :, None] * rows[:, None, :]).sum(0)


def assert_close(got, want, tolerance):
    """By norm, and entry by entry relative to sqrt(C_ii C_jj), so that small channels count too."""
    assert got.dtype == torch.float64 and torch.equal(got, got.T), "not symmetric"
    scale = want.diagonal().sqrt()
    error = (got - want).abs() / (scale[:, None] * scale).clamp_min(torch.finfo(torch.float64).tiny)
    worst = divmod(int(error.argmax()), len(want))
    assert error.max() <= tolerance, f"entry {worst}: {got[worst]}, not {want[worst]} ({error.max():.2e})"
    assert (got - want).norm() <= tolerance * want.norm()


def prefilled(channels, value=0.0):
    return torch.full((channels, channels), value, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# make(*shape) gives a contiguous tensor; what is returned has the strides the name says
LAYOUTS = {
    "map": lambda make: make(3, 37, 7, 11),
    "one channel": lambda make: make(2, 1, 5, 3),
    "one position": lambda make: make(1, 6, 1, 1),
    "whole panels": lambda make: make(2, 64, 16, 16),
    "several chunks": lambda make: make(2, 97, 83, 89),
    "rows": lambda make: make(131, 53),
    "column-major rows": lambda make: make(53, 131).T,
    "every other row and channel": lambda make: make(200, 60)[::2, 1::3],
    "every other sample": lambda make: make(6, 19, 5, 5)[::2],
    "cropped": lambda make: make(2, 17, 12, 13)[:, :, 1:-2, 3:-1],
    "every other pixel": lambda make: make(2, 17, 12, 13)[:, :, ::2, 1::2],
    "channel slice": lambda make: make(2, 40, 6, 6)[:, 5:38],
    "transposed map": lambda make: make(2, 17, 8, 13).transpose(2, 3),
    "samples last": lambda make: make(17, 8, 13, 3).permute(3, 0, 1, 2),
    "channels_last": lambda make: make(3, 33, 7, 9).to(memory_format=torch.channels_last),
    "cropped channels_last": lambda make: make(3, 33, 7, 9).to(memory_format=torch.channels_last)[:, :32, 1:, :-1],
    "expanded samples": lambda make: make(1, 13, 4, 5).expand(6, -1, -1, -1),
    "expanded positions": lambda make: make(2, 13, 1, 1).expand(-1, -1, 9, 31),
    "expanded channels": lambda make: make(2, 1, 6, 7).expand(-1, 23, -1, -1),
    "overlapping windows": lambda make: make(90).as_strided((4, 8, 5, 3), (11, 2, 5, 1)),
}


def features_of(layout, dtype=torch.float32):
    return LAYOUTS[layout](lambda *shape: normal(*shape).to(dtype))
