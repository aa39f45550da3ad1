from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organseg.metrics.evaluate import UNKNOWN, OrganScore
from organseg.metrics.summary import CaseRow
from organseg.report.figures import colour_of, draw_curves, draw_organs, png, shown, smoothed

FOUND = OrganScore("found", 0.8, 9.0, 5.0, 1.0, 0.7, 1.0, 1.0)


def test_smoothing_takes_as_many_neighbours_on_either_side():
    assert smoothed(np.array([0.0, 3.0, 6.0, 0.0, 9.0]), 3).tolist() == [0, 3, 3, 5, 9]
    assert smoothed(np.array([4.0]), 1).tolist() == [4.0]


def curve(*values: float) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values)), np.array(values)


def test_each_logged_metric_gets_its_panel():
    curves = {
        "train/loss": curve(*np.linspace(1, 0, 100)), "val/dsc": curve(0.5, 0.6), "val/dsc/liver": curve(0.8, 0.9),
        "lr-AdamW": curve(1e-3, 1e-4), "pace/samples_per_s": curve(50, 48), "pace/data_wait": curve(0.1, 0.2),
        "train/other": curve(1),
    }  # fmt: skip
    figure = draw_curves(curves)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["training loss", "validation DSC (on the working grid)", "learning rate", "pace"]
    raw, mean = figure.axes[0].get_lines()
    assert len(raw.get_ydata()) == len(mean.get_ydata()) == 100
    assert raw.get_alpha() < 0.5
    organ, overall = figure.axes[1].get_lines()
    assert organ.get_color() == colour_of("liver")
    assert overall.get_ydata().tolist() == [0.5, 0.6]


def test_a_run_that_logged_only_a_loss_gets_one_panel():
    assert len(draw_curves({"train/loss": curve(1.0)}).axes) == 1
    assert draw_curves({"something": curve(1.0)}) is None


def rows() -> list[CaseRow]:
    scores = [
        ("liver", FOUND), ("liver", replace(FOUND, dsc=0.6)), ("spleen", replace(FOUND, outcome="missed", dsc=0.0)),
        ("spleen", replace(FOUND, outcome="both_empty", dsc=1.0)), ("pancreas", UNKNOWN),
        ("aorta", replace(FOUND, outcome="false_positive", dsc=0.0)), ("aorta", UNKNOWN),
    ]  # fmt: skip
    return [CaseRow(f"toy/{number}", organ, score, 100.0) for number, (organ, score) in enumerate(scores)]


def test_organs_are_boxes_in_their_colours_with_every_case_as_a_mark():
    figure = draw_organs(rows())
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["liver", "spleen", "aorta"]
    assert axes.patches[0].get_facecolor()[:3] == colour_of("liver")
    marks = [offset[0] for marks in axes.collections for offset in marks.get_offsets().tolist()]
    assert marks == [0.8, 0.6, 0.0, 1.0, 0.0]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.split(":")[0] for text in legend] == ["case (organ found)", "missed", "false positive", "both empty"]
    words = [text.get_text() for text in axes.texts]
    assert "70.0 ± 14.1 %  (n = 2)" in words and "0.0 %  (n = 1)" in words


def test_top_organ_is_the_first_one():
    bottom, top = draw_organs(rows()).axes[0].get_ylim()
    assert bottom > top


def test_no_evaluated_organ_gives_no_picture():
    assert draw_organs([CaseRow("a", "liver", UNKNOWN, 1.0)]) is None


def test_an_organ_that_is_new_has_a_colour_of_its_own():
    assert colour_of("tail") == colour_of("tail") != colour_of("fin")
    assert all(0 <= value <= 1 for value in colour_of("tail"))


@given(st.text())
def test_any_name_is_made_of_letters_that_can_be_drawn(name):
    assert all(letter.isprintable() and ord(letter) < 256 for letter in shown(name))


@pytest.mark.parametrize("name", ["$\\frac{", "a$b$c", "\u4e2d\n\x00"])
def test_names_are_text_not_formulas(name):
    assert png(draw_organs([CaseRow("a", name, FOUND, 1.0)]))
