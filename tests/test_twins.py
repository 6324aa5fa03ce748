"""Tests of hard scenes: families that differ in one fact, reproducible everywhere."""

from dataclasses import astuple, fields

import numpy as np
import pytest

from ieft.data.hard_scenes import FAMILY, draw_twin, plan_twins, vary_line, vary_things
from ieft.data.scenes import KINDS, Plan, Thing


@pytest.fixture(scope="module")
def families():
    return [plan_twins(np.random.default_rng([0, family])) for family in range(200)]


def facts(plan):
    """The facts of a plan that a sentence can name."""
    said = {"ground": plan.ground, "sea": plan.sea}
    for place, thing in enumerate(plan.things):
        said |= {f"{field.name} {place}": value for field, value in zip(fields(thing), astuple(thing), strict=True)}
    if plan.line:
        said |= {field.name: value for field, value in zip(fields(plan.line), astuple(plan.line), strict=True)}
    return said


def test_twins_show_the_same_things_and_differ_in_one_fact(families):
    for first, *twins in families:
        assert len({first, *twins}) == FAMILY
        for twin in twins:
            before, after = facts(first), facts(twin)
            changed = {name for name in before if before[name] != after[name]}
            assert before.keys() == after.keys() and not any(name.startswith("kind") for name in changed)
            exchanged = changed in ({"count 0", "count 1"}, {"colour 0", "colour 1"})
            assert len(changed) == 1 or exchanged
            if exchanged:
                name, other = sorted(changed)
                assert (before[name], before[other]) == (after[other], after[name])


def test_every_kind_of_fact_is_changed_somewhere(families):
    changed = set()
    for first, *twins in families:
        for twin in twins:
            changed |= {name for name, value in facts(first).items() if facts(twin)[name] != value}
    assert {"ground", "sea", "curved", "colour", "bridge", "count 0", "count 1", "colour 0", "colour 1"} <= changed


def test_no_thing_is_given_what_its_kind_has_not(families):
    for thing in (thing for family in families for plan in family for thing in plan.things):
        kind = KINDS[thing.kind]
        assert thing.count in kind.counts and (thing.colour in kind.colours or not kind.colours and not thing.colour)


def test_two_things_exchange_counts_only_where_both_come_so():
    plan = Plan("meadow", (Thing("tank", 2, "red"), Thing("house", 3, "red")))
    assert Plan("meadow", (Thing("tank", 3, "red"), Thing("house", 2, "red"))) in vary_things(plan)
    lone = Plan("meadow", (Thing("tank", 3, "red"), Thing("stadium", 1, "white")))
    assert all(plan.things[1].count == 1 for plan in vary_things(lone))
    assert vary_line(plan) == []


def test_a_twin_hangs_on_seed_and_index_alone():
    scenes = [draw_twin(0, index) for index in (5, 6, 5)]
    assert scenes[0].image.tobytes() == scenes[2].image.tobytes() != scenes[1].image.tobytes()
    assert scenes[0].captions == scenes[2].captions != scenes[1].captions
    assert draw_twin(1, 5).captions != scenes[0].captions
    assert scenes[0].image.size == (96, 96) and draw_twin(0, 5, size=48).image.size == (48, 48)


def test_sentences_name_every_fact():
    for index in range(0, 40):
        plan = plan_twins(np.random.default_rng([0, index // FAMILY, 3]))[index % FAMILY]
        for caption in draw_twin(0, index).captions:
            for thing in plan.things:
                kind = KINDS[thing.kind]
                assert (kind.singular if thing.count == 1 else kind.plural) in caption
                assert thing.colour is None or thing.colour in caption
            assert plan.line is None or (plan.line.kind in caption and ("bridge" in caption) == plan.line.bridge)
