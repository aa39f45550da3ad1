"""Simulated partial labels (METHOD.md 1.4): each organ keeps its label in a share of the cases."""

import hashlib
from collections.abc import Collection, Mapping

from organseg.errors import UsageError


def hide_labels(annotated: Mapping[str, Collection[str]], share: float, seed: int) -> dict[str, frozenset[str]]:
    """Which organs each case still annotates at this share.

    Organs are drawn independently. Shares nest: what is kept at 10% is kept at 30%. The draw depends on the seed, the
    organ and the case keys alone, not on the order of the cases.

    Args:
        annotated: Case key -> organs that it annotates; training and validation cases, never test cases.
        share: Share of each organ's cases that keep the label, 0..1; Python's round, at least one where above 0.
        seed: Of the draw.

    Returns:
        Case key -> organs still annotated.

    Raises:
        UsageError: If the share is not in 0..1.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"label_share is {share}, expected a number from 0 (hide all) to 1 (keep all)")

    def rank(organ: str, case: str) -> bytes:
        return hashlib.sha256(f"{seed}/{organ}/{case}".encode()).digest()

    kept: dict[str, set[str]] = {case: set() for case in annotated}
    for organ in sorted({organ for organs in annotated.values() for organ in organs}):
        cases = sorted(case for case, organs in annotated.items() if organ in organs)
        cases.sort(key=lambda case: rank(organ, case))
        count = max(1, round(share * len(cases))) if share > 0 else 0
        for case in cases[:count]:
            kept[case].add(organ)
    return {case: frozenset(organs) for case, organs in kept.items()}
