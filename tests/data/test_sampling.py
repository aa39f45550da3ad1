from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.data.sampling import SlicePlan, StepSampler

SLICES = np.array([(case, z) for case, count in enumerate((5, 7, 3)) for z in range(count)])
BY_ORGAN = {1: np.array([(0, 1), (0, 2), (2, 0)]), 4: np.array([(1, 6)])}


def plan(batch_size: int = 8, seed: int = 0, **options) -> SlicePlan:
    return SlicePlan(**{"slices": SLICES, "by_organ": BY_ORGAN, "batch_size": batch_size, "seed": seed, **options})


def batch(plan: SlicePlan, step: int) -> list[tuple[int, int]]:
    return [(draw.case, draw.z) for draw in (plan.draw(step, position) for position in range(plan.batch_size))]


@pytest.mark.parametrize(("batch_size", "walked"), [(8, 4), (7, 4), (2, 1)])
def test_half_of_a_batch_walks_and_half_draws_by_organ(batch_size, walked):
    order = plan(batch_size)
    assert order.walked == walked
    shown = {tuple(row) for table in BY_ORGAN.values() for row in table.tolist()}
    for step in range(40):
        assert set(batch(order, step)[walked:]) <= shown


@given(st.integers(2, 9), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_every_pass_shows_every_slice_exactly_once(batch_size, seed, phase):
    order = plan(batch_size, seed, phase=phase)
    walk = [place for step in range(60) for place in batch(order, step)[: order.walked]]
    passes = [walk[start : start + 15] for start in range(0, len(walk) - 14, 15)]
    assert passes
    for one in passes:
        assert sorted(one) == sorted(map(tuple, SLICES.tolist()))
    assert len({tuple(one) for one in passes}) == len(passes)  # each in another order


def test_without_any_organ_all_positions_walk():
    order = plan(by_organ={})
    assert order.walked == 8
    assert sorted([*batch(order, 0), *batch(order, 1)][:15]) == sorted(map(tuple, SLICES.tolist()))


def test_organs_are_drawn_alike_however_many_slices_show_them():
    order = plan()
    drawn = Counter(place for step in range(500) for place in batch(order, step)[4:])
    assert drawn[(1, 6)] / 2000 == pytest.approx(1 / 2, abs=0.05)  # organ 2 has one slice, organ 1 has three
    for place in ((0, 1), (0, 2), (2, 0)):
        assert drawn[place] / 2000 == pytest.approx(1 / 6, abs=0.04)


def test_a_batch_of_one_walks_and_draws_by_organ_in_turns():
    order = plan(1)
    draws = [order.draw(step, 0) for step in range(60)]
    assert [draw.organ is None for draw in draws] == [True, False] * 30
    walk = [(draw.case, draw.z) for draw in draws[::2]]
    assert sorted(walk[:15]) == sorted(walk[15:]) == sorted(map(tuple, SLICES.tolist()))
    assert all(plan(1, by_organ={}).draw(step, 0).organ is None for step in range(4))


def test_a_draw_says_for_which_organ_it_was_made():
    order = plan()
    for step in range(20):
        for position in range(8):
            draw = order.draw(step, position)
            if position < order.walked:
                assert draw.organ is None
            else:
                assert (draw.case, draw.z) in set(map(tuple, BY_ORGAN[draw.organ].tolist()))


def test_a_draw_is_a_function_of_seed_phase_step_and_position():
    first, again = plan(), plan()
    forwards = {(s, p): first.draw(s, p) for s in range(6) for p in range(8)}
    for s, p in reversed(list(forwards)):  # in any order
        draw = again.draw(s, p)
        assert (draw.case, draw.z) == (forwards[s, p].case, forwards[s, p].z)
        assert draw.rng.integers(2**60) == forwards[s, p].rng.integers(2**60)


@pytest.mark.parametrize("other", [{"seed": 1}, {"phase": 1}])
def test_another_seed_or_phase_is_another_order(other):
    one, two = plan(), plan(**other)
    assert [batch(one, step) for step in range(4)] != [batch(two, step) for step in range(4)]
    assert one.draw(0, 0).rng.integers(2**60) != two.draw(0, 0).rng.integers(2**60)


def test_every_sample_has_its_own_generator():
    order = plan()
    numbers = {order.draw(step, position).rng.integers(2**60) for step in range(20) for position in range(8)}
    assert len(numbers) == 160


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_of_any_world_share_one_global_batch(world):
    ranks = [list(StepSampler(5, 8, rank, world)) for rank in range(world)]
    for step in range(5):
        shares = [rank[step] for rank in ranks]
        assert {len(share) for share in shares} == {8 // world}
        assert sorted(key for share in shares for key in share) == [(step, position) for position in range(8)]
        for share in shares:  # nobody gets only walked or only drawn ones
            if world < 8:
                assert sum(position < 4 for _, position in share) == len(share) / 2


def test_a_sampler_starts_where_it_is_told():
    whole, rest = StepSampler(6, 4), StepSampler(6, 4)
    rest.start = 4
    assert list(rest) == list(whole)[4:]
    assert list(rest) == list(whole)[4:]  # and again
    rest.start = 6
    assert list(rest) == []
    assert len(whole) == 6
