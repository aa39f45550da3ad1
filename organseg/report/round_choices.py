"""Which organs of which cases show how relabelling went: rules over a round's tables, said beside the pictures.

Ties are broken by case and organ, so that the same run always shows the same.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from organseg.data.pseudo_labels import path_of, read_pseudo_labels, read_round_header
from organseg.report.round_tables import CaseLine, RoundTables


def middle(lines: Sequence[CaseLine], values: Sequence[float]) -> CaseLine:
    """The line with the median value; of an even number of lines the one with the lower of the two."""
    ranked = sorted(zip(values, lines, strict=True), key=lambda pair: (-pair[0], pair[1].case, pair[1].organ))
    return ranked[len(ranked) // 2][1]


def worst_and_typical(round_tables: RoundTables) -> dict[str, CaseLine]:
    """`worst`: most wrong pseudo-labels; `typical`: median precision, if that is another one."""
    known = [line for line in round_tables.known if line.added]
    if not known:
        return {}
    worst = max(known, key=lambda line: line.wrong)
    typical = middle(known, [line.precision for line in known])
    return {"worst": worst} if worst is typical else {"worst": worst, "typical": typical}


def grown(round_tables: RoundTables) -> list[CaseLine]:
    """Of the organs with the best, median and worst recall, each in its case of median recall."""
    found: dict[str, list[CaseLine]] = defaultdict(list)
    for line in round_tables.known:
        if line.missing and line.added:
            found[line.organ].append(line)
    recall = {
        organ: sum(line.right or 0 for line in lines) / sum(line.missing or 0 for line in lines)
        for organ, lines in found.items()
    }
    ranked = sorted(recall, key=lambda organ: (-recall[organ], organ))
    chosen = dict.fromkeys(ranked[place] for place in (0, len(ranked) // 2, -1)) if ranked else {}
    return [middle(found[organ], [line.recall for line in found[organ]]) for organ in chosen]


def whole_case(round_tables: RoundTables) -> str | None:
    """Of the cases with most relabelled organs, the one with the median precision over all their voxels.

    Cases that surely annotate an organ come first: they lack fewer than others do.
    """
    by_case: dict[str, list[CaseLine]] = defaultdict(list)
    for line in round_tables.known:
        if line.added:
            by_case[line.case].append(line)
    if not by_case:
        return None
    lacking = Counter(line.case for line in round_tables.cases)
    organs = len({line.organ for line in round_tables.cases})
    by_case = {case: lines for case, lines in by_case.items() if lacking[case] < organs} or by_case
    most = max(len(lines) for lines in by_case.values())
    ours = {case: lines for case, lines in by_case.items() if len(lines) == most}
    precision = [sum(line.right or 0 for line in lines) / sum(line.added for line in lines) for lines in ours.values()]
    return middle([lines[0] for lines in ours.values()], precision).case


def most_and_least_certain(round_tables: RoundTables) -> tuple[list[tuple[str, CaseLine, float]], list[str]]:
    """The organ of a case without truth with the highest and the lowest mean score of what the round added.

    Returns:
        Role, line and mean score, one entry if there is but one; and the cases whose pseudo-labels are not there.

    Raises:
        IntegrityError: If a file is damaged.
    """
    by_case: dict[str, list[CaseLine]] = defaultdict(list)
    for line in round_tables.unknown:
        if line.added:
            by_case[line.case].append(line)
    gone = [case for case in by_case if not path_of(round_tables.labels, case).is_file()]
    rated: list[tuple[float, CaseLine]] = []
    for case in by_case.keys() - set(gone):
        organs = read_round_header(round_tables.labels, case).organs
        voxels = read_pseudo_labels(round_tables.labels, case)
        new = np.where(voxels.round == round_tables.index, voxels.label, 0)
        for line in by_case[case]:
            scores = voxels.score[new == organs.index(line.organ) + 1] if line.organ in organs else voxels.score[:0]
            if scores.size:
                rated.append((float(scores.mean(dtype=np.float64)), line))
    rated.sort(key=lambda pair: (-pair[0], pair[1].case, pair[1].organ))
    ends = [("most certain", rated[0]), ("least certain", rated[-1])] if rated else []
    return [(role, line, mean) for role, (mean, line) in ends[: len(rated)]], gone
