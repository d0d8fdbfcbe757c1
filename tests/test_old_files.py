"""Files of version 0.1 hold what they held. (rewrites and edits: below, as their rooms are rebuilt)"""

import hashlib
import json

import torch
from conftest import DATA

import rewrite_core as rc

OLD = DATA / "version_0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_a_second_moment(layer, latents, moment):
    old = rc.SecondMoment.load(OLD / "moment.safetensors", layer)
    assert sha256(old.matrix()) == EXPECTED["matrix"] and old.count == EXPECTED["count"]
    assert old.latents["count"] == 200 and "recipe" not in old.latents
    old.check(layer, latents)
    assert torch.allclose(old.matrix(), moment.matrix(), rtol=1e-6) and 0 < old.standard_error < 1
