"""The ``rewrite`` command line as a whole: help, warnings, interrupts, and a session on the embedded generator."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.command_line import LAYER, MINE, run, save_edit
from PIL import Image

import rewrite_core as rc
from rewrite_core.cli import options as names
from rewrite_core.cli.entry import COMMANDS, parser
from rewrite_core.demo import RULES, load_edit


def test_every_option_has_help():
    [commands] = [action.choices for action in parser()._actions if action.metavar == "COMMAND"]
    assert list(commands) == [command.name for command in COMMANDS]
    for command, sub in commands.items():
        for action in sub._actions:
            assert action.help, f"rewrite {command} {action.option_strings or action.dest}"


def test_every_example_can_be_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        program, *words = command.example.split()
        assert program == "rewrite" and parser().parse_args(words).command is command


def test_the_words_that_options_take_are_the_librarys():
    from rewrite_core.edits.directions import DIRECTIONS
    from rewrite_core.edits.goals import BLENDS, REGIONS
    from rewrite_core.layers.latents import DISTRIBUTIONS
    from rewrite_core.ops.losses import LOSSES
    from rewrite_core.rewrites.following import OBJECTIVES
    from rewrite_core.solvers.choice import SOLVERS

    assert tuple(RULES) == names.DEMO_EDITS
    assert tuple(DIRECTIONS) == names.DIRECTIONS and tuple(DISTRIBUTIONS) == names.DISTRIBUTIONS
    assert tuple(REGIONS) == names.REGIONS and tuple(BLENDS) == names.BLENDS
    assert tuple(LOSSES) == names.LOSSES and tuple(SOLVERS) == names.SOLVERS
    assert tuple(OBJECTIVES) == names.OBJECTIVES


def test_a_score_of_no_scene_is_json(tmp_path, capsys, monkeypatch):
    change = tmp_path / "spire.safetensors"
    assert run(capsys, "edit", "spire", "--layer", LAYER, "--out", change, "--count", 1000)[0] == 0
    monkeypatch.setattr("rewrite_core.demo.rules.score", lambda *_: SimpleNamespace(efficacy=float("nan"), scenes=0))
    code, out, _ = run(capsys, "measure", "--rewrite", change, "--rule", "spire", "--count", 1)
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["efficacy"] is None


@pytest.mark.parametrize("command", [[], *([command.name] for command in COMMANDS)], ids=" ".join)
def test_help_comes_with_an_example_and_without_torch(command):
    script = (
        "import sys; from rewrite_core.cli.entry import main\n"
        f"try: main({[*command, '--help']})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not command or {"--device", "--quiet", "example:"} <= set(done.stdout.replace(",", "").split())


def test_a_whole_session_on_chapels(tmp_path, capsys):
    edit, moment, rule = tmp_path / "spire.json", tmp_path / "moment.safetensors", tmp_path / "spire.safetensors"
    load_edit("spire").save(edit)
    code, out, _ = run(capsys, "layers")
    assert code == 0 and LAYER in out and "proggan" in out
    code, out, _ = run(capsys, "layers", "--json")
    assert code == 0 and LAYER in [row["name"] for row in json.loads(out)]
    code, out, _ = run(capsys, "collect", "--layer", LAYER, "--out", moment, "--count", 1000, "--quiet")
    assert code == 0 and rc.SecondMoment.load(moment).count == 1000 * 64
    assert rc.SecondMoment.load(moment).latents["seed"] == 1
    code, out, _ = run(
        capsys,
        "edit",
        edit,
        "--layer",
        LAYER,
        "--moment",
        moment,
        "--rank",
        4,
        "--loss",
        "l2",
        "--region",
        "map",
        "--out",
        rule,
        "--state-dict",
        tmp_path / "edited.safetensors",
        "--quiet",
    )
    assert code == 0 and "closed_form" in out and rc.Rewrite.load(rule).rank == 4
    code, out, _ = run(capsys, "measure", "--rewrite", rule, "--rule", "spire", "--count", 200, "--seed", 2)
    report = json.loads(out)
    assert code == 0 and report["efficacy"] > 0.8 and report["pictures"] == 200
    code, out, _ = run(capsys, "render", "--rewrite", rule, "--images", "0-3,9", "--out", tmp_path / "grid.png")
    assert code == 0 and Image.open(tmp_path / "grid.png").width > 500
    code, out, _ = run(
        capsys,
        "search",
        edit,
        "--layer",
        LAYER,
        "--moment",
        moment,
        "--top",
        5,
        "--out",
        tmp_path / "found.png",
        "--quiet",
    )
    assert code == 0 and len(out.splitlines()[0].split()) == 5 and Image.open(tmp_path / "found.png").width > 500
    # the edited state dict is the generator with the rewrite applied
    from safetensors.torch import load_file

    from rewrite_core.demo import chapels

    edited = chapels()
    rc.Rewrite.load(rule).apply(edited)
    state = load_file(tmp_path / "edited.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in edited.state_dict().items())


def test_info_names_the_backends(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and all(word in out for word in ("second_moment", "spd_solve", "fit_low_rank", "cpp"))


def test_warnings_are_one_line(tmp_path, capsys, user_generator):
    save_edit(latents=rc.sample_latents(6, 20))
    code, _, err = run(capsys, "layers", "--generator", "mine:make", "--latent-size", 6)
    assert (
        code == 0
        and err == "rewrite: warning: Without --checkpoint the weights are those that mine:make starts from.\n"
    )
    assert run(capsys, "collect", "--layer", "3", "--out", "m.safetensors", "--count", 30, *MINE, "--quiet")[2] == ""
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--moment", "m.safetensors", "--zero", *MINE)
    for same in (("--count", 30), ("--count", 60), ("--count", 20)):  # samples of one seed begin alike
        assert run(capsys, *edit, *same)[2] == ""
    code, _, err = run(capsys, *edit, "--seed", 2)
    assert code == 2 and "was made on other latents (normal 6, seed 1, 20 rows) than these (normal 6, seed 2" in err
    save_edit()  # as the reference's, which do not say on which latents
    code, _, err = run(capsys, *edit)
    assert code == 0 and err.startswith("rewrite: warning: The edit's file does not say which latents"), err
    assert len(err.splitlines()) == 1
    code, _, err = run(capsys, *edit, "--distribution", "uniform")
    assert code == 2 and "collected from other latents (normal 6, seed 1, 30 rows; these are uniform 6" in err


def test_benchmarks_without_a_name(tmp_path, capsys, monkeypatch):
    runner = pytest.importorskip("rewrite_core.benchmarks.runner")
    asked = []
    monkeypatch.setattr(runner, "main", lambda *arguments: asked.append(arguments) or 0)
    assert run(capsys, "bench", "--quick", "--out", tmp_path)[0] == 0
    assert run(capsys, "bench", "solve", "--out", tmp_path)[0] == 0
    assert asked == [(["all"], tmp_path, True, ""), (["solve"], tmp_path, False, "")]


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, user_generator, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rewrite_core.statistics.collection.collect_second_moments", interrupt)
    monkeypatch.setattr("rewrite_core.cli.inputs.collect_second_moment", interrupt)
    save_edit()
    Path("c.safetensors").touch()
    collect = ("collect", "--layer", "3", "--out", "m.safetensors", *MINE)
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", *MINE)
    for command, words in (
        ((*collect, "--resume", "none.safetensors"), "before the first checkpoint"),
        ((*collect, "--resume", "c.safetensors"), "the same command again to go on from c.safetensors"),
        (collect, "with --resume FILE"),
        (edit, "rewrite collect --resume FILE"),
    ):
        code, _, err = run(capsys, *command)
        assert code == 130 and err.startswith(f"rewrite {command[0]}: interrupted; ") and words in err
        assert len(err.splitlines()) == 1


def test_the_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rewrite_core", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == rc.__version__
    assert (Path(rc.__file__).parent / "py.typed").exists()


def start(tmp_path, script, *arguments):
    """A process of its own, that Ctrl-C reaches although a shell's background jobs ignore it."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_an_interrupt_while_torch_is_imported(tmp_path):
    script = "import sys; from rewrite_core.cli.entry import main; print('started', flush=True); sys.exit(main())"
    process = start(tmp_path, script, "info")
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "rewrite info: interrupted.\n"


SLOW = """
import sys, time
from dataclasses import replace
from rewrite_core.cli import entry, info
def run(options):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:  # what an interrupt leaves to do
        print("cleaning", flush=True)
        time.sleep(60)
entry.COMMANDS = (replace(info.COMMAND, run=run),)
sys.exit(entry.main())
"""


def test_three_interrupts_end_without_a_traceback(tmp_path):
    process = start(tmp_path, SLOW, "info")
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "rewrite: stopping; press Ctrl-C once more to stop at once.\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""


ENDING = """
import atexit, sys, time
from rewrite_core.cli.entry import main
def end():
    print("ending", flush=True)
    time.sleep(1)
atexit.register(end)
sys.exit(main())
"""


def test_an_interrupt_after_the_work_is_too_late(tmp_path):
    process = start(tmp_path, ENDING, "layers", "--device", "none")
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and err.startswith("rewrite layers: Device 'none'") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [(">&-", 0, ""), ("> /dev/full", 2, "rewrite info: a file: No space left on device.\n"), ("| head -c 1", 0, "")],
)
def test_an_output_that_cannot_be_written(tmp_path, redirected, status, said):
    command = f"{sys.executable} -m rewrite_core info {redirected}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)
