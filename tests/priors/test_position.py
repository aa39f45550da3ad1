"""Where an organ is taken to be: the largest piece, corrected by references (METHOD.md 2.3)."""

import numpy as np

from organseg.priors import Reference, coarse_centre, corrected_centre, drawn

SHIFT = (4, 4, 4)


def ball(shape, centre, radius) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return ((grid - np.array(centre)) ** 2).sum(axis=-1) <= radius**2


def reference(name: str = "a/b", radius: float = 5) -> Reference:
    n = 2 * int(radius) + 1
    return Reference(name, ball((n, n, n), [int(radius)] * 3, radius))


def test_the_largest_piece_is_the_organ():
    probs = 0.9 * ball((30, 30, 30), (10, 10, 10), 5) + 0.8 * ball((30, 30, 30), (25, 25, 25), 2)
    low, high = coarse_centre(probs)
    assert low.tolist() == [5, 5, 5] and high.tolist() == [16, 16, 16]


def test_pieces_that_touch_at_a_corner_are_one():
    probs = np.zeros((2, 2, 4))
    probs[0, 0, 0] = probs[1, 1, 1] = 0.5
    assert [edge.tolist() for edge in coarse_centre(probs)] == [[0, 0, 0], [2, 2, 2]]


def test_nothing_found_is_no_position():
    assert coarse_centre(np.full((3, 3, 3), 0.49)) is None


def test_what_is_missing_of_an_organ_is_made_up_for():
    organ = ball((40, 40, 40), (20, 18, 22), 5)
    probs = 0.95 * organ
    probs[:18] = 0  # the lower part was not found
    coarse = coarse_centre(probs)
    assert (coarse[0] + coarse[1] - 1)[0] / 2 == 21.5
    assert corrected_centre(probs, coarse, [reference()], SHIFT).tolist() == [20, 18, 22]
    assert corrected_centre(probs, coarse, [], SHIFT).tolist() == [21.5, 18, 22]


def test_what_touches_the_organ_does_not_move_it():
    probs = 0.95 * ball((40, 40, 40), (20, 18, 22), 5)
    probs[20, 18, 27:34] = 0.9
    coarse = coarse_centre(probs)
    assert (coarse[0] + coarse[1] - 1)[2] / 2 == 25
    assert corrected_centre(probs, coarse, [reference()], SHIFT).tolist() == [20, 18, 22]


def test_at_the_border_of_the_scan():
    """An organ that the field of view cuts: its centre may lie where the scan does not reach."""
    probs = 0.95 * ball((40, 40, 40), (1, 18, 22), 5)
    found = corrected_centre(probs, coarse_centre(probs), [reference()], SHIFT)
    assert found.tolist() == [1, 18, 22]


def test_a_border_near_by_does_not_draw_an_organ_out_of_the_scan():
    """An organ that is there as a whole, 2 voxels from the border, with shifts that would reach far beyond it."""
    probs = np.clip(0.95 * ball((60, 80, 80), (7, 40, 40), 5), 1e-3, None)
    found = corrected_centre(probs, coarse_centre(probs), [reference()], (10, 15, 15))
    assert found.tolist() == [7, 40, 40]


def test_references_vote_and_the_median_counts():
    probs = 0.95 * ball((40, 40, 40), (20, 18, 22), 5)
    odd = Reference("c/d", np.ones((1, 1, 1), bool))
    found = corrected_centre(probs, coarse_centre(probs), [reference("a/1"), odd, reference("a/2", 4)], SHIFT)
    assert found.tolist() == [20, 18, 22]


def test_references_are_drawn_by_seed_and_case_and_never_the_case_itself():
    pool = [reference(f"a/{n}") for n in range(9)]
    mine = [one.case for one in drawn(pool, "a/4", 0, 3)]
    assert mine == [one.case for one in drawn(pool[::-1], "a/4", 0, 3)] and len(set(mine)) == 3
    pool_of_others = [reference(f"b/{n}") for n in range(9)]
    in_predict, in_test = ([one.case for one in drawn(pool_of_others, case, 0, 3)] for case in ("4", "a/4"))
    assert in_predict == in_test
    everyone = {one.case for one in drawn(pool, "a/4", 0, 99)}
    assert len(everyone) == 8 and "a/4" not in everyone
    assert {tuple(one.case for one in drawn(pool, "a/4", seed, 1)) for seed in range(20)} != {tuple(mine[:1])}
