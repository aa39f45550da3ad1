"""METHOD.md 1.4."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.data.partial import hide_labels
from organseg.errors import UsageError

ORGANS = ["liver", "spleen", "pancreas"]
COHORTS = st.dictionaries(
    st.text("abcdef/0123456789", min_size=1, max_size=6), st.sets(st.sampled_from(ORGANS)), max_size=25
)
SHARES = (0.1, 0.3, 0.5, 0.7)


def cases_of(kept, organ):
    return {case for case, organs in kept.items() if organ in organs}


@given(COHORTS, st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_counts_are_exact(annotated, share, seed):
    kept = hide_labels(annotated, share, seed)
    assert set(kept) == set(annotated)
    for organ in ORGANS:
        n = len(cases_of(annotated, organ))
        expected = 0 if share == 0 or n == 0 else max(1, round(share * n))
        assert len(cases_of(kept, organ)) == expected
        assert cases_of(kept, organ) <= cases_of(annotated, organ)


@given(COHORTS, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_shares_nest(annotated, seed):
    steps = [hide_labels(annotated, share, seed) for share in (0, *SHARES, 1)]
    for fewer, more in pairwise(steps):
        assert all(fewer[case] <= more[case] for case in annotated)
    assert steps[0] == dict.fromkeys(annotated, frozenset())
    assert steps[-1] == {case: frozenset(organs) for case, organs in annotated.items()}


@given(COHORTS, st.sampled_from(SHARES), st.integers(0, 5), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_cases_and_organs_does_not_matter(annotated, share, seed, random):
    shuffled = list(annotated)
    random.shuffle(shuffled)
    assert hide_labels({case: sorted(annotated[case]) for case in shuffled}, share, seed) == hide_labels(
        annotated, share, seed
    )


@pytest.mark.parametrize(
    ("cases", "share", "kept"),
    [(20, 0.1, 2), (20, 0.3, 6), (24, 0.1, 2), (24, 0.3, 7), (5, 0.5, 2), (15, 0.1, 2), (3, 0.1, 1), (1, 0.01, 1)],
)
def test_pythons_round_by_hand(cases, share, kept):
    # 7.2 -> 7; 2.5 -> 2 and 1.5 -> 2, to even; 0.3 -> 0 -> at least one
    assert len(cases_of(hide_labels({f"c{i}": ["liver"] for i in range(cases)}, share, 0), "liver")) == kept


def test_organs_are_drawn_independently():
    annotated = {f"c{i:02}": ORGANS for i in range(40)}
    kept = {organ: cases_of(hide_labels(annotated, 0.5, 0), organ) for organ in ORGANS}
    for one, other in (("liver", "spleen"), ("liver", "pancreas"), ("spleen", "pancreas")):
        assert 4 < len(kept[one] & kept[other]) < 16  # ten are expected
    alone = hide_labels({case: ["spleen"] for case in annotated}, 0.5, 0)
    assert cases_of(alone, "spleen") == kept["spleen"]


def test_another_seed_keeps_others_and_the_same_seed_the_same_for_ever():
    annotated = {f"btcv/img{i:04}": ["liver"] for i in range(1, 11)}
    draws = [sorted(case[-2:] for case in cases_of(hide_labels(annotated, 0.3, seed), "liver")) for seed in range(3)]
    assert draws == [["02", "03", "06"], ["06", "08", "09"], ["03", "05", "10"]]


@pytest.mark.parametrize("share", [-0.1, 1.001, 30, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(UsageError, match="label_share is"):
        hide_labels({"a": ["liver"]}, share, 0)
