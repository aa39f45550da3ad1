"""The summary before a training, by hand."""

import numpy as np
import pytest
from synthetic import LABELS, make_cache, write_dataset, write_label_map

from organseg.data.cohort import CohortOptions, load_cohort
from organseg.data.coverage import coverage


@pytest.fixture
def cache(tmp_path):
    """`full` labels four organs; `single` the spleen alone, by another name and integer; `held` is for tests."""
    make_cache(write_dataset(tmp_path / "full", 3, name="full"), tmp_path / "cache")
    make_cache(
        write_dataset(tmp_path / "single", 4, name="single", seed=20, labels={1: "Lien"}),
        tmp_path / "cache",
    )
    return make_cache(write_dataset(tmp_path / "held", 2, name="held", seed=40), tmp_path / "cache")


def text_of(cache, **options) -> list[str]:
    defaults = {"datasets": None, "organs": None, "fold": 0, "folds": 5, "fold_seed": 0, "val_share": 0.0,
                "label_share": 1.0, "seed": 0, "test_datasets": ["held"]}  # fmt: skip
    return coverage(load_cohort(CohortOptions(cache, **{**defaults, **options}))).splitlines()


def test_by_hand(cache):
    assert text_of(cache) == [
        "data set        training  validation        test  cases; labels",
        "full                   3           0           0  liver, left_kidney, right_kidney, spleen",
        "held                   0           0           2  liver, left_kidney, right_kidney, spleen",
        "single                 4           0           0  spleen",
        "organ          annotated in, of 7 training cases",
        "liver                  3  (3 of 3 in full, 0 of 4 in single)",
        "left_kidney            3  (3 of 3 in full, 0 of 4 in single)",
        "right_kidney           3  (3 of 3 in full, 0 of 4 in single)",
        "spleen                 7  (3 of 3 in full, 4 of 4 in single)",
    ]


def test_one_data_set_and_validation_cases(cache):
    lines = text_of(cache, datasets=["full"], val_share=0.3, organs=["lien", "liver"])
    assert lines == [
        "data set    training  validation        test  cases; labels",
        "full               2           1           0  spleen, liver",
        "held               0           0           2  spleen, liver",
        "organ      annotated in, of 2 training cases",
        "spleen             2",
        "liver              2",
    ]


def test_hidden_labels_are_not_annotated(cache):
    lines = text_of(cache, label_share=0.4)  # of 3 cases 1, of 7 cases 3
    assert [line.split()[1] for line in lines[5:9]] == ["1", "1", "1", "3"]


def test_an_organ_that_no_training_case_annotates(cache):
    lines = text_of(cache, datasets=["single"], organs=["spleen", "liver"])
    assert lines[-2].split() == ["liver", "0"]
    assert lines[-1].startswith("organseg: warning: liver: no training case annotates it, so it is never learned")
    hidden = text_of(cache, label_share=0.0)
    assert sum("never learned" in line for line in hidden) == 4


def test_an_organ_that_is_annotated_and_absent_everywhere(tmp_path):
    dataset = write_dataset(tmp_path / "set", 3, labels={**LABELS, 9: "heart"})
    lines = text_of(make_cache(dataset, tmp_path / "cache"), folds=3, test_datasets=None)
    assert lines[-1].startswith("organseg: warning: heart: no training case that annotates it has a voxel of it")
    assert sum("warning" in line for line in lines) == 1


def scribbles(folder, cache, zero_voxels: int):
    """Spleen alone, everything else 255 but for a few voxels of background."""
    dataset = write_dataset(folder, 3, labels={7: "spleen"})
    for i in range(3):
        label = np.full((12, 32, 32), 255, np.uint8)
        label[5:8, 10:14, 22:28] = 7
        label[0, 0, :zero_voxels] = 0
        write_label_map(folder / f"case{i}_label.nii.gz", label)
    return make_cache(dataset, cache)


@pytest.mark.parametrize("zero_voxels", [0, 1])
def test_an_organ_without_any_negative(tmp_path, zero_voxels):
    lines = text_of(scribbles(tmp_path / "set", tmp_path / "cache", zero_voxels), folds=3, test_datasets=None)
    warned = [line for line in lines if "warning" in line]
    assert len(warned) == 1 - zero_voxels
    assert all("spleen: no voxel is known not to be it" in line for line in warned)


def test_another_organ_is_a_negative(tmp_path):
    cache = scribbles(tmp_path / "set", tmp_path / "cache", 0)
    make_cache(write_dataset(tmp_path / "other", 3, name="other", seed=9, labels={1: "liver"}), cache)
    assert not any("warning" in line for line in text_of(cache, folds=3, test_datasets=None))
