"""`tools/table.py`: runs, folders of `evaluate` and folds side by side."""

import sys
from pathlib import Path

import pytest
import warm

from organseg.metrics import CaseRow, OrganScore, summarise, write_case_table, write_summary

sys.path.append(str(warm.TOOLS))

import table


def scored(folder: Path, **dsc: float) -> Path:
    rows = [CaseRow(case, "liver", OrganScore("found", value, 1, 1, 1, 1, 9, 9), 100.0) for case, value in dsc.items()]
    folder.mkdir(parents=True)
    write_case_table(folder / "cases.csv", rows)
    write_summary(folder / "summary.csv", summarise(rows))
    return folder


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["table", *map(str, words)])
    table.main()
    return capsys.readouterr().out


def test_runs_and_scored_folders_stand_side_by_side(tmp_path, monkeypatch, capsys):
    run = scored(tmp_path / "ours" / "test", a=0.5, b=0.7).parent
    theirs = scored(tmp_path / "theirs", a=0.4, b=0.5)
    found = shown(monkeypatch, capsys, run, theirs, "--paired")
    assert "| DSC % | ours | theirs |" in found and "| liver | 60.0 |   45.0 |" in found
    assert "theirs: -15.0" in found and "2 cases" in found


def test_folds_are_one_column_of_all_their_patients(tmp_path, monkeypatch, capsys):
    folds = [scored(tmp_path / "fold_0", a=0.5), scored(tmp_path / "fold_1", b=0.6, c=1.0)]
    found = shown(monkeypatch, capsys, "--pool", f"all={folds[0]},{folds[1]}")
    assert "| liver | 70.0 |" in found  # over three patients, not over two folds
    with pytest.raises(SystemExit):
        shown(monkeypatch, capsys, "--pool", f"all={folds[0]},{folds[0]}")
    assert "a case was tested by two of its runs" in capsys.readouterr().err
