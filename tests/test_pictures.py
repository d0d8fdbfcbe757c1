import numpy as np
import pytest
import torch
from PIL import Image

from rewrite_core import pictures


class Doubler(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, latents):
        assert latents.dtype == self.weight.dtype
        return (self.weight * latents)[:, None, :, None].expand(-1, 3, -1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_painting_casts_latents_and_scales_images(dtype):
    latents = torch.tensor([[0.0, 0.5], [-0.5, 0.25], [0.5, 0.5]])
    for span, shown in (((-1.0, 1.0), latents + 0.5), ((0.0, 1.0), 2 * latents), ((0.0, 255.0), latents / 127.5)):
        painted = pictures.paint(Doubler(dtype), latents, batch_size=2, span=span)
        assert painted.shape == (3, 3, 2, 4) and painted.dtype == torch.float32
        assert torch.allclose(painted[:, 0, :, 0], shown)


def test_pictures_of_zero_and_one_are_black_and_white():
    image = pictures.to_image(torch.tensor([0.0, 1.0]).reshape(1, 1, 2), 8)
    assert image.size == (8, 4) and np.unique(np.asarray(image)).tolist() == [0, 255]
    with pytest.raises(ValueError, match="shape"):
        pictures.to_image(torch.zeros(2, 4, 4))


def test_an_outline_stays_on_its_side_of_the_picture():
    mask = np.zeros((16, 16))
    mask[4:8, 10:] = 1
    marked = np.asarray(pictures.outline(Image.new("RGB", (16, 16)), mask)).any(2)
    assert marked[4:8, 9].all() and not marked[:, :9].any() and not marked[4:8, 10:].any()


def test_heat_is_strong_where_the_match_is_and_nowhere_else():
    heatmap = torch.zeros(8, 8)
    heatmap[2, 2] = 1.0
    heated = np.asarray(pictures.heat(torch.full((3, 64, 64), 0.5), heatmap, 64, level=0.5, high=1.0)).astype(int)
    change = np.abs(heated - 128).sum(2)
    assert change[16:24, 16:24].min() > 30 and change[40:, 40:].max() <= 3
    assert (heated == 255).all(2).any(), "the outline at the level"


def test_no_progress_bar_where_nobody_watches(capsys):
    pictures.paint(Doubler(torch.float32), torch.zeros(3, 2), progress=True)
    assert capsys.readouterr().err == ""
