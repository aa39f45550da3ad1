"""Slices in a curriculum's rounds: what may be relabelled, and what pseudo-labels change."""

import numpy as np
import pytest
from synthetic import SPACING

from organseg.data import SliceDataModule
from organseg.data.module import slice_tables
from organseg.data.pseudo_labels import PseudoLabels, RoundHeader, write_pseudo_labels
from organseg.data.slices import SliceSamples


@pytest.fixture
def relabelled(prepared, tmp_path):
    """A data module in round 1, whose pseudo-labels are what was hidden, and nothing in the first case."""
    data = SliceDataModule(prepared, batch_size=6, workers=0, label_share=0.4, val_share=0.2)
    for number, key in enumerate(data.case_keys("predict")):
        hidden = data.hidden_truth(key) * np.uint8(number > 0)
        header = RoundHeader(key, data.organs, 1, 1.0, "test", (0,) * 4, (0,) * 4)
        zeros = np.zeros(hidden.shape, np.float32)
        write_pseudo_labels(tmp_path, header, PseudoLabels(hidden, hidden, hidden, zeros, zeros))
    data.enter_phase(3, tmp_path)
    return data


def test_cases_to_relabel_are_training_cases_that_lack_an_organ(relabelled):
    keys = set(relabelled.case_keys("predict"))
    assert keys == {case.key for case in relabelled.cohort.train if len(case.annotated) < 4}
    assert keys and not keys & {case.key for case in relabelled.cohort.val + relabelled.cohort.test}


def test_hidden_truth_is_what_the_annotations_lack(relabelled):
    for case in relabelled.cohort.train:
        label = case.cached.arrays().label
        hidden = relabelled.hidden_truth(case.key)
        assert (np.where(case.lookup[label] == 0, hidden, case.lookup[label]) == label).all()
        assert not (hidden.astype(bool) & case.lookup[label].astype(bool)).any()
        assert (relabelled.hidden_organs(case.key) == ~case.known).all()
        assert (relabelled.unknown_organs(case.key) == ~case.known).all()
    assert relabelled.voxel_ml(relabelled.cohort.train[0].key) == pytest.approx(np.prod(SPACING) / 1000)


def test_pseudo_labels_fill_what_is_not_annotated_and_nothing_is_made_known(relabelled):
    cases, plan = relabelled.cohort.train, relabelled.plan()
    samples = SliceSamples(cases, plan, relabelled.preprocessing, None)
    with_labels = SliceSamples(cases, plan, relabelled.preprocessing, None, relabelled.round_labels)
    keys = relabelled.case_keys("predict")
    seen = 0
    for step in range(20):
        for position in range(6):
            draw = plan.draw(step, position)
            case = cases[draw.case]
            plain, merged = samples[step, position], with_labels[step, position]
            truth = case.cached.arrays().label[draw.z]
            whole = case.key in keys[1:]
            assert (merged["label"] == (truth if whole else plain["label"])).all()
            assert (merged["annotated"] == case.known).all()
            seen += whole and bool((merged["label"] != plain["label"]).any())
    assert seen


def test_slices_with_pseudo_labels_are_drawn_by_organ(relabelled):
    cases = relabelled.cohort.train
    _, by_organ = slice_tables(cases, relabelled.round_labels)
    keys = relabelled.case_keys("predict")
    for k, table in enumerate(by_organ.values(), start=1):
        expected = set()
        for number, case in enumerate(cases):
            label = case.cached.arrays().label
            if case.key not in keys[1:]:
                label = case.lookup[label]
            expected |= {(number, int(z)) for z in np.flatnonzero((label == k).any(axis=(1, 2)))}
        assert {tuple(row) for row in table.tolist()} == expected and len(table) == len(expected)


def test_only_annotated_slices_are_drawn_by_organ_where_that_is_asked_for(relabelled):
    annotated = slice_tables(relabelled.cohort.train)[1]
    with_pseudo = relabelled.plan().by_organ
    relabelled.draw_annotated_only = True
    drawn = relabelled.plan().by_organ
    assert drawn.keys() == annotated.keys() and all((drawn[k] == annotated[k]).all() for k in drawn)
    assert sum(map(len, drawn.values())) < sum(map(len, with_pseudo.values()))


def test_each_phase_has_an_order_of_its_own(relabelled):
    later = relabelled.plan()
    relabelled.enter_phase(0, None)
    first = relabelled.plan()
    assert relabelled.round_labels is None
    drawn = [[(plan.draw(s, p).case, plan.draw(s, p).z) for s in range(4) for p in range(6)] for plan in (first, later)]
    assert drawn[0] != drawn[1]
