"""Calls of ``fit_low_rank`` with nothing but data on the CPU: they take a way with few looks, and lose none of them."""

import pytest
import torch
from helpers.fit_problems import CPU, cast, linear_problem, run

from rewrite_core import ops
from rewrite_core.backends import extension
from rewrite_core.ops.fit_low_rank_op import problem as facts
from rewrite_core.ops.fit_low_rank_op import register

LONG_WAY = CPU[f"cpp-{extension().isa()}"]


def given(**change):
    options = {"slope": 1.0, "gain": 1.0, "loss": "l2", "max_iterations": 60, "tolerance": 1e-5}
    fields = dict.fromkeys(facts.FitLowRankProblem._fields) | options | linear_problem() | change
    return facts.FitLowRankProblem(**fields)


def same_bits(ours, theirs):
    return ours.solver == theirs.solver and all(map(torch.equal, ours[:5], theirs[:5]))


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [None, "bias", "noise", "full"])
@pytest.mark.parametrize("batched", [False, True])
def test_the_short_way_gives_the_same_bits(monkeypatch, loss, dtype, shift, batched):
    problem = cast(linear_problem(channels=19), dtype)
    if shift is not None:
        noise = linear_problem(1, channels=19)["base"].to(dtype)
        part = {"bias": noise[:, :1], "noise": noise[:1], "full": noise}[shift]
        problem["shift"] = part.expand(19, 40)
    if batched:
        other = cast(linear_problem(3, channels=19), dtype) | ({} if shift is None else {"shift": problem["shift"]})
        problem = {name: torch.stack([data, other[name]]) for name, data in problem.items()}
    wanted = run(LONG_WAY, **problem, loss=loss)
    monkeypatch.setattr(register, "prepare", lambda *args: pytest.fail("the long way"))
    assert same_bits(ops.fit_low_rank(**problem, loss=loss, backend="cpp"), wanted)


GOOD = linear_problem()
ODD = {
    "a list": {"base": [1.0]},
    "too few channels": {"target": GOOD["target"][1:]},
    "too few pixels": {"basis": GOOD["basis"][:, 1:].contiguous()},
    "no rows": {"basis": GOOD["basis"][:0]},
    "no channels": {name: data[:0] for name, data in GOOD.items() if name != "basis"},
    "no pixels": {name: data[:, :0] for name, data in GOOD.items()},
    "two types": {"basis": GOOD["basis"].float()},
    "half": {name: data.half() for name, data in GOOD.items()},
    "whole numbers": {name: data.long() for name, data in GOOD.items()},
    "one batched": {"basis": GOOD["basis"][None]},
    "four dimensions": {name: data[None, None] for name, data in GOOD.items()},
    "another count of edits": {
        name: data.expand(3 if name == "basis" else 2, -1, -1).clone() for name, data in GOOD.items()
    },
    "basis turned": {"basis": GOOD["basis"].T.contiguous().T},
    "target strided": {"target": GOOD["target"].repeat_interleave(2, 1)[:, ::2]},
    "gradient": {"base": GOOD["base"].clone().requires_grad_()},
    "parameter": {"base": torch.nn.Parameter(GOOD["base"].clone())},
    "negated": {"target": torch._neg_view(GOOD["target"])},
    "sparse": {"target": GOOD["target"].to_sparse()},
    "meta": {"target": GOOD["target"].to("meta")},
    "shift to expand": {"shift": GOOD["base"][:, :1]},
    "demodulated": {"constant": torch.ones(7)},
    "weighted": {"pixel_weights": torch.ones(40)},
    "penalised": {"penalty": torch.eye(9)},
    "scaled": {"penalty_scale": torch.ones(7)},
    "segments": {"segments": torch.ones(40).long()},
    "loss": {"loss": "huber"},
    "no steps": {"max_iterations": 0},
    "steps": {"max_iterations": 2.0},
    "many steps": {"max_iterations": 2**31},
    "True": {"max_iterations": True},
    "slope": {"slope": float("inf")},
    "gain": {"gain": 1},
    "tolerance": {"tolerance": -1e-5},
    "NaN": {"tolerance": float("nan")},
}


def test_plain_data_are_known():
    assert facts.is_plain(given())
    assert facts.is_plain(given(**{name: data[None] for name, data in GOOD.items()}))
    assert facts.is_plain(given(**{name: data.float() for name, data in GOOD.items()}, slope=0.2, loss="l1"))


@pytest.mark.parametrize("name", ODD)
def test_all_else_goes_the_long_way(name):
    assert facts.is_plain(given()._replace(**ODD[name])) is False


@pytest.mark.parametrize("name", ["basis", "base", "target", "shift"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity_are_found(name, bad, loss, dtype):
    problem = cast(linear_problem() | {"shift": torch.zeros(7, 40)}, dtype)
    problem[name] = problem[name].clone()
    problem[name][-1, -1] = bad
    with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
        ops.fit_low_rank(**problem, loss=loss, backend="cpp")
    batch = {key: torch.stack([problem[key] if key == name else data, data]) for key, data in problem.items()}
    batch[name][1] = 0
    with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
        ops.fit_low_rank(**batch, loss=loss, backend="cpp")


def test_nan_is_found_where_there_are_no_channels():
    problem = linear_problem(channels=0)
    problem["basis"][3, 7] = torch.nan
    with pytest.raises(ValueError, match="basis holds NaN"):
        ops.fit_low_rank(**problem, loss="l2", backend="cpp")


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_nan_is_found_where_there_is_nothing_to_fit(gain):
    problem = linear_problem()
    problem["basis"][3, 7] = torch.nan
    with pytest.raises(ValueError, match="basis holds NaN"):
        ops.fit_low_rank(**problem | {"target": gain * problem["base"]}, gain=gain, loss="l2", backend="cpp")


def test_large_numbers_are_no_infinity():
    for name, status in (("basis", facts.DEGENERATE), ("base", facts.NONFINITE)):
        problem = linear_problem()
        problem[name] = problem[name] * 1e200
        result = ops.fit_low_rank(**problem, loss="l2", backend="cpp")
        assert (result.status == status).all() and not result.coefficients.any()
