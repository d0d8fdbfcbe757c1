"""python all_reduce.py RANK STORE FILE FILE: one of two processes that collect a half of the latents each and add
up."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rewrite_core as rc

DATA = Path(__file__).parents[1] / "data"


def collect(layer, latents):
    return rc.collect_second_moment(layer, latents, batch_size=8, progress=False, skip_nonfinite=True)


def main(rank, store, sums):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = rc.load_proggan(DATA / "proggan_state.npz")
    layer, latents = rc.bind(generator, "layer5.conv"), rc.sample_latents(64, 80).split(40)
    mine = latents[rank].clone()
    mine[7, rank] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(layer, mine).all_reduce().save(sums[rank])
    for other, words in (
        (rc.SecondMoment(64 + rank), "channels"),
        (collect(rc.bind(generator, f"layer{4 + rank}.conv"), latents[0][:4]), "layer"),
    ):
        with pytest.raises(rc.MismatchError, match=f"differ in {words}"):
            other.all_reduce()
    with torch.no_grad():
        generator.layer2.conv.weight.mul_(1 + rank)
    with pytest.raises(rc.MismatchError, match="fingerprint"):
        collect(layer, latents[0][:4]).all_reduce()
    with torch.no_grad():
        generator.layer2.conv.weight.div_(1 + rank)
    with pytest.warns(rc.LatentsWarning, match="count twice"):
        collect(layer, latents[0][:4]).all_reduce()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
