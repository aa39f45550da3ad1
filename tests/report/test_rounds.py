import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from relabelled import BOXES, SPACING, Relabelled, make_run

from organseg.errors import IntegrityError
from organseg.report import write_report
from organseg.report.round_choices import grown, most_and_least_certain, whole_case, worst_and_typical
from organseg.report.round_pictures import Places, candidates_figure, certain_figure, growth_figure, whole_case_figure
from organseg.report.round_plots import draw_rates, draw_volumes
from organseg.report.round_tables import read_rounds
from organseg.report.round_views import piece_of
from organseg.report.rounds import averaging, organ_table, score_name

WITH_TRUTH = ["round_case.png", "round_growth.png", "round_typical.png", "round_worst.png", "rounds.png"]
WITHOUT_TRUTH = ["round_certain.png", "round_volumes.png"]


@pytest.fixture
def run(tmp_path: Path) -> Relabelled:
    """A run that a test may spoil."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Relabelled:
    """A run that hid the truth, with its report, for tests that only look."""
    run = make_run(tmp_path_factory.mktemp("hidden"))
    (run.path / "report").mkdir()
    (run.path / "report" / "round_certain.png").write_bytes(b"of an earlier report")
    write_report(run.path)
    return run


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Relabelled:
    """A run whose truth nobody has, for tests that only look."""
    return make_run(tmp_path_factory.mktemp("unknown"), truth=False)


def places(run: Relabelled) -> Places:
    return Places(run.cache, tuple(read_rounds(run.path, [])))


def line(run: Relabelled, index: int, case: str):
    return next(line for line in places(run).rounds[index - 1].cases if (line.case, line.organ) == (case, "liver"))


def panels(figure) -> dict[str, object]:
    """Title -> panel; axes without a title are the bars of maps."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def painted(figure, axes, colour: tuple[float, float, float], opacity: float) -> np.ndarray:
    """Where a panel has a translucent colour over the body of 40 HU, [n, 2] mm (down, across) of its slice."""
    if figure.stale:
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    box = axes.get_window_extent()
    inside = pixels[round(len(pixels) - box.y1) : round(len(pixels) - box.y0), round(box.x0) : round(box.x1)]
    wanted = opacity * np.array(colour) + (1 - opacity) * (40 + 160) / 400
    rows, columns = np.nonzero((np.abs(inside - wanted) < 0.03).all(axis=-1))
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    assert x0 < x1 and y0 < y1, "mirrored"
    down, across = (rows + 0.5) / inside.shape[0] * (y1 - y0) + y0, (columns + 0.5) / inside.shape[1] * (x1 - x0) + x0
    return np.stack([down, across], axis=1)


def middle_mm(place: tuple[slice, slice]) -> tuple[float, float]:
    """(down, across) of a box of an axial slice."""
    return tuple((part.start + part.stop) / 2 * mm for part, mm in zip(place, SPACING[1:], strict=True))


def test_a_table_for_each_round_has_both_rankings(hidden):
    first = organ_table(places(hidden).rounds[0], 0.5, "learned confidence")
    assert first.title == "Round 1: at most the 50 % of the candidates with the highest learned confidence"
    assert first.head == [
        "organ", "candidates", "added", "precision %", "recall %", "AUC %, learned confidence", "AUC %, probability",
        "AP success %, learned confidence", "AP success %, probability", "AP error %, learned confidence",
        "AP error %, probability",
    ]  # fmt: skip
    liver, spleen, everything = first.lines
    # Candidates: 224 + 24, 112 + 2, 224; half of them; wrong ones among these: 8 and 2.
    assert liver[:3] == ("liver", "586", "293")
    assert liver[3:5] == (f"{100 * 283 / 293:.1f}", f"{100 * 283 / 672:.1f}")
    # The score puts 16 of 26 wrong ones below all right ones and 10 above; the probability puts all 26 above.
    assert liver[5:7] == (f"{100 * 16 / 26:.1f}", "0.0")
    assert spleen == ("spleen", "0", "0", "\u2013", "0.0", *["\u2013"] * 6)
    # All voxels together: 3 spleens of 2 x 6 x 6 voxels are missing too.
    assert everything[:5] == ("all organs", "586", "293", liver[3], f"{100 * 283 / (672 + 216):.1f}")
    assert first.remarks[0] == "No candidate of spleen: nothing to add in this round."


def test_without_truth_the_table_leaves_out_what_nobody_knows(unknown):
    table = organ_table(places(unknown).rounds[1], 1.0, "learned confidence")
    assert table.head == ["organ", "candidates", "added"]
    assert table.lines == [("liver", "586", "586"), ("spleen", "0", "0"), ("all organs", "586", "586")]
    assert draw_rates(places(unknown).rounds) is None


def test_a_run_that_ranks_by_probability_has_each_ranking_once(tmp_path):
    run = make_run(tmp_path, mcp=True)
    rounds = places(run).rounds
    assert organ_table(rounds[0], None, "probability (MCP)").head[3:] == [
        "precision %", "recall %", "AUC %", "AP success %", "AP error %",
    ]  # fmt: skip
    figure = candidates_figure(places(run), rounds[0], line(run, 1, "toy/a"), "probability (MCP)")
    assert list(panels(figure)) == ["image", "probability (MCP)", "candidates", "added"]


def test_with_earlier_rounds_additions_the_table_says_what_was_added_now(tmp_path):
    run = make_run(tmp_path, accumulate=True)
    first, second = (organ_table(round_tables, None, "confidence") for round_tables in places(run).rounds)
    assert first.head[:4] == ["organ", "candidates", "added", "precision %"]
    # Of 586 candidates round 1 added 293, and round 2 the rest; 26 of all are wrong.
    assert second.head[:4] == ["organ", "candidates", "added now", "added so far"]
    assert second.lines[0][:5] == ("liver", "293", "293", "586", f"{100 * 560 / 586:.1f}")
    assert second.lines[-1][:4] == ("all organs", "293", "293", "586")
    write_report(run.path)
    assert run.report() == ["index.html", *WITH_TRUTH]


def test_averaged_scores_and_probabilities_are_called_so(run):
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    config["curriculum"] |= {"selection": {"smooth_mm": 8.0}, "score": "organseg.curriculum.CrossFittedConfidence"}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "with the highest mean probability with judges, averaged over 8 mm<" in write_report(run.path).read_text()
    averaged = averaging(config)
    figure = candidates_figure(places(run), places(run).rounds[0], line(run, 1, "toy/a"), "confidence", averaged)
    assert list(panels(figure))[:3] == [
        "image", "probability (MCP)\naveraged over 8 mm", "confidence\naveraged over 8 mm",
    ]  # fmt: skip
    chosen = [("most certain", line(run, 2, "toy/a"), 0.9)]
    assert "confidence\naveraged over 8 mm" in panels(certain_figure(places(run), chosen, "confidence", averaged))
    assert averaging({"curriculum": {"selection": {"smooth_mm": 0.0}}}) == averaging({}) == ""


def test_rates_are_lines_over_the_rounds(hidden):
    precision, recall = draw_rates(places(hidden).rounds).axes
    found = {drawn.get_label(): drawn.get_ydata().tolist() for drawn in precision.get_lines()}
    assert found["liver"] == pytest.approx([283 / 293, 560 / 586])
    found = {drawn.get_label(): drawn.get_ydata().tolist() for drawn in recall.get_lines()}
    assert found["liver"] == pytest.approx([283 / 672, 560 / 672])
    assert found["all voxels"] == pytest.approx([283 / 888, 560 / 888])
    assert recall.get_lines()[0].get_xdata().tolist() == [1, 2]


def test_rates_of_one_round_are_bars(hidden):
    precision, recall = draw_rates(places(hidden).rounds[:1]).axes
    assert [bar.get_height() for bar in precision.patches] == pytest.approx([283 / 293, 0, 283 / 293])
    assert [text.get_text() for text in precision.texts] == ["97", "none", "97"]
    assert [tick.get_text() for tick in recall.get_xticklabels()] == ["liver", "spleen", "all voxels"]


def test_the_worst_and_the_typical_case_are_chosen_where_candidates_are_left_out(hidden):
    # Round 1, wrong of added: a 8 of 124, b 2 of 57, c 0 of 112.
    chosen = worst_and_typical(places(hidden).rounds[0])
    assert {role: found.case for role, found in chosen.items()} == {"worst": "toy/a", "typical": "toy/b"}
    html = (hidden.path / "report" / "index.html").read_text()
    assert "of round 1, the last round that leaves candidates out" in html


def test_candidates_are_drawn_in_the_fullest_slice_right_ones_cyan_and_wrong_ones_red(hidden):
    figure = candidates_figure(places(hidden), places(hidden).rounds[0], line(hidden, 1, "toy/a"), "confidence")
    drawn = panels(figure)
    assert list(drawn) == ["image", "probability (MCP)", "confidence", "candidates", "as many by probability",
                           "added: by confidence"]  # fmt: skip
    assert "axial, z = 2 of 0..5" in drawn["image"].get_ylabel()
    right = painted(figure, drawn["candidates"], (0.0, 1.0, 1.0), 0.75)
    wrong = painted(figure, drawn["candidates"], (1.0, 0.1, 0.1), 0.75)
    assert right.mean(axis=0) == pytest.approx(middle_mm(BOXES["liver"][1:]), abs=2)
    assert wrong.mean(axis=0) == pytest.approx(middle_mm(np.s_[18:22, 20:26]), abs=2)
    # The wrong ones have the higher probability: it would add all 24 of them, the score adds 8.
    chosen = painted(figure, drawn["added: by confidence"], (1.0, 0.1, 0.1), 0.75)
    likely = painted(figure, drawn["as many by probability"], (1.0, 0.1, 0.1), 0.75)
    assert chosen.mean(axis=0) == pytest.approx(middle_mm(np.s_[18:20, 20:24]), abs=2)
    assert likely.mean(axis=0) == pytest.approx(wrong.mean(axis=0), abs=2)
    assert drawn["candidates"].get_xlabel() == "248 voxels in the whole case, 90 % of them right"
    assert drawn["as many by probability"].get_xlabel() == "124 voxels in the whole case, 81 % of them right"
    assert drawn["added: by confidence"].get_xlabel() == "124 voxels in the whole case, 94 % of them right"


def test_maps_of_scores_have_their_own_scale_if_half_to_one_does_not_hold_them(hidden):
    figure = candidates_figure(places(hidden), places(hidden).rounds[0], line(hidden, 1, "toy/a"), "confidence")
    bars = [axes for axes in figure.axes if not axes.get_title()] or [
        child for axes in figure.axes for child in axes.child_axes
    ]
    scales = {bar.get_xlabel(): [text.get_text() for text in bar.get_xticklabels()] for bar in bars}
    assert scales == {"probability (MCP)": ["0.50", "0.75", "1.00"], "confidence": ["0.30", "0.65", "0.99"]}


def test_growth_shows_the_case_of_median_recall_in_every_round(hidden):
    # Recall in round 2: a and c 100 %, b 50 %; of a, c, b the middle one is c.
    (chosen,) = grown(places(hidden).last)
    assert (chosen.case, chosen.organ) == ("toy/c", "liver")
    figure = growth_figure(places(hidden), [chosen])
    drawn = panels(figure)
    assert list(drawn) == ["hidden truth", "round 1", "round 2"]
    assert "toy/c\naxial, z = 1 of 0..5" in drawn["hidden truth"].get_ylabel()
    assert drawn["round 1"].get_xlabel() == "whole case: precision 100 %, recall 50 %"
    assert drawn["round 2"].get_xlabel() == "whole case: precision 100 %, recall 100 %"


def test_a_whole_case_shows_all_organs_before_and_after(hidden):
    # Round 2, precision: a 224 / 248, b 112 / 114, c 1; the middle one is b.
    assert whole_case(places(hidden).last) == "toy/b"
    figure = whole_case_figure(places(hidden), "toy/b")
    assert list(panels(figure)) == ["annotated", "with round 1", "with round 2", "truth"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "liver: precision 98 %, recall 50 %", "left kidney: annotated", "spleen: nothing added", "annotated",
    ]  # fmt: skip
    # The liver, on the picture's left, is nowhere before the first round; the kidney is in all.
    liver, kidney = (0.769, 0.290, 0.235), (0.941, 0.639, 0.220)
    shown = [painted(figure, axes, liver, 0.45) for axes in figure.axes[:4]]
    assert len(shown[0]) == 0 and 0 < len(shown[1]) < len(shown[3])
    assert shown[3].mean(axis=0) == pytest.approx(middle_mm(BOXES["liver"][1:]), abs=2)
    for axes in figure.axes[:4]:
        middle = painted(figure, axes, kidney, 0.45).mean(axis=0)
        assert middle == pytest.approx(middle_mm(BOXES["left_kidney"][1:]), abs=2)


def test_where_nobody_knows_the_most_and_the_least_certain_additions_are_drawn(unknown):
    # Mean score: b (112 x 0.9 + 2 x 0.99) / 114, c 0.9, a (224 x 0.9 + 8 x 0.99 + 16 x 0.3) / 248.
    chosen, gone = most_and_least_certain(places(unknown).last)
    assert gone == []
    assert [(role, found.case) for role, found, _ in chosen] == [("most certain", "toy/b"), ("least certain", "toy/a")]
    assert [mean for *_, mean in chosen] == pytest.approx([102.78 / 114, 214.32 / 248])
    figure = certain_figure(places(unknown), chosen, "confidence")
    names = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert names == [
        "most certain: liver\ntoy/b\naxial, z = 3 of 0..5",
        "least certain: liver\ntoy/a\naxial, z = 2 of 0..5",
    ]
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_title() == "added"] == [
        "11.4 mL, pieces: 2", "24.8 mL, pieces: 2",
    ]  # fmt: skip


def test_volumes_are_marks_against_the_plausible_range(unknown):
    volumes, pieces = draw_volumes(places(unknown).last.unknown).axes
    (bar,) = volumes.patches
    assert (bar.get_x(), bar.get_width()) == (600, 2900)
    marks = [offset[0] for drawn in volumes.collections for offset in drawn.get_offsets().tolist()]
    assert marks == pytest.approx([24.8, 11.4, 22.4])
    assert [drawn.get_offsets().tolist()[0][0] for drawn in pieces.collections] == [2, 2, 1]


def test_volumes_are_of_all_that_is_taken_pieces_of_what_was_added(unknown):
    # Round 1 added half of the candidates: volumes of that half would never look too large.
    lines = places(unknown).rounds[0].unknown
    assert [found.volume_ml for found in lines if found.added] == pytest.approx([12.4, 5.7, 11.2])
    volumes, pieces = draw_volumes(lines).axes
    marks = [offset[0] for drawn in volumes.collections for offset in drawn.get_offsets().tolist()]
    assert marks == pytest.approx([24.8, 11.4, 22.4])
    assert volumes.get_xlabel() == "taken for the organ, added or not (mL); bar: plausible in an adult"
    assert pieces.get_xlabel() == "pieces added"


def test_an_organ_without_a_range_is_drawn_without_one(unknown):
    lines = [replace(found, organ="mass", plausible="unknown") for found in places(unknown).last.unknown]
    figure = draw_volumes(lines)
    assert not figure.axes[0].patches
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["case, no range known"]


def test_implausible_cases_are_listed_by_name(unknown):
    html = write_report(unknown.path).read_text()
    assert unknown.report() == ["index.html", *WITHOUT_TRUTH]
    text = re.sub(r"<[^>]+>", " ", html)
    assert re.search(r"implausible volumes .*liver\s+toy/a\s+24.8\s+600 to 3500\s+low\s+2 .*toy/b.*toy/c", text, re.S)


def test_pictures_are_in_the_page_and_in_the_folder_and_old_ones_go(hidden):
    first = (hidden.path / "report" / "index.html").read_bytes()
    assert hidden.report() == ["index.html", *WITH_TRUTH]
    assert first.count(b"data:image/png;base64") == len(WITH_TRUTH)
    for name in WITH_TRUTH:
        pixels = matplotlib.image.imread(hidden.path / "report" / name)
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels[..., 0])) > 20, name
    assert write_report(hidden.path).read_bytes() == first


def test_an_unfinished_round_is_left_out_and_named(tmp_path, capsys):
    run = make_run(tmp_path, truth=False)
    run.table(2, "organs").unlink()
    html = write_report(run.path).read_text()
    assert "<h3>Round 1:" in html and "<h3>Round 2" not in html
    assert "Volumes taken for the organs, and pieces added, in round 1" in html
    assert "round 2 is left out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pseudo-labels", "case"])
def test_missing_files_are_named_and_their_pictures_left_out(run, kind, capsys):
    for key in ("toy/a", "toy/b", "toy/c"):
        (run.labels(1, key) if kind == "pseudo-labels" else run.cache / f"{key}.h5").unlink()
    write_report(run.path)
    assert run.report() == ["index.html", "rounds.png"]
    notes = capsys.readouterr().err
    assert str(run.labels(1, "toy/a") if kind == "pseudo-labels" else run.cache / "toy" / "a.h5") in notes


def test_without_pseudo_labels_of_unknown_truth_the_case_is_named(tmp_path, capsys):
    run = make_run(tmp_path, truth=False)
    run.labels(2, "toy/b").unlink()
    write_report(run.path)
    assert "no picture considers toy/b" in capsys.readouterr().err
    assert run.report() == ["index.html", *WITHOUT_TRUTH]


def test_damaged_pseudo_labels_are_refused(run):
    path = run.labels(1, "toy/a")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"toy/a: .*content hash"):
        write_report(run.path)
    assert not (run.path / "report").exists()


def test_a_cache_on_another_grid_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other", shape=(6, 32, 36))
    (run.cache / "toy" / "a.h5").write_bytes((other.cache / "toy" / "a.h5").read_bytes())
    with pytest.raises(IntegrityError, match=r"\(6, 30, 36\), expected \(6, 32, 36\)"):
        write_report(run.path)


@pytest.mark.parametrize(
    ("score", "name"),
    [
        ("mcp", "probability (MCP)"),
        ({"class_path": "organseg.curriculum.scores.LearnedConfidence"}, "learned confidence"),
        ("organseg.curriculum.CrossFittedConfidence", "mean probability with judges"),
        ({"class_path": "mine.Entropy"}, "Entropy"),
    ],
)
def test_a_score_has_a_name(score, name):
    assert score_name({"curriculum": {"score": score}}) == name


def test_a_config_that_says_nothing_of_rounds_will_do(tmp_path):
    run = make_run(tmp_path, truth=False)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.split("curriculum")[0])
    html = write_report(run.path).read_text()
    assert "<h3>Round 1</h3>" in html and "highest and the lowest mean score" in html
    assert run.report() == ["index.html", *WITHOUT_TRUTH]


def test_the_probability_s_choice_is_compared_within_the_piece_that_was_eligible():
    candidates = np.zeros((1, 1, 7), dtype=bool)
    candidates[0, 0, [0, 1, 4, 5, 6]] = True
    chosen = np.zeros_like(candidates)
    chosen[0, 0, 5] = True
    assert np.flatnonzero(piece_of(candidates, chosen)).tolist() == [4, 5, 6]
    chosen[0, 0, 0] = True  # of two pieces: nothing was left out
    assert (piece_of(candidates, chosen) == candidates).all()
    assert (piece_of(candidates, np.zeros_like(candidates)) == candidates).all()
