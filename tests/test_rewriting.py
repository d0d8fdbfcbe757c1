import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, read_npz, same_bits, solver_of, square, state_bits
from helpers import reference

import rewrite_core as rc
from rewrite_core.adapters.base import Capture
from rewrite_core.edits.goals import paste_goals
from rewrite_core.layers import bound
from rewrite_core.rewrites import solving
from rewrite_core.solvers.lm import solve_lm
from rewrite_core.solvers.problem import LayerProblem, basis_maps, combine, generic_second_moment

STEPS = {"solver": rc.Projected(steps=201)}


def reference_steps(kind, weight, steps=201):
    """The reference's own: steps of 0.05, whatever the weight, and the last one is kept."""
    scale = weight.square().mean().sqrt().item() * (weight.shape[1] ** 0.5 if kind is rc.Adam else 1)
    return kind(steps=steps, lr=0.05 / scale, keep="last")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def curve_error(change, curve):
    losses = torch.tensor(change.losses, dtype=torch.float64)
    assert len(losses) == len(curve)
    return ((losses - curve).abs() / curve).max().item()


# --- the reference implementation's numbers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("projected_rank1", reference.rewrite, STEPS),
        ("projected_rank3", reference.rewrite, STEPS | {"rank": 3}),
        ("lowrankgrad_rank1", reference.rewrite, {"solver": rc.Projected(steps=201, project_gradient=True)}),
        ("noalpha_rank1", reference.rewrite, STEPS | {"blend": "box"}),
        ("erase_rank1", rc.erase, STEPS | {"units": 8}),
    ],
)
def test_golden_curves(golden, golden_moment, layer, edit, latents, name, make, options):
    change = make(layer, golden_moment, edit, latents, **options)
    assert curve_error(change, golden[f"{name}_loss"]) < 0.02
    assert relative(layer.weight + change.weight_delta(), golden[f"{name}_weight"]) < 0.02


@pytest.mark.parametrize(("name", "options"), [("projected_rank1", {}), ("projected_rank3", {"rank": 3})])
def test_golden_curves_from_collection(golden, moment, layer, edit, latents, name, options):
    change = reference.rewrite(layer, moment, edit, latents, **STEPS, **options)
    assert curve_error(change, golden[f"{name}_loss"]) < 0.02
    assert relative(layer.weight + change.weight_delta(), golden[f"{name}_weight"]) < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [("nontight_rank1", STEPS | {"region": "map"}), ("unconstrained", {})],
)
def test_golden_chaotic_curves(golden, golden_moment, layer, edit, latents, name, options):
    """These two trajectories are chaotic in their last bits: the reference itself, run again on another CPU, misses
    its recorded curves by 16 % and 5 % at single steps. The opening, the typical step and the final weight agree."""
    options = options or {"solver": reference_steps(rc.Unconstrained, layer.weight)}
    change = reference.rewrite(layer, golden_moment, edit, latents, **options)
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
        from rewrite_core.adapters.stylegan2 import StyleGAN2Layer
        from rewrite_core.generators.stylegan2 import StyledConv

        data = {
            key[len(kind) + 1 :]: value
            for key, value in read_npz("stylegan2_layer.npz").items()
            if key.startswith(kind)
        }
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
        self.problem = LayerProblem(self.layer, ((capture, goal),), data["directions"])


# measured: at most 0.24 % ("same") and 2.3 % ("up", on 2 of 201 steps; the reference's own sequence of operations, run
# on this CPU, is off by 2.5 % there)
@pytest.mark.parametrize(("kind", "tolerance"), [("same", 0.02), ("up", 0.035)])
def test_golden_stylegan2(kind, tolerance):
    styled = _StyledLayer(kind)
    data = styled.data
    assert (styled.layer.value(styled.problem.regions[0][0]) - data["value"]).abs().max() < 1e-5
    adam = reference_steps(rc.Adam, styled.problem.weight)
    for solver, name in ((rc.Projected(steps=201), "projected"), (adam, "linear")):
        (solution,) = solver.solve([styled.problem])
        curve = data[f"{name}_loss"]
        errors = (torch.tensor(solution.losses, dtype=torch.float64) - curve).abs() / curve
        assert errors.max() < tolerance and errors.quantile(0.95) < 0.02
        weight = styled.problem.weight + combine(solution.coefficients, data["directions"])
        assert relative(weight, data[f"{name}_weight"][0]) < 0.02


@pytest.mark.parametrize("kind", ["same", "up"])
def test_lm_is_at_least_as_good_as_adam_on_stylegan2(kind):
    styled = _StyledLayer(kind)
    lm = solve_lm([styled.problem])[0]
    (adam,) = rc.Adam().solve([styled.problem])
    assert lm.solver == "lm" and lm.final_loss <= 1.01 * adam.final_loss
    # what the solver says is what the layer then does
    weight = styled.problem.weight + combine(lm.coefficients, styled.data["directions"])
    assert styled.problem.distance(weight).item() == pytest.approx(lm.final_loss, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"region": "map"}, {"blend": "box"}])
def test_lm_is_at_least_as_good_as_adam_on_proggan(moment, layer, edit, latents, options):
    lm = reference.rewrite(layer, moment, edit, latents, **options)
    adam = reference.rewrite(layer, moment, edit, latents, solver="adam", **options)
    assert lm.final_loss <= 1.01 * adam.final_loss


def test_lm_is_at_least_as_good_as_adam_on_erasure(moment, layer, edit, latents):
    lm = rc.erase(layer, moment, edit, latents, units=8)
    adam = rc.erase(layer, moment, edit, latents, units=8, solver="adam")
    assert lm.final_loss <= 1.01 * adam.final_loss


# --- what a change is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize("solver", ["lm", "projected", "adam"])
def test_the_change_has_rank_r_and_rows_in_the_span(moment, layer, edit, latents, rank, solver):
    change = reference.rewrite(layer, moment, edit, latents, rank=rank, solver=solver_of(solver, 12))
    rows = change.weight_delta().double().permute(0, 2, 3, 1).reshape(-1, 64)
    values = torch.linalg.svdvals(rows)
    assert (values > 1e-6 * values[0]).sum() <= rank
    directions = change.directions.double()
    assert (rows - rows @ directions.T @ directions).norm() < 1e-6 * rows.norm()
    assert change.rank == rank and change.coefficients.shape == (48, rank, 3, 3)


def test_weights_become_what_the_solver_predicted(moment, layer, edit, latents):
    change = reference.rewrite(layer, moment, edit, latents, region="map")
    (goal,) = paste_goals(layer, edit, latents, region="map")
    with change:
        value = layer.values(latents[edit.paste.index][None])
    assert (value - goal.target).abs().mean().item() == pytest.approx(change.final_loss, rel=1e-5)


def test_closed_form_is_the_least_squares_optimum(moment, layer, edit, latents):
    change = reference.rewrite(layer, moment, edit, latents, loss="l2", rank=2)
    assert change.solver == "closed_form"
    (goal,) = paste_goals(layer, edit, latents)
    problem = LayerProblem(layer, ((goal.capture, goal.target),), change.directions, "l2")
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
            change = reference.rewrite(layer, moment, edit, latents, loss="l2", preserve=preserve)
            with change:
                outcomes.append((change.final_loss, (layer.values(latents[100:140]) - before).square().mean().item()))
    losses, changes = zip(*outcomes)
    assert list(losses) == sorted(losses) and list(changes) == sorted(changes, reverse=True)
    assert changes[-1] < 0.01 * changes[0]


def test_preserve_in_adam_agrees_with_lm(moment, layer, edit, latents):
    options = {"loss": "l2", "preserve": 0.5}
    lm = reference.rewrite(layer, moment, edit, latents, **options)
    adam = reference.rewrite(layer, moment, edit, latents, solver="adam", **options)
    assert adam.final_loss == pytest.approx(lm.final_loss, rel=0.02)


def test_preserve_is_exact_for_one_by_one_layers(latents):
    generator = torch.nn.Sequential(torch.nn.Conv2d(64, 32, 1), torch.nn.Conv2d(32, 8, 1))
    layer = rc.bind(generator, "1", forward=lambda g, z: g(z[:, :, None, None].expand(-1, -1, 3, 3)))
    moment = rc.collect_second_moment(layer, latents, progress=False)
    directions = torch.linalg.qr(torch.randn(32, 2))[0].T
    exact = generic_second_moment(layer, directions, latents, moment.matrix())
    basis = basis_maps(layer, layer.keys(latents), directions)
    rows = basis.double().movedim(1, -1).reshape(-1, 2)
    assert torch.allclose(exact, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-7)


def test_many_edits_equal_one_by_one(moment, layer, edit, latents):
    other = rc.Edit(copy=edit.paste, paste=edit.context[0], context=edit.context[:2])
    many = reference.rewrite_many(layer, moment, [edit, other], latents, rank=2)
    for change, one in zip(many, (edit, other)):
        alone = reference.rewrite(layer, moment, one, latents, rank=2)
        assert torch.allclose(change.coefficients, alone.coefficients, rtol=1e-4, atol=1e-5)
        assert change.edit == one and change.edit.rows


def test_many_edits_take_the_memory_of_a_few(monkeypatch, moment, layer, edit, latents):
    """Once keys and goals of some size are there they are fitted and let go; the bits are those of all at once."""
    others = [rc.Edit(copy=edit.copy, paste=edit.paste, context=edit.context[: 1 + i % 2]) for i in range(12)]
    wanted = rc.rewrite_many(layer, moment, others, latents, region="map")
    goals, most = [], []
    make, fit = solving._problem, solving._solutions

    def alive():
        return sum(each() is not None for each in goals)

    def made(*args):
        problem = make(*args)
        goals.extend(weakref.ref(target) for _, target in problem.regions)
        most.append(alive())
        return problem

    sizes = []
    monkeypatch.setattr(solving, "_problem", made)
    monkeypatch.setattr(solving, "_solutions", lambda *args: sizes.append(len(args[1])) or fit(*args))
    (goal,) = paste_goals(layer, edit, latents, "map")
    monkeypatch.setattr(solving, "TOGETHER", 3 * (goal.capture.key.nbytes + goal.target.nbytes))
    found = rc.rewrite_many(layer, moment, others, latents, region="map")
    assert sizes == [3, 3, 3, 3] and max(most) <= 3 and alive() == 0
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.coefficients, other.coefficients) and one.losses == other.losses
        assert one.edit == other.edit and one.box == other.box and one.seconds.keys() == other.seconds.keys()


@pytest.mark.parametrize("solver", ["lm", "adam", "projected", "unconstrained"])
def test_the_callers_modes_change_nothing(generator, moment, layer, edit, latents, solver):
    def changes():
        made = (
            reference.rewrite(layer, moment, edit, latents, solver=solver_of(solver, 5)),
            rc.zero(layer, moment, edit, latents),
        )
        return (*made, rc.erase(layer, moment, edit, latents, units=8, solver=solver_of(solver, 5)))

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
        again = reference.rewrite(first, moment, edit, latents.clone(), solver=solver_of(solver, 5))
    assert torch.equal(again.coefficients, usual[0].coefficients)
    before = state_bits(made)
    with again.apply(made):
        assert again.applied
    assert same_bits(before, state_bits(made))


def test_no_tf32_while_an_edit_on_a_gpu_is_solved():
    """Whichever names of torch's settings the caller used, both can be read within, and come out as they were."""
    from rewrite_core.rewrites.arithmetic import plain_arithmetic

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = hasattr(matmul, "fp32_precision")
    on = {place: SimpleNamespace(parameter=SimpleNamespace(device=torch.device(place))) for place in ("cpu", "cuda")}

    def state():
        return (matmul.fp32_precision, cudnn.conv.fp32_precision) if newer else (matmul.allow_tf32, cudnn.allow_tf32)

    def older():
        try:
            return matmul.allow_tf32, cudnn.allow_tf32
        except RuntimeError:  # they cannot say what the newer names were set to
            return None

    def settings():
        yield "as they are"
        for matrices, maps in ((True, True), (False, True), (True, False)):
            matmul.allow_tf32, cudnn.allow_tf32 = matrices, maps
            yield "older names"
        if newer:
            matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32", "tf32"
            yield "newer names"
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"
            assert older() is None
            yield "newer names alone"

    was = matmul.allow_tf32, cudnn.allow_tf32, state()
    try:
        for names in settings():
            before, said = state(), older()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")  # there is none here
                with plain_arithmetic(on["cuda"]):
                    assert state() in ([("ieee", "ieee"), ("ieee", "none")] if newer else [(False, False)]), names
                    assert older() == (None if said is None else (False, False)), names
            assert (state(), older()) == (before, said), names
            with plain_arithmetic(on["cpu"]):
                assert state() == before, names
    finally:
        if newer:
            cudnn.rnn.fp32_precision = cudnn.conv.fp32_precision = matmul.fp32_precision = "ieee"
        matmul.allow_tf32, cudnn.allow_tf32 = was[:2]
        if newer:
            matmul.fp32_precision, cudnn.conv.fp32_precision = was[2]


@pytest.mark.parametrize("solver", ["lm", "adam", "projected", "unconstrained"])
def test_a_key_made_in_inference_mode(solver):
    generator = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3, padding=1))
    layer = rc.bind(generator, "0", forward=lambda g, z: g(z.reshape(-1, 5, 4, 4)))
    with torch.inference_mode():
        z = torch.randn(20, 80)
    moment = rc.SecondMoment(5)
    moment.update(torch.randn(40, 5))
    edit = rc.Edit(copy=square(1, 4, 0, 2), paste=square(2, 4, 1, 2))
    for region in ("box", "map"):
        assert reference.rewrite(layer, moment, edit, z, solver=solver_of(solver, 3), region=region).applied is False


def test_many_edits_need_one_pass_over_the_units(monkeypatch, moment, layer, edit, latents):
    calls = []
    collect = solving.collect_unit_quantiles
    monkeypatch.setattr(solving, "collect_unit_quantiles", lambda *a, **k: calls.append(a) or collect(*a, **k))
    many = reference.rewrite_many(layer, moment, [edit] * 3, latents, directions="units")
    assert len(calls) == 1 and len(many) == 3


def test_unconstrained_needs_no_rank_and_no_keys_of_a_context(moment, layer, edit, latents):
    tiny = torch.zeros(512, 512)
    tiny[5, 5] = 0.1  # vanishes on the map: no key is read from it
    bare = rc.Edit(copy=edit.copy, paste=edit.paste, context=[rc.Selection(3, tiny)])
    change = reference.rewrite(layer, moment, bare, latents, solver=rc.Unconstrained(steps=2), rank=1000)
    assert change.coefficients.shape == (48, 64, 3, 3)
    with pytest.raises(rc.SolverError, match="preserve"):
        reference.rewrite(layer, moment, bare, latents, solver="unconstrained", preserve=1.0)


def test_without_context_the_paste_is_the_context(moment, layer, edit, latents):
    bare = rc.Edit(copy=edit.copy, paste=edit.paste)
    explicit = rc.Edit(copy=edit.copy, paste=edit.paste, context=[edit.paste])
    a, b = (reference.rewrite(layer, moment, e, latents) for e in (bare, explicit))
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


def _square_edit(layer, z, top, side=1):
    size = layer.values(z[:1]).shape[2]
    return rc.Edit(
        copy=square(1, size, min(1, size - side), side), paste=square(2, size, top, side), context=[square(3, 8, 0, 8)]
    )


@pytest.mark.parametrize(
    ("conv", "side", "top"),
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
        with pytest.raises(rc.SolverError, match="region='map'"):
            reference.rewrite(layer, moment, edit, z)
        assert reference.rewrite(layer, moment, edit, z, region="map").box is None


@pytest.mark.parametrize(
    ("conv", "side", "box", "key"),
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
    (goal,) = paste_goals(layer, edit, z)
    assert goal.box == box and goal.capture.key.shape[2:] == key
    for part in (goal.target, goal.capture.key):  # no view of a whole map
        assert part.untyped_storage().nbytes() == part.numel() * 4
    whole = paste_goals(layer, edit, z, region="map")[0].target
    assert torch.allclose(goal.target, whole[:, :, box[0] : box[2], box[1] : box[3]], atol=1e-6)
    assert reference.rewrite(layer, moment, edit, z).box == box


def test_the_whole_map_is_a_crop_of_any_layer():
    layer, moment, z = _one_layer(torch.nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), 4)
    edit = _square_edit(layer, z, 0, side=4)
    whole, tight = (reference.rewrite(layer, moment, edit, z, loss="l2", region=region) for region in ("map", "box"))
    assert torch.equal(whole.coefficients, tight.coefficients)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"solver": "newton"}, rc.SolverError, "choose from"),
        ({"loss": "l3"}, rc.RewriteCoreError, "loss must be 'l1' or 'l2'"),
        ({"rank": 65}, rc.RankError, "64 channels"),
        ({"preserve": -1}, rc.RewriteCoreError, "at least 0"),
        ({"preserve": float("inf")}, rc.RewriteCoreError, "preserve must be a number"),
        ({"preserve": "0.3"}, rc.ArgumentError, "preserve must be a number"),
        ({"preserve": True}, rc.ArgumentError, "preserve must be a number"),
        ({"region": "yes"}, rc.RewriteCoreError, "region must be 'box' or 'map'"),
        ({"region": False}, rc.ArgumentError, "region must be 'box' or 'map'"),
        ({"blend": "alpha"}, rc.RewriteCoreError, "blend must be 'mask' or 'box'"),
        ({"preserve": 1, "solver": "projected"}, rc.SolverError, "preserve"),
        ({"solver": "adamw"}, rc.SolverError, "choose from"),
        ({"directions": "pca"}, rc.RewriteCoreError, "directions must be"),
    ],
)
def test_bad_options(moment, layer, edit, latents, options, error, words):
    with pytest.raises(error, match=words):
        reference.rewrite(layer, moment, edit, latents, **options)


def test_bad_edits(moment, layer, edit, latents):
    far = rc.Selection(200, edit.copy.mask)
    with pytest.raises(rc.SelectionError, match="200 latents"):
        reference.rewrite(layer, moment, rc.Edit(copy=far, paste=edit.paste), latents)
    with pytest.raises(rc.SelectionError, match="no copy"):
        reference.rewrite(layer, moment, rc.Edit(paste=edit.paste), latents)
    with pytest.raises(rc.SelectionError, match="no paste"):
        reference.rewrite(layer, moment, rc.Edit(copy=edit.copy), latents)
    with pytest.raises(rc.SelectionError, match="at least one"):
        reference.rewrite_many(layer, moment, [], latents)
    tiny = torch.zeros(512, 512)
    tiny[5, 5] = 0.1
    with pytest.raises(rc.MaskError, match="vanishes on a 16x16"):
        reference.rewrite(layer, moment, rc.Edit(copy=rc.Selection(7, tiny), paste=edit.paste), latents)
    with pytest.raises(rc.RewriteCoreError, match="units"):
        rc.erase(layer, moment, edit, latents, units=65)


def test_edits_that_are_no_edits(moment, layer, edit, latents):
    for make in (reference.rewrite, rc.erase, rc.zero):
        with pytest.raises(rc.SelectionError, match="rc.Edit.load"):
            make(layer, moment, "edit.json", latents)
    with pytest.raises(rc.SelectionError, match="a list of edits"):
        reference.rewrite_many(layer, moment, edit, latents)
    assert len(reference.rewrite_many(layer, moment, iter([edit, edit]), latents)) == 2


def test_what_is_given_is_told_apart(generator, moment, layer, edit, latents):
    for make, arguments, words in (
        (reference.rewrite, (generator, moment, edit, latents), "rc.bind.*not the generator"),
        (rc.erase, ("layer5.conv", moment, edit, latents), "rc.bind.*not str"),
        (rc.zero, (layer, moment.matrix(), edit, latents), "rc.collect_second_moment.*not Tensor"),
        (reference.rewrite, (layer, moment, edit, latents.numpy()), "latents must be a torch tensor"),
        (rc.search, (layer, moment, edit, latents), "an rc.Selection or a key, not Edit"),
        (rc.context_keys, (layer, edit, latents), "edit.where"),
        (rc.context_directions, (moment, latents.numpy()), "floating-point tensor"),
        (rc.context_directions, (moment.matrix(), latents), "rc.collect_second_moment"),
        (rc.insert, (layer, moment, [[1.0]], latents), "keys must be a floating-point tensor"),
    ):
        with pytest.raises(TypeError, match=words):
            make(*arguments)
    with pytest.raises(rc.SelectionError, match="mark at least one"):
        rc.context_keys(layer, [], latents)
    with pytest.raises(rc.RewriteCoreError, match="no latents"):
        rc.collect_unit_quantiles(layer, latents[:0])
    with pytest.raises(rc.RewriteCoreError, match="amount"):
        rc.zero(layer, moment, edit, latents, amount=float("nan"))
    with pytest.raises(rc.RewriteCoreError, match="units must be an integer"):
        rc.erase(layer, moment, edit, latents, units=2.5)


def test_nan_weights(moment, layer, edit, latents):
    with torch.no_grad():
        layer.parameter[0, 0, 0, 0] = torch.nan
    for make in (reference.rewrite, rc.zero):
        with pytest.raises(rc.NonFiniteError):
            make(layer, moment, edit, latents)


def test_moment_of_another_layer(generator, moment, edit, latents):
    with pytest.raises(rc.MismatchError, match="layer4.conv"):
        reference.rewrite(rc.bind(generator, "layer4.conv"), moment, edit, latents)
    with pytest.raises(rc.MismatchError, match="channels"):
        reference.rewrite(rc.bind(generator, "layer7.conv"), moment, edit, latents)


def test_nan_activations(moment, layer, edit, latents):
    bad = latents.clone()
    bad[edit.paste.index] = torch.nan
    bare = rc.Edit(edit.copy, edit.paste, edit.context)  # which does not know that these are others
    with pytest.raises(rc.NonFiniteError, match="latent 11"):
        reference.rewrite(layer, moment, bare, bad)


def test_seconds_add_up_and_name_the_generators_own(moment, layer, edit, latents, monkeypatch):
    run_to = bound.run_to

    def slow(layers, latents, consume):
        time.sleep(0.05)
        return run_to(layers, latents, consume)

    monkeypatch.setattr(bound, "run_to", slow)
    start = time.perf_counter()
    change = reference.rewrite(layer, moment, edit, latents)
    total = time.perf_counter() - start
    assert set(change.seconds) == {"check", "generator", "directions", "goal", "fit"}
    assert 0.9 * total < sum(change.seconds.values()) <= total
    passes = len(edit.where) + 2
    assert change.seconds["generator"] >= 0.05 * passes and change.seconds["check"] > 0
    assert max(change.seconds[stage] for stage in ("directions", "goal", "fit")) < 0.05 * passes
