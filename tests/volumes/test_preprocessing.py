import json

import numpy as np
import pytest

from organseg.volumes import Normalisation, Preprocessing, WorkingGrid, own_normalisation


@pytest.mark.parametrize("grid", [WorkingGrid(), WorkingGrid(size=128), WorkingGrid(spacing=(3.0, 0.8, 0.8))])
@pytest.mark.parametrize("normalisation", [None, Normalisation((-160.0, 300.0), 12.345678901234567, 98.7)])
def test_it_travels_through_a_checkpoint_unchanged(grid, normalisation):
    before = Preprocessing(grid, normalisation)
    after = Preprocessing.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert hash(after) == hash(before)


def test_ct_is_normalised_as_the_training_cases_and_mr_by_itself():
    image = np.random.default_rng(0).gamma(2, 50, (4, 8, 8)).astype(np.float32)
    shared = Normalisation((-160.0, 300.0), 0.0, 1.0)
    assert Preprocessing(WorkingGrid(), shared).normalisation_of(image) is shared
    assert Preprocessing(WorkingGrid(), None).normalisation_of(image) == own_normalisation(image)
