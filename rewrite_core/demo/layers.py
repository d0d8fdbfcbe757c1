"""Measure every layer for every demo edit: ``python -m rewrite_core.demo.layers``.

Scored on other latents than the demo reports on, so that the choice is not made on its own test.
"""

from __future__ import annotations

import argparse

from ..demo import chapels, load_edit
from ..errors import RewriteCoreError
from ..files import to_json
from ..layers.binding import bind
from ..layers.latents import sample_latents
from ..layers.listing import list_layers
from ..pictures import paint
from ..rewrites.calls import rewrite
from ..statistics.collection import collect_second_moment
from .generator import ARCHITECTURES, load_chapels
from .rules import RULES, score
from .run import EDIT_LATENTS, EDIT_SEED, OPTIONS
from .world import LATENT_SIZE

_CHOICE_SEED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="written by rewrite_core.demo.training; default: the shipped ones")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="proggan", help="of --weights")
    parser.add_argument("--layers", nargs="+", help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--preserve", type=float, nargs="+", default=[0.0])
    parser.add_argument("--loss", default=OPTIONS["loss"])
    parser.add_argument("--region", default=OPTIONS["region"], help="box: fit the pasted box, as the reference does")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--json", help="also write one JSON line per row here")
    options = parser.parse_args()
    generator = load_chapels(options.weights, options.architecture) if options.weights else chapels()
    latents = sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
    unseen = sample_latents(LATENT_SIZE, options.scenes, seed=_CHOICE_SEED)
    before = paint(generator, unseen)
    print("edit        layer                        rank preserve efficacy completed collateral unrelated")
    for info in list_layers(generator, latents):
        if info.name not in options.layers if options.layers else len(info.value_size) != 2:
            continue  # the mapping network has no map for an edit's masks
        layer = bind(generator, info.name)
        moment = collect_second_moment(layer, latents, batch_size=50, progress=False)
        for rule in RULES.values():
            for rank in options.ranks:
                for preserve in options.preserve:
                    try:
                        change = rewrite(
                            layer,
                            moment,
                            load_edit(rule.name),
                            latents,
                            rank=rank,
                            preserve=preserve,
                            loss=options.loss,
                            region=options.region,
                        )
                    except RewriteCoreError as error:
                        print(f"{rule.name:11} {info.name:28} {rank:4} {preserve:8g} {error}")
                        continue
                    with change:
                        result = score(rule, before, paint(generator, unseen), unseen)
                    print(
                        f"{rule.name:11} {info.name:28} {rank:4} {preserve:8g} {result.efficacy:8.3f} "
                        f"{result.completed:9.3f} {result.collateral:10.4f} {result.collateral_unrelated:9.4f}",
                        flush=True,
                    )
                    if options.json:
                        row = {"edit": rule.name, "layer": info.name, "rank": rank, "preserve": preserve}
                        with open(options.json, "a", encoding="utf-8") as file:
                            file.write(to_json(row | vars(result)) + "\n")


if __name__ == "__main__":
    main()
