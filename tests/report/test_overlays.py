from dataclasses import replace

import numpy as np
import pytest

from organseg.batch import IGNORE
from organseg.report.figures import colour_of, png
from organseg.report.overlays import draw_overlay, fill
from organseg.report.views import load_case


def drawn(run, key: str):
    case = load_case(run.cache / f"{key}.h5", run.predictions / f"{key}.nii.gz", run.organs)
    return draw_overlay(case, "worst", [row for row in run.rows if row.case == key])


def centre_mm(figure, panel: int, organ: str) -> tuple[float, float]:
    """Where the organ's fill lies in a panel as it was painted: (from its top, from its left), mm of the slice."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    axes = figure.axes[panel]
    box = axes.get_window_extent()
    top, left = round(len(pixels) - box.y1), round(box.x0)
    panel_pixels = pixels[top : round(len(pixels) - box.y0), left : round(box.x1)]
    body = (40 + 160) / 400
    wanted = 0.45 * np.array(colour_of(organ)) + 0.55 * body
    rows, columns = np.nonzero((np.abs(panel_pixels - wanted) < 0.03).all(axis=-1))
    assert len(rows) > 20, f"{organ} is not in panel {panel}"
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    assert x0 < x1 and y0 < y1, "mirrored"
    return (
        y0 + (rows.mean() + 0.5) / len(panel_pixels) * (y1 - y0),
        x0 + (columns.mean() + 0.5) / panel_pixels.shape[1] * (x1 - x0),
    )


def letters(axes) -> dict[str, tuple[float, float]]:
    """Letter -> where it stands in its panel."""
    return {text.get_text(): text.get_position() for text in axes.texts}


@pytest.mark.parametrize("column", [1, 2])
def test_axial_slices_show_the_patients_right_on_the_left_and_the_front_on_top(run, column):
    figure = drawn(run, "toy/c")
    down, right = centre_mm(figure, column, "right_kidney")
    assert down == pytest.approx(25 * 2.0, abs=2)
    assert right == pytest.approx(11 * 2.5, abs=2)
    assert centre_mm(figure, column, "left_kidney")[1] == pytest.approx(37 * 2.5, abs=2)
    assert letters(figure.axes[column]) == {"R": (0.02, 0.5), "L": (0.98, 0.5), "A": (0.5, 0.98), "P": (0.5, 0.02)}


@pytest.mark.parametrize("column", [1, 2])
def test_coronal_slices_show_the_head_on_top_and_the_patients_right_on_the_left(run, column):
    figure = drawn(run, "toy/c")
    panel = len(figure.axes) - 3 + column
    liver, kidney = centre_mm(figure, panel, "liver"), centre_mm(figure, panel, "right_kidney")
    assert liver[0] < kidney[0]
    assert liver[0] == pytest.approx((12 - 9) * 5.0, abs=3)
    assert kidney[0] == pytest.approx((12 - 4.5) * 5.0, abs=3)
    assert kidney[1] < centre_mm(figure, panel, "left_kidney")[1]
    assert letters(figure.axes[panel]) == {"R": (0.02, 0.5), "L": (0.98, 0.5), "H": (0.5, 0.98), "F": (0.5, 0.02)}


def test_a_millimetre_is_as_long_down_as_across(run):
    figure = drawn(run, "toy/a")
    figure.canvas.draw()
    scales = []
    for axes in figure.axes:
        box = axes.get_window_extent()
        scales += [box.width / np.ptp(axes.get_xlim()), box.height / np.ptp(axes.get_ylim())]
    assert np.ptp(scales) < 0.01 * max(scales)


def test_the_legend_says_how_good_each_organ_is(run):
    figure = drawn(run, "toy/b")
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[1:] == [
        "left kidney  0.0 %, missed",
        "right kidney  0.0 %, missed",
        "spleen  not annotated",
        "ignored (truth unknown)",
    ]
    assert words[0].startswith("liver  ") and not words[0].startswith("liver  0.0")
    colours = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    assert colours[:4] == [colour_of(organ) for organ in run.organs]
    known = [row.score.dsc for row in run.rows if row.case == "toy/b"][:3]
    assert figure.get_suptitle() == f"worst case: toy/b, mean DSC {100 * np.mean(known):.1f} %"


def test_fills_are_translucent_and_background_is_clear():
    colours = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    filled = fill(np.array([[0, 2, IGNORE]], np.uint8), colours)
    assert filled[0, 0, 3] == 0
    assert filled[0, 1].tolist() == [0, 1, 0, 0.45]
    assert filled[0, 2, 3] == 0.45


def test_a_hostile_key_is_drawn_as_text(run):
    case = load_case(run.cache / "toy/c.h5", run.predictions / "toy/c.nii.gz", run.organs)
    rows = [row for row in run.rows if row.case == "toy/c"]
    assert png(draw_overlay(replace(case, key="toy/$\\frac{\n\u4e2d"), "best", rows))
