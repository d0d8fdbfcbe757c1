"""Which configuration of a Triton kernel runs: measured, kept on the disk, or the default."""

from types import SimpleNamespace

import pytest
import torch
from conftest import needs_triton

from rewrite_core.errors import RewriteCoreError

pytestmark = needs_triton


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """The module in a fresh state, with a stand-in for an H200, and the disk and clock of a test."""
    from rewrite_core.kernels import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.TUNING_VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tuning


@pytest.fixture
def choices():
    from rewrite_core.kernels.second_moment import CANDIDATES

    return CANDIDATES[9]["half"][:2]


GPU = SimpleNamespace(type="cuda", index=0)


def test_measured_configurations_are_kept(tuning, choices, tmp_path, monkeypatch):
    folder = tuning.cache_folder("second_moment", "NVIDIA H200 / ../x")
    assert folder == tmp_path / "rewrite_core" / "second_moment" / "nvidia-h200-x"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert tuning.cache_folder("second_moment", "").is_absolute()
    path, timed = folder / "a.json", []

    def time(config):
        timed.append(config)
        return tuning.Trial(config, {choices[0]: 2.0, choices[1]: 1.0}[config])

    def best(path, time):
        trials = tuning.trials_of(path, choices, time)
        assert tuple(trial.config for trial in trials) == choices
        return tuning.fastest(trials).config

    assert best(path, time) == choices[1] and timed == list(choices)
    assert best(path, time) == choices[1] and len(timed) == 2, "measured again"
    assert [file.name for file in folder.iterdir()] == ["a.json"], "something was left behind"
    flat = '{"block": 64, "positions": 128, "run": 2, "warps": 4, "stages": 3, "resident": 2}'  # as 0.1 kept them
    without = '[{"config": ' + flat + ', "seconds": 1.0, "reason": null}]'
    texts = ("", "[]", '{"block": 64', flat, without, without.replace("64", "[]"), "null", "\xff\xfe")
    texts += (path.read_text().replace("128", "4096"),)
    for text in texts:
        path.write_bytes(text.encode("latin-1"))
        assert tuning.stored(path, choices) is None
        assert best(path, time) == choices[1]
        assert tuning.stored(path, choices), "a file that is of no use stays"

    def slower_than_another_process(config):
        tuning.trials_of(path, choices, lambda config: tuning.Trial(config, float(config == choices[1])))
        return time(config)

    path.unlink()
    assert best(path, slower_than_another_process) == choices[0], "the first to write wins"
    blocked = tmp_path / "file"
    blocked.write_text("")
    timed.clear()
    assert tuning.trials_of(blocked / "a.json", choices, time) == () and not timed
    assert tuning.trials_of(folder / "b.json", choices[:1], time) == () and not timed


def test_every_candidates_time_can_be_read(tuning, choices, monkeypatch):
    seconds = dict(zip(choices, (2e-3, 1e-3)))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run, **how: 1e3 * seconds[run()])
    want = tuple(tuning.Trial(config, seconds[config]) for config in choices)
    for _ in range(2):  # the second time from the disk
        assert tuning.choose(GPU, "op", "a class", choices, lambda config: config) == choices[1]
        assert tuning.measured("op") == {"a class": want} and tuning.measured("another") == {}
        tuning._chosen.clear()
        seconds.clear()


@pytest.mark.parametrize("error", ["OutOfMemoryError", "OutOfResources"])
def test_a_candidate_that_does_not_fit_is_skipped(tuning, choices, error, monkeypatch):
    """What do_bench allocates is given back, and the reason is kept."""
    errors = {
        "OutOfMemoryError": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore"),
        "OutOfResources": tuning.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
    }
    emptied = []

    def bench(run, **how):
        if run() == choices[0]:
            raise errors[error]
        return 1.0

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    assert tuning.choose(GPU, "op", "name", choices, lambda config: config) == choices[1]
    first, second = tuning.measured("op")["name"]
    assert second == (choices[1], 1e-3, None) and len(emptied) == 2
    assert first.config == choices[0] and first.seconds is None
    words = {"OutOfMemoryError": "Tried to allocate 1 GiB.", "OutOfResources": "shared memory, Required: 300000"}
    assert words[error] in first.reason and "more" not in first.reason
    tuning._chosen.clear()
    assert tuning.choose(GPU, "op", "name", choices, None) == choices[1], "not kept"

    def none_runs(run, **how):
        raise errors[error]

    monkeypatch.setattr(tuning.triton.testing, "do_bench", none_runs)
    assert tuning.choose(GPU, "op", "other", choices, lambda config: config) == choices[0]
    assert [trial.seconds for trial in tuning.measured("op")["other"]] == [None, None]
    assert not (tuning.cache_folder("op", "NVIDIA H200") / "other.json").exists(), (
        "a later process may have more memory"
    )


def test_tuning_can_be_switched_off(tuning, choices, tmp_path, monkeypatch):
    """Then the disk is not read either: a check must run what it says."""
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run, **how: float(run() == choices[0]))
    assert tuning.choose(GPU, "op", "name", choices, lambda config: config) == choices[1]
    tuning._chosen.clear()
    monkeypatch.setenv("REWRITE_CORE_TUNING", "0")
    assert tuning.choose(GPU, "op", "name", choices, None) == choices[0]
    assert tuning.choose(GPU, "op", "other", choices, None) == choices[0]
    assert tuning.measured("op") == {"name": (), "other": ()}
    assert [path.name for path in tmp_path.rglob("*.json")] == ["name.json"]
    monkeypatch.setenv("REWRITE_CORE_TUNING", "off")
    with pytest.raises(RewriteCoreError, match="REWRITE_CORE_TUNING='off' must be 0 .* or 1"):
        tuning.choose(GPU, "op", "third", choices, None)


def test_no_measurement_goes_into_a_graph(tuning, monkeypatch, tmp_path):
    """Stand-ins for a GPU: what was chosen before the capture is used in it, and nothing is chosen there."""
    from rewrite_core.kernels import second_moment as kernels

    class OnGPU:
        shape, dtype, device = (2, 300, 8, 8), torch.float32, GPU

        def data_ptr(self):
            return 1 << 20

        def stride(self, axis=None):
            strides = (300 * 64, 64, 8, 1)
            return strides if axis is None else strides[axis]

    capturing = False
    chosen = kernels.CANDIDATES[9]["x3"][1]
    monkeypatch.setattr(tuning, "trials_of", lambda path, choices, time: (tuning.Trial(chosen, 1.0),))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, multi_processor_count=132)
    )
    capturing = True
    with pytest.raises(RewriteCoreError, match="second_moment .* call it once before the capture"):
        kernels.configuration(OnGPU(), "x3")
    assert not list(tmp_path.iterdir()) and not tuning._chosen
    capturing = False
    assert kernels.configuration(OnGPU(), "x3") == chosen
    capturing = True
    assert kernels.configuration(OnGPU(), "x3") == chosen
    with pytest.raises(RewriteCoreError, match="before the capture"):
        kernels.configuration(OnGPU(), "ieee")
