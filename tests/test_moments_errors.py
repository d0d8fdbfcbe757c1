"""Standard errors of second moments, and collecting until they are small."""

import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, relative

import rewrite_core as rc


class Scaled(torch.nn.Module):
    """Latents [N, 6] -> maps [N, 6, 4, 4] of correlated keys, whose size differs from image to image."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.mixing = torch.nn.Parameter(torch.randn(6, 6, generator=random) + 3 * torch.eye(6))
        self.pixels = torch.nn.Parameter(torch.randn(16, 6, generator=random))
        self.conv = torch.nn.Conv2d(6, 3, 1)

    def forward(self, z):
        maps = z[:, None, :] * (1 + 0.3 * self.pixels)  # the same latent in all positions of a map
        return self.conv((maps @ self.mixing).mT.unflatten(2, (4, 4)))


@pytest.mark.parametrize("batch_size", [5, 7])
def test_standard_errors_are_what_repeated_collections_show(batch_size):
    """The error said against the error made, in the root mean square over independent collections."""
    layer = rc.bind(Scaled(), "conv")
    random = torch.Generator().manual_seed(1)
    keys = torch.eye(6)[:3]
    spatial = 1 + 0.3 * layer.generator.pixels.detach().double()
    mixing = layer.generator.mixing.detach().double()
    truth = mixing.T @ ((spatial.T @ spatial / 16) * torch.eye(6)) @ mixing  # E z z^T is the identity
    said, made, said_keys, made_keys = [], [], [], []
    for _ in range(60):
        z = torch.randn(320, 6, generator=random)
        moment = rc.collect_second_moment(layer, z, batch_size=batch_size, progress=False, keys=keys)
        said.append(moment.standard_error)
        made.append(relative(moment.matrix(), truth))
        exact = torch.linalg.solve(truth, keys.double().T).T
        said_keys.append(moment.key_errors)
        made_keys.append((moment.solve(keys) - exact).norm(dim=1) / exact.norm(dim=1))

    def rms(values):
        return torch.as_tensor(np.array(values)).square().mean(0).sqrt()

    assert rms(said) == pytest.approx(rms(made).item(), rel=0.15)
    assert np.std(said) < 0.3 * np.mean(said)
    assert torch.allclose(rms(said_keys), rms(made_keys), rtol=0.25), (rms(said_keys), rms(made_keys))


def test_until_stops_at_the_error_that_was_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    layer, z = rc.bind(Scaled(), "conv"), torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    moment = rc.collect_second_moment(layer, z, batch_size=10, until=0.1)
    used = moment.latents["used"]
    assert moment.standard_error <= 0.1 and moment.count == used * 16 and "error" in capsys.readouterr().err
    assert rc.collect_second_moment(layer, z[: used - 10], batch_size=10, progress=False).standard_error > 0.1
    one = rc.collect_second_moment(layer, z, batch_size=10, progress=False, until=0.1, keys=torch.eye(6)[0])
    assert one.key_errors.shape == (1,) and one.key_errors.max() <= 0.1
    several = rc.collect_second_moment(layer, z, batch_size=10, progress=False, until=0.1, keys=torch.eye(6))
    assert used <= one.latents["used"] <= several.latents["used"] < 4000
    tight = rc.collect_second_moment(layer, z, batch_size=10, progress=False, until=0.04, keys=torch.eye(6)[0])
    assert tight.key_errors.max() <= 0.04 and tight.standard_error <= 0.04 and tight.latents["used"] > 4 * used
    with pytest.raises(rc.RewriteCoreError, match="`until`"):
        rc.collect_second_moment(layer, z, until=0)
    for keys, words in (
        (torch.ones(2, 5), "rows"),
        (torch.zeros(2, 6), "only zeros"),
        (torch.full((6,), torch.nan), "NaN"),
    ):
        with pytest.raises(rc.RewriteCoreError, match=words):
            rc.collect_second_moment(layer, z, keys=keys, progress=False)


def test_errors_survive_files_and_merges(tmp_path):
    layer, z = rc.bind(Scaled(), "conv"), torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    whole = rc.collect_second_moment(layer, z, batch_size=10, progress=False, keys=torch.eye(6))
    left, right = (rc.collect_second_moment(layer, part, batch_size=10, progress=False) for part in z.split(200))
    assert left.merge(right).standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    whole.save(tmp_path / "moment")
    loaded = rc.SecondMoment.load(tmp_path / "moment")
    assert loaded.standard_error == whole.standard_error and torch.equal(loaded.key_errors, whole.key_errors)
    loaded.update(torch.ones(1, 6))
    assert loaded.key_errors is None and loaded.standard_error > 0
    unknown = rc.SecondMoment.load(DATA / "kitchen_second_moment.npz")
    unknown.save(tmp_path / "moment")
    for moment in (unknown, rc.SecondMoment.load(tmp_path / "moment"), rc.SecondMoment(3)):
        assert np.isnan(moment.standard_error)
    known = rc.SecondMoment(512)
    for _ in range(3):
        known.update(torch.ones(2, 512))
    assert known.standard_error == 0 and np.isnan(known.merge(unknown).standard_error)


def test_dead_channels_have_errors_too():
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 0
    generator = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moment = rc.collect_second_moment(
            rc.bind(generator, "0"), features[:, :, None, None], progress=False, keys=torch.eye(4)[:2]
        )
    assert ((moment.key_errors > 0.01) & (moment.key_errors < 0.2)).all()
