"""Generators of a user, good and bad: the tests of the command line name their functions."""

import torch


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (6, 1, 1)),
        torch.nn.ConvTranspose2d(6, 8, 4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(8, 3, 4, 2, 1),
    )


def make_maps():
    return make()[1:]


def make_half():
    return make().bfloat16()


def make_unit():
    return torch.nn.Sequential(*make(), torch.nn.Sigmoid())


def one_at_a_time():
    class Single(torch.nn.Linear):
        def forward(self, latents):
            assert len(latents) == 1
            return super().forward(latents).reshape(1, 1, 2, 3)

    return Single(6, 6)


def pair():
    class Pair(torch.nn.Linear):
        def forward(self, latents):
            return latents, latents

    return Pair(6, 6)


def not_a_module():
    return 3


def empty():
    return torch.nn.ReLU()


def raises():
    raise KeyError("weights")


def quits():
    raise SystemExit(3)


def two(path, size):
    return make()


def keyword(*, path):
    return make()


def fussy():
    class Fussy(torch.nn.Linear):
        def forward(self, latents):
            raise ValueError

    return Fussy(2, 2)


def lines():
    """A generator with a one-dimensional convolution."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8 * 5),
        torch.nn.Unflatten(1, (8, 5)),
        torch.nn.Conv1d(8, 12, 3, padding=1),
        torch.nn.Unflatten(1, (3, 4)),
    )


def nan():
    """Its pictures hold NaN."""

    class NaN(torch.nn.Module):
        def forward(self, images):
            return torch.cat([images[:, :2], images[:, 2:] * float("nan")], 1)

    return torch.nn.Sequential(*make(), NaN())


def late():
    """Fails on more than two latents, which is after it was tried out."""

    class Late(torch.nn.Module):
        def forward(self, images):
            if len(images) > 2:
                raise KeyError("late")
            return images

    return torch.nn.Sequential(*make(), Late())


def deep():
    return deep()


def interrupts():
    raise RuntimeError("one\nsentence\x1b[31m of\nseveral lines" + 3000 * "!")
