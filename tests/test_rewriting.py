import copy
import io
import pickle
import time
import weakref

import pytest
import torch
from conftest import DATA, read_npz

import rewrite_core as rc
from rewrite_core.families import Capture
from rewrite_core.files import save_record
from rewrite_core.solvers import Problem, combine, solve_adam, solve_lm, solve_projected

STEPS = {"solver": "projected", "steps": 201}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def curve_error(change, curve):
    losses = torch.tensor(change.losses, dtype=torch.float64)
    assert len(losses) == len(curve)
    return ((losses - curve).abs() / curve).max().item()


# --- the reference implementation's numbers --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, make, options",
    [
        ("projected_rank1", rc.rewrite, STEPS),
        ("projected_rank3", rc.rewrite, STEPS | {"rank": 3}),
        ("lowrankgrad_rank1", rc.rewrite, STEPS | {"project_gradient": True}),
        ("noalpha_rank1", rc.rewrite, STEPS | {"alpha": False}),
        ("erase_rank1", rc.erase, STEPS | {"units": 8}),
    ],
)
def test_golden_curves(golden, golden_moment, layer, edit, latents, name, make, options):
    change = make(layer, golden_moment, edit, latents, **options)
    assert curve_error(change, golden[f"{name}_loss"]) < 0.02
    assert relative(layer.weight + change.weight_delta(), golden[f"{name}_weight"]) < 0.02


@pytest.mark.parametrize("name, options", [("projected_rank1", {}), ("projected_rank3", {"rank": 3})])
def test_golden_curves_from_collection(golden, moment, layer, edit, latents, name, options):
    change = rc.rewrite(layer, moment, edit, latents, **STEPS, **options)
    assert curve_error(change, golden[f"{name}_loss"]) < 0.02
    assert relative(layer.weight + change.weight_delta(), golden[f"{name}_weight"]) < 0.02


@pytest.mark.parametrize(
    "name, options", [("nontight_rank1", STEPS | {"tight": False}), ("unconstrained", {"solver": "unconstrained", "steps": 201})]
)
def test_golden_chaotic_curves(golden, golden_moment, layer, edit, latents, name, options):
    """These two trajectories are chaotic in their last bits: the reference itself, run again on another CPU, misses
    its recorded curves by 16 % and 5 % at single steps. The opening, the typical step and the final weight agree."""
    change = rc.rewrite(layer, golden_moment, edit, latents, **options)
    losses, curve = torch.tensor(change.losses, dtype=torch.float64), golden[f"{name}_loss"]
    error = (losses - curve).abs() / curve
    assert error[:6].max() < 0.02 and error.median() < 0.05 and error.max() < 0.5
    assert relative(layer.weight + change.weight_delta(), golden[f"{name}_weight"]) < 0.02


def test_golden_zero(golden, golden_moment, layer, edit, latents):
    change = rc.zero(layer, golden_moment, edit, latents)
    assert relative(layer.weight + change.weight_delta(), golden["zero_rank1_weight"]) < 1e-5


class _StyledLayer:
    """The golden StyleGAN2 layer as the library binds it: one StyledConv with recorded tensors."""

    def __init__(self, kind):
        from rewrite_core.families.stylegan2 import StyledConv, StyleGAN2Layer

        data = {key[len(kind) + 1 :]: value for key, value in read_npz("stylegan2_layer.npz").items() if key.startswith(kind)}
        self.data = data
        conv = StyledConv(64, 48, 8, upsample=kind == "up")
        with torch.no_grad():
            conv.conv.weight.copy_(data["weight"])
            conv.noise.weight.copy_(data["noise_weight"])
            conv.activate.bias.copy_(data["bias"])
        self.generator = torch.nn.Sequential(conv)
        self.layer = rc.BoundLayer(self.generator, StyleGAN2Layer("0.conv", conv.conv, conv))
        capture = Capture(data["fmap_modulated"][:1], {"style": data["style"][:1], "noise": data["noise"]})
        with torch.no_grad():
            value = self.layer.value(capture)
        # The recorded value differs from ours by 2e-6. Outside the pasted area the goal is the value itself, to the
        # bit, as it is in the library's own use; else the l1 gradient there would be the sign of that rounding.
        goal = torch.where(data["goal"] == data["value"], value, data["goal"])
        self.problem = Problem(self.layer, capture, goal, data["directions"])


# measured: at most 0.24 % ("same") and 2.3 % ("up", on 2 of 201 steps; the reference's own sequence of operations, run on
# this CPU, is off by 2.5 % there)
@pytest.mark.parametrize("kind, tolerance", [("same", 0.02), ("up", 0.035)])
def test_golden_stylegan2(kind, tolerance):
    styled = _StyledLayer(kind)
    data = styled.data
    assert (styled.layer.value(styled.problem.capture) - data["value"]).abs().max() < 1e-5
    for solve, name in ((solve_projected, "projected"), (solve_adam, "linear")):
        solution = solve(styled.problem, steps=201)
        curve = data[f"{name}_loss"]
        errors = (torch.tensor(solution.losses, dtype=torch.float64) - curve).abs() / curve
        assert errors.max() < tolerance and errors.quantile(0.95) < 0.02
        weight = styled.problem.weight + combine(solution.coefficients, data["directions"])
        assert relative(weight, data[f"{name}_weight"][0]) < 0.02


@pytest.mark.parametrize("kind", ["same", "up"])
def test_lm_is_at_least_as_good_as_adam_on_stylegan2(kind):
    styled = _StyledLayer(kind)
    lm = solve_lm([styled.problem])[0]
    adam = solve_adam(styled.problem, steps=2001)
    assert lm.solver == "lm" and lm.final_loss <= 1.01 * adam.final_loss
    # what the solver says is what the layer then does
    weight = styled.problem.weight + combine(lm.coefficients, styled.data["directions"])
    assert styled.problem.distance(weight).item() == pytest.approx(lm.final_loss, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"tight": False}, {"alpha": False}])
def test_lm_is_at_least_as_good_as_adam_on_proggan(moment, layer, edit, latents, options):
    lm = rc.rewrite(layer, moment, edit, latents, **options)
    adam = rc.rewrite(layer, moment, edit, latents, solver="adam", **options)
    assert lm.final_loss <= 1.01 * adam.final_loss


def test_lm_is_at_least_as_good_as_adam_on_erasure(moment, layer, edit, latents):
    lm = rc.erase(layer, moment, edit, latents, units=8)
    adam = rc.erase(layer, moment, edit, latents, units=8, solver="adam")
    assert lm.final_loss <= 1.01 * adam.final_loss


# --- what a change is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize("solver", ["lm", "projected", "adam"])
def test_the_change_has_rank_r_and_rows_in_the_span(moment, layer, edit, latents, rank, solver):
    change = rc.rewrite(layer, moment, edit, latents, rank=rank, solver=solver, steps=12)
    rows = change.weight_delta().double().permute(0, 2, 3, 1).reshape(-1, 64)
    values = torch.linalg.svdvals(rows)
    assert (values > 1e-6 * values[0]).sum() <= rank
    directions = change.directions.double()
    assert (rows - rows @ directions.T @ directions).norm() < 1e-6 * rows.norm()
    assert change.rank == rank and change.coefficients.shape == (48, rank, 3, 3)


def test_weights_become_what_the_solver_predicted(moment, layer, edit, latents):
    change = rc.rewrite(layer, moment, edit, latents, tight=False)
    (goal,) = rc.rewriting.paste_goals(layer, edit, latents, tight=False)
    with change:
        value = layer.values(latents[edit.paste.index][None])
    assert (value - goal.target).abs().mean().item() == pytest.approx(change.final_loss, rel=1e-5)


def test_closed_form_is_the_least_squares_optimum(moment, layer, edit, latents):
    change = rc.rewrite(layer, moment, edit, latents, loss="l2", rank=2)
    assert change.solver == "closed_form"
    (goal,) = rc.rewriting.paste_goals(layer, edit, latents)
    problem = Problem(layer, goal.capture, goal.target, change.directions, "l2")
    coefficients = change.coefficients.clone().requires_grad_(True)
    with torch.enable_grad():
        problem.distance(layer.weight + combine(coefficients, change.directions)).backward()
    zero = torch.zeros_like(coefficients).requires_grad_(True)
    with torch.enable_grad():
        problem.distance(layer.weight + combine(zero, change.directions)).backward()
    assert coefficients.grad.abs().max() < 1e-4 * zero.grad.abs().max()


def test_preserve_trades_the_goal_for_smaller_change(moment, layer, edit, latents):
    with torch.no_grad():
        before = layer.values(latents[100:140])
        outcomes = []
        for preserve in (0.0, 0.1, 1.0, 100.0):
            change = rc.rewrite(layer, moment, edit, latents, loss="l2", preserve=preserve)
            with change:
                outcomes.append((change.final_loss, (layer.values(latents[100:140]) - before).square().mean().item()))
    losses, changes = zip(*outcomes)
    assert list(losses) == sorted(losses) and list(changes) == sorted(changes, reverse=True)
    assert changes[-1] < 0.01 * changes[0]


def test_preserve_in_adam_agrees_with_lm(moment, layer, edit, latents):
    options = {"loss": "l2", "preserve": 0.5}
    lm = rc.rewrite(layer, moment, edit, latents, **options)
    adam = rc.rewrite(layer, moment, edit, latents, solver="adam", steps=2001, **options)
    assert adam.final_loss == pytest.approx(lm.final_loss, rel=0.02)


def test_preserve_is_exact_for_one_by_one_layers(latents):
    generator = torch.nn.Sequential(torch.nn.Conv2d(64, 32, 1), torch.nn.Conv2d(32, 8, 1))
    layer = rc.bind(generator, "1", forward=lambda g, z: g(z[:, :, None, None].expand(-1, -1, 3, 3)))
    moment = rc.collect_second_moment(layer, latents, progress=False)
    directions = torch.linalg.qr(torch.randn(32, 2))[0].T
    exact = rc.solvers.generic_second_moment(layer, directions, latents, moment.matrix())
    basis = rc.solvers.basis_maps(layer, layer.keys(latents), directions)
    rows = basis.double().movedim(1, -1).reshape(-1, 2)
    assert torch.allclose(exact, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-7)


def test_many_edits_equal_one_by_one(moment, layer, edit, latents):
    other = rc.Edit(copy=edit.paste, paste=edit.context[0], context=edit.context[:2])
    many = rc.rewrite_many(layer, moment, [edit, other], latents, rank=2)
    for change, one in zip(many, (edit, other)):
        alone = rc.rewrite(layer, moment, one, latents, rank=2)
        assert torch.allclose(change.coefficients, alone.coefficients, rtol=1e-4, atol=1e-5)
        assert change.edit is one


@pytest.mark.parametrize("solver", ["lm", "adam", "projected", "unconstrained"])
def test_the_callers_modes_change_nothing(generator, moment, layer, edit, latents, solver):
    def changes():
        made = rc.rewrite(layer, moment, edit, latents, solver=solver, steps=5), rc.zero(layer, moment, edit, latents)
        return made + (rc.erase(layer, moment, edit, latents, units=8, solver=solver, steps=5),)

    usual = changes()
    with torch.inference_mode():
        inferred = changes()
    with torch.autocast("cpu", torch.bfloat16):
        cast = changes()
    for one, two, three in zip(usual, inferred, cast):
        assert torch.equal(one.coefficients, two.coefficients) and torch.equal(one.coefficients, three.coefficients)
        assert not two.coefficients.is_inference()
        with two.apply():
            pass
    with torch.inference_mode():  # weights, latents and keys that autograd refuses
        made = rc.load_proggan(DATA / "proggan_state.npz")
        first = rc.bind(made, "layer5.conv")
        again = rc.rewrite(first, moment, edit, latents.clone(), solver=solver, steps=5)
    assert torch.equal(again.coefficients, usual[0].coefficients)
    before = state_bits(made)
    with again.apply(made):
        assert again.applied
    assert same_bits(before, state_bits(made))


@pytest.mark.parametrize("solver", ["lm", "adam", "projected", "unconstrained"])
def test_a_key_made_in_inference_mode(solver):
    generator = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3, padding=1))
    layer = rc.bind(generator, "0", forward=lambda g, z: g(z.reshape(-1, 5, 4, 4)))
    with torch.inference_mode():
        z = torch.randn(20, 80)
    moment = rc.SecondMoment(5)
    moment.update(torch.randn(40, 5))
    edit = rc.Edit(copy=_square(1, 4, 0, 2), paste=_square(2, 4, 1, 2))
    for tight in (True, False):
        assert rc.rewrite(layer, moment, edit, z, solver=solver, steps=3, tight=tight).applied is False


def test_many_edits_need_one_pass_over_the_units(monkeypatch, moment, layer, edit, latents):
    calls = []
    collect = rc.rewriting.collect_unit_quantiles
    monkeypatch.setattr(rc.rewriting, "collect_unit_quantiles", lambda *a, **k: calls.append(a) or collect(*a, **k))
    many = rc.rewrite_many(layer, moment, [edit] * 3, latents, method="units")
    assert len(calls) == 1 and len(many) == 3


def test_unconstrained_needs_no_rank_and_no_keys_of_a_context(moment, layer, edit, latents):
    tiny = torch.zeros(512, 512)
    tiny[5, 5] = 0.1  # vanishes on the map: no key is read from it
    bare = rc.Edit(copy=edit.copy, paste=edit.paste, context=[rc.Selection(3, tiny)])
    change = rc.rewrite(layer, moment, bare, latents, solver="unconstrained", steps=2, rank=1000)
    assert change.coefficients.shape == (48, 64, 3, 3)
    with pytest.raises(rc.SolverError, match="preserve"):
        rc.rewrite(layer, moment, bare, latents, solver="unconstrained", preserve=1.0)


def test_without_context_the_paste_is_the_context(moment, layer, edit, latents):
    bare = rc.Edit(copy=edit.copy, paste=edit.paste)
    explicit = rc.Edit(copy=edit.copy, paste=edit.paste, context=[edit.paste])
    a, b = (rc.rewrite(layer, moment, e, latents) for e in (bare, explicit))
    assert torch.equal(a.weight_delta(), b.weight_delta())


# --- crops -----------------------------------------------------------------------------------------------


def _one_layer(conv, side):
    """A generator whose second convolution is `conv` on a side x side map, bound, with its moment and latents."""
    torch.manual_seed(1)
    texture = torch.randn(1, 5, side, side)
    generator = torch.nn.Sequential(torch.nn.Conv2d(5, 8, 3, padding=1), torch.nn.ReLU(), conv)
    layer = rc.bind(generator, "2", forward=lambda g, z: g(z[:, :, None, None] * texture))
    z = rc.sample_latents(5, 40)
    return layer, rc.collect_second_moment(layer, z, progress=False), z


def _square(index, size, top, side):
    mask = torch.zeros(size, size)
    mask[top : top + side, top : top + side] = 1
    return rc.Selection(index, mask)


def _square_edit(layer, z, top, side=1):
    size = layer.values(z[:1]).shape[2]
    return rc.Edit(copy=_square(1, size, min(1, size - side), side), paste=_square(2, size, top, side), context=[_square(3, 8, 0, 8)])


@pytest.mark.parametrize(
    "conv, side, top",
    [
        (torch.nn.Conv2d(8, 6, 3, stride=2, padding=1), 7, 3),  # map sizes that do not divide: 7 and 4
        (torch.nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), 4, 5),  # 4 and 7
        (torch.nn.Conv2d(8, 6, 3, stride=3, padding=1), 10, 2),
        (torch.nn.Conv2d(8, 6, 3), 8, 3),  # no padding
        (torch.nn.Conv2d(8, 6, 3), 4, 1),  # no padding, and sizes that divide: 4 and 2
        (torch.nn.Conv2d(8, 6, 5), 8, 1),
        (torch.nn.Conv2d(8, 6, 3, padding=3), 4, 2),  # 4 and 8, but no upsampling
        (torch.nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), 8, 3),
        (torch.nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), 8, 3),
        (torch.nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"), 8, 3),
    ],
)
def test_layers_that_cannot_be_cropped_say_so(conv, side, top):
    layer, moment, z = _one_layer(conv, side)
    size = layer.values(z[:1]).shape[2]
    for extent in range(1, min(3, size)):
        edit = _square_edit(layer, z, min(top, size - extent), extent)
        with pytest.raises(rc.SolverError, match="tight=False"):
            rc.rewrite(layer, moment, edit, z)
        assert rc.rewrite(layer, moment, edit, z, tight=False).box is None


@pytest.mark.parametrize(
    "conv, side, box, key",
    [
        (torch.nn.Conv2d(8, 6, 3, padding=1), 8, (3, 3, 4, 4), (1, 1)),
        (torch.nn.Conv2d(8, 6, 3, padding=2, dilation=2), 8, (3, 3, 4, 4), (1, 1)),
        (torch.nn.Conv2d(8, 6, 3, stride=2, padding=1), 8, (3, 3, 4, 4), (2, 2)),
        (torch.nn.Conv2d(8, 6, 2, stride=2), 8, (3, 3, 4, 4), (2, 2)),
        (torch.nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), 4, (2, 2, 4, 4), (1, 1)),
        (torch.nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), 4, (2, 2, 4, 4), (1, 1)),
    ],
)
def test_crops_are_the_map_with_zeros_around_them(conv, side, box, key):
    layer, moment, z = _one_layer(conv, side)
    edit = _square_edit(layer, z, 3)
    (goal,) = rc.rewriting.paste_goals(layer, edit, z)
    assert goal.box == box and goal.capture.key.shape[2:] == key
    for part in (goal.target, goal.capture.key):  # no view of a whole map
        assert part.untyped_storage().nbytes() == part.numel() * 4
    whole = rc.rewriting.paste_goals(layer, edit, z, tight=False)[0].target
    assert torch.allclose(goal.target, whole[:, :, box[0] : box[2], box[1] : box[3]], atol=1e-6)
    assert rc.rewrite(layer, moment, edit, z).box == box


def test_the_whole_map_is_a_crop_of_any_layer():
    layer, moment, z = _one_layer(torch.nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), 4)
    edit = _square_edit(layer, z, 0, side=4)
    whole, tight = (rc.rewrite(layer, moment, edit, z, loss="l2", tight=tight) for tight in (False, True))
    assert torch.equal(whole.coefficients, tight.coefficients)


# --- apply, revert, save ---------------------------------------------------------------------------------


@pytest.fixture
def changes(moment, layer, edit, latents):
    other = rc.Edit(copy=edit.paste, paste=edit.context[0])
    return rc.rewrite_many(layer, moment, [edit, other], latents)


def state_bits(generator):
    return {name: tensor.clone() for name, tensor in generator.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_apply_changes_one_weight_and_revert_is_bit_exact(generator, changes, latents):
    before, images = state_bits(generator), generator(latents[:2]).detach()
    changes[0].apply()
    after = state_bits(generator)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["layer5.conv.weight"]
    assert not torch.equal(generator(latents[:2]), images)
    changes[0].revert()
    assert same_bits(before, state_bits(generator)) and torch.equal(generator(latents[:2]), images)
    assert not any(hasattr(module, "_rewrite_core_stack") for module in generator.modules())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stacked_rewrites_revert_in_any_order(generator, layer, changes, order):
    before = state_bits(generator)
    changes[0].apply()
    alone = layer.weight.clone()
    changes[1].apply()
    assert torch.allclose(layer.weight, alone + changes[1].weight_delta())
    changes[order[0]].revert()
    if order[0] == 1:
        assert torch.equal(layer.weight, alone)
    changes[order[1]].revert()
    assert same_bits(before, state_bits(generator))


def test_a_rewrite_of_a_rewritten_layer(generator, layer, moment, changes, edit, latents):
    before = state_bits(generator)
    with changes[0]:
        second = rc.rewrite(layer, moment, rc.Edit(copy=edit.paste, paste=edit.context[0]), latents)
        with second:
            assert second.applied and changes[0].applied
    assert same_bits(before, state_bits(generator))
    with pytest.raises(rc.MismatchError, match="fitted to"):
        second.apply()


def test_rewrites_on_two_layers(generator, moment, changes, edit, latents):
    before = state_bits(generator)
    sixth = rc.bind(generator, "layer6.conv")
    with changes[0]:
        moment6 = rc.collect_second_moment(sixth, latents, progress=False)
        with rc.rewrite(sixth, moment6, edit, latents):
            assert not torch.equal(sixth.weight, before["layer6.conv.weight"])
    assert same_bits(before, state_bits(generator))


def test_context_manager_reverts_after_an_error(generator, changes):
    before = state_bits(generator)
    with pytest.raises(KeyError), changes[0]:
        raise KeyError
    assert same_bits(before, state_bits(generator))


def test_misuse_of_apply_and_revert(generator, layer, changes):
    with pytest.raises(rc.MismatchError, match="not applied"):
        changes[0].revert()
    changes[0].apply()
    with pytest.raises(rc.MismatchError, match="already"):
        changes[0].apply()
    with torch.no_grad():
        layer.parameter[0, 0, 0, 0] += 1
    with pytest.raises(rc.MismatchError, match="something else"):
        changes[0].revert()


@pytest.mark.parametrize("solver", ["lm", "projected", "unconstrained"])
def test_saved_loaded_and_applied_is_bit_exact(tmp_path, generator, layer, moment, edit, latents, solver):
    change = rc.rewrite(layer, moment, edit, latents, rank=3, solver=solver, steps=5)
    path = tmp_path / "rule.safetensors"
    change.save(path)
    copied = copy.deepcopy(generator)
    loaded = rc.load_rewrite(path).apply(copied)
    change.apply()
    assert same_bits(state_bits(generator), state_bits(copied))
    assert loaded.solver == solver and loaded.edit == edit and loaded.rank == change.rank
    loaded.revert()
    change.revert()
    assert same_bits(state_bits(generator), state_bits(copied))


def _saved_and_loaded(generator):
    file = io.BytesIO()
    torch.save(generator, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), _saved_and_loaded])
def test_a_copy_of_a_rewritten_generator_is_a_rewritten_generator(generator, moment, edit, latents, duplicate):
    layer = rc.bind(generator, "layer5.conv", forward=lambda g, z: g(z))  # a lambda cannot be pickled
    before = state_bits(generator)
    change = rc.rewrite(layer, moment, edit, latents).apply()
    copied = duplicate(generator)
    assert same_bits(state_bits(copied), state_bits(generator)) and before.keys() == state_bits(copied).keys()
    with pytest.raises(rc.MismatchError, match="already"):
        change.apply(copied)
    change.revert(copied)
    assert same_bits(before, state_bits(copied)) and change.applied
    change.revert()
    assert same_bits(before, state_bits(generator)) and not change.applied


def test_what_is_kept_on_the_module_is_plain(generator, changes):
    """So that a pickled generator can be loaded where this library is not installed."""
    for change in changes:
        change.apply()
    data = pickle.dumps(generator.layer5.conv)
    assert b"rewrite_core." not in data.replace(b"rewrite_core.families", b"")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_rewrite_takes_no_generator_along(generator, changes, duplicate):
    before = state_bits(generator)
    changes[0].apply()
    copied = duplicate(changes[0])
    assert len(pickle.dumps(copied)) < 200_000 < generator.layer5.conv.weight.nbytes + 200_000
    with pytest.raises(rc.MismatchError, match="name the generator"):
        copied.apply()
    copied.revert(generator)  # the same change, by its content
    assert same_bits(before, state_bits(generator)) and not changes[0].applied


def test_one_rewrite_on_two_generators(generator, changes):
    before, other = state_bits(generator), copy.deepcopy(generator)
    change = changes[0]
    change.apply(generator).apply(other)
    change.revert()  # the last first
    assert same_bits(before, state_bits(other)) and not same_bits(before, state_bits(generator)) and change.applied
    change.revert()
    assert same_bits(before, state_bits(generator)) and not change.applied
    change.apply(generator).apply(other).revert(generator)
    assert same_bits(before, state_bits(generator)) and not same_bits(before, state_bits(other))
    change.revert()
    assert same_bits(before, state_bits(other))


def test_a_rewrite_forgets_the_generators_it_is_off(generator, changes):
    other = copy.deepcopy(generator)
    gone = weakref.ref(other)
    changes[0].apply(other).revert()
    changes[0].apply(generator)
    del other
    assert gone() is None


def test_the_same_change_is_never_applied_twice(tmp_path, generator, changes):
    path = tmp_path / "rule.safetensors"
    changes[0].save(path)
    rc.load_rewrite(path).apply(generator)
    applied = state_bits(generator)
    for again in (rc.load_rewrite(path), changes[0], copy.deepcopy(changes[0])):
        with pytest.raises(rc.MismatchError, match="already"):
            again.apply(generator)
    assert same_bits(applied, state_bits(generator))
    rc.load_rewrite(path).revert(generator)


def test_nested_with_blocks_revert_once(generator, changes):
    before, change = state_bits(generator), changes[0]
    with change:
        applied = state_bits(generator)
        with change, change:
            pass
        assert same_bits(applied, state_bits(generator))
    assert same_bits(before, state_bits(generator))


def test_with_apply_reverts_where_it_applied(generator, changes):
    before, other = state_bits(generator), copy.deepcopy(generator)
    with changes[0].apply(generator):
        with changes[0].apply(other):
            pass
        assert same_bits(before, state_bits(other)) and not same_bits(before, state_bits(generator))
    assert same_bits(before, state_bits(generator))
    with changes[0]:
        changes[0].revert()  # within the block is fine
    assert same_bits(before, state_bits(generator))


def test_a_weight_put_back_by_load_state_dict_has_no_rewrites(generator, changes):
    before = copy.deepcopy(generator.state_dict())
    with changes[0]:
        generator.load_state_dict(before)
        assert not changes[0].applied
        with pytest.raises(rc.MismatchError, match="not applied"):
            changes[0].revert()
    with changes[1]:  # nor is there anything in the way of another
        assert changes[1].applied and not changes[0].applied
    assert same_bits(before, state_bits(generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_generator_reverts_to_the_cast_original(generator, changes, dtype):
    original = copy.deepcopy(generator).to(dtype)
    changes[0].apply()
    changes[1].apply()
    generator.to(dtype)
    assert changes[0].applied
    changes[0].revert()
    both = copy.deepcopy(original)
    with pytest.raises(rc.MismatchError, match="fitted to"):
        changes[1].apply(both)
    changes[1].revert()
    assert same_bits(state_bits(original), state_bits(generator))


def test_a_weight_changed_by_a_cast_says_so_and_can_be_forced(generator, changes):
    original = copy.deepcopy(generator).bfloat16()
    changes[0].apply()
    changes[1].apply()
    generator.half().bfloat16()  # rounded twice: not the bits of one cast
    with pytest.raises(rc.MismatchError, match="was torch.float32 .* is torch.bfloat16 .*force=True"):
        changes[0].revert()
    changes[0].revert(force=True)
    changes[1].revert()
    assert torch.equal(generator.layer5.conv.weight, original.layer5.conv.weight)


def test_forced_revert_of_a_weight_that_something_else_changed(generator, layer, changes):
    before = state_bits(generator)
    changes[0].apply()
    with torch.no_grad():
        layer.parameter.mul_(2)
    with pytest.raises(rc.MismatchError, match="something else"):
        changes[1].apply()
    with pytest.raises(rc.MismatchError, match="already"):
        changes[0].apply(force=True)
    changes[0].revert(force=True)
    assert same_bits(before, state_bits(generator))


def test_forced_apply_on_a_weight_that_something_else_changed(generator, layer, changes):
    changes[0].apply()
    with torch.no_grad():
        layer.parameter.mul_(2)
    finetuned = state_bits(generator)
    changes[1].apply(force=True).revert()
    assert same_bits(finetuned, state_bits(generator)) and not changes[0].applied


def test_tied_weights_revert_in_the_opposite_order(latents):
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1))
    generator[2].weight = generator[0].weight
    before = state_bits(generator)
    texture = torch.randn(1, 64, 8, 8)
    edit = rc.Edit(copy=_square(1, 8, 1, 4), paste=_square(2, 8, 3, 4))
    changes = []
    for name in "0", "2":
        layer = rc.bind(generator, name, forward=lambda g, z: g(z[:, :, None, None] * texture))
        moment = rc.collect_second_moment(layer, latents, progress=False)
        changes.append(rc.rewrite(layer, moment, edit, latents, tight=False).apply())
    with pytest.raises(rc.MismatchError, match="shared with '2'"):
        changes[0].revert()
    changes[1].revert()
    changes[0].revert()
    assert same_bits(before, state_bits(generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(generator, edit, latents, dtype):
    layer = rc.bind(generator.to(dtype), "layer5.conv")
    moment = rc.collect_second_moment(layer, latents, progress=False)
    change = rc.rewrite(layer, moment, edit, latents, rank=2)
    wanted = (layer.weight.double() + change.weight_delta().double()).to(dtype)
    with change:
        assert (layer.weight != wanted).double().mean() < 1e-3  # float32 between, so a tie may fall the other way


def test_a_change_that_overflows_is_refused(generator, layer, changes):
    half = copy.deepcopy(generator).half()
    before = state_bits(half)
    big = rc.Rewrite(layer.name, changes[0].directions, changes[0].coefficients * 1e6, "", "lm")
    with pytest.raises(rc.NonFiniteError, match="torch.float16"):
        big.apply(half, force=True)
    assert same_bits(before, state_bits(half)) and not hasattr(half.layer5.conv, "_rewrite_core_stack")
    big.apply(generator, force=True).revert()


def test_applying_costs_the_same_however_many_are_on(monkeypatch, generator, layer, changes):
    before, one, calls = state_bits(generator), changes[0], []
    combine = rc.rewriting.combine
    monkeypatch.setattr(rc.rewriting, "combine", lambda *args: calls.append(args) or combine(*args))
    many = [rc.Rewrite(one.layer, one.directions, one.coefficients * 0.1 * i, one.fitted_to, "lm") for i in range(1, 13)]
    weights = []
    for change in many:
        weights.append(layer.weight.clone())
        calls.clear()
        change.apply(layer)
        assert len(calls) == 1
    for change, weight in zip(reversed(many), reversed(weights)):
        change.revert()
        assert torch.equal(layer.weight, weight)  # to the bit, at every step down
    assert same_bits(before, state_bits(generator))


def test_apply_in_inference_mode_leaves_a_generator_that_trains(generator, changes, latents):
    before = state_bits(generator)
    with torch.inference_mode():
        changes[0].apply()
    generator(latents[:1]).sum().backward()
    copy.deepcopy(generator)
    changes[0].revert()
    assert same_bits(before, state_bits(generator)) and generator.layer5.conv.weight.grad is not None


def test_loaded_rewrites_refuse_other_weights(tmp_path, generator, changes):
    path = tmp_path / "rule.safetensors"
    changes[0].save(path)
    with pytest.raises(rc.MismatchError, match="name the generator"):
        rc.load_rewrite(path).apply()
    with torch.no_grad():
        generator.layer5.conv.weight[0, 0, 0, 0] += 1
    weight = generator.layer5.conv.weight.detach().clone()
    with pytest.raises(rc.MismatchError, match="force=True"):
        rc.load_rewrite(path).apply(generator)
    assert torch.equal(generator.layer5.conv.weight, weight)
    rc.load_rewrite(path).apply(generator, force=True)
    assert not torch.equal(generator.layer5.conv.weight, weight)
    with pytest.raises(rc.UnknownLayerError):
        rc.load_rewrite(path).apply(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))
    with pytest.raises(rc.MismatchError, match="shape"):
        rc.load_rewrite(path).apply(rc.families.ProgGAN([8, 8, 8, 8]))


def test_truncated_and_foreign_rewrite_files(tmp_path, moment, changes):
    path = tmp_path / "rule.safetensors"
    changes[0].save(path)
    data = path.read_bytes()
    assert len(data) < 40_000
    for size in (0, 8, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(rc.FileFormatError, match="truncated"):
            rc.load_rewrite(tmp_path / "cut.safetensors")
    moment.save(tmp_path / "moment.safetensors")
    with pytest.raises(rc.FileFormatError, match="not a rewrite_core rewrite"):
        rc.load_rewrite(tmp_path / "moment.safetensors")
    with pytest.raises(FileNotFoundError):
        rc.load_rewrite(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": 3}, {"loss": ["a"]}, {"layer": 5}, {"fitted_to": None}, {"solver": ["lm"]}, {"edit": 3}, {"edit": "{bad"},
    ],
)  # fmt: skip
def test_rewrite_files_with_wrong_metadata(tmp_path, changes, wrong):
    path = tmp_path / "rule.safetensors"
    tensors = {"directions": changes[0].directions, "coefficients": changes[0].coefficients}
    good = {"layer": "layer5.conv", "fitted_to": "", "solver": "lm", "loss": [], "edit": None}
    save_record(path, "rewrite", 1, tensors, good)
    assert rc.load_rewrite(path).final_loss is None
    for metadata in (good | wrong, list(good), 5):
        save_record(path, "rewrite", 1, tensors, metadata)
        with pytest.raises(rc.FileFormatError, match="rule.safetensors"):
            rc.load_rewrite(path)
    save_record(path, "rewrite", 1, {name: part.long() for name, part in tensors.items()}, good)
    with pytest.raises(rc.FileFormatError, match="floating-point"):
        rc.load_rewrite(path)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"solver": "newton"}, rc.SolverError, "choose from"),
        ({"loss": "l3"}, rc.SolverError, "choose from"),
        ({"rank": 65}, rc.RankError, "64 channels"),
        ({"preserve": -1}, rc.RewriteCoreError, "0 or more"),
        ({"preserve": float("inf")}, rc.RewriteCoreError, "finite"),
        ({"preserve": 1, "solver": "projected"}, rc.SolverError, "preserve"),
        ({"solver": "projected", "steps": 0}, rc.RewriteCoreError, "at least one step"),
        ({"solver": "projected", "project_every": 0}, rc.RewriteCoreError, "project_every"),
        ({"method": "pca"}, rc.RewriteCoreError, "choose from"),
    ],
)
def test_bad_options(moment, layer, edit, latents, options, error, words):
    with pytest.raises(error, match=words):
        rc.rewrite(layer, moment, edit, latents, **options)


def test_bad_edits(moment, layer, edit, latents):
    far = rc.Selection(200, edit.copy.mask)
    with pytest.raises(rc.SelectionError, match="200 latents"):
        rc.rewrite(layer, moment, rc.Edit(copy=far, paste=edit.paste), latents)
    with pytest.raises(rc.SelectionError, match="no copy"):
        rc.rewrite(layer, moment, rc.Edit(paste=edit.paste), latents)
    with pytest.raises(rc.SelectionError, match="no paste"):
        rc.rewrite(layer, moment, rc.Edit(copy=edit.copy), latents)
    with pytest.raises(rc.SelectionError, match="at least one"):
        rc.rewrite_many(layer, moment, [], latents)
    tiny = torch.zeros(512, 512)
    tiny[5, 5] = 0.1
    with pytest.raises(rc.MaskError, match="vanishes on a 16x16"):
        rc.rewrite(layer, moment, rc.Edit(copy=rc.Selection(7, tiny), paste=edit.paste), latents)
    with pytest.raises(rc.RewriteCoreError, match="units"):
        rc.erase(layer, moment, edit, latents, units=65)


def test_edits_that_are_no_edits(moment, layer, edit, latents):
    for make in (rc.rewrite, rc.erase, rc.zero):
        with pytest.raises(rc.SelectionError, match="rc.Edit.load"):
            make(layer, moment, "edit.json", latents)
    with pytest.raises(rc.SelectionError, match="a list of edits"):
        rc.rewrite_many(layer, moment, edit, latents)
    assert len(rc.rewrite_many(layer, moment, iter([edit, edit]), latents)) == 2


def test_nan_weights(moment, layer, edit, latents):
    with torch.no_grad():
        layer.parameter[0, 0, 0, 0] = torch.nan
    for make in (rc.rewrite, rc.zero):
        with pytest.raises(rc.NonFiniteError):
            make(layer, moment, edit, latents)


def test_moment_of_another_layer(generator, moment, edit, latents):
    with pytest.raises(rc.MismatchError, match="layer4.conv"):
        rc.rewrite(rc.bind(generator, "layer4.conv"), moment, edit, latents)
    with pytest.raises(rc.MismatchError, match="channels"):
        rc.rewrite(rc.bind(generator, "layer7.conv"), moment, edit, latents)


def test_nan_activations(moment, layer, edit, latents):
    bad = latents.clone()
    bad[edit.paste.index] = torch.nan
    with pytest.raises(rc.NonFiniteError, match="latent 11"):
        rc.rewrite(layer, moment, edit, bad)


def test_seconds_add_up_and_name_the_generators_own(moment, layer, edit, latents, monkeypatch):
    capture = rc.BoundLayer.capture

    def slow(self, latents):
        time.sleep(0.05)
        return capture(self, latents)

    monkeypatch.setattr(rc.BoundLayer, "capture", slow)
    start = time.perf_counter()
    change = rc.rewrite(layer, moment, edit, latents)
    total = time.perf_counter() - start
    assert set(change.seconds) == {"check", "generator", "directions", "goal", "fit"}
    assert 0.9 * total < sum(change.seconds.values()) <= total
    passes = len(edit.keys) + 2
    assert change.seconds["generator"] >= 0.05 * passes and change.seconds["check"] > 0
    assert max(change.seconds[stage] for stage in ("directions", "goal", "fit")) < 0.05 * passes
