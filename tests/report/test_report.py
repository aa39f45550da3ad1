import base64
import io
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from organseg.errors import IntegrityError, UsageError
from organseg.metrics import write_case_table
from organseg.report import write_report

PICTURES = ["curves.png", "organs.png", "overlay_best.png", "overlay_median.png", "overlay_worst.png"]


def written(run) -> list[str]:
    return sorted(path.name for path in (run.path / "report").iterdir())


def test_a_tested_run_gets_every_picture_and_a_page_that_holds_them(reported):
    assert written(reported) == [*PICTURES[:1], "index.html", *PICTURES[1:]]
    folder = reported.path / "report"
    html = (folder / "index.html").read_text()
    inside = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert sorted(inside) == sorted((folder / name).read_bytes() for name in PICTURES)
    for content in inside:
        pixels = matplotlib.image.imread(io.BytesIO(content))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels[..., 0])) > 20, "a blank picture"


def test_the_worst_case_is_the_one_with_the_lowest_mean(reported):
    html = (reported.path / "report" / "index.html").read_text()
    assert "Best case by mean DSC: toy/c" in html
    assert "Median case by mean DSC: toy/a" in html
    assert "Worst case by mean DSC: toy/b" in html


def test_a_second_report_is_the_same_and_says_nothing(reported, capsys):
    first = (reported.path / "report" / "index.html").read_bytes()
    index = write_report(reported.path)
    assert index == reported.path / "report" / "index.html"
    assert index.read_bytes() == first
    assert capsys.readouterr() == ("", "")


def test_before_a_test_there_are_curves_and_the_command_to_run(run, capsys):
    (run.path / "test" / "cases.csv").unlink()
    html = write_report(run.path).read_text()
    assert written(run) == ["curves.png", "index.html"]
    command = f"organseg test --config {run.path}/config.yaml --ckpt_path {run.path}/checkpoints/last.ckpt"
    assert command in html
    (line,) = capsys.readouterr().err.splitlines()
    assert command in line


def test_a_run_without_a_logged_number_says_so(run, capsys):
    (run.path / "metrics.csv").unlink()
    write_report(run.path)
    assert "curves.png" not in written(run)
    assert "no training curves" in capsys.readouterr().err


def test_without_predictions_one_line_says_that_overlays_are_left_out_and_old_ones_go(run, capsys):
    (run.path / "report").mkdir()
    (run.path / "report" / "overlay_best.png").write_bytes(b"of an earlier test")
    for path in run.predictions.glob("*/*"):
        path.unlink()
    write_report(run.path)
    assert written(run) == ["curves.png", "index.html", "organs.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "no overlay of best" in line and "run `organseg test` again" in line


def test_a_cache_that_moved_is_named_and_nothing_is_written(run):
    run.cache.rename(run.cache.with_name("elsewhere"))
    with pytest.raises(UsageError, match=r"cache/toy/c\.h5: no such case.*correct the path") as caught:
        write_report(run.path)
    assert "\n" not in str(caught.value)
    assert not (run.path / "report").exists()


def test_a_relative_cache_is_said_to_be_looked_for_here(run):
    text = (run.path / "config.yaml").read_text().replace(str(run.cache), "nowhere")
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(f"looked for below {Path.cwd()}")):
        write_report(run.path)


def test_predictions_of_other_organs_are_refused(run):
    write_case_table(run.path / "test" / "cases.csv", [row for row in run.rows if row.organ == "liver"])
    with pytest.raises(IntegrityError, match=r"values to 3, expected .* values to 1"):
        write_report(run.path)


@pytest.mark.parametrize("content", [None, "- a list\n"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match="organseg fit"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
