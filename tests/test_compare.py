"""Baselines, and the comparison with them."""

import pytest
import torch
from helpers import small

import rewrite_core as rc
from rewrite_core.evaluation.comparing import TUNED, WAYS, comparison_table


@pytest.fixture(scope="module")
def bound():
    made = small.generator()
    layer = rc.bind(made, small.LAYER)
    return layer, rc.collect_second_moment(layer, small.Z, batch_size=16, progress=False)


def test_fine_tuning_nears_its_goals_and_leaves_the_generator_alone(bound):
    layer, _ = bound
    generator, before = layer.generator, small.bits(layer.generator)
    goals = rc.preview(layer, small.EDIT, small.Z)
    rows, others = small.Z[[1]], small.Z[10:30]
    plain = rc.fine_tune(generator, rows, goals, stops=(5, 40))
    held = rc.fine_tune(generator, rows, goals, ordinary=others, preserve=20.0, stops=(40,))[0]
    assert [each.steps for each in plain] == [5, 40] and len(plain[1].losses) == 40
    assert small.same(before, generator) and not any(each.requires_grad for each in plain[0].generator.parameters())
    with torch.no_grad():
        away = [(each.generator(rows) - goals).abs().mean().item() for each in (*plain, held)]
        moved = [(each.generator(others) - generator(others)).abs().mean().item() for each in (*plain, held)]
        first = (generator(rows) - goals).abs().mean().item()
    assert plain[1].losses[0] == pytest.approx(first, rel=1e-5) and plain[1].losses[:5] == plain[0].losses
    assert away[1] < away[0] < first and away[1] < 0.7 * first
    assert moved[2] < 0.8 * moved[1]


def test_steps_of_fine_tuning_are_in_parts_of_each_parameter():
    """In other units of a weight and of the next one the pictures are the same, and so are the steps."""
    usual, scaled = small.generator(), small.generator()
    with torch.no_grad():  # through the ReLU between them
        for module, factor in ((scaled[1], 4.0), (scaled[4], 1 / 4)):
            module.weight.mul_(factor)
        scaled[1].bias.mul_(4.0)
    goals = torch.zeros_like(usual(small.Z[:2]))
    one, two = (rc.fine_tune(each, small.Z[:2], goals, stops=(4,))[0].losses for each in (usual, scaled))
    assert one[-1] < one[0] and two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0}, "lr"),
        ({"stops": ()}, "at least one"),
        ({"preserve": -1}, "preserve"),
        ({"goals": 1}, "goals must be"),
    ],
)
def test_bad_arguments_of_fine_tuning(change, words):
    made = small.generator()
    goals = torch.zeros(1, 3, 4, 4) if "goals" in change else torch.zeros_like(made(small.Z[:1]))
    options = {name: value for name, value in change.items() if name != "goals"}
    with pytest.raises(rc.RewriteCoreError, match=words):
        rc.fine_tune(made, small.Z[:1], goals, **options)


@pytest.mark.filterwarnings("ignore")
def test_every_way_is_measured_on_the_same_pictures(bound):
    layer, moment = bound
    before = small.bits(layer.generator)
    found = rc.compare(layer, moment, small.EDIT, small.Z, rank=2, ways=("ours, value", "Lambda without direction"))
    ours, random = found
    alone = rc.rewrite(
        layer, moment, small.EDIT, small.Z, rank=2, region="map", loss="l2", objective="value", preserve=0.0
    )
    assert ours.report.to_dict() == rc.measure(alone, small.EDIT, small.Z, moment=moment).to_dict()
    assert random.report.matching == ours.report.matching and random.report.unrelated != ours.report.unrelated
    rest = rc.compare(layer, moment, small.EDIT, small.Z, rank=2, ways=("30 units zeroed", "fine-tuned"))
    assert rest[0].stopped is None and rest[1].stopped in (10, 25, 50, 100, 200) and rest[1].report.size is None
    table = comparison_table([*found, *rest]).splitlines()
    assert len(table) == 5 and table[0].split()[:3] == ["way", "verdict", "reach"]
    assert small.same(before, layer.generator)
    with pytest.raises(rc.RewriteCoreError, match="each of ways"):
        rc.compare(layer, moment, small.EDIT, small.Z, ways=("magic",))
    assert len(WAYS) == 10 and len(TUNED) == 2
