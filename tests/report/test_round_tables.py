"""Tables of relabelling rounds that are spoilt, of another version, or empty."""

import csv

import pytest
from relabelled import Relabelled, make_run

from organseg.errors import IntegrityError
from organseg.report import write_report
from organseg.report.round_tables import read_rounds


@pytest.fixture
def run(tmp_path) -> Relabelled:
    """A run that a test may spoil."""
    return make_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "found", "wanted", "message"),
    [
        ("cases", "toy/a,liver,248,124", "toy/a,liver,248,123", "found 124 voxels of liver, expected 123"),
        ("cases", "toy/a,liver,248,124", "toy/a,liver,248,-4", "row 1: found '-4', expected a count"),
        ("cases", "toy/a,liver,248,124", "toy/a,aorta,248,124", "names aorta"),
        ("cases", ",low,", ",perhaps,", "row 1: found 'perhaps', expected one of yes, low"),
        ("cases", "pieces", "parts", "expected also pieces"),
        ("organs", "liver,", "liver,1,", "row 1: .* expected 14 cells"),
        ("organs", "586", "9" * 30, "expected a count"),
        ("organs", "0.965", "nan0.965", "expected a number"),
    ],
)
def test_a_spoilt_table_is_refused(run, name, found, wanted, message):
    path = run.table(1, name)
    text = path.read_text()
    assert found in text
    path.write_text(text.replace(found, wanted, 1))
    with pytest.raises(IntegrityError, match=message) as caught:
        write_report(run.path)
    assert "\n" not in str(caught.value)


def test_other_columns_may_be_there_in_any_order(run):
    before = read_rounds(run.path, [])
    for index in (1, 2):
        for name in ("cases", "organs"):
            head, *rows = run.table(index, name).read_text().splitlines()
            turned = [
                ",".join([*row.split(",")[::-1], more]) for row, more in ((head, "new"), *((r, "7") for r in rows))
            ]
            run.table(index, name).write_text("\n".join(turned) + "\n")
    assert repr(read_rounds(run.path, [])) == repr(before)


def test_tables_of_older_versions_have_fewer_columns(tmp_path):
    run = make_run(tmp_path, accumulate=True)
    for name in ("cases", "organs"):
        with run.table(2, name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [column for column in rows[0] if column not in ("added_now", "taken_ml")]
        lines = [kept, *([row[column] for column in kept] for row in rows)]
        run.table(2, name).write_text("".join(f"{','.join(cells)}\n" for cells in lines))
    last = read_rounds(run.path, [])[-1]
    assert [found.added_now for found in last.organs] == [found.added for found in last.organs] == [586, 0]
    assert all(found.taken_ml == found.volume_ml for found in last.cases)


def test_a_round_that_found_nothing_is_a_table_of_zeros(run, capsys):
    for name, row in (("cases", "toy/a,spleen,0,0,0,0.0,0.0,none,0,0,72"), ("organs", "spleen,1,1,0,0,0,,0.0,,,,,,")):
        path = run.table(1, name)
        path.write_text(path.read_text().splitlines()[0] + "\n" + row + "\n")
        run.table(2, name).unlink()
    html = write_report(run.path).read_text()
    assert "No candidate of spleen" in html
    assert run.report() == ["index.html", "rounds.png"]
