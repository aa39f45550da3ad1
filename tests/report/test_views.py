from dataclasses import replace

import numpy as np
import pytest

from organseg.batch import IGNORE
from organseg.errors import IntegrityError
from organseg.metrics.evaluate import UNKNOWN, OrganScore
from organseg.metrics.summary import CaseRow
from organseg.report.views import (
    ScoredCase,
    View,
    chosen_cases,
    content_box,
    disagreement,
    load_case,
    resampled_plane,
    views_of,
)
from organseg.volumes import resample_image, write_label


def row(case: str, organ: str, dsc: float | None) -> CaseRow:
    score = UNKNOWN if dsc is None else OrganScore("found", dsc, *[1.0] * 6)
    return CaseRow(case, organ, score, 1.0)


def test_cases_are_ranked_by_their_mean_over_evaluated_organs():
    rows = [
        row("a", "liver", 0.9), row("a", "spleen", None),  # 0.9; with the unknown as 0 it would be 0.45
        row("b", "liver", 1.0), row("b", "spleen", 0.2),  # 0.6
        row("c", "liver", 0.8), row("c", "spleen", 0.6),  # 0.7
        row("d", "liver", None),
    ]  # fmt: skip
    assert chosen_cases(rows) == {"best": "a", "median": "c", "worst": "b"}


@pytest.mark.parametrize(
    ("scores", "roles"),
    [
        ([], {}),
        ([0.5], {"median": "0"}),
        ([0.5, 0.6], {"best": "1", "worst": "0"}),
        ([0.5, 0.6, 0.7, 0.8], {"best": "3", "median": "1", "worst": "0"}),
    ],
)
def test_few_cases_are_shown_once_each(scores, roles):
    assert chosen_cases([row(str(number), "liver", dsc) for number, dsc in enumerate(scores)]) == roles


@pytest.mark.parametrize("shape", [(7, 9, 11), (3, 18, 5), (4, 5, 6)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_resampled_plane_is_that_of_the_whole_volume(axis, shape):
    volume = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    whole = resample_image(volume, shape)
    for index in range(shape[axis]):
        plane = resampled_plane(volume, shape, axis, index)
        np.testing.assert_allclose(plane, whole.take(index, axis), atol=1e-5)


def loaded(run, key: str) -> ScoredCase:
    return load_case(run.cache / f"{key}.h5", run.predictions / f"{key}.nii.gz", run.organs)


def test_organs_of_the_cache_become_those_of_the_run_by_name(run):
    case = loaded(run, "toy/c")
    for value, organ in enumerate(run.organs[:3], start=1):
        assert (case.label[run.boxes[organ]] == value).all()
        assert np.count_nonzero(case.label == value) == case.label[run.boxes[organ]].size
    assert case.known.tolist() == [True, True, True, False]
    assert (case.preds == np.where(case.label == IGNORE, 0, case.label)).all()
    assert case.spacing == run.spacing
    assert case.window == (-160, 240)


def test_a_prediction_on_another_grid_is_refused(run):
    path = run.predictions / "toy" / "c.nii.gz"
    write_label(path, np.zeros((3, 4, 5), np.uint8), np.eye(4))
    with pytest.raises(IntegrityError, match=r"c\.nii\.gz: found a label map \(3, 4, 5\)"):
        loaded(run, "toy/c")


def test_views_show_most_organs_most_errors_and_the_middle(run):
    case = loaded(run, "toy/b")  # predicts next to nothing
    fullest, worst, coronal = views_of(case)
    assert "z = 2 of 0..11\nmost organs" in fullest.caption  # the first with both kidneys
    assert "z = 7 of 0..11\nlargest disagreement\n(352 voxels)" in worst.caption
    assert "y = 23 of 0..39" in coronal.caption  # mean of 25, 25 and 20
    assert (fullest.label == case.label[2]).all()
    assert (worst.preds == case.preds[7]).all()
    assert (coronal.label[::-1] == case.label[:, 23]).all()
    assert (fullest.pixel_mm, coronal.pixel_mm) == ((2.0, 2.5), (5.0, 2.5))
    assert (fullest.top, coronal.top) == ("A", "H")
    assert all(view.image.shape == view.label.shape == view.preds.shape for view in (fullest, worst, coronal))


def test_one_slice_that_is_both_is_shown_once(run):
    case = loaded(run, "toy/c")
    preds = case.preds.copy()
    preds[2] = 0
    axial, _ = views_of(replace(case, preds=preds))
    assert "z = 2" in axial.caption and "most organs, and\nlargest disagreement\n(120 voxels)" in axial.caption


def test_a_perfect_case_has_no_slice_of_errors(run):
    axial, coronal = views_of(loaded(run, "toy/c"))
    assert axial.caption.endswith("most organs")
    assert coronal.top == "H"


def test_a_case_without_any_organ_can_be_shown(run):
    case = loaded(run, "toy/c")
    nothing = np.zeros_like(case.label)
    axial, coronal = views_of(replace(case, label=nothing, preds=nothing))
    assert axial.label.shape == (40, 48)
    assert coronal.label.shape == (12, 48)


def test_a_tall_scan_is_shown_near_its_organs_only():
    label = np.zeros((100, 4, 4), np.uint8)
    label[50] = 1
    case = ScoredCase("a", np.zeros((100, 4, 4), np.int16), label, label, np.array([True]), (5.0, 1.0, 1.0), (0.0, 1.0))
    coronal = views_of(case)[-1]
    assert len(coronal.label) == 17  # 40 mm either side
    assert coronal.label[8].all()


def test_what_is_unknown_is_no_disagreement():
    label = np.array([[[0, 1, IGNORE, 0, 1]]], np.uint8)
    preds = np.array([[[2, 2, 1, 1, 1]]], np.uint8)
    case = ScoredCase("a", label, label, preds, np.array([True, False]), (1.0, 1.0, 1.0), (0.0, 1.0))
    # Organ 2 is unknown: over background it may be right, over organ 1 it is wrong all the same.
    assert disagreement(case, 0) == 2


def test_the_picture_is_cropped_to_the_body_and_every_label():
    image = np.full((20, 30), -1000, np.float32)
    image[5:12, 6:20] = 40
    image[16, 2:28] = 300  # a table
    nothing = np.zeros(image.shape, np.uint8)
    view = View("", "A", image, (1.0, 1.0), nothing, nothing)
    assert content_box(view, (-160, 240)) == (slice(5, 12), slice(6, 20))
    preds = nothing.copy()
    preds[2, 25] = 1
    assert content_box(replace(view, preds=preds), (-160, 240)) == (slice(2, 12), slice(6, 26))
    black = replace(view, image=np.full_like(image, -1000))
    assert content_box(black, (-160, 240)) == (slice(0, 20), slice(0, 30))


def test_air_that_a_data_set_clipped_is_air_still():
    image = np.full((20, 30), -125, np.float32)
    image[5:12, 6:20] = 40
    nothing = np.zeros(image.shape, np.uint8)
    view = View("", "A", image, (1.0, 1.0), nothing, nothing)
    assert content_box(view, (-160, 240)) == (slice(5, 12), slice(6, 20))
