"""Other threads run the same generator while the library does: a web service that renders, two collections at a
time."""

import copy
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.layers.passes import Hooks
from rewrite_core.modes import evaluating, repeatable


def in_thread(call):
    """What a call returns in another thread; raises what it raises."""
    results = []

    def run():
        try:
            results.append((call(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = results[0]
    if error is not None:
        raise error
    return value


class Meanwhile(nn.Module):
    """Passes on what it is given; calls a function first, in one thread."""

    def __init__(self):
        super().__init__()
        self.call, self.thread = None, None

    def forward(self, x):
        if self.call is not None and threading.get_ident() == self.thread:
            self.call()
        return x

    def meanwhile(self, call):
        self.call, self.thread = call, threading.get_ident()


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), Meanwhile(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    ).eval()


def maps(count=6, seed=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


CALLS = {
    "keys": lambda layer: layer.keys(maps()),
    "collect": lambda layer: rc.collect_second_moment(layer, maps(), batch_size=2, progress=False).matrix(),
    "fingerprint": lambda layer: layer.fingerprint(maps()),
    "render": lambda layer: layer.render(maps(), torch.ones(6, 8, 8, 8)),
    "list": lambda layer: rc.list_layers(layer.generator, maps()),
    "units": lambda layer: rc.collect_unit_quantiles(layer, maps()).quantile(torch.ones(1, 8)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_of_another_thread_is_no_part_of_a_call_and_survives_it(call, training):
    wanted = CALLS[call](rc.bind(make(), "2"))
    generator = make().train(training)
    layer, images = rc.bind(generator, "2"), make()(maps(2, seed=2))
    served = []
    generator[1].meanwhile(lambda: served.append(in_thread(lambda: generator(maps(2, seed=2)).detach())))
    found = CALLS[call](layer)
    assert served and all(torch.equal(each, images) for each in served)
    assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
    assert all(module.training == training for module in generator.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_another_thread_is_no_part_of_a_call(call):
    wanted = CALLS[call](rc.bind(make(), "2"))
    generator = make().train()
    CALLS[call](rc.bind(generator, "2")), CALLS["collect"](rc.bind(generator, "4"))  # they are known to draw nothing
    layer, other, found = rc.bind(generator, "2"), rc.bind(generator, "4"), []
    wanted_beside = CALLS["collect"](rc.bind(make(), "4"))
    generator[1].meanwhile(lambda: found.append(in_thread(lambda: CALLS["collect"](other))))
    mine = CALLS[call](layer)
    assert torch.equal(mine, wanted) if isinstance(wanted, torch.Tensor) else mine == wanted
    assert found and all(torch.equal(each, wanted_beside) for each in found)
    assert all(module.training for module in generator.modules())


def test_a_call_inside_a_pass_of_the_same_thread_is_a_pass_of_its_own():
    generator = make()
    layer, inner, seen = rc.bind(generator, "2"), rc.bind(generator, "4"), []
    wanted, wanted_inside = layer.keys(maps()), inner.keys(maps(3, seed=3))

    def call():
        generator[1].call = None
        seen.append(inner.keys(maps(3, seed=3)))

    generator[1].meanwhile(call)
    assert torch.equal(layer.keys(maps()), wanted) and torch.equal(seen[0], wanted_inside)


def test_two_threads_that_collect_at_once_count_their_own_keys():
    generator = make().train()
    wanted, errors, interval = CALLS["collect"](rc.bind(make(), "2")), [], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def collect():
        layer = rc.bind(generator, "2")
        for _ in range(8):
            try:
                assert torch.equal(CALLS["collect"](layer), wanted)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=collect) for _ in range(3)]
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert errors == [] and all(module.training for module in generator.modules())


@pytest.mark.parametrize("order", ["first out first", "last out first"])
def test_eval_mode_lasts_until_the_last_is_out(order):
    generator = make().train()
    generator[3].eval()
    first, second = evaluating(generator), evaluating(generator[2])
    first.__enter__(), second.__enter__()
    ways = [first, second] if order == "first out first" else [second, first]
    ways[0].__exit__(None, None, None)
    assert not generator[2].training and generator[0].training == (order == "first out first")
    ways[1].__exit__(None, None, None)
    assert [part.training for part in generator] == [True, True, True, False, True] and generator.training


class Noisy(nn.Module):
    """Draws noise from torch and from NumPy, and calls a function between the two draws."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.meanwhile, self.conv = Meanwhile(), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        x = self.meanwhile(x + torch.randn_like(x))
        return self.conv(x + torch.randn_like(x) + torch.from_numpy(np.random.randn(*x.shape)).float())


def test_noise_is_the_same_whatever_other_threads_collect():
    wanted = rc.bind(Noisy(), "conv").keys(maps())
    noisy, other = Noisy(), [rc.bind(Noisy(), "conv"), rc.bind(make(), "2")]
    layer, started, threads = rc.bind(noisy, "conv"), threading.Event(), []
    [
        each.keys(maps()) for each in (layer, *other)
    ]  # whether they draw is known from now on, or one waits for the other

    def call():
        def run(each):
            started.set()
            each.keys(maps())

        threads.extend(threading.Thread(target=run, args=[each]) for each in other)
        [thread.start() for thread in threads]
        started.wait()
        threads[-1].join()  # the one that does not draw does not wait

    noisy.meanwhile.meanwhile(call)
    state = torch.get_rng_state()
    assert torch.equal(layer.keys(maps()), wanted)
    [thread.join() for thread in threads]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_compiled_runs_again_when_the_last_is_out():
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))  # imports the compiler
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    first, second = repeatable(make()), repeatable(make())
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance == before


def test_copies_that_another_thread_makes_meanwhile_are_clean():
    generator, copies = make(), []
    layer = rc.bind(generator, "2")
    generator[1].meanwhile(
        lambda: copies.append(
            in_thread(lambda: (copy.deepcopy(generator[2]), pickle.loads(pickle.dumps(generator[2]))))
        )
    )
    keys = layer.keys(maps())
    generator[1].call = None
    for conv in copies[0]:
        with torch.no_grad():
            assert torch.equal(conv(keys), generator[2](keys))
        assert conv._forward_pre_hooks and layer.keys(maps()).equal(keys)  # they do nothing


def test_a_fingerprint_that_is_made_beside_another_pass_is_remembered():
    layer = rc.bind(make(), "2")
    first = layer.fingerprint(maps())
    with Hooks() as hooks:
        hooks.before(layer.module, lambda module, args, kwargs: None)
        hooks.after(layer.generator, lambda module, args, output: None)
        assert layer._remembered.still(layer.generator, layer._forward, maps())
        assert layer.fingerprint(maps()) == first
