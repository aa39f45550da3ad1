import pytest

from organseg.anatomy import ORGANS, SEVEN_ORGANS, canonical
from organseg.errors import UsageError


def test_every_spelling_means_one_organ():
    spellings = [spelling for organ in ORGANS.values() for spelling in (organ.name, *organ.aliases)]
    assert len(spellings) == len(set(spellings))
    assert all(spelling == spelling.lower().replace(" ", "_").replace("-", "_") for spelling in spellings)
    for organ in ORGANS.values():
        for spelling in (organ.name, *organ.aliases):
            assert canonical(spelling) == organ.name
            assert canonical(f" {spelling.upper().replace('_', ' ')} ") == organ.name


@pytest.mark.parametrize(
    ("spelling", "organ"),
    [
        ("Kidney left", "left_kidney"),
        ("IVC", "inferior_vena_cava"),
        ("esophagus", "oesophagus"),
        ("right-adrenal-gland", "right_adrenal"),
        ("RAD", "right_adrenal"),
        ("LAD", "left_adrenal"),
        ("kidney_r", "right_kidney"),
    ],
)
def test_names_of_known_data_sets(spelling, organ):
    assert canonical(spelling) == organ


@pytest.mark.parametrize(("wrong", "near"), [("livr", "liver"), ("left kidny", "left_kidney"), ("splen", "spleen")])
def test_unknown_organ_is_refused_with_the_nearest_name(wrong, near):
    with pytest.raises(UsageError, match=f"'{wrong}' is not known; nearest: {near}"):
        canonical(wrong)


def test_nothing_near_lists_all():
    with pytest.raises(UsageError, match=r"aorta, bladder, .*trachea"):
        canonical("qqqqqqqq")


def test_seven_organs_of_the_thesis():
    # METHOD.md 0: liver, gallbladder, spleen, kidneys L and R, pancreas, stomach
    assert SEVEN_ORGANS == ("liver", "gallbladder", "spleen", "left_kidney", "right_kidney", "pancreas", "stomach")
    assert set(SEVEN_ORGANS) <= set(ORGANS)


def test_mirrors_are_mutual_and_named_left_and_right():
    paired = {organ.name: organ.mirror for organ in ORGANS.values() if organ.mirror}
    assert set(paired) == {name for name in ORGANS if name.startswith(("left_", "right_"))}
    for name, mirror in paired.items():
        side, _, rest = name.partition("_")
        assert mirror == {"left": "right_", "right": "left_"}[side] + rest


def test_ranges_rise_and_colours_differ():
    for organ in ORGANS.values():
        assert 0 < organ.volume_ml[0] < organ.volume_ml[1] < 5000
        assert -1024 <= organ.mean_hu[0] < organ.mean_hu[1] <= 500
        assert all(0 <= channel <= 255 for channel in organ.colour)
    assert len({organ.colour for organ in ORGANS.values()}) == len(ORGANS)


def verhoeff(digits: str) -> int:
    """0 for a number whose last digit is right (dihedral group D5: position i turns the digit i times)."""
    turn, turned = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4), [tuple(range(10))]
    for _ in range(7):
        turned.append(tuple(turn[digit] for digit in turned[-1]))
    check = 0
    for place, digit in enumerate(reversed(digits)):
        other = turned[place % 8][int(digit)]
        # check * other in D5: 0..4 are turns, 5..9 flips.
        if check < 5:
            check = (check + other) % 5 if other < 5 else 5 + (check + other) % 5
        else:
            check = 5 + (check - other) % 5 if other < 5 else (check - other) % 5
    return check


def test_snomed_codes_are_whole():
    assert verhoeff("2363") == 0 and verhoeff("2364") != 0  # the textbook's example
    codes = [organ.snomed for organ in ORGANS.values()]
    assert len(set(codes)) == len(codes)
    for organ in ORGANS.values():
        assert organ.snomed[-3:-1] == "00", organ.name  # a concept of the international release
        assert verhoeff(organ.snomed) == 0, organ.name
