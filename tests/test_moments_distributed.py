"""Collecting in shards: independent jobs whose files are merged, and the processes of torchrun, some of them killed."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROGRAMS, relative
from helpers import mine
from helpers.command_line import MINE, run

import rewrite_core as rc
from rewrite_core.statistics.collection import Asked
from rewrite_core.statistics.distributed import collect_shard, merge_files
from rewrite_core.statistics.shards import Shard

QUICK = Asked(batch_size=4, progress=False)


def shards(layer, latents, of, tmp_path, asked=QUICK, seed=1, names="shard"):
    paths = [tmp_path / f"{names}{number}" for number in range(1, of + 1)]
    for number, path in enumerate(paths, 1):
        collect_shard([layer], latents, Shard(number, of), asked, seed)[0].save(path)
    return paths


def assert_whole(total, whole):
    assert relative(total.matrix(), whole.matrix()) <= 1e-12
    facts, wanted = total._facts(), whole._facts()
    assert facts.pop("spread") == pytest.approx(wanted.pop("spread"), rel=1e-12) and facts == wanted


def test_eight_shards_are_one_process(generator, latents, tmp_path):
    layer = rc.bind(generator, "layer4.conv")
    whole = rc.collect_second_moment(layer, latents, batch_size=4, latent_seed=1, progress=False)
    paths = shards(layer, latents, 8, tmp_path)
    orders = random.Random(0)
    first = merge_files(paths)
    assert_whole(first, whole)
    for _ in range(3):
        orders.shuffle(paths)
        again = merge_files(paths)
        assert torch.equal(again._sum, first._sum) and again._facts() == first._facts()
    first.save(tmp_path / "whole")
    assert_whole(rc.SecondMoment.load(tmp_path / "whole", layer), whole)
    first.check(layer, latents)
    parts = [rc.SecondMoment.load(path) for path in paths]
    for part in parts[1:]:
        parts[0].merge(part)  # in any order, as long as they are all there
    assert parts[0].latents == whole.latents and relative(parts[0].matrix(), whole.matrix()) <= 1e-12


@pytest.mark.parametrize(("count", "batch_size", "of"), [(33, 4, 9), (32, 4, 8), (5, 2, 3), (7, 16, 1), (40, 3, 5)])
def test_shards_are_whole_batches_and_all_of_them(count, batch_size, of):
    rows = [Shard(number, of).rows(count, batch_size) for number in range(1, of + 1)]
    assert [*itertools.chain(*(range(count)[each] for each in rows))] == [*range(count)]
    assert all(each.start % batch_size == 0 and each.stop > each.start for each in rows)
    with pytest.raises(rc.RewriteCoreError, match="too few for .* shards"):
        Shard(1, count // batch_size + 2).rows(count, batch_size)


def test_shards_of_masked_broken_and_several_layers(generator, latents, tmp_path):
    layers = [rc.bind(generator, name) for name in ("layer4.conv", "layer2.conv")]
    bad = latents[:40].clone()
    bad[8:12], bad[30] = torch.nan, torch.inf
    asked = Asked(batch_size=4, skip_nonfinite=True, progress=False)
    whole = rc.collect_second_moments(layers, bad, batch_size=4, skip_nonfinite=True, progress=False)
    paths = [[tmp_path / f"{number}-{each}" for each in range(2)] for number in (1, 2, 3)]
    for number, files in enumerate(paths, 1):
        # a shard goes on where it stopped, as any collection does
        moments = collect_shard(layers, bad, Shard(number, 3), asked, checkpoints=files)
        again = collect_shard(layers, bad, Shard(number, 3), asked, checkpoints=files)
        assert all(torch.equal(one._sum, other._sum) for one, other in zip(moments, again))
    for each in range(2):
        assert_whole(merge_files([files[each] for files in paths]), whole[each])
    assert whole[0].skipped == 5
    mask = torch.rand(40, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = rc.collect_second_moment(layers[0], latents[:40], batch_size=4, mask=mask, progress=False)
    asked = Asked(batch_size=4, mask=mask, progress=False)
    assert_whole(merge_files(shards(layers[0], latents[:40], 4, tmp_path, asked, None, "masked")), kept)


def test_errors_of_a_shard_name_the_batch_of_the_whole(generator, latents):
    bad = latents[:40].clone()
    bad[30] = torch.nan
    with pytest.raises(rc.NonFiniteError, match=r"batch 7 \(latents 28 to 31\)"):
        collect_shard([rc.bind(generator, "layer4.conv")], bad, Shard(2, 2), QUICK)
    with pytest.raises(rc.RewriteCoreError, match="`until` looks at all latents"):
        collect_shard([rc.bind(generator, "layer4.conv")], bad, Shard(2, 2), Asked(until=0.1))


def test_what_does_not_add_up_is_refused(generator, latents, tmp_path):
    layer, z = rc.bind(generator, "layer4.conv"), latents[:48]
    one, two, three = shards(layer, z, 3, tmp_path)
    others = shards(layer, z, 2, tmp_path, names="half")
    elsewhere = shards(layer, latents[48:96], 3, tmp_path, names="elsewhere")
    batches = shards(layer, z, 3, tmp_path, Asked(batch_size=8, progress=False), names="batches")
    deeper = shards(rc.bind(generator, "layer5.conv"), z, 3, tmp_path, names="deeper")
    plain = tmp_path / "plain"
    rc.collect_second_moment(layer, z, progress=False).save(plain)
    with torch.no_grad():
        generator.layer1.conv.weight.mul_(1.01)
    weights = shards(layer, z, 3, tmp_path, names="weights")
    for paths, words in (
        ([one, two], r"Of 3 shards 1 is missing \(3\)"),
        ([two], r"Of 3 shards 2 are missing \(1, 3\)"),
        ([one, two, three, two], "shard2 and .*shard2 overlap: both hold shard 2 of 3"),
        (
            [one, two, others[0]],
            "shards of different collections .*2 shards of 48 latents, seed 1, batches of 4; 3 shards",
        ),
        ([one, two, elsewhere[2]], "different collections"),
        ([one, two, batches[2]], "different collections"),
        ([one, two, plain], "plain is no shard"),
        ([one, two, weights[2]], "weights3 and .*shard1 are of different weights"),
        ([one, two, deeper[2]], "different (layer|channels)"),
        ([plain, plain], "plain and .*plain overlap"),
    ):
        with pytest.raises(rc.MismatchError, match=words) as caught:
            merge_files(paths)
        assert str(caught.value).endswith(".")
    with pytest.raises(rc.RewriteCoreError, match="nothing to merge"):
        merge_files([])
    with pytest.raises(FileNotFoundError):
        merge_files([one, tmp_path / "none"])


def test_moments_of_different_latents_are_merged(layer, latents, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path, part in zip(paths, latents[:40].split(20)):
        rc.collect_second_moment(layer, part, batch_size=4, progress=False).save(path)
    whole = rc.collect_second_moment(layer, latents[:40], batch_size=4, progress=False)
    total = merge_files(paths)
    assert relative(total.matrix(), whole.matrix()) <= 1e-12 and len(total.latents["merged"]) == 2


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/5", "a/b", "01/3", "1/" + 99 * "9", ""])
def test_what_is_no_shard(text):
    with pytest.raises(rc.RewriteCoreError, match="is no shard: give its number"):
        Shard.parse(text)
    assert Shard.parse("3/8") == Shard(3, 8) and str(Shard(3, 8)) == "3/8"


def test_shards_in_damaged_files(layer, latents, tmp_path):
    (path,) = shards(layer, latents[:8], 1, tmp_path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for change in (
        5,
        [],
        {},
        {"number": 0},
        {"of": 2**40},
        {"number": 2},
        {"batch_size": "4"},
        {"latents": 5},
        {"more": 1},
    ):
        header = json.loads(data[8 : 8 + size])
        inner = json.loads(header["__metadata__"]["metadata"])
        shard = inner["latents"]["shard"]
        inner["latents"]["shard"] = shard | change if isinstance(change, dict) and change else change
        header["__metadata__"]["metadata"] = json.dumps(inner)
        text = json.dumps(header).encode()
        (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        with pytest.raises(rc.FileFormatError):
            merge_files([tmp_path / "bad"])


# --- the command line, and torchrun ------------------------------------------------------------------------------

COLLECT = ("--layer", "3", "--count", "200", "--batch-size", "4", *map(str, MINE), "--quiet")


def test_shards_on_the_command_line(tmp_path, capsys, user_generator):
    assert run(capsys, "collect", *COLLECT, "--out", "whole")[0] == 0
    for number in (1, 2, 3):
        shard = ("--shard", f"{number}/3", "--out", f"s{number}", "--resume", f"r{number}")
        code, out, err = run(capsys, "collect", *COLLECT, *shard)
        assert code == 0 and err == "" and "keys of 8 channels at layer 3" in out
    code, _, err = run(capsys, "merge", "s3", "s1", "--out", "m")
    assert code == 2 and err == "rewrite merge: Of 3 shards 1 is missing (2); collect and name them too.\n"
    code, _, err = run(capsys, "merge", "s3", "s1", "s2", "--out", "s1")
    assert code == 2 and "s1 is named twice" in err
    code, out, _ = run(capsys, "merge", "s3", "s1", "s2", "--out", "m")
    assert code == 0 and "keys of 8 channels at layer 3, standard error" in out and out.endswith(" -> m\n")
    assert_whole(rc.SecondMoment.load("m"), rc.SecondMoment.load("whole"))
    for wrong, words in (("4/3", "is no shard"), ("1/99", "too few for 99 shards")):
        code, _, err = run(capsys, "collect", *COLLECT, "--out", "x", "--shard", wrong)
        assert code == 2 and words in err
    code, _, err = run(capsys, "collect", *COLLECT, "--out", "x", "--shard", "1/2", "--until", "0.1")
    assert code == 2 and err.startswith("rewrite collect: --until looks at all latents")


class Torchrun:
    """torchrun with four processes, in a folder of its own."""

    def __init__(self, folder, seconds_per_batch, restarts):
        folder.mkdir()
        torch.save(mine.make().state_dict(), folder / "weights.pt")
        self.folder = folder
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "SECONDS_PER_BATCH": str(seconds_per_batch),
            "PYTHONPATH": os.pathsep.join(
                [str(PROGRAMS.parent / "helpers"), *os.environ.get("PYTHONPATH", "").split(":")]
            ),
        }
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", f"--max-restarts={restarts}"]
        program += ["--monitor-interval=0.05", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        program += [PROGRAMS / "slow_collect.py", "collect", *COLLECT, "--out", "moment"]
        self.child = subprocess.Popen(
            program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def lines(self, restart, rank):
        """What a process said since it was started for this time: its number, then a word as each batch begins."""
        file = self.folder / "starts" / f"{restart}-{rank}"
        return file.read_text().splitlines() if file.exists() else []

    def kill(self, restart, rank, batch, after):
        """Kill a process so many seconds after it has begun its batch of that number; whether it was still collecting.

        It is stopped first, and then looked at: it cannot get through meanwhile.
        """
        while len(lines := self.lines(restart, rank)) < 2 + batch:
            assert self.child.poll() is None and "through" not in lines, self.child.communicate()
            time.sleep(0.005)
        time.sleep(after)
        process = int(lines[0])
        os.kill(process, signal.SIGSTOP)
        collecting = "through" not in self.lines(restart, rank)
        os.kill(process, signal.SIGKILL if collecting else signal.SIGCONT)
        return collecting

    def finished(self):
        out, err = self.child.communicate(timeout=400)
        assert self.child.returncode == 0, err[-3000:]
        assert sorted(path.name for path in self.folder.iterdir()) == ["moment", "starts", "weights.pt"]
        (said,) = out.splitlines()
        assert "keys of 8 channels at layer 3" in said
        return rc.SecondMoment.load(self.folder / "moment")

    def batches(self):
        """How many batches each process began, over all its starts."""
        return [sum(self.lines(restart, rank).count("batch") for restart in self.starts()) for rank in range(4)]

    def starts(self):
        return sorted({int(file.name.partition("-")[0]) for file in (self.folder / "starts").iterdir()})


BATCHES = [12, 13, 12, 13]  # of each process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What four processes make of it that nobody kills."""
    torchrun = Torchrun(tmp_path_factory.mktemp("torchrun") / "undisturbed", 0, 0)
    moment = torchrun.finished()
    assert torchrun.batches() == BATCHES
    return moment


def test_torchrun_makes_what_one_process_makes(undisturbed, tmp_path, capsys, user_generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(capsys, "collect", *COLLECT, "--out", "whole")[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert_whole(undisturbed, rc.SecondMoment.load("whole"))


def test_what_torchrun_is_refused(tmp_path, capsys, user_generator, monkeypatch):
    """Before anything runs, in every process."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    for options, words in (
        (("--until", "0.1"), "--until looks at all latents so far, in their order, and each of torchrun's processes"),
        (("--shard", "1/2"), "torchrun gives each of its processes a shard by itself"),
    ):
        code, out, err = run(capsys, "collect", *COLLECT, "--out", "x", *options)
        assert code == 2 and out == "" and err.startswith(f"rewrite collect: {words}") and err.count("\n") == 1


def killed_runs(undisturbed, folder, times, seed=0):
    """So many times four processes of which one is killed, at a random moment of its collecting: torchrun starts all of
    them again, once, and they go on, each with at most one batch done again, to the same bits."""
    chances, seconds, late, kills, restarts = random.Random(seed), 0.05, 0, times, 0
    while times:
        torchrun = Torchrun(folder / str(restarts + late), seconds, 1)
        rank = chances.randrange(4)
        killed = torchrun.kill(0, rank, chances.randrange(BATCHES[rank] - 1), chances.uniform(0, seconds))
        again = torchrun.finished()
        assert torch.equal(again._sum, undisturbed._sum) and again._facts() == undisturbed._facts()
        times, late = times - killed, late + (not killed)
        assert late <= 3, "too often the process had got through, on a machine that is this slow"
        if killed:
            assert torchrun.starts() == [0, 1]
            restarts += 1
            assert all(0 <= done - needed <= 1 for done, needed in zip(torchrun.batches(), BATCHES, strict=True))
    print(f"{kills} processes killed, {restarts} restarts, {restarts} times the same bits; {late} got through before")


def test_a_killed_process_goes_on_to_the_same_bits(undisturbed, tmp_path):
    killed_runs(undisturbed, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_a_killed_process_goes_on_to_the_same_bits_twenty_times(part, undisturbed, tmp_path):
    killed_runs(undisturbed, tmp_path, 5, seed=part)


def scripts():
    """{name: text} of the scripts on the page about many machines."""
    page = (PROGRAMS.parents[1] / "docs" / "many-machines.md").read_text(encoding="utf-8")
    return dict(re.findall(r'^```bash title="([^"]+)"\n(.*?)^```$', page, re.DOTALL | re.MULTILINE))


def test_the_scripts_of_the_documentation(tmp_path):
    """Here, with other programs in the places of Slurm's, and for as many latents as are quickly collected."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("rewrite", f'exec {sys.executable} -m rewrite_core "$@" --quiet'),
        (
            "torchrun",
            f'exec {sys.executable} -m torch.distributed.run --rdzv-endpoint=localhost:0 --rdzv-backend=c10d "$@"',
        ),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    found = scripts()
    assert sorted(found) == ["collect-many.sbatch", "collect.sbatch", "collect.sh"]
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "COUNT": "96",
        "DEVICE": "cpu",
        "PROCESSES": "2",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "OMP_NUM_THREADS": "1",
    }

    def bash(name, *options, **more):
        command = ["bash", *options, "-c", found[name]]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]

    for name in found:
        bash(name, "-n")
    for number in (3, 1, 2):
        bash("collect.sbatch", SLURM_ARRAY_TASK_ID=str(number))
    bash("collect.sh")
    by_shards = merge_files([*(tmp_path / "shards").iterdir()])
    by_torchrun = rc.SecondMoment.load(tmp_path / "moment.safetensors")
    assert_whole(by_torchrun, by_shards)
    assert by_shards.count == 96 * 64
