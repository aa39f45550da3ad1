"""DESIGN.md section 3."""

from pathlib import Path

import pytest
import yaml
from synthetic import LABELS, write_dataset

from organseg.data.manifest import CaseEntry, Manifest, load_manifest, write_manifest
from organseg.errors import UsageError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files that manifests may name; their content does not matter here."""
    for name in ("a.nii.gz", "a_label.nii.gz", "b.nii.gz", "b_label.nii.gz"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def load(folder: Path, text: str) -> Manifest:
    path = folder / "dataset.yaml"
    path.write_text(text)
    return load_manifest(path)


HEAD = "name: set\nmodality: CT\nlabels: {6: liver, 1: Spleen, 3: kidney_left}\n"
CASE = "  - {id: a, image: a.nii.gz, label: a_label.nii.gz}\n"


def test_what_is_written_is_read(folder):
    manifest = load(folder, HEAD + "cases:\n" + CASE)
    assert manifest == Manifest(
        "set", "CT", {6: "liver", 1: "spleen", 3: "left_kidney"}, folder,
        (CaseEntry("a", folder / "a.nii.gz", folder / "a_label.nii.gz",
                   frozenset({"liver", "spleen", "left_kidney"}), frozenset()),),
    )  # fmt: skip
    assert manifest.organs == ("spleen", "left_kidney", "liver")  # in the order of the integers


def test_who_annotates_what(folder):
    manifest = load(
        folder,
        HEAD + "annotated: [liver, spleen]\nhide: [spleen]\ncases:\n" + CASE
        + "  - {id: own, image: a.nii.gz, label: a_label.nii.gz, annotated: [left_kidney, Lien], patient: p}\n"
        + "  - {id: hidden, image: a.nii.gz, label: a_label.nii.gz, hide: [hepar]}\n"
        + "  - {id: nothing, image: a.nii.gz, label: a_label.nii.gz, annotated: []}\n"
        + "  - {id: unlabelled, image: b.nii.gz}\n"
        + "  - {id: none, image: b.nii.gz, label: null, annotated: []}\n",
    )  # fmt: skip
    found = {case.id: (set(case.annotated), set(case.hidden)) for case in manifest.cases}
    assert found == {
        "a": ({"liver"}, {"spleen"}),
        "own": ({"left_kidney"}, {"spleen"}),  # what is hidden in the whole set is unknown here too
        "hidden": (set(), {"spleen", "liver"}),
        "nothing": (set(), {"spleen"}),
        "unlabelled": (set(), {"spleen"}),
        "none": (set(), {"spleen"}),
    }
    patients = [manifest.patient_of(case) for case in manifest.cases]
    assert patients == ["set/a", "p", "set/hidden", "set/nothing", "set/unlabelled", "set/none"]
    assert [case.label is None for case in manifest.cases] == [False, False, False, False, True, True]


def test_every_fault_of_a_file_is_told_at_once(folder):
    outside = folder.parent / f"{folder.name}_outside.nii.gz"
    outside.write_bytes(b"x")
    (folder / "link.nii.gz").symlink_to(outside)
    with pytest.raises(UsageError) as caught:
        load(
            folder,
            f"""
name: a/b
modality: PET
nonsense: 1
affine: both
assume_affine: maybe
new_organs: [IVC, ivc, "no good", prostate, background]
labels: {{0: liver, 255: spleen, x: aorta, true: aorta, 4: livr, 5: pancreas, 6: Pancreas, 7: stomach}}
annotated: [pancreas, colon]
hide: stomach
cases:
  - {{id: ../x, image: a.nii.gz, label: a_label.nii.gz}}
  - {{id: c1, image: gone.nii.gz, label: gone_label.nii.gz}}
  - {{id: c2, image: ../{outside.name}, label: link.nii.gz}}
  - {{id: c3, image: /etc/passwd, lable: a_label.nii.gz}}
  - {{id: c4, image: b.nii.gz, annotated: [pancreas]}}
  - {{id: c5, image: a.nii.gz, label: a_label.nii.gz, annotated: [splen], hide: [heart]}}
  - {{id: Twice, image: a.nii.gz, label: a_label.nii.gz}}
  - {{id: twice, image: a.nii.gz, label: a_label.nii.gz}}
  - {{id: c6}}
  - {{id: c7, image: [a.nii.gz], annotated: all}}
  - {{id: c8, image: "a\\0b", label: {"y" * 300}, patient: null}}
  - just text
""",
        )
    message = str(caught.value)
    expected = [
        "name: found 'a/b'",
        "modality: found 'PET', expected CT or MR",
        "top level: unknown key 'nonsense'; known: a",
        "affine: found 'both', expected sform or qform",
        "assume_affine: found 'maybe', expected true or false",
        "labels: found 0,",
        "labels: found 255,",
        "labels: found 'x',",
        "labels: found True,",
        "labels[4]: organ 'livr' is not known; nearest: liver",
        "new_organs: found 'IVC', expected a name of lower-case letters",
        "new_organs: ivc is known already, as inferior_vena_cava",
        "new_organs: found 'no good'",
        "new_organs: found 'background'",
        "annotated: colon is not among",
        "hide: found 'stomach', expected a list",
        "case ../x: id '../x'",
        "case c1: image: 'gone.nii.gz' does not exist",
        "case c1: label: 'gone_label.nii.gz' does not exist",
        f"case c2: image: '../{outside.name}' leaves the root",
        "case c2: label: 'link.nii.gz' leaves the root",
        "case c3: image: '/etc/passwd' leaves the root",
        "case c3: unknown key 'lable'",
        "case c4: annotated organs without a label file",
        "case c5: organ 'splen' is not known",
        "case c5: heart is not among",
        "case twice: 2 cases have this id",
        "case c6: image: found None, expected a path",
        "case c7: image: found ['a.nii.gz'], expected a path",
        "case c7: found 'all', expected a list of organs",
        "case c8: image: 'a\\x00b' is no path (embedded null byte)",
        "case c8: label: 'yyyyyyyy",
        "case c8: patient: found None, expected a name",
        "cases[11]: found 'just text'",
        "case 11: id ''",
        "case 11: image: found None",
    ]
    lines = message.splitlines()
    for fragment in expected:
        assert sum(fragment in line for line in lines) == 1, (fragment, message)
    assert len(lines) == len(expected)
    assert all(line.startswith(str(folder / "dataset.yaml")) for line in lines)


@pytest.mark.parametrize(
    "case", ["..", ".hidden", "-rf", "a b", "a/b", "a\\nb", "a\\0", "x" * 101, "", "über", "a\u202e", "~", "null"]
)
def test_unsafe_ids_are_refused(folder, case):
    case = f'"{case}"' if case not in ("~", "null") else case
    with pytest.raises(UsageError, match="id "):
        load(folder, HEAD + f"cases:\n  - {{id: {case}, image: a.nii.gz, label: a_label.nii.gz}}\n")


@pytest.mark.parametrize("case", ["img0001", "0012", "a.b-c_d", "12", "x" * 100])
def test_ids_stay_as_they_are_written(folder, case):
    manifest = load(folder, HEAD + f"cases:\n  - {{id: {case}, image: a.nii.gz, label: a_label.nii.gz}}\n")
    assert manifest.cases[0].id == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values"),
        ("- a\n", "expected keys and values"),
        (HEAD, "cases: expected a list of at least one case"),
        (HEAD + "cases: []\n", "cases: expected a list of at least one case"),
        (HEAD + "cases: {a: 1}\n", "cases: expected a list of at least one case"),
        ("name: s\nmodality: CT\ncases:\n" + CASE, "labels: expected integers"),
        (HEAD + "name: other\ncases:\n" + CASE, "duplicate key 'name'"),
        (HEAD + "cases:\n  - {id: a, id: b, image: a.nii.gz}\n", "duplicate key 'id'"),
        ("name: s\nmodality: CT\nlabels: {1: liver, 1: spleen}\ncases:\n" + CASE, "duplicate key 1"),
    ],
)
def test_documents_that_are_no_manifests(folder, text, message):
    with pytest.raises(UsageError, match=message):
        load(folder, text)


def test_paths_are_relative_to_root(folder):
    (folder / "scans").mkdir()
    (folder / "a.nii.gz").rename(folder / "scans" / "a.nii.gz")
    for root in ("scans", folder / "scans"):
        manifest = load(folder, HEAD + f"root: {root}\ncases:\n  - {{id: a, image: a.nii.gz}}\n")
        assert manifest.root == folder / "scans"
        assert manifest.cases[0].image == folder / "scans" / "a.nii.gz"
    with pytest.raises(UsageError, match="leaves the root"):
        load(folder, HEAD + "root: scans\ncases:\n  - {id: a, image: ../b.nii.gz}\n")


def test_a_written_manifest_reads_back_as_it_was(folder):
    text = HEAD + (
        "affine: qform\nassume_affine: true\nannotated: [liver, spleen]\nhide: [spleen]\ncases:\n" + CASE
        + "  - {id: '0012', image: a.nii.gz, label: a_label.nii.gz, patient: '7'}\n"
        + "  - {id: own, image: a.nii.gz, label: a_label.nii.gz, annotated: [left_kidney], hide: [liver]}\n"
        + "  - {id: '1e3', image: a.nii.gz, label: a_label.nii.gz, annotated: []}\n"
        + "  - {id: b, image: b.nii.gz, patient: a}\n"
    )  # fmt: skip
    manifest = load(folder, text)
    elsewhere = folder / "sub" / "written.yaml"
    elsewhere.parent.mkdir()
    write_manifest(elsewhere, manifest)
    assert load_manifest(elsewhere) == manifest
    assert elsewhere.stat().st_mode & 0o777 == 0o600
    assert list(elsewhere.parent.iterdir()) == [elsewhere]


def test_the_synthetic_data_set_is_a_manifest(tmp_path):
    manifest = load_manifest(write_dataset(tmp_path, 3, entries={"case1": {"patient": "p"}}))
    assert [case.id for case in manifest.cases] == ["case0", "case1", "case2"]
    assert manifest.labels == LABELS
    assert manifest.cases[1].patient == "p"
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["name"] == "tiny"


def test_a_patient_who_is_named_like_a_case_is_one_person(folder):
    later = "  - {id: later, image: b.nii.gz, patient: a}\n"
    manifest = load(folder, HEAD + "cases:\n" + CASE + later)
    assert [manifest.patient_of(case) for case in manifest.cases] == ["a", "a"]
    # The same name in two data sets is the same person, also where it is the case's id.
    named = load(folder, HEAD + "cases:\n  - {id: a, image: a.nii.gz, label: a_label.nii.gz, patient: a}\n")
    assert named.patient_of(named.cases[0]) == "a"
    written = folder / "written.yaml"
    write_manifest(written, named)
    assert load_manifest(written) == named


def test_parts_of_an_organ_other_structures_and_organs_of_one_s_own(folder):
    manifest = load(
        folder,
        """
name: set
modality: CT
new_organs: [prostate]
labels: {4: prostate, 1: pancreas, 2: pancreas, 3: background}
cases:
  - {id: a, image: a.nii.gz, label: a_label.nii.gz}
""",
    )
    assert manifest.organs == ("pancreas", "prostate")
    assert manifest.cases[0].annotated == {"pancreas", "prostate"}
    write_manifest(folder / "again.yaml", manifest)
    assert load_manifest(folder / "again.yaml") == manifest
    for labels, message in (("{1: background}", "at least one organ"), ("{1: prostate}", "not known; nearest")):
        with pytest.raises(UsageError, match=message):
            load(folder, f"{{name: s, modality: CT, labels: {labels}, cases: [{{id: a, image: a.nii.gz}}]}}")
