"""The sums of bits against plain integers: see tests/test_interpreted.py."""

import numpy as np
import pytest
import torch

from rewrite_core.kernels import checksum
from rewrite_core.layers import bits

ALL = (1 << 64) - 1


def plain(words, before):
    """The sum of words of which so many were before, in Python's whole numbers."""
    total = 0
    for place, word in enumerate(words, before):
        number = (int(word) + place * checksum._PLACE.value) & ALL
        number = (number ^ (number >> 32)) * checksum._FIRST.value & ALL
        number = (number ^ (number >> 29)) * checksum._SECOND.value & ALL
        total += number ^ (number >> 32)
    return total & ALL


def test_sums_are_those_of_whole_numbers():
    tensors = [torch.randn(size) for size in (1, 5, 2 * checksum.WORDS + 3, 0)] + [torch.randn(3, 4).double()]
    wanted = []
    for tensor in tensors:
        words = tensor.numpy().reshape(-1).view(np.uint32)
        wanted += [plain(words[at : at + checksum.WORDS], at) for at in range(0, len(words), checksum.WORDS)]
    found = checksum.checksums(tensors)
    assert found.dtype == torch.int64 and [number & ALL for number in found.tolist()] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.float64])
def test_every_bit_counts(dtype):
    """Also those of a last word that is not whole, and of tensors at odd addresses."""

    def summed(tensors):
        return tuple(number for sums in bits.summed(tensors) for number in sums.tolist())

    whole = torch.randint(0, 2, (8,)).to(dtype)
    tensor = whole[1:]
    sums = summed([tensor, torch.ones(3)])
    seen = {sums}
    for number in range(len(tensor)):
        changed = whole.clone()[1:]
        changed.view(torch.uint8)[number * tensor.element_size()] ^= 1
        seen.add(summed([changed, torch.ones(3)]))
    swapped = whole.clone()[1:]
    swapped.view(torch.uint8)[:2] = torch.tensor([3, 4], dtype=torch.uint8)
    turned = swapped.clone()
    turned.view(torch.uint8)[:2] = torch.tensor([4, 3], dtype=torch.uint8)
    assert len(seen) == 1 + len(tensor) and summed([swapped]) != summed([turned])
    assert summed([tensor, torch.ones(3)]) == sums and summed([torch.ones(3), tensor]) != sums
