"""How well a prior, built and placed in several ways, tells where the organs of training cases are.

Of a finished run of STIPPLE with hidden labels (`label_share` below 1): each hidden organ of a training case is found
by the coarse model, the prior is placed there, and the cross-entropy of the hidden truth under it is summed over the
cache's grid, in nats per voxel of the organ; less is better. Nothing is trained and no test patient is seen, so
settings can be chosen by it: how organs are centred, the blur, the floor, and where organs are taken to be.

Usage: python tools/priors.py RUN [--smooth_mm 0 8] [--floors 0.001 0.01] [--tables DIR]
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from relabelling import write
from stipple import with_trainer

from organseg.batch import CaseSource
from organseg.cli.training import quieten
from organseg.errors import OrgansegError, UsageError
from organseg.methods import PriorModule
from organseg.methods.built_priors import built_priors
from organseg.methods.organ_positions import Centring, Position
from organseg.priors import OrganPriors, place

POSITIONS: dict[Centring, tuple[Position, ...]] = {
    "boxes": ("naive", "aligned", "true"),
    "matched": ("matched", "true"),
}
KEYS = ("centring", "smooth_mm", "position", "floor")


def nats(
    known: OrganPriors, channel: int, centre: NDArray[np.float32], mask: NDArray[np.bool_], spacing: tuple[float, ...],
    floor: float,
) -> float:  # fmt: skip
    """Cross-entropy of an organ's mask [Z, Y, X] under its prior there, per voxel of the organ."""
    to_mm = torch.diag(torch.tensor([*spacing, 1.0]))[None]
    truth = torch.from_numpy(mask).float()
    probs = place([known.priors[channel]], to_mm, torch.from_numpy(centre[None, None]), mask.shape, floor)[0, 0]
    return float(F.binary_cross_entropy(probs, truth, reduction="sum") / truth.sum())


def measured(run: Path, smooth_mm: list[float], floors: list[float]) -> list[dict[str, str | float]]:
    """A line for each hidden organ, way to build and place its prior, and floor."""
    data, module = with_trainer(run)
    if not isinstance(module, PriorModule):
        raise UsageError(f"{run}: trained by {type(module).__name__}, which has no prior; name a run of PriorModule")
    source = cast(CaseSource, data)  # Its cases are a torch data set, which is a sequence in all but type.
    ways = []
    for centring, positions in POSITIONS.items():
        for blur in smooth_mm:
            positioning = replace(module.positioning, centring=centring, smooth_mm=blur)
            known, _ = built_priors(source, data.organs, positioning, module.bins)
            ways.append((positioning, known, positions))
    cases = source.training_cases()
    lines: list[dict[str, str | float]] = []
    for number in range(len(cases)):
        given = cases[number]
        case = replace(given, truth=data.hidden_truth(given.key), annotated=data.hidden_organs(given.key))
        on_grid = module.positioning.grid.of(case)
        probs = module.segment_coarsely(on_grid)
        for positioning, known, positions in ways:
            found: dict[str, NDArray[np.float32]] = {
                position: positioning.found(on_grid, probs, case.annotated, known, position)
                for position in positions
                if position != "true"
            }
            has_prior = np.array([prior is not None for prior in known.priors])
            there = has_prior & ~np.isnan(found[positions[0]]).any(axis=1)
            found["true"] = positioning.annotated(case, known)
            for k in map(int, np.flatnonzero(there & ~np.isnan(found["true"]).any(axis=1))):
                mask = np.asarray(case.truth == k + 1)
                way = {"centring": positioning.centring, "smooth_mm": positioning.smooth_mm}
                lines += [{"case": case.key, "organ": data.organs[k], **way, "position": position, "floor": floor,
                           "nats": round(nats(known, k, found[position][k], mask, case.working_spacing, floor), 4)}
                          for position in positions for floor in floors]  # fmt: skip
        print(case.key, flush=True)
    return lines


def main() -> None:
    """Measure, and show the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--smooth_mm", type=float, nargs="+", default=[0.0, 8.0])
    parser.add_argument("--floors", type=float, nargs="+", default=[0.001])
    parser.add_argument("--tables", type=Path, help="folder for `priors.csv`")
    arguments = parser.parse_args()
    quieten()
    try:
        lines = measured(arguments.run, arguments.smooth_mm, arguments.floors)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"priors: {error}\n")
    if not lines:
        parser.exit(2, f"priors: {arguments.run}: no label of its training cases is hidden, or no organ was found\n")
    groups: dict[tuple[object, ...], list[dict[str, str | float]]] = defaultdict(list)
    for line in lines:
        groups[tuple(line[key] for key in KEYS)].append(line)
    print("\nNats per voxel of the organ, mean of the hidden organs that were found")
    organs = list(dict.fromkeys(str(line["organ"]) for line in lines))
    print(f"| {' | '.join((*KEYS, 'found', 'mean', *organs))} |\n|" + "---|" * len(KEYS) + "---:|" * (2 + len(organs)))
    for way, group in groups.items():
        means = [statistics.fmean(float(line["nats"]) for line in group if organ in ("", line["organ"]))
                 for organ in ("", *organs)]  # fmt: skip
        print(f"| {' | '.join(map(str, (*way, len(group))))} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    if arguments.tables:
        arguments.tables.mkdir(parents=True, exist_ok=True)
        write(arguments.tables / "priors.csv", lines)


if __name__ == "__main__":
    main()
