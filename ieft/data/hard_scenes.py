"""Synthetic scenes with hard negatives: families of scenes that differ from one another in one fact each.

A family is a plan and its variants with one fact changed: a count, a colour, the ground, the bend or the bridge of a
line, or which of two things has which count or colour. Each variant is drawn anew, so that only the facts tell them
apart, and its sentences name every fact.
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from ieft.data.scenes import GROUNDS, KINDS, WATERS, Scene, describe_plan, draw_plan, plan_scene

FAMILY = 4  # scenes of consecutive indices
SPLITS = {"train": 4000, "validation": 200, "test": 1000}
MOST_GROUNDS = 1  # scenes on another ground, the easiest difference to see


def draw_twin(seed, index, *, size=96):
    """The scene of one index: the same pixels and sentences on every call, in any order and any process."""
    family, member = divmod(index, FAMILY)
    plan = plan_twins(np.random.default_rng([seed, family, 3]))[member]
    image = draw_plan(plan, np.random.default_rng([seed, index, 4]))
    captions = describe_plan(plan, np.random.default_rng([seed, index, 5]), num_brief=0)
    return Scene(image.resize((size, size), Image.Resampling.LANCZOS), captions)


def plan_twins(generator):
    """`FAMILY` plans, all different, of which the others differ from the first in one fact."""
    while True:
        plan = plan_scene(generator)
        changes = [changed for changed in vary_things(plan) + vary_line(plan) if changed != plan]
        if len(changes) >= FAMILY - 1 - MOST_GROUNDS:
            break
    grounds = [replace(plan, ground=ground) for ground in GROUNDS if ground != plan.ground]
    changes += [grounds[row] for row in generator.permutation(len(grounds))[:MOST_GROUNDS]]
    chosen = generator.permutation(len(changes))[: FAMILY - 1]
    return [plan, *(changes[row] for row in chosen)]


def vary_things(plan):
    """All plans with another count or colour of one thing, or with those of two things exchanged."""
    plans = []
    for place, thing in enumerate(plan.things):
        kind = KINDS[thing.kind]
        others = [replace(thing, count=count) for count in kind.counts] + [
            replace(thing, colour=colour) for colour in kind.colours
        ]
        plans += [
            replace(plan, things=(*plan.things[:place], other, *plan.things[place + 1 :]))
            for other in others
            if other != thing
        ]
    return plans + _exchange(plan)


def _exchange(plan):
    """The plans with the counts, or the colours, of the two things exchanged, where both kinds allow it."""
    if len(plan.things) < 2:
        return []
    first, second = plan.things
    kinds = KINDS[first.kind], KINDS[second.kind]
    plans = []
    if first.count != second.count and second.count in kinds[0].counts and first.count in kinds[1].counts:
        plans.append((replace(first, count=second.count), replace(second, count=first.count)))
    if first.colour != second.colour and second.colour in kinds[0].colours and first.colour in kinds[1].colours:
        plans.append((replace(first, colour=second.colour), replace(second, colour=first.colour)))
    return [replace(plan, things=things) for things in plans]


def vary_line(plan):
    """All plans with another bend, colour or bridge of the line, or another sea."""
    if plan.sea:
        return [replace(plan, sea=sea) for sea in ("blue", "green") if sea != plan.sea]
    if plan.line is None:
        return []
    lines = [replace(plan.line, curved=not plan.line.curved)]
    if plan.line.kind == "river":
        lines += [replace(plan.line, colour=colour) for colour in WATERS if colour != plan.line.colour]
        lines += [replace(plan.line, bridge=not plan.line.bridge)]
    return [replace(plan, line=line) for line in lines]
