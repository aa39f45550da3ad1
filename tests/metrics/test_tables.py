import csv
import math
from dataclasses import replace

import pytest

from organseg.errors import IntegrityError
from organseg.metrics.evaluate import UNKNOWN, OrganScore
from organseg.metrics.summary import CaseRow, summarise
from organseg.metrics.tables import CASE_COLUMNS, read_case_table, write_case_table, write_summary

SCORE = OrganScore("found", 0.1 + 0.2, 1 / 3, 1e-17, 123456789.123456789, 0.999999999999, 5e-324, 2 / 3)
ROWS = [
    CaseRow("btcv/img0001", "liver", SCORE, 512.3),
    CaseRow('odd, "case"\nnäme', "spleen", replace(SCORE, outcome="both_empty"), 1e300),
]


def test_case_table_reads_back_exactly(tmp_path):
    write_case_table(tmp_path / "cases.csv", ROWS)
    assert read_case_table(tmp_path / "cases.csv") == ROWS


def test_what_has_no_value_is_nan_in_the_file_and_after(tmp_path):
    write_case_table(tmp_path / "cases.csv", [CaseRow("a", "liver", UNKNOWN, 1.5)])
    text = (tmp_path / "cases.csv").read_text()
    assert text.splitlines()[1] == "a,liver,unknown,nan,nan,nan,nan,nan,nan,nan,1.5"
    (row,) = read_case_table(tmp_path / "cases.csv")
    assert row.score.outcome == "unknown"
    assert math.isnan(row.score.hd95_mm)
    assert row.diagonal_mm == 1.5


def test_no_rows_still_make_a_table(tmp_path):
    write_case_table(tmp_path / "cases.csv", [])
    assert read_case_table(tmp_path / "cases.csv") == []


HEADER = ",".join(CASE_COLUMNS)
NUMBERS = ",".join(["1.0"] * 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found columns"),
        (b"case,organ\n", r"found columns \('case', 'organ'\), expected"),
        (f"{HEADER}\na,liver,found,1.0\n".encode(), r"row 1: found .* expected 11 cells"),
        (f"{HEADER}\na,liver,found,{NUMBERS}\nb,liver,lost,{NUMBERS}\n".encode(), r"row 2: .*'lost'.* an outcome of"),
        (f"{HEADER}\na,liver,found,{NUMBERS[:-3]}x\n".encode(), r"row 1: .* expected numbers \(.*'x'"),
        (f'{HEADER}\na,liver,"found'.encode(), "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "cases.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"cases\.csv: .*{message}.*; run `organseg test` again"):
        read_case_table(path)


def test_summary_has_one_line_an_organ_and_the_mean(tmp_path):
    rows = [CaseRow("a", "liver", SCORE, 100.0), CaseRow("b", "liver", UNKNOWN, 100.0)]
    write_summary(tmp_path / "summary.csv", summarise(rows))
    with (tmp_path / "summary.csv").open(newline="") as stream:
        liver, overall = csv.DictReader(stream)
    assert (liver["organ"], liver["evaluated"], liver["unknown"], liver["found"]) == ("liver", "1", "1", "1")
    assert overall["organ"] == "mean"
    assert float(liver["dsc_mean"]) == SCORE.dsc
    assert liver["dsc_std"] == "nan"
    assert float(liver["hd95_mm_mean_without_both_empty"]) == SCORE.hd95_mm
    assert float(overall["nsd_mean"]) == SCORE.nsd
