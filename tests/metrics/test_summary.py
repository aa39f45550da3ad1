import math

import numpy as np
import pytest

from organseg.metrics.evaluate import UNKNOWN, OrganScore
from organseg.metrics.summary import CONVENTIONS, OVERALL, CaseRow, conventions, summarise

NAN = math.nan
FOUND = OrganScore("found", 0.8, 9.0, 4.0, 1.0, 0.6, 10.0, 12.0)
MISSED = OrganScore("missed", 0.0, NAN, NAN, NAN, 0.0, 0.0, 12.0)
FALSE_POSITIVE = OrganScore("false_positive", 0.0, NAN, NAN, NAN, 0.0, 10.0, 0.0)
BOTH_EMPTY = OrganScore("both_empty", 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)

ROWS = [
    CaseRow("a", "liver", FOUND, 100.0),
    CaseRow("b", "liver", MISSED, 80.0),
    CaseRow("c", "liver", BOTH_EMPTY, 100.0),
    CaseRow("d", "liver", UNKNOWN, 100.0),
    CaseRow("a", "gallbladder", FALSE_POSITIVE, 100.0),
    CaseRow("a", "spleen", UNKNOWN, 100.0),
]


def by_organ(rows=ROWS, **options):
    return {line.organ: line for line in summarise(rows, **options)}


def test_lines_come_in_order_of_appearance_and_the_mean_last():
    assert [line.organ for line in summarise(ROWS)] == ["liver", "gallbladder", "spleen", OVERALL]


def test_counts_name_every_outcome():
    lines = by_organ()
    counts = {
        organ: (line.evaluated, line.unknown, line.both_empty, line.missed, line.false_positive, line.found)
        for organ, line in lines.items()
    }
    assert counts == {
        "liver": (3, 1, 1, 1, 0, 1),
        "gallbladder": (1, 0, 0, 0, 1, 0),
        "spleen": (0, 1, 0, 0, 0, 0),
        OVERALL: (4, 2, 1, 1, 1, 1),
    }


def test_averages_of_an_organ_worked_by_hand():
    liver = by_organ()["liver"]
    assert liver.dsc.mean == pytest.approx((0.8 + 0 + 1) / 3)
    assert liver.dsc.std == pytest.approx(math.sqrt((0.2**2 + 0.6**2 + 0.4**2) / 2))
    assert liver.dsc.mean_without_both_empty == pytest.approx(0.4)
    assert liver.nsd.mean == pytest.approx((0.6 + 0 + 1) / 3)
    assert liver.hd_mm.mean == pytest.approx((9 + 80 + 0) / 3)
    assert liver.hd95_mm.mean == pytest.approx((4 + 80 + 0) / 3)
    assert liver.hd95_mm.mean_without_both_empty == pytest.approx(42)
    assert liver.asd_mm.mean == pytest.approx((1 + 80 + 0) / 3)


def test_a_false_positive_costs_the_diagonal_too():
    gallbladder = by_organ()["gallbladder"]
    assert (gallbladder.dsc.mean, gallbladder.hd95_mm.mean) == (0.0, 100.0)
    assert math.isnan(gallbladder.dsc.std)


def test_another_distance_can_stand_for_the_diagonal():
    lines = by_organ(empty_distance_mm=50.0)
    assert lines["liver"].hd95_mm.mean == pytest.approx((4 + 50 + 0) / 3)
    assert lines["gallbladder"].asd_mm.mean == 50.0
    assert lines["liver"].dsc == by_organ()["liver"].dsc


def test_an_organ_that_no_case_annotates_has_no_mean():
    spleen = by_organ()["spleen"]
    assert math.isnan(spleen.dsc.mean)
    assert math.isnan(spleen.hd95_mm.mean)


def test_the_mean_weighs_organs_not_rows_and_leaves_out_unknown_ones():
    overall = by_organ()[OVERALL]
    assert overall.dsc.mean == pytest.approx((0.6 + 0) / 2)  # over the rows it would be 0.45
    assert overall.dsc.std == pytest.approx(np.std([0.6, 0.0], ddof=1))
    assert overall.dsc.mean_without_both_empty == pytest.approx((0.4 + 0) / 2)
    assert overall.hd95_mm.mean == pytest.approx((28 + 100) / 2)


def test_an_organ_that_is_always_rightly_absent_leaves_the_second_mean_alone():
    rows = [CaseRow("a", "liver", FOUND, 100.0), CaseRow("a", "spleen", BOTH_EMPTY, 100.0)]
    lines = by_organ(rows)
    assert math.isnan(lines["spleen"].dsc.mean_without_both_empty)
    assert lines[OVERALL].dsc.mean == pytest.approx(0.9)
    assert lines[OVERALL].dsc.mean_without_both_empty == pytest.approx(0.8)


def test_a_row_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"\('a', 'liver'\) is there more than once"):
        summarise([ROWS[0], ROWS[1], ROWS[0]])


def test_no_rows_make_an_empty_mean():
    (overall,) = summarise([])
    assert (overall.organ, overall.evaluated) == (OVERALL, 0)
    assert math.isnan(overall.dsc.mean)


def test_conventions_name_the_distance_that_was_used():
    assert "the diagonal of the image" in conventions()
    assert "373.1 mm" in conventions(373.1)
    assert "{" not in conventions()
    assert "{distance}" in CONVENTIONS
