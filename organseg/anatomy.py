"""The organs: one canonical name each, with aliases, codes, colours and what is plausible in a living adult.

Data sets name and number organs as they like; everywhere inside organseg an organ is its canonical name. Volumes and HU
are generous adult ranges, from no contrast to late phases and contrast drunk, used to warn and never to refuse.
"""

import colorsys
import zlib
from collections.abc import Collection
from dataclasses import dataclass

from organseg.errors import UsageError


@dataclass(frozen=True)
class Organ:
    """An organ that a data set may annotate.

    Attributes:
        name: Canonical name.
        aliases: Other spellings, lower case with underscores.
        snomed: SNOMED CT code of the body structure.
        colour: RGB in 0..255 for pictures.
        volume_ml: Plausible adult volume (low, high).
        mean_hu: Plausible mean in CT, without contrast to portal-venous (low, high).
        mirror: The same organ on the other side, if it is paired.
    """

    name: str
    aliases: tuple[str, ...]
    snomed: str
    colour: tuple[int, int, int]
    volume_ml: tuple[float, float]
    mean_hu: tuple[float, float]
    mirror: str | None = None


ORGANS: dict[str, Organ] = {
    organ.name: organ
    for organ in (
        Organ("liver", ("hepar",), "10200004", (196, 74, 60), (600, 3500), (30, 150)),
        Organ("gallbladder", ("gall_bladder",), "28231008", (112, 173, 71), (1, 200), (-20, 150)),
        Organ("spleen", ("lien",), "78961009", (142, 86, 166), (40, 3500), (20, 250)),
        Organ("left_kidney", ("kidney_left", "kidney_l", "lkidney"), "18639004", (240, 163, 56), (8, 500), (15, 300),
              "right_kidney"),
        Organ("right_kidney", ("kidney_right", "kidney_r", "rkidney"), "9846003", (247, 214, 84), (8, 500), (15, 300),
              "left_kidney"),
        Organ("pancreas", (), "15776009", (64, 196, 208), (15, 250), (-30, 220)),
        Organ("stomach", ("gaster",), "69695003", (226, 120, 178), (50, 2500), (-300, 500)),
        Organ("oesophagus", ("esophagus", "esofagus"), "32849002", (165, 120, 84), (3, 80), (-150, 150)),
        Organ("duodenum", ("duodenum_gland",), "38848004", (236, 196, 154), (15, 250), (-50, 120)),
        Organ("aorta", ("aorta_abdominal",), "15825003", (220, 30, 40), (15, 600), (20, 400)),
        Organ("inferior_vena_cava", ("ivc", "postcava", "vena_cava_inferior"), "64131007", (58, 110, 200), (15, 250),
              (20, 250)),
        Organ("portal_and_splenic_vein", ("portal_vein_and_splenic_vein", "portal_vein", "portal_splenic_vein",
                                          "veins"), "32764006", (110, 160, 232), (5, 160), (20, 260)),
        Organ("right_adrenal", ("right_adrenal_gland", "adrenal_gland_right", "adrenal_right", "rad"), "29392005",
              (150, 206, 150), (0.5, 20), (-30, 140), "left_adrenal"),
        Organ("left_adrenal", ("left_adrenal_gland", "adrenal_gland_left", "adrenal_left", "lad"), "12003004",
              (98, 166, 120), (0.5, 20), (-30, 140), "right_adrenal"),
        Organ("heart", (), "80891009", (180, 50, 80), (200, 1500), (20, 350)),
        Organ("trachea", (), "44567001", (170, 200, 210), (10, 90), (-1024, -600)),
        Organ("small_bowel", ("small_intestine",), "30315005", (214, 170, 120), (100, 2500), (-150, 130)),
        Organ("colon", ("large_bowel", "large_intestine"), "71854001", (150, 130, 96), (100, 3000), (-600, 130)),
        Organ("bladder", ("urinary_bladder",), "89837001", (230, 226, 130), (5, 1500), (-10, 150)),
    )
}  # fmt: skip

SEVEN_ORGANS = ("liver", "gallbladder", "spleen", "left_kidney", "right_kidney", "pancreas", "stomach")
"""The seven organs of the thesis, in its order (METHOD.md 0)."""

_BY_SPELLING = {spelling: organ.name for organ in ORGANS.values() for spelling in (organ.name, *organ.aliases)}


def canonical(name: str, also: Collection[str] = ()) -> str:
    """The canonical name of an organ given by any spelling (`Kidney left`, `IVC`, `esophagus`).

    Args:
        name: Any spelling.
        also: Names of further organs, which a data set declares.

    Raises:
        UsageError: If no organ is spelled so; the message lists the nearest names.
    """
    spelling = name.strip().lower().replace(" ", "_").replace("-", "_")
    if spelling in also:
        return spelling
    if spelling in _BY_SPELLING:
        return _BY_SPELLING[spelling]
    from difflib import get_close_matches

    near = get_close_matches(spelling, _BY_SPELLING, n=3, cutoff=0.5) or sorted(ORGANS)
    raise UsageError(f"organ {name!r} is not known; nearest: {', '.join(near)}")


def colour_of(organ: str) -> tuple[int, int, int]:
    """RGB in 0..255 for pictures; of an organ that is not known here always the same one, made of its name."""
    if organ in ORGANS:
        return ORGANS[organ].colour
    red, green, blue = colorsys.hsv_to_rgb(zlib.crc32(organ.encode()) % 360 / 360, 0.45, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
