"""A change: applied, reverted, saved and loaded, bit for bit."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from conftest import relative, same_bits, solver_of, square, state_bits
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.files import save_record
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.layers import memory
from rewrite_core.rewrites import stack


@pytest.fixture
def changes(moment, layer, edit, latents):
    other = rc.Edit(copy=edit.paste, paste=edit.context[0])
    return reference.rewrite_many(layer, moment, [edit, other], latents)


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
        second = reference.rewrite(layer, moment, rc.Edit(copy=edit.paste, paste=edit.context[0]), latents)
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
        with reference.rewrite(sixth, moment6, edit, latents):
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
    change = reference.rewrite(layer, moment, edit, latents, rank=3, solver=solver_of(solver, 5))
    path = tmp_path / "rule.safetensors"
    change.save(path)
    copied = copy.deepcopy(generator)
    loaded = rc.Rewrite.load(path).apply(copied)
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
    change = reference.rewrite(layer, moment, edit, latents).apply()
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
    assert b"rewrite_core." not in data.replace(b"rewrite_core.generators", b"")


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
    rc.Rewrite.load(path).apply(generator)
    applied = state_bits(generator)
    for again in (rc.Rewrite.load(path), changes[0], copy.deepcopy(changes[0])):
        with pytest.raises(rc.MismatchError, match="already"):
            again.apply(generator)
    assert same_bits(applied, state_bits(generator))
    rc.Rewrite.load(path).revert(generator)


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


def test_a_weight_that_became_computed_is_not_reverted(generator, layer, changes):
    before = state_bits(generator)
    changes[0].apply()
    torch.nn.utils.parametrizations.spectral_norm(generator.layer5.conv)
    used = layer.weight.clone()
    for force in False, True:  # what would be written to a computed weight is lost
        with pytest.raises(rc.MismatchError, match="take that off first"):
            changes[0].revert(force=force)
    assert torch.equal(layer.weight, used) and changes[0].applied
    torch.nn.utils.parametrize.remove_parametrizations(generator.layer5.conv, "weight", leave_parametrized=False)
    changes[0].revert()
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
    generator = torch.nn.Sequential(
        torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1)
    )
    generator[2].weight = generator[0].weight
    before = state_bits(generator)
    texture = torch.randn(1, 64, 8, 8)
    edit = rc.Edit(copy=square(1, 8, 1, 4), paste=square(2, 8, 3, 4))
    changes = []
    for name in "0", "2":
        layer = rc.bind(generator, name, forward=lambda g, z: g(z[:, :, None, None] * texture))
        moment = rc.collect_second_moment(layer, latents, progress=False)
        changes.append(reference.rewrite(layer, moment, edit, latents, region="map").apply())
    with pytest.raises(rc.MismatchError, match="shared with '2'"):
        changes[0].revert()
    changes[1].revert()
    changes[0].revert()
    assert same_bits(before, state_bits(generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(generator, edit, latents, dtype):
    layer = rc.bind(generator.to(dtype), "layer5.conv")
    moment = rc.collect_second_moment(layer, latents, progress=False)
    change = reference.rewrite(layer, moment, edit, latents, rank=2)
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
    combine = stack.combine
    monkeypatch.setattr(stack, "combine", lambda *args: calls.append(args) or combine(*args))
    many = [
        rc.Rewrite(one.layer, one.directions, one.coefficients * 0.1 * i, one.fitted_to, "lm") for i in range(1, 13)
    ]
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
        rc.Rewrite.load(path).apply()
    with torch.no_grad():
        generator.layer5.conv.weight[0, 0, 0, 0] += 1
    weight = generator.layer5.conv.weight.detach().clone()
    with pytest.raises(rc.MismatchError, match="force=True"):
        rc.Rewrite.load(path).apply(generator)
    assert torch.equal(generator.layer5.conv.weight, weight)
    with pytest.raises(rc.MismatchError, match="float16 now.*another precision"):
        rc.Rewrite.load(path).apply(copy.deepcopy(generator).half())
    rc.Rewrite.load(path).apply(generator, force=True)
    assert not torch.equal(generator.layer5.conv.weight, weight)
    with pytest.raises(rc.UnknownLayerError):
        rc.Rewrite.load(path).apply(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))
    with pytest.raises(rc.MismatchError, match="shape"):
        rc.Rewrite.load(path).apply(ProgGAN([8, 8, 8, 8]))


def test_truncated_and_foreign_rewrite_files(tmp_path, moment, changes):
    path = tmp_path / "rule.safetensors"
    changes[0].save(path)
    data = path.read_bytes()
    assert len(data) < 40_000
    for size in (0, 8, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(rc.FileFormatError, match="truncated"):
            rc.Rewrite.load(tmp_path / "cut.safetensors")
    moment.save(tmp_path / "moment.safetensors")
    with pytest.raises(rc.FileFormatError, match="not a rewrite_core rewrite"):
        rc.Rewrite.load(tmp_path / "moment.safetensors")
    with pytest.raises(FileNotFoundError):
        rc.Rewrite.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": 3},
        {"loss": ["a"]},
        {"layer": 5},
        {"fitted_to": None},
        {"solver": ["lm"]},
        {"edit": 3},
        {"edit": "{bad"},
        {"groups": "2"},
    ],
)
def test_rewrite_files_with_wrong_metadata(tmp_path, changes, wrong):
    path = tmp_path / "rule.safetensors"
    tensors = {"directions": changes[0].directions, "coefficients": changes[0].coefficients}
    good = {"layer": "layer5.conv", "fitted_to": "", "solver": "lm", "loss": [], "edit": None}
    save_record(path, "rewrite", 1, tensors, good)
    assert rc.Rewrite.load(path).final_loss is None
    for metadata in (good | wrong, list(good), 5):
        save_record(path, "rewrite", 1, tensors, metadata)
        with pytest.raises(rc.FileFormatError, match="rule.safetensors"):
            rc.Rewrite.load(path)
    save_record(path, "rewrite", 1, {name: part.long() for name, part in tensors.items()}, good)
    with pytest.raises(rc.FileFormatError, match="floating-point"):
        rc.Rewrite.load(path)


def test_a_forced_state_dict_leaves_other_changes_on_record(generator, layer, changes):
    before = state_bits(generator)
    changes[0].apply()
    layer.parameter.data.add_(1e-3)
    touched = state_bits(generator)
    changes[1].state_dict(generator, force=True)
    assert same_bits(touched, state_bits(generator))
    changes[0].revert(force=True)
    assert same_bits(before, state_bits(generator))


def test_a_large_weight_is_changed_in_blocks(monkeypatch):
    """To the bit what a whole would be at rank 1, and nearly at others; its size and overflow are seen, too."""
    generator = nn.Sequential(nn.Conv2d(24, 33, 3)).eval()
    layer = rc.bind(generator, "0")
    random = torch.Generator().manual_seed(0)
    for rank in (1, 5):
        directions = torch.linalg.qr(torch.randn(24, rank, generator=random))[0].T.contiguous()
        coefficients = torch.randn(33, rank, 3, 3, generator=random)
        fitted = layer.weight_fingerprint(layer.weight)
        whole = rc.Rewrite("0", directions, coefficients, fitted, "lm", bound=layer)
        delta, size = whole.weight_delta(), whole.size
        with monkeypatch.context() as patched:
            patched.setattr(memory.blocks, "__defaults__", (4 * 24 * 9 * 2,))
            assert [*memory.blocks(delta)][:2] == [slice(0, 2), slice(2, 4)]
            change = rc.Rewrite("0", directions, coefficients, fitted, "lm", bound=layer)
            assert change.size == pytest.approx(size, rel=1e-14)
            own = change.weight_delta()
            assert torch.equal(own, delta) or (rank > 1 and relative(own, delta) < 1e-7)
            before = layer.weight.clone()
            with change:
                assert torch.equal(layer.weight, before + change.weight_delta())
            assert torch.equal(layer.weight, before)
            huge = rc.Rewrite("0", directions, 3e38 * coefficients, fitted, "lm", bound=layer)
            with pytest.raises(rc.NonFiniteError):
                huge.apply()
            assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (7, 100), (1, 10**3), (3, 0)])
def test_blocks_are_all_of_a_tensor(shape):
    for most in (1, 8, 200, 10**6):
        rows = [row for block in memory.blocks(torch.zeros(shape), most) for row in range(shape[0])[block]]
        assert rows == [*range(shape[0])]
