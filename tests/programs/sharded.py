"""python sharded.py RANK STORE FOLDER: one of two processes whose generator FSDP2 shards; binding it is refused, and
what the refusal says to do works."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import rewrite_core as rc


def main(rank, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)).eval()
    generator = copy.deepcopy(plain)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name in ("0", "2", "3"):
        fully_shard(generator.get_submodule(name), mesh=mesh)
    with pytest.raises(rc.UnknownLayerError, match="DTensor, sharded over processes.*full state dict"):
        rc.bind(generator, "2")
    state = get_model_state_dict(generator, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # the others have none of it
        with torch.no_grad():
            plain[2].weight.zero_()
        plain.load_state_dict(state)
        layer = rc.bind(plain, "2")
        z = torch.randn(4, 3, 6, 6)
        rc.collect_second_moment(layer, z, progress=False).save(Path(folder, "moment"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
