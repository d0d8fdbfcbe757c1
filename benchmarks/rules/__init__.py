"""Rules on three generators: edits, and unseen latents that each rule concerns or has nothing to do with.

``chapels`` ships with the package, and its scenes say what each rule concerns. ``faces_dcgan`` and ``svhn_dcgan`` are
other people's; their weights are no part of this project. Which of their pictures a rule concerns was seen by eye, on
numbered contact sheets (``python -m benchmarks.rules`` draws them again); the numbers are in ``NAME.rows.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rewrite_core import Edit, RewriteCoreError, preview, sample_latents
from rewrite_core.demo import RULES as SCENES
from rewrite_core.demo import chapels, load_edit
from rewrite_core.demo.world import LATENT_SIZE, scene_from_latents
from rewrite_core.layers.bound import BoundLayer

from .retouches import RETOUCHES

FOLDER = "REWRITE_GENERATORS"  # the environment variable that names the folder of other people's weights
EDIT_SEED, EDIT_ROWS = 1, 1000  # the latents that edits select from
UNSEEN_SEED, UNSEEN_ROWS = 2, 4000  # those that no edit and no statistic has seen


def _faces() -> nn.Module:
    """32x32 faces: fletchersarip93/face-generator at 50ce2ed."""
    return nn.Sequential(
        nn.ConvTranspose2d(100, 256, 4, 1, 0, bias=False),
        nn.BatchNorm2d(256),
        nn.Conv2d(256, 128, 3, 1, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )


class StreetNumbers(nn.Module):
    """32x32 street numbers: Newmu/dcgan_code at ee12b2d."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(100, 4096, bias=False)
        self.bn1 = nn.BatchNorm1d(4096, eps=1e-8)
        self.d2 = nn.ConvTranspose2d(256, 128, 5, 2, 2, output_padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.d3 = nn.ConvTranspose2d(128, 64, 5, 2, 2, output_padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.dx = nn.ConvTranspose2d(64, 3, 5, 2, 2, output_padding=1, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        maps = torch.relu(self.bn1(self.fc(latents))).reshape(-1, 256, 4, 4)
        maps = torch.relu(self.bn2(self.d2(maps)))
        return torch.tanh(self.dx(torch.relu(self.bn3(self.d3(maps)))))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A generator that rules are tried on. span: what its pictures lie in; layers: where its rules are tried, the one
    that suits most of them first."""

    name: str
    latent: int | tuple[int, ...]
    distribution: str
    span: tuple[float, float]
    layers: tuple[str, ...]
    build: Callable[[], nn.Module] | None  # None: it ships with the package

    def latents(self, seed: int, count: int) -> Tensor:
        return sample_latents(self.latent, count, seed=seed, distribution=self.distribution)

    @property
    def edit_latents(self) -> Tensor:
        """[1000, ...]"""
        return self.latents(EDIT_SEED, EDIT_ROWS)

    @property
    def unseen_latents(self) -> Tensor:
        """[4000, ...]"""
        return self.latents(UNSEEN_SEED, UNSEEN_ROWS)

    def generator(self, folder: str | os.PathLike | None = None) -> nn.Module:
        """The generator in eval mode. `folder` has the weights of those that do not ship with the package; by default
        what the environment variable REWRITE_GENERATORS names, else ``shared/generators`` beside the checkout.

        Raises RewriteCoreError where the weights are not there.
        """
        if self.build is None:
            return chapels()
        path = weights_folder(folder) / f"{self.name}.safetensors"
        if not path.is_file():
            raise RewriteCoreError(f"There is no {path.name} in {path.parent}; set {FOLDER} to the folder that has it.")
        generator = self.build()
        generator.load_state_dict(load_file(path), strict=False)  # DCGANs of 2015 counted no batches
        return generator.eval()


def weights_folder(folder: str | os.PathLike | None = None) -> Path:
    """Where the weights of other people's generators are looked for."""
    beside = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "generators"
    return Path(folder or os.environ.get(FOLDER) or beside)


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "chapels",
            LATENT_SIZE,
            "normal",
            (-1.0, 1.0),
            ("synthesis.layer4.conv", "synthesis.layer6.conv", "synthesis.layer5.conv", "synthesis.layer3.conv"),
            None,
        ),
        Subject("faces_dcgan", (100, 1, 1), "uniform", (-1.0, 1.0), ("5", "8", "2"), _faces),
        Subject("svhn_dcgan", 100, "normal", (-1.0, 1.0), ("d3", "d2"), StreetNumbers),
    )
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """An edit of a subject, and rows of its unseen latents: those that the rule concerns, and those that hold nothing
    of what it concerns. Rows that are neither were not looked at, or it could not be told. retouch: of
    :data:`.retouches.RETOUCHES`, what makes the goal of an edit without a copy from the pictures it pastes into."""

    name: str
    subject: Subject
    title: str
    edit: Edit
    concerned: Tensor  # int64 [n]
    unrelated: Tensor  # int64 [m]
    retouch: str | None = None

    @property
    def rows(self) -> list[int]:
        """The pictures that the edit pastes into, each once."""
        return list(dict.fromkeys(paste.index for paste in self.edit.pastes))

    def goals(self, layer: BoundLayer) -> Tensor:
        """The goal picture of each of `rows`: what the pasted value renders, or what was painted."""
        if self.retouch is None:
            return preview(layer, self.edit, self.subject.edit_latents)
        return RETOUCHES[self.retouch](layer.render(self.subject.edit_latents[self.rows]))

    def options(self, layer: BoundLayer) -> dict[str, Any]:
        """What ``rc.rewrite`` is told besides its defaults: nothing, or what was painted."""
        return {} if self.retouch is None else {"objective": "pictures", "goal": self.goals(layer)}


def _scenes(name: str) -> Rule:
    subject = SUBJECTS["chapels"]
    concerns = SCENES[name].concerns(scene_from_latents(subject.unseen_latents))
    rows = concerns.nonzero()[:, 0], (~concerns).nonzero()[:, 0]
    return Rule(name, subject, SCENES[name].title, load_edit(name), *rows)


def _seen(name: str) -> Rule:
    here = Path(__file__).parent
    record = json.loads((here / f"{name}.rows.json").read_text(encoding="utf-8"))
    concerned, unrelated = (torch.tensor(record[kind]) for kind in ("concerned", "unrelated"))
    edit, subject = Edit.load(here / f"{name}.json"), SUBJECTS[record["subject"]]
    return Rule(name, subject, record["title"], edit, concerned, unrelated, record.get("retouch"))


PAINTED = ("svhn_golden", "svhn_pale", "svhn_red")
"""Of the rules whose goals are painted."""
NAMES = (
    *SCENES,
    *sorted({path.name.split(".")[0] for path in Path(__file__).parent.glob("*.rows.json")} - {*PAINTED}),
)
"""Of the rules that copy: those of chapels, then those of other people's generators."""


@functools.cache
def rule(name: str) -> Rule:
    """The rule of that name. Raises RewriteCoreError for another."""
    if name not in NAMES + PAINTED:
        raise RewriteCoreError(f"There is no rule {name!r}; choose from {', '.join(NAMES + PAINTED)}.")
    return _scenes(name) if name in SCENES else _seen(name)
