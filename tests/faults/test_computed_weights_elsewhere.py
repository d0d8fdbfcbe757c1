"""A weight that is computed (weight norm) has other bits on another CPU: it is known there all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rewrite_core as rc
from rewrite_core.layers.fingerprints import is_of, rounded_fingerprint, tensor_fingerprint

PROGRAM = """
import sys
import torch
from torch import nn
import rewrite_core as rc

torch.manual_seed(0)
norm = getattr(nn.utils.parametrizations, "weight_norm")
G = nn.Sequential(nn.Conv2d(3, 16, 1), norm(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU()).eval()
z = torch.randn(8, 3, 8, 8)
layer, mask = rc.bind(G, "1"), torch.ones(8, 8)
edit = rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(2, mask)], latents=z)
if len(sys.argv) == 3:
    moment = rc.collect_second_moment(layer, z, progress=False)
    first = rc.rewrite(layer, moment, edit, z, loss="l2", region="map")
    first.save(sys.argv[1])
    with first:  # one that is fitted on top of another
        rc.rewrite(layer, moment, edit, z, loss="l2", region="map", rank=2).save(sys.argv[2])
else:
    first, second = (rc.Rewrite.load(path) for path in sys.argv[1:3])
    print(first.fitted_to.partition("~")[0] == layer.weight_fingerprint(layer.weight).partition("~")[0])
    with first.apply(G):
        second.apply(G)
        second.revert(G)
"""


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.strip()


def test_a_rewrite_applies_on_another_cpu(tmp_path):
    files = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run(*files)
    run(*files, "again")
    run(*files, "again", ATEN_CPU_CAPABILITY="default")  # may have other bits, or not: it applies


def test_a_weight_is_known_but_for_rounding_and_no_further():
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    known = rounded_fingerprint(weight)
    assert known.partition("~")[0] == tensor_fingerprint(weight)
    ulp = torch.nextafter(weight, torch.full_like(weight, torch.inf))
    assert is_of(weight, known) and is_of(ulp, known) and is_of(ulp.clone(), known)
    for other in (weight + 1e-4, weight * 1.0001, weight.flip(0), weight.double(), weight.bfloat16().float(), -weight):
        assert not is_of(other, known)
    one = weight.clone()
    one[3, 4, 1, 1] += 0.1
    assert not is_of(one, known)
    assert is_of(weight, tensor_fingerprint(weight)) and not is_of(ulp, tensor_fingerprint(weight))
    for damaged in ("", "~", known[:-2], known.partition("~")[0] + "~torch.float32~zz"):
        assert not is_of(ulp, damaged)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_has_a_sketch_folded_or_not(norm):
    layer = rc.bind(nn.Sequential(norm(nn.Conv2d(3, 4, 1))).eval(), "0")
    weight = layer.weight.clone()
    before = layer.weight_fingerprint(weight)
    assert "~" in before and layer.is_weight(weight, before) and layer.is_weight(weight, tensor_fingerprint(weight))
    layer.fold()
    assert layer.weight_fingerprint(weight) == before and layer.is_weight(layer.weight, before)
    layer.unfold()
    assert not layer.is_weight(weight + 0.01, before)


def test_a_stored_weight_is_known_by_its_bits_alone():
    layer = rc.bind(nn.Sequential(nn.Conv2d(3, 4, 1)), "0")
    known = layer.weight_fingerprint(layer.weight)
    assert known == tensor_fingerprint(layer.weight) and not layer.is_weight(layer.weight * (1 + 1e-7), known)
