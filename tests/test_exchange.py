"""What other tools read: adapters for peft and diffusers, graphs for onnxruntime; and peft's adapters as rewrites."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import rewrite_core as rc
from rewrite_core.cli.settings import tomllib
from rewrite_core.exchange.graph import save_onnx, save_program
from rewrite_core.exchange.lora import CONFIG, WEIGHTS, load_peft, save_diffusers, save_peft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(16, 8, 4)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.strided = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 6, 1)
        self.line = nn.Linear(6, 5)

    def forward(self, z):
        x = torch.relu(self.conv(torch.relu(self.up(z[:, :, None, None]))))
        return self.line(torch.relu(self.point(torch.relu(self.strided(x)))).movedim(1, -1)).movedim(-1, 1)


LAYERS = ["conv", "strided", "point", "line"]
Z = rc.sample_latents(16, 8)


def change_of(generator, name, rank=2, seed=1):
    """A rewrite of a size that shows."""
    layer = rc.bind(generator, name)
    random = torch.Generator().manual_seed(seed)
    outputs, inputs, *kernel = layer.weight.shape
    directions = torch.linalg.qr(torch.randn(inputs, rank, generator=random))[0].T.contiguous()
    coefficients = 0.3 * torch.randn(outputs, rank, *kernel, generator=random)
    fitted = layer.weight_fingerprint(layer.weight)
    return rc.Rewrite(layer.name, directions, coefficients, fitted, "lm", bound=layer)


def edited(generator, changes, strength=1.0, latents=Z):
    for change in changes:
        change.apply(generator, strength=strength)
    with torch.no_grad():
        images = generator(latents)
    for change in changes:
        change.revert(generator)
    return images


@pytest.mark.parametrize("names", [["conv"], ["strided"], ["point"], ["line"], LAYERS])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_peft_loads_the_adapter(names, strength, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `export` is not installed")
    generator = Net().eval()
    changes = [change_of(generator, name, rank) for rank, name in enumerate(names, 1)]
    save_peft(changes, generator, tmp_path / "adapter", strength)
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(generator), tmp_path / "adapter").eval()
    with torch.no_grad():
        found, plain = fresh(Z), generator(Z)
    wanted = edited(generator, changes, strength)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() and (wanted - plain).norm() > 1e-3 * plain.norm()
    merged = fresh.merge_and_unload()
    for change in changes:
        weight = merged.get_submodule(change.layer).weight - generator.get_submodule(change.layer).weight
        delta = strength * change.weight_delta()
        assert (weight - delta).norm() <= 1e-6 * generator.get_submodule(change.layer).weight.norm()


def test_several_changes_of_one_layer_add_up(tmp_path):
    generator = Net().eval()
    changes = [change_of(generator, "conv", 1, seed=1), change_of(generator, "conv", 2, seed=2)]
    save_peft(changes, generator, tmp_path)
    (back,) = load_peft(tmp_path, generator)
    delta = changes[0].weight_delta() + changes[1].weight_delta()
    assert back.rank == 3 and (back.weight_delta() - delta).norm() <= 1e-6 * delta.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_comes_back_as_the_rewrite_it_was(name, tmp_path):
    generator = Net().eval()
    change = change_of(generator, name)
    save_peft([change], generator, tmp_path)
    (back,) = load_peft(tmp_path, generator)
    assert back.rank == change.rank and back.layer == name
    assert (back.weight_delta() - change.weight_delta()).norm() <= 1e-6 * change.weight_delta().norm()
    assert (back.directions @ back.directions.T - torch.eye(2)).abs().max() < 1e-5
    assert torch.allclose(edited(generator, [back]), edited(generator, [change]), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_trained_is_a_rewrite(rslora, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `export` is not installed")
    generator = Net().eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "line"], use_rslora=rslora)
    model = peft.get_peft_model(copy.deepcopy(generator), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.eval()(Z)
    found = edited(generator, load_peft(tmp_path, generator))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config, tensors: config.update(peft_type="IA3"), "no LoRA adapter"),
        (lambda config, tensors: config.update(use_dora=True), "use_dora"),
        (lambda config, tensors: config.update(lora_alpha="much"), "lora_alpha"),
        (lambda config, tensors: tensors.pop("base_model.model.conv.lora_B.weight"), "lacks"),
        (lambda config, tensors: tensors.update({"base_model.model.conv.bias": torch.zeros(1)}), "more than B A"),
    ],
)
def test_what_is_no_rewrite_is_refused(spoil, message, tmp_path):
    generator = Net().eval()
    save_peft([change_of(generator, "conv")], generator, tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    spoil(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(rc.FileFormatError, match=message):
        load_peft(tmp_path, generator)


def test_an_adapter_of_another_generator_is_refused(tmp_path):
    save_peft([change_of(Net().eval(), "conv")], Net().eval(), tmp_path)
    other = Net()
    other.conv = nn.Conv2d(8, 20, 3)
    with pytest.raises(rc.MismatchError, match="another generator"):
        load_peft(tmp_path, other)
    with pytest.raises(rc.UnknownLayerError):
        load_peft(tmp_path, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "computed|ParametrizedConv2d"),
    ],
)
def test_layers_that_a_lora_does_not_describe(layer, message, tmp_path):
    generator = nn.Sequential(layer)
    with pytest.raises(rc.SolverError, match=message):
        save_peft([change_of(generator, "0")], generator, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_diffusers_loads_the_file(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    pytest.importorskip("peft", reason="the extra `export` is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    names = ["up_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "conv_out"]
    changes = [change_of(unet, name, rank) for rank, name in enumerate(names, 1)]
    file = tmp_path / "lora.safetensors"
    save_diffusers(changes, unet, file)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 9]), torch.randn(2, 5, 8)
    for change in changes:
        change.apply(unet)
    with torch.no_grad():
        wanted = unet(*inputs).sample
    for change in changes:
        change.revert(unet)
    with torch.no_grad():
        plain = unet(*inputs).sample
    assert (wanted - plain).norm() > 1e-3 * plain.norm()
    fresh = copy.deepcopy(unet)
    unet.load_lora_adapter(load_file(file), prefix="unet")
    scheduler = diffusers.DDIMScheduler()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "feature_extractor": None, "safety_checker": None}
    pipeline = diffusers.StableDiffusionPipeline(
        unet=fresh, scheduler=scheduler, requires_safety_checker=False, **parts
    )
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    for loaded in (unet, pipeline.unet):
        with torch.no_grad():
            found = loaded(*inputs).sample
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_onnxruntime_runs_the_edited_generator(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    generator = Net().eval()
    changes = [change_of(generator, "conv")]
    before = copy.deepcopy(generator.state_dict())
    save_onnx(changes, generator, Z, tmp_path / "net.onnx", strength=0.5)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    wanted = edited(generator, changes, 0.5)
    for rows in (8, 3):  # N is free
        (found,) = session.run(None, {"latents": Z[:rows].numpy()})
        assert (torch.from_numpy(found) - wanted[:rows]).norm() <= 1e-4 * wanted[:rows].norm()


def test_torch_runs_the_program_of_the_edited_generator(tmp_path):
    generator = Net().eval()
    changes = [change_of(generator, "conv"), change_of(generator, "line", 1)]
    before = copy.deepcopy(generator.state_dict())
    save_program(changes, generator, Z, tmp_path / "net.pt2", strength=0.5)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    program = torch.export.load(tmp_path / "net.pt2").module()
    wanted = edited(generator, changes, 0.5)
    for rows in (8, 3, 1):  # N is free
        found = program(Z[:rows])
        assert (found - wanted[:rows]).norm() <= 1e-5 * wanted[:rows].norm()


@pytest.mark.parametrize("save", [save_program, save_onnx])
def test_what_cannot_be_traced_is_said_in_a_sentence(save, tmp_path):
    class Branches(Net):
        def forward(self, latents):
            return super().forward(latents) * (2 if latents.sum() > 0 else 1)

    if save is save_onnx:
        pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    generator = Branches().eval()
    change = change_of(generator, "conv")
    before = copy.deepcopy(generator.state_dict())
    with pytest.raises(rc.RewriteCoreError, match=r"torch\.(export|onnx) cannot export this generator: .+"):
        save([change], generator, Z, tmp_path / "net.pt2")
    assert not [*tmp_path.iterdir()] and not change.applied
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_the_command_writes_each_format(tmp_path, monkeypatch, capsys):
    from rewrite_core.cli.entry import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, 8, 1), nn.ReLU(),\n"
        "                         nn.Upsample(scale_factor=8), nn.Conv2d(8, 3, 3, padding=1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_net

    generator = my_net.make()
    change = change_of(generator, "4")
    change.save("rule.safetensors")
    mine = ["--generator", "my_net:make", "--latent-size", "16", "--quiet"]
    assert main(["export", "rule.safetensors", *mine, "--format", "peft", "--out", "adapter"]) == 0
    (back,) = load_peft("adapter", generator)
    assert torch.allclose(back.weight_delta(), change.weight_delta(), atol=1e-6)
    assert main(["export", "rule.safetensors", *mine, "--format", "diffusers", "--out", "lora.safetensors"]) == 0
    assert set(load_file("lora.safetensors")) == {"unet.4.lora_A.weight", "unet.4.lora_B.weight"}
    state = ["--format", "state-dict", "--out", "state.safetensors", "--strength", "0.5"]
    assert main(["export", "rule.safetensors", *mine, *state]) == 0
    wanted = generator[4].weight.detach() + 0.5 * change.weight_delta()
    assert torch.allclose(load_file("state.safetensors")["4.weight"], wanted, atol=1e-6)
    assert main(["export", "adapter", *mine, "--format", "state-dict", "--out", "again.safetensors"]) == 0
    assert main(["export", "rule.safetensors", *mine, "--format", "torch-export", "--out", "net.pt2"]) == 0
    z = torch.randn(3, 16)
    program, loaded = torch.export.load("net.pt2").module(), my_net.make().eval()
    assert torch.allclose(program(z), edited(loaded, [change], latents=z), atol=1e-5)
    capsys.readouterr()
    assert main(["export", "rule.safetensors", *mine, "--format", "onnx", "--out", "net.pt"]) == 2
    assert ".onnx" in capsys.readouterr().err
    assert main(["export", "rule.safetensors", *mine, "--format", "peft", "--out", "my_net.py"]) == 2
    for rule, out in (("rule.safetensors", "rule.png"), ("adapter", "adapter.png")):
        assert main(["render", "--rewrite", rule, *mine, "--images", "0-1", "--out", out]) == 0
    own, theirs = (np.asarray(Image.open(name), dtype=float) for name in ("rule.png", "adapter.png"))
    assert np.abs(own - theirs)[40:].max() <= 2  # below the title, which names the file
    capsys.readouterr()
    assert main(["measure", "--rewrite", "rule.safetensors", "--rewrite", "rule.safetensors", *mine]) == 2
    assert "hold one rewrite" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for rule, kind, out in (
        ("rule.safetensors", "state-dict", "./rule.safetensors"),
        ("adapter", "peft", "adapter"),
        ("lora.safetensors", "diffusers", tmp_path / "lora.safetensors"),
    ):
        capsys.readouterr()
        assert main(["export", rule, *mine, "--format", kind, "--out", str(out)]) == 2
        assert "is named twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "rule.safetensors", *mine, "--format", "peft", "--out", ""])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "out"), [("torch-export", "net.pt2"), ("onnx", "net.onnx"), ("diffusers", "l.safetensors")]
)
def test_a_full_disk_ends_an_export_in_a_sentence(kind, out, tmp_path):
    """In a process that may write small files alone; torch's own writer of programs would abort it."""
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 512, 4),\n"
        "                         nn.Conv2d(512, 512, 1), nn.Conv2d(512, 3, 1))\n"
    )
    change = rc.Rewrite("2", torch.eye(512)[:9], torch.ones(512, 9, 1, 1), fitted_to="", solver="given")
    change.save(tmp_path / "rule")
    program = (
        "import resource, sys\n"
        "from rewrite_core.cli.entry import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["export", "rule", "--generator", "net:make", "--latent-size", "16", "--force", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options, "--format", kind, "--out", out],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("rewrite: warning: Without --checkpoint")]
    assert done.returncode == 2 and len(told) == 1 and told[0].startswith("rewrite export: ") and out in told[0], told
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "" or path.is_file()) == ["net.py", "rule"]


OTHERS = {"peft", "diffusers", "transformers", "onnx", "onnxruntime", "onnxscript", "accelerate"}


def test_the_core_is_installed_without_other_tools():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", each)[0] for each in requirements}

    assert not names(project["dependencies"]) & OTHERS
    assert {"peft", "diffusers", "onnx"} <= names(project["optional-dependencies"]["export"])


def test_adapters_are_written_and_read_without_other_tools(tmp_path):
    """In a process in which none of them can be imported."""
    change_of(Net().eval(), "conv").save(tmp_path / "rule")
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(OTHERS)}))\n"
        "import rewrite_core as rc\n"
        "from rewrite_core.exchange.lora import load_peft, save_diffusers, save_peft\n"
        "from test_exchange import Net\n"
        "change, net = rc.Rewrite.load('rule'), Net().eval()\n"
        "save_peft([change], net, 'adapter'), save_diffusers([change], net, 'lora')\n"
        "assert load_peft('adapter', net)[0].rank == 2\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
