"""A round's tables, numbers by hand, and what is said of a round that has collapsed."""

import csv
from pathlib import Path

import numpy as np
import pytest

from organseg.curriculum.quality import RoundReport, added_times, refuse_collapse
from organseg.data.pseudo_labels import PseudoLabels, RoundHeader, write_pseudo_labels
from organseg.errors import NumericsError

ORGANS = ("liver", "spleen", "mass")
"""Nobody annotates the mass, and `anatomy` does not know it."""


class Source:
    """Voxels of 0.1 mL in case a, of 0.2 mL in case b."""

    def voxel_ml(self, key: str) -> float:
        return {"set/a": 0.1, "set/b": 0.2}[key]

    def mean_volumes_ml(self) -> tuple[float, ...]:
        return (3.5, 100.0, np.nan)

    def unknown_organs(self, key: str) -> np.ndarray:
        return np.ones(3, bool)

    def hidden_organs(self, key: str) -> np.ndarray:
        return np.zeros(3, bool)


def headers(*added: tuple[int, int, int], candidates: tuple[int, int, int] = (9999,) * 3) -> list[RoundHeader]:
    keys = ("set/a", "set/b")
    return [RoundHeader(key, ORGANS, 1, 1.0, "", candidates, one) for key, one in zip(keys, added, strict=True)]


def test_what_was_added_is_compared_with_the_mean_annotated_volume():
    # Liver: 10 and 60 mL, in the mean 35; the spleen in one case alone: 50 mL.
    times = added_times(headers((100, 500, 0), (300, 0, 30)), Source())
    assert times == pytest.approx({"liver": 10.0, "spleen": 0.5})


@pytest.mark.parametrize(("liver", "spleen"), [(50, 0), (101, 500), (1, 1), (0, 0), (400, 0)])
def test_a_round_with_anything_plausible_goes_on(liver, spleen):
    refuse_collapse(headers((liver, spleen, 9999), (0, 0, 9999)), Source())


@pytest.mark.parametrize(("added", "candidates", "said"), [
    ((0, 0, 0), (0, 0, 0), "no candidate of any unlabelled organ"),
    ((400, 11_000, 0), (9999,) * 3, r"times its mean volume: liver 11, spleen 11\)"),
])  # fmt: skip
def test_a_collapsed_round_stops(added, candidates, said):
    with pytest.raises(NumericsError, match=said):
        refuse_collapse(headers(added, (0, 0, 0), candidates=candidates), Source())


def report(folder: Path, accumulated: bool = False) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Of case a, 500 voxels of the liver and 20 of the mass; the tables' rows."""
    label = np.zeros((2, 20, 20), np.uint8)
    label.ravel()[:500] = 1
    label.ravel()[600:620] = 3
    rounds = np.where(label > 0, 1 + accumulated, 0).astype(np.uint8)
    rounds.ravel()[:100] = 1
    candidate = np.where(rounds == 1 + accumulated, label, 0).astype(np.uint8)
    score = (candidate > 0).astype(np.float32)
    now = (400 if accumulated else 500, 0, 20)
    header = RoundHeader("set/a", ORGANS, 1 + accumulated, 1.0, "", now, now)
    write_pseudo_labels(folder / "labels", header, PseudoLabels(label, rounds, candidate, score, score))
    written = RoundReport(folder, folder / "labels", [header], Source())
    written.add(header)
    written.write()
    tables = []
    for name in ("cases", "organs"):
        with (folder / f"{name}.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    return tables[0], tables[1]


def test_warnings_name_organs_and_leave_the_table_alone(tmp_path, capsys):
    report(tmp_path)
    said = capsys.readouterr()
    assert "warning" not in said.out
    assert said.err.splitlines() == [
        "organseg: warning: no candidate at all of spleen: nothing was added for it in this round",
        "organseg: warning: liver: 14 times its mean annotated volume was added to a case, in the mean",
    ]


def test_what_a_round_added_is_beside_its_candidates(tmp_path, capsys):
    cases, organs = report(tmp_path, accumulated=True)
    assert [(row["candidates"], row["added"], row["added_now"]) for row in cases] == [
        ("400", "500", "400"), ("0", "0", "0"), ("20", "20", "20"),
    ]  # fmt: skip
    assert (organs[0]["candidates"], organs[0]["added"], organs[0]["added_now"]) == ("400", "500", "400")
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["organ", "cases", "candidates", "added", "so", "far"]
    assert printed[3].split() == ["liver", "1", "400", "400", "500"]
    report(tmp_path)
    assert "so far" not in capsys.readouterr().out


def test_an_organ_without_a_range_is_neither_plausible_nor_implausible(tmp_path):
    cases, _ = report(tmp_path)
    assert {row["organ"]: row["plausible"] for row in cases} == {"liver": "low", "spleen": "none", "mass": "unknown"}
