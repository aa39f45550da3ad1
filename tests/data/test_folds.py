from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from organseg.data.folds import hold_out, split
from organseg.errors import UsageError


def cohort(patients: int, cases_each: int = 1) -> dict[str, str]:
    return {f"set/p{p:02}_{c}": f"p{p:02}" for p in range(patients) for c in range(cases_each)}


@given(
    st.dictionaries(st.text("abc/01", min_size=1, max_size=5), st.sampled_from("ABCDEFGHIJ"), min_size=4, max_size=30),
    st.integers(2, 5), st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 0.15, 0.4]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_parts_of_every_fold(patients, folds, fold_seed, seed, val_share):
    names = set(patients.values())
    assume(len(names) > folds + 2)  # else nobody may be left to train on
    tested: Counter[str] = Counter()
    sizes = set()
    for fold in range(folds):
        parts = split(patients, fold=fold, folds=folds, fold_seed=fold_seed, val_share=val_share, seed=seed)
        assert sorted([*parts.train, *parts.val, *parts.test]) == sorted(patients)  # every case, once
        members = [{patients[key] for key in part} for part in (parts.train, parts.val, parts.test)]
        assert sum(map(len, members)) == len(names)  # no patient in two parts
        for part in (parts.train, parts.val, parts.test):
            assert list(part) == sorted(part)
        others = len(members[0]) + len(members[1])
        assert len(members[1]) == (max(1, round(val_share * others)) if val_share else 0)
        tested.update(members[2])
        sizes.add(len(members[2]))
    assert max(sizes) - min(sizes) <= 1
    assert set(tested) == names
    assert set(tested.values()) == {1}


def test_24_patients_in_5_folds():
    sizes = [len(split(cohort(24), fold=fold).test) for fold in range(5)]
    assert sizes == [5, 5, 5, 5, 4]
    parts = split(cohort(24), fold=0)
    assert (len(parts.train), len(parts.val)) == (16, 3)  # 0.15 x 19 = 2.85


def test_all_cases_of_a_patient_stay_together():
    parts = split(cohort(10, cases_each=3), fold=1)
    assert len(parts.test) == 6
    assert len({key.rpartition("_")[0] for key in parts.test}) == 2


def test_the_tested_patients_depend_on_names_and_fold_seed_alone():
    patients = cohort(12)
    first = split(patients, fold=2).test
    assert split(dict(reversed(patients.items())), fold=2).test == first
    assert split(patients, fold=2, seed=5, val_share=0.4).test == first
    assert split(patients, fold=2, fold_seed=1).test != first
    renamed = {f"{key}x": patient for key, patient in patients.items()}  # other keys, the same patients
    assert tuple(key.removesuffix("x") for key in split(renamed, fold=2).test) == first
    doubled = patients | {f"{key}_2": patient for key, patient in patients.items()}
    assert tuple(key for key in split(doubled, fold=2).test if not key.endswith("_2")) == first


def test_the_seed_draws_who_validates():
    draws = {split(cohort(24), fold=0, seed=seed).val for seed in range(6)}
    assert len(draws) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 5}, r"fold 5 does not exist: with folds=5 it is 0\.\.4"),
        ({"fold": -1}, "fold -1 does not exist"),
        ({"fold": 0, "folds": 11}, "10 patients cannot make 11 folds"),
        ({"fold": 0, "val_share": 0.99}, r"val_share 0\.99 leaves no patient of 8 to train on"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        split(cohort(10), **options)


def test_held_out_cases_are_tested_and_all_others_train_and_validate():
    patients = cohort(12)
    tested = {"set/p03_0", "set/p07_0"}
    parts = hold_out(patients, tested, val_share=0.2, seed=1)
    assert parts.test == ("set/p03_0", "set/p07_0")
    assert len(parts.val) == 2 and len(parts.train) == 8
    assert sorted([*parts.train, *parts.val, *parts.test]) == sorted(patients)
    assert hold_out(dict(reversed(patients.items())), tested, val_share=0.2, seed=1) == parts
    assert {hold_out(patients, tested, val_share=0.2, seed=seed).val for seed in range(4)} != {parts.val}
    assert hold_out(patients, tested, val_share=0).val == ()


def test_the_same_patients_tested_give_the_same_split():
    patients = cohort(12)
    by_fold = split(patients, fold=1, val_share=0.3, seed=4)
    assert hold_out(patients, by_fold.test, val_share=0.3, seed=4) == by_fold


def test_a_patient_on_both_sides_is_refused():
    with pytest.raises(UsageError, match=r"set/p03_1 \(training\) and set/p03_0 \(test\) are of one patient, 'p03'"):
        hold_out(cohort(5, cases_each=2), {"set/p03_0"})


@pytest.mark.parametrize(
    ("tested", "val_share", "message"),
    [(5, 0.15, "every case is a test case"), (4, 0.15, "val_share 0.15 leaves no patient of 1 to train on")],
)
def test_nobody_left_to_train_on(tested, val_share, message):
    patients = cohort(5)
    with pytest.raises(UsageError, match=message):
        hold_out(patients, set(list(patients)[:tested]), val_share=val_share)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"folds": 1}, "folds: found 1, expected at least 2"), ({"val_share": -0.1}, "val_share: found -0.1, expected 0"),
     ({"val_share": 1.0}, "val_share: found 1.0, expected 0 or more, and below 1")],
)  # fmt: skip
def test_shares_that_are_none(options, message):
    with pytest.raises(UsageError, match=message):
        split(cohort(6), **{"fold": 0, **options})
