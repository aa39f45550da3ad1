"""Who trains, and what each case may show (METHOD.md 1.2, 1.4)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic import LABELS, SPACING, make_cache, make_case, write_dataset

from organseg.data.cache import CachedCase
from organseg.data.cohort import CohortOptions, load_cohort, read_index
from organseg.errors import IntegrityError, UsageError

ORGANS = ("liver", "left_kidney", "right_kidney", "spleen")
DEFAULTS = {
    "datasets": None, "organs": None, "fold": 0, "folds": 5, "fold_seed": 0, "val_share": 0.15, "label_share": 1.0,
    "seed": 0,
}  # fmt: skip


def load(cache: Path, **options: object):
    return load_cohort(CohortOptions(**{"cache": cache, **DEFAULTS, **options}))


def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_everything_by_default(prepared):
    cohort = load(prepared)
    assert cohort.organs == ORGANS
    assert [len(part) for part in (cohort.train, cohort.val, cohort.test)] == [7, 1, 2]
    assert sorted(case.key for case in (*cohort.train, *cohort.val, *cohort.test)) == [
        f"tiny/case{i}" for i in range(10)
    ]
    for case in cohort.train:
        assert case.annotated == frozenset(ORGANS)
        assert case.known.tolist() == [True] * 4
        assert case.lookup[:5].tolist() == [0, 1, 2, 3, 4]


def test_hidden_labels_are_zero_and_unknown_but_never_in_test_cases(prepared):
    cohort = load(prepared, label_share=0.3)
    shown = (*cohort.train, *cohort.val)
    for organ in ORGANS:
        assert sum(organ in case.annotated for case in shown) == 2  # 0.3 x 8 = 2.4
    for case in cohort.test:
        assert case.annotated == frozenset(ORGANS)
    partly = [case for case in shown if 0 < len(case.annotated) < 4]
    assert partly
    for case in shown:
        label = case.cached.arrays().label
        seen = case.lookup[label]
        for k, organ in enumerate(ORGANS, start=1):
            assert case.known[k - 1] == (organ in case.annotated)
            assert (seen[label == k] == (k if organ in case.annotated else 0)).all()
        assert case.lookup[255] == 255
        assert not case.lookup[5:255].any()


def test_organs_in_the_order_of_the_run_and_others_background(prepared):
    case = load(prepared, organs=["Lien", "kidney left"]).train[0]
    assert case.organs == ("spleen", "left_kidney")
    assert case.annotated == {"spleen", "left_kidney"}
    # In the cache: 1 liver, 2 left kidney, 3 right kidney, 4 spleen.
    assert case.lookup[:5].tolist() == [0, 0, 2, 0, 1]
    assert sorted(case.columns()) == [(0, 3), (1, 1)]


def test_centres_are_middles_of_bounding_boxes_in_mm(prepared):
    cohort = load(prepared, organs=["spleen", "liver"], label_share=0.5)
    seen = 0
    for case in cohort.train:
        label = make_case(int(case.key[-1]))[1]
        for k, organ in enumerate(case.organs):
            voxels = np.argwhere(label == {name: value for value, name in LABELS.items()}[organ])
            middle = (voxels.min(0) + voxels.max(0)) / 2 * SPACING
            if organ in case.annotated:
                assert case.centres()[k] == pytest.approx(middle)
                seen += 1
            else:
                assert np.isnan(case.centres()[k]).all()
        assert case.centres().dtype == np.float32
    assert 0 < seen < 2 * len(cohort.train)


def test_an_absent_organ_is_known_and_has_no_centre(tmp_path):
    dataset = write_dataset(tmp_path / "set", 3, head={"labels": {**LABELS, 9: "heart"}})
    case = load(make_cache(dataset, tmp_path / "cache"), folds=3, val_share=0).train[0]
    heart = case.organs.index("heart")
    assert case.known[heart]
    assert np.isnan(case.centres()[heart]).all()


def test_two_data_sets_with_their_own_organs(tmp_path):
    cache = tmp_path / "cache"
    make_cache(write_dataset(tmp_path / "one", 4, name="one"), cache)
    hide = {"labels": {1: "spleen", 2: "liver", 3: "left_kidney", 5: "right_kidney", 7: "stomach"},
            "hide": ["liver", "left_kidney", "right_kidney", "stomach"], "annotated": []}  # fmt: skip
    make_cache(write_dataset(tmp_path / "two", 4, name="two", seed=20, head=hide), cache)
    cohort = load(cache, folds=4, val_share=0)
    assert cohort.organs == (*ORGANS, "stomach")
    everyone = {case.key: case for case in (*cohort.train, *cohort.test)}
    assert len(everyone) == 8  # case0 of one set is not case0 of the other
    assert everyone["one/case0"].known.tolist() == [True] * 4 + [False]
    assert not everyone["two/case0"].known.any()
    alone = load(cache, datasets=["two"], folds=4, val_share=0)
    assert {case.key[:3] for case in (*alone.train, *alone.test)} == {"two"}


@pytest.fixture(scope="module")
def three_sets(tmp_path_factory):
    """`one` and `two` to learn from, `held` to test on, which alone labels the heart."""
    folder = tmp_path_factory.mktemp("three")
    cache = folder / "cache"
    make_cache(write_dataset(folder / "one", 5, name="one"), cache)
    make_cache(write_dataset(folder / "two", 4, name="two", seed=20, labels={3: "hepar"}), cache)
    return make_cache(
        write_dataset(folder / "held", 3, name="held", seed=40, labels={**LABELS, 9: "heart"}),
        cache,
    )


def names(cases) -> set[str]:
    return {case.key.split("/")[0] for case in cases}


@pytest.mark.parametrize("datasets", [None, ["one", "two"], ["two", "one", "held"]])
def test_a_test_data_set_is_tested_and_nothing_else(three_sets, datasets):
    cohort = load(three_sets, datasets=datasets, test_datasets=["held"], val_share=0.2)
    assert names(cohort.test) == {"held"} and len(cohort.test) == 3
    assert names(cohort.train) == {"one", "two"}
    assert (len(cohort.train), len(cohort.val)) == (7, 2)
    assert set(cohort.organs) == set(ORGANS)  # what can be learned, not the heart
    for options in ({"fold": 3}, {"folds": 77}, {"fold_seed": 5}):
        other = load(three_sets, datasets=datasets, test_datasets=["held"], val_share=0.2, **options)
        assert other.content_hash == cohort.content_hash


def test_only_training_and_validation_labels_are_hidden(three_sets):
    cohort = load(three_sets, test_datasets=["held"], label_share=0.25, organs=[*ORGANS, "heart"])
    shown = [*cohort.train, *cohort.val]
    assert [sum(organ in case.annotated for case in shown) for organ in cohort.organs] == [2, 1, 1, 1, 0]  # of 9 and 5
    assert all(case.annotated == {*ORGANS, "heart"} for case in cohort.test)


def test_which_set_is_tested_is_part_of_the_content(three_sets):
    hashes = {load(three_sets, test_datasets=tested).content_hash for tested in (None, ["held"], ["two"])}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_datasets": ["other"]}, "no data set other; prepared here: held, one, two"),
        ({"test_datasets": ["held"], "datasets": ["held"]}, "test_datasets: held are all there is"),
        ({"test_datasets": ["held", "one", "two"]}, "held, one, two are all there is"),
        ({"test_datasets": ["held"], "organs": ["colon"]}, "labels colon; labelled: .*heart"),
        ({"test_datasets": ["held"], "val_share": 0.99}, "leaves no patient of 9"),
    ],
)
def test_impossible_test_data_sets(three_sets, options, message):
    with pytest.raises(UsageError, match=message):
        load(three_sets, **options)


def test_one_patient_in_a_test_data_set_and_a_training_one_is_refused(tmp_path):
    cache = tmp_path / "cache"
    for name, seed in (("one", 0), ("held", 20)):
        entries = {"case1": {"patient": "john"}}
        make_cache(write_dataset(tmp_path / name, 3, name=name, seed=seed, entries=entries), cache)
    with pytest.raises(UsageError, match=r"one/case1 \(training\) and held/case1 \(test\) are of one patient, 'john'"):
        load(cache, test_datasets=["held"])


def test_one_image_in_a_test_data_set_and_a_training_one_is_refused(tmp_path):
    cache = tmp_path / "cache"
    for name, seed in (("one", 0), ("held", 2)):  # case2 of the one is case0 of the other
        make_cache(write_dataset(tmp_path / name, 3, name=name, seed=seed), cache)
    with pytest.raises(UsageError, match=r"one/case2 .* and held/case0 .* are the same image"):
        load(cache, test_datasets=["held"], val_share=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organs": ["liver", "heart"]}, "organs: no data set in .* labels heart; labelled: liver, left_kidney"),
        ({"organs": ["liver", "livr"]}, "organ 'livr' is not known; nearest: liver"),
        ({"organs": ["liver", "spleen", "hepar"]}, "organs: liver given twice"),
        ({"datasets": ["tiny", "btcv"]}, "no data set btcv; prepared here: tiny"),
        ({"label_share": 1.5}, "label_share is 1.5"),
        ({"fold": 7}, "fold 7 does not exist"),
    ],
)
def test_what_is_not_there_is_named(prepared, options, message):
    with pytest.raises(UsageError, match=message):
        load(prepared, **options)


def test_a_folder_that_is_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no prepared data set here"):
            load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "cases": 3}', "\x00\xff"])
def test_a_damaged_index_is_refused(prepared, tmp_path, text):
    cache = copy(prepared, tmp_path)
    (cache / "tiny" / "index.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"index\.json: no readable index"):
        load(cache)


def test_an_index_of_another_schema(prepared, tmp_path):
    cache = copy(prepared, tmp_path)
    path = cache / "tiny" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(IntegrityError, match="schema 2, this version reads 1"):
        load(cache)


def test_files_that_are_not_those_of_the_index(prepared, tmp_path):
    cache = copy(prepared, tmp_path)
    folder = cache / "tiny"
    shutil.copy(folder / "case3.h5", folder / "case4.h5")
    with pytest.raises(IntegrityError, match="case4 changed since the last complete preparation"):
        read_index(folder)
    (folder / "case4.h5").unlink()
    with pytest.raises(IntegrityError, match="tiny/case4"):
        load(cache)


def test_a_case_that_is_not_listed_is_not_used(prepared, tmp_path):
    cache = copy(prepared, tmp_path)
    path = cache / "tiny" / "index.json"
    document = json.loads(path.read_text())
    del document["cases"]["case9"]
    path.write_text(json.dumps(document))
    cohort = load(cache)
    assert len([*cohort.train, *cohort.val, *cohort.test]) == 9


def same_image_twice(tmp_path: Path, **entries: dict[str, str]) -> Path:
    """Six patients; case5 is case0's scan under another name."""
    dataset = write_dataset(tmp_path / "set", 6, entries=entries)
    for suffix in (".nii.gz", "_label.nii.gz"):
        (dataset.parent / f"case5{suffix}").write_bytes((dataset.parent / f"case0{suffix}").read_bytes())
    return make_cache(dataset, tmp_path / "cache")


def test_one_image_in_training_and_test_is_refused(tmp_path):
    cache = same_image_twice(tmp_path)
    refused = 0
    for fold in range(5):
        try:
            cohort = load(cache, fold=fold, val_share=0)
        except UsageError as error:
            assert "tiny/case0" in str(error) and "tiny/case5" in str(error) and "same image" in str(error)
            refused += 1
        else:
            tested = {case.key for case in cohort.test}
            assert {"tiny/case0", "tiny/case5"} <= tested or not {"tiny/case0", "tiny/case5"} & tested
    assert refused >= 1


def test_one_image_twice_of_one_patient_stays_together(tmp_path):
    cache = same_image_twice(tmp_path, case0={"patient": "p"}, case5={"patient": "p"})
    for fold in range(5):
        load(cache, fold=fold, val_share=0)


def test_the_content_hash_is_of_everything_that_a_run_sees(prepared, tmp_path):
    first = load(prepared).content_hash
    assert load(prepared).content_hash == first
    others = [
        {"label_share": 0.5},
        {"fold": 1},
        {"organs": ["liver"]},
        {"seed": 1, "label_share": 0.5},
        {"val_share": 0},
    ]
    hashes = {first} | {load(prepared, **options).content_hash for options in others}
    assert len(hashes) == 6
    moved = copy(prepared, tmp_path)
    assert load(moved).content_hash == first


def test_headers_are_those_of_the_files(prepared):
    for case in load(prepared).train:
        assert case.cached.header == CachedCase(case.cached.path).header
