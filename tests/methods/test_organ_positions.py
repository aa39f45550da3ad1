"""Priors of cases, and where their organs are (METHOD.md 2.1 and 2.3): no method, no training."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from organseg.batch import WholeCase
from organseg.methods.built_priors import built_priors
from organseg.methods.cross_fitted_priors import ALL, FIRST, SECOND, Halves
from organseg.methods.organ_positions import Positioning, PriorGrid
from organseg.priors import place


class Cases(list):
    """As a data module has them."""

    patients: Mapping[str, str] = {}

    def training_cases(self):
        return self

    def identity_of(self, key):
        return self.patients.get(key, key), f"image of {key}"


def priors_of(cases, organs, positioning, bins):
    return built_priors(Cases(cases), organs, positioning, bins)[0]


def test_what_the_field_of_view_cuts_counts_only_where_there_is_no_other():
    def case(key: str, low: int) -> WholeCase:
        truth = np.zeros((6, 5, 5), np.uint8)
        truth[low : low + 3, 1:4, 1:4] = 1
        image = truth.astype(np.float32)
        return WholeCase(key, 0, image, np.float32, truth.shape, (1.0,) * 3, np.eye(4), truth, np.ones(1, bool))

    grid = Positioning(PriorGrid((1.0, 1.0, 1.0)), "boxes", 1, 0.0)
    both = priors_of([case("a/cut", 0), case("a/whole", 2)], ["liver"], grid, 5)
    assert [reference.case for reference in both.references[0]] == ["a/whole"]
    assert both.priors[0].cases == ("a/whole",)
    alone = priors_of([case("a/cut", 0)], ["liver", "spleen"], grid, 5)
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
    sharp, blurred = (priors_of(cases, ["liver"], how, "all").priors[0].probs for how in (matched, boxes))
    assert (sharp**2).sum() > 1.1 * (blurred**2).sum()  # the same voxels, less spread
    known = priors_of(cases, ["liver"], matched, 5)
    off = []  # from the ellipsoids' own centres: the same in all, whoever is looked for
    for n, one in enumerate(cases):
        probs = 0.9 * one.truth[None] + 0.01
        found = matched.found(replace(one, truth=None), probs, np.ones(1, bool), known, "matched")
        off += [matched.annotated(one, known)[0] - (8 + n, 12, 12), found[0] - (8 + n, 12, 12)]
    assert np.ptp(off, axis=0).max() <= 0.6 and np.abs(off).max() <= 1.5
    assert boxes.annotated(cases[3], known)[0, 2] - 12 == tail // 2 - 0.5


@pytest.mark.parametrize(("centring", "position"), [("boxes", "aligned"), ("matched", "matched")])
def test_an_organ_has_one_prior_and_one_place_in_mm_whatever_the_spacing(centring, position):
    """An ellipsoid in fine slices and in thick ones, seen by networks on other grids; the prior of one finds the other.

    A scan's first voxel is that of the network's grid, which lies border on border with the others.
    """
    middle, radii, grid = np.array([61.0, 55.0, 66.0]), np.array([24.0, 30.0, 18.0]), (3.0, 2.0, 2.0)

    def case(n: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> WholeCase:
        mm = np.ix_(*((np.arange(size) + 0.5) * step for size, step in zip(shape, spacing, strict=True)))
        away = sum(((axis - at) / radius) ** 2 for axis, at, radius in zip(mm, middle, radii, strict=True))
        seen = np.zeros((8 + n, 20, 24), np.float32)
        return WholeCase(f"a/{n}", n, seen, np.float32, shape, spacing, np.eye(4), (away <= 1).astype(np.uint8),
                         np.ones(1, bool))  # fmt: skip

    fine, thick = case(0, (81, 121, 121), (1.5, 1.0, 1.0)), case(1, (24, 150, 150), (5.0, 0.8, 0.8))
    positioning = Positioning(PriorGrid(grid), centring, 1, 30.0)
    for one, other in ((fine, thick), (thick, fine)):
        known = priors_of([other], ["liver"], positioning, "all")
        expected = middle - np.array(one.working_spacing) / 2
        found, (mask, (low, high)) = positioning.annotated(one, known), positioning.grid.placed_masks(one)[0]
        assert (np.abs(found[0] - expected) <= np.add(grid, 1e-3)).all()
        on_grid = positioning.grid.of(one)
        probs = np.full((1, *on_grid.shape), 0.02)
        probs[0][tuple(map(slice, low, high))][mask] = 0.95
        coarse = positioning.found(on_grid, probs, np.ones(1, bool), known, position)
        assert (np.abs(coarse[0] - expected) <= np.add(grid, 1e-3)).all()
        # The prior, read in 1 mm steps around that place, is the ellipsoid.
        to_mm = torch.eye(4)[None]
        to_mm[0, :3, 3] = torch.from_numpy(expected - 40.0)
        placed = place(known.priors, to_mm, torch.from_numpy(found)[None], (81, 81, 81), 1e-3)[0, 0] > 0.5
        around = np.ogrid[-40:41, -40:41, -40:41]
        organ = sum((axis / radius) ** 2 for axis, radius in zip(around, radii, strict=True)) <= 1
        assert 2 * (placed.numpy() & organ).sum() / (placed.sum() + organ.sum()) > 0.9


@pytest.mark.parametrize("centring", ["boxes", "matched"])
def test_what_is_too_small_for_the_grid_is_where_it_is_and_what_is_absent_is_nowhere(centring):
    def case(low: int, high: int) -> WholeCase:
        truth = np.zeros((12, 12, 12), np.uint8)
        truth[low:high, low:high, low:high] = 1
        return WholeCase("a/b", 0, truth.astype(np.float32), np.float32, truth.shape, (1.0,) * 3, np.eye(4), truth,
                         np.ones(2, bool))  # fmt: skip

    positioning = Positioning(PriorGrid((2.0,) * 3), centring, 1, 0.0)
    known = priors_of([case(2, 8)], ["liver", "spleen"], positioning, 5)
    lost = case(4, 5)
    assert not positioning.grid.placed_masks(lost)
    found = positioning.annotated(lost, known)
    assert found[0].tolist() == [4, 4, 4] and np.isnan(found[1]).all()
    assert np.isnan(positioning.annotated(case(0, 0), known)).all()


def test_a_checkpoint_carries_few_references():
    def case(n: int) -> WholeCase:
        truth = np.zeros((5, 5, 5), np.uint8)
        truth[1:4, 1:4, 1:4] = 1
        return WholeCase(f"a/{n:02d}", n, truth.astype(np.float32), np.float32, truth.shape, (1.0,) * 3, np.eye(4),
                         truth, np.ones(1, bool))  # fmt: skip

    known = priors_of([case(n) for n in range(40)], ["liver"], Positioning(PriorGrid((1.0,) * 3), "boxes", 1, 0), 5)
    assert len(known.references[0]) == 16 and len(known.priors[0].cases) == 40


def test_a_case_sees_the_prior_of_the_half_that_it_is_not_in():
    def case(n: int, organs: tuple[int, ...]) -> WholeCase:
        truth = np.zeros((6, 8, 8), np.uint8)
        for organ in organs:
            truth[1:5, 1 + 3 * organ : 3 + 3 * organ, 2 : 4 + n % 4] = organ + 1  # each as wide as its number says
        return WholeCase(f"a/{n}", n, truth.astype(np.float32), np.float32, truth.shape, (1.0,) * 3, np.eye(4), truth,
                         np.array([k in organs for k in range(2)]))  # fmt: skip

    positioning, organs = Positioning(PriorGrid((1.0,) * 3), "boxes", 1, 0), ["liver", "spleen"]
    cases = Cases([case(0, (0, 1)), case(1, (0,)), case(2, (0,)), case(3, ())])
    halves = built_priors(cases, organs, positioning, 1, cross_fitted=True)[1]
    assert {key: seen.tolist() for key, seen in halves.seen.items()} == {
        "a/0": [SECOND, ALL], "a/1": [FIRST, ALL], "a/2": [SECOND, ALL],
    }  # fmt: skip
    assert halves.first.priors[0].cases == ("a/0", "a/2") and halves.second.priors[0].cases == ("a/1",)
    alone = priors_of([cases[1]], organs, positioning, 1)
    assert np.array_equal(halves.second.priors[0].probs, alone.priors[0].probs)
    assert halves.first.priors[1] is halves.second.priors[1] is None, "nobody but the spleen's one case to learn from"
    assert halves.undivided(organs, []) == ["spleen"] and halves.undivided(organs, ["spleen"]) == []
    assert halves.of("a/1", ("all", "all")) == [halves.first.priors[0], "all"]
    # Two scans of one patient are no two halves.
    cases.patients = {"a/0": "p", "a/1": "p", "a/2": "q"}
    people = built_priors(cases, organs, positioning, 1, cross_fitted=True)[1]
    assert people.first.priors[0].cases == ("a/0", "a/1") and people.second.priors[0].cases == ("a/2",)
    cases.patients = dict.fromkeys(("a/0", "a/1", "a/2"), "p")
    one = built_priors(cases, organs, positioning, 1, cross_fitted=True)[1]
    assert not one.seen
    again = Halves.from_state(halves.to_state())
    assert {key: seen.tolist() for key, seen in again.seen.items()} == {
        key: seen.tolist() for key, seen in halves.seen.items()
    }
