"""Mean volumes of organs: what a round's additions are compared with, and what the training may know of them."""

from pathlib import Path

import numpy as np
import pytest
from synthetic import LABELS, SPACING, make_case

from organseg.data import SliceDataModule

VOXEL_ML = np.prod(SPACING) / 1000


def module(cache: Path, **options: object) -> SliceDataModule:
    return SliceDataModule(cache, batch_size=2, workers=0, **options)


def by_hand(data: SliceDataModule) -> list[float]:
    """Of the label maps of those training cases that annotate an organ, counted in the files."""
    means = []
    for organ in data.organs:
        value = next(value for value, name in LABELS.items() if name == organ)
        shown = [case for case in data.cohort.train if organ in case.annotated]
        assert 0 < len(shown) < len(data.cohort.train)
        means.append(np.mean([(make_case(int(case.key[-1]))[1] == value).sum() * VOXEL_ML for case in shown]))
    return means


def test_they_are_of_the_annotated_cases_alone(prepared):
    found = {}
    for seed in (0, 1):
        data = module(prepared, label_share=0.4, seed=seed)
        found[seed] = data.mean_volumes_ml()
        assert found[seed] == pytest.approx(by_hand(data))
    everything = module(prepared).mean_volumes_ml()
    assert len({found[0], found[1], everything}) == 3


def test_nobody_s_annotations_have_no_mean(prepared):
    assert np.isnan(module(prepared, label_share=0.0).mean_volumes_ml()).all()
