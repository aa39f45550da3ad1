"""Our scores beside the official result of the CHAOS organisers' sample submission, on the real scan (DATA.md 2)."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from scipy.spatial import KDTree

from organseg.metrics.evaluate import evaluate_case
from organseg.metrics.surface import surface

DATA = os.environ.get("ORGANSEG_TEST_DATA")
if not DATA:
    pytest.skip("ORGANSEG_TEST_DATA is not set", allow_module_level=True)


@pytest.fixture(scope="module")
def chaos():
    """Prediction and truth, uint8 [78, 512, 512], and the spacing (z, y, x) in mm."""
    folder = Path(DATA) / "chaos"
    with zipfile.ZipFile(folder / "CHAOS_Train_Sets_CT3.zip") as archive:
        files = [io.BytesIO(archive.read(name)) for name in sorted(archive.namelist()) if not name.endswith("/")]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files[:78]]
    label = np.stack([np.asarray(Image.open(file)) for file in files[78:]])
    results = sorted(folder.glob("evaluation_example/CT_3_Segmentation/results*.png"))
    preds = np.stack([np.asarray(Image.open(path)) for path in results])
    # SliceThickness says 3.2 mm; the positions are 2 mm apart.
    (step,) = set(np.diff([float(header.ImagePositionPatient[2]) for header in headers]))
    spacing = (abs(step), *(float(value) for value in headers[0].PixelSpacing))
    return (preds > 0).astype(np.uint8), (label > 0).astype(np.uint8), spacing


def test_scores_are_the_official_ones(chaos):
    (score,) = evaluate_case(*chaos[:2], [True], chaos[2])
    assert score.outcome == "found"
    assert round(score.dsc, 3) == 0.978
    assert score.hd_mm == pytest.approx(14.00, abs=0.01)
    volume_difference = 100 * abs(score.preds_volume_ml - score.label_volume_ml) / score.label_volume_ml
    assert round(volume_difference, 3) == 0.665
    assert score.label_volume_ml == pytest.approx(1417, abs=1)
    # The official average is 0.734: the next test shows where the difference comes from.
    assert score.asd_mm == pytest.approx(0.713, abs=0.002)


def test_official_average_distance_takes_the_image_to_go_on_beyond_its_border(chaos):
    # CHAOS's code erodes with the outside counted as *inside*. This liver is cut by the last slice: there we count its
    # whole section as surface (METHOD.md 4), with many distances of 0; CHAOS only the section's outline.
    def points(array):
        return np.argwhere(surface(np.pad(array == 1, 1, mode="edge"))[1:-1, 1:-1, 1:-1]) * chaos[2]

    preds, label = points(chaos[0]), points(chaos[1])
    both = np.concatenate([KDTree(label).query(preds)[0], KDTree(preds).query(label)[0]])
    assert chaos[1][-1].any()
    assert round(both.mean(), 3) == 0.734
    assert round(both.max(), 2) == 14.0
