"""Priors of cases, and where their organs are (METHOD.md 2.1 and 2.3): no method, no training."""

from dataclasses import replace

import numpy as np

from organseg.batch import WholeCase
from organseg.methods.organ_positions import Positioning, PriorGrid, learned_priors


def test_what_the_field_of_view_cuts_counts_only_where_there_is_no_other():
    def case(key: str, low: int) -> WholeCase:
        truth = np.zeros((6, 5, 5), np.uint8)
        truth[low : low + 3, 1:4, 1:4] = 1
        image = truth.astype(np.float32)
        return WholeCase(key, 0, image, np.float32, truth.shape, (1.0,) * 3, np.eye(4), truth, np.ones(1, bool))

    grid = Positioning(PriorGrid((1.0, 1.0, 1.0)), "boxes", 1, 0.0)
    both = learned_priors([case("a/cut", 0), case("a/whole", 2)], ["liver"], grid, 5)
    assert [reference.case for reference in both.references[0]] == ["a/whole"]
    assert both.priors[0].cases == ("a/whole",)
    alone = learned_priors([case("a/cut", 0)], ["liver", "spleen"], grid, 5)
    assert alone.priors[0].cases == ("a/cut",) and alone.priors[1] is None and alone.references[1] == ()


def test_matched_organs_lie_where_their_prior_fits_in_training_and_in_test():
    """Ellipsoids that a thin tail makes lopsided: boxes are off by half of its length, matched centres are not."""
    shape, tail = (20, 30, 30), 10

    def case(n: int, low: int, with_tail: bool) -> WholeCase:
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        truth = (((grid - np.array([low, 12, 12])) / 4) ** 2).sum(axis=-1) <= 1
        if with_tail:
            truth[low, 12, 12 : 16 + tail] = True
        label = truth.astype(np.uint8)
        return WholeCase(f"a/{n}", n, label.astype(np.float32), np.float32, shape, (1.0,) * 3, np.eye(4), label,
                         np.ones(1, bool))  # fmt: skip

    cases = [case(n, 8 + n, n == 3) for n in range(4)]
    boxes, matched = (Positioning(PriorGrid((1.0, 1.0, 1.0)), how, 1, 8.0) for how in ("boxes", "matched"))
    sharp, blurred = (learned_priors(cases, ["liver"], how, "all").priors[0].probs for how in (matched, boxes))
    assert (sharp**2).sum() > 1.1 * (blurred**2).sum()  # the same voxels, less spread
    known = learned_priors(cases, ["liver"], matched, 5)
    off = []  # from the ellipsoids' own centres: the same in all, whoever is looked for
    for n, one in enumerate(cases):
        probs = 0.9 * one.truth[None] + 0.01
        found = matched.found(replace(one, truth=None), probs, np.ones(1, bool), known, "matched")
        off += [matched.annotated(one, known)[0] - (8 + n, 12, 12), found[0] - (8 + n, 12, 12)]
    assert np.ptp(off, axis=0).max() <= 0.6 and np.abs(off).max() <= 1.5
    assert boxes.annotated(cases[3], known)[0, 2] - 12 == tail // 2 - 0.5


def test_a_checkpoint_carries_few_references():
    def case(n: int) -> WholeCase:
        truth = np.zeros((5, 5, 5), np.uint8)
        truth[1:4, 1:4, 1:4] = 1
        return WholeCase(f"a/{n:02d}", n, truth.astype(np.float32), np.float32, truth.shape, (1.0,) * 3, np.eye(4),
                         truth, np.ones(1, bool))  # fmt: skip

    known = learned_priors(
        [case(n) for n in range(40)], ["liver"], Positioning(PriorGrid((1.0,) * 3), "boxes", 1, 0), 5
    )
    assert len(known.references[0]) == 16 and len(known.priors[0].cases) == 40
