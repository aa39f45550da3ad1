"""Time organseg's metrics on one synthetic case of 160 x 512 x 512 voxels and 13 organs, beside its peers (PEERS.md 7).

    PYTHONPATH=. PEERS/bin/python tools/bench/metrics.py [--repeats 3]

Peers that the environment has are timed; it needs organseg's dependencies and, all at once, `pip install
surface-distance==0.1 monai==1.6.1 torch==2.13.0`. Without any, only references written here are. All work on the same
label maps, on one thread; the best of the repeats counts, and only ratios within one run mean something.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from organseg.metrics.evaluate import evaluate_case
from organseg.metrics.overlap import dsc, overlap_counts
from organseg.metrics.surface import organ_boxes, surface, surface_scores

LabelMap = NDArray[np.uint8]

SHAPE = (160, 512, 512)
SPACING = (3.0, 0.8, 0.8)
TOLERANCE_MM = 2.0

# Centre (z, y, x) in voxels, volume in mL, relative half axes (z, y, x), of median portal-venous anatomy (DATA.md 1).
ORGANS = (
    ("spleen", (100, 260, 400), 225, (1.0, 1.0, 1.0)),
    ("right_kidney", (70, 280, 150), 150, (1.5, 0.8, 0.8)),
    ("left_kidney", (70, 280, 370), 160, (1.5, 0.8, 0.8)),
    ("gallbladder", (80, 150, 200), 17, (1.0, 1.0, 1.0)),
    ("oesophagus", (135, 290, 270), 15, (3.0, 0.6, 0.6)),
    ("liver", (105, 220, 170), 1660, (0.8, 1.0, 1.25)),
    ("stomach", (110, 160, 370), 430, (1.0, 1.0, 1.0)),
    ("aorta", (60, 310, 270), 86, (4.0, 0.5, 0.5)),
    ("inferior_vena_cava", (60, 300, 235), 84, (4.0, 0.5, 0.5)),
    ("portal_and_splenic_vein", (80, 200, 290), 31, (0.6, 0.6, 2.8)),
    ("pancreas", (65, 210, 300), 85, (0.6, 0.7, 2.4)),
    ("right_adrenal", (100, 345, 230), 4, (1.0, 1.4, 0.7)),
    ("left_adrenal", (100, 330, 310), 5, (1.0, 1.4, 0.7)),
)


def synthetic_case() -> tuple[LabelMap, LabelMap]:
    """Bumpy ellipsoids as truth; as prediction the same, half of them eroded, shifted by (1, 2, -2) voxels."""
    label = np.zeros(SHAPE, np.uint8)
    preds = np.zeros(SHAPE, np.uint8)
    grid = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    bumps = 0.25 * np.sin(grid[0] / 4) * np.sin(grid[1] / 9) * np.sin(grid[2] / 11)
    for value, (_, centre, volume_ml, axes) in enumerate(ORGANS, start=1):
        radius_mm = (volume_ml * 1000 * 0.75 / np.pi / np.prod(axes)) ** (1 / 3)
        terms = zip(grid, centre, axes, SPACING, strict=True)
        squared = sum(((index - middle) * step / radius_mm / axis) ** 2 for index, middle, axis, step in terms)
        mask = (squared < 1 + bumps) & (label == 0)
        label[mask] = value
        predicted = ndimage.binary_erosion(mask) if value % 2 and volume_ml > 10 else mask
        preds[np.roll(predicted, (1, 2, -2), (0, 1, 2))] = value
    return preds, label


def ours_surfaces(preds: LabelMap, label: LabelMap) -> list[float]:
    """HD95 of each organ, having computed HD, HD95, ASD and NSD."""
    boxes = enumerate(organ_boxes(preds, label, len(ORGANS)), start=1)
    scores = [surface_scores(preds[box] == k, label[box] == k, SPACING, TOLERANCE_MM) for k, box in boxes]
    return [score.hd95_mm for score in scores]


def google_surfaces(preds: LabelMap, label: LabelMap) -> list[float]:
    """HD95 of each organ, having computed HD95, ASD and NSD (surface elements, another definition)."""
    import surface_distance

    found = []
    for k in range(1, len(ORGANS) + 1):
        distances = surface_distance.compute_surface_distances(label == k, preds == k, SPACING)
        surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)
        surface_distance.compute_average_surface_distance(distances)
        found.append(float(surface_distance.compute_robust_hausdorff(distances, 95)))
    return found


def monai_hd95(preds: LabelMap, label: LabelMap) -> list[float]:
    """HD95 of each organ, alone; organ by organ, since one-hot maps of all would need gigabytes."""
    from monai.metrics import compute_hausdorff_distance

    warnings.simplefilter("ignore", FutureWarning)  # MONAI warns about its own calls
    found = []
    for k in range(1, len(ORGANS) + 1):
        ours, truth = (torch.from_numpy(array == k)[None, None] for array in (preds, label))
        found.append(float(compute_hausdorff_distance(ours, truth, True, percentile=95, spacing=list(SPACING))))
    return found


def transform_hd95(ours: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """HD95 of one organ by distance transforms of the arrays given."""
    ours, truth = surface(ours), surface(truth)
    to_label = ndimage.distance_transform_edt(~truth, SPACING)[ours]
    to_preds = ndimage.distance_transform_edt(~ours, SPACING)[truth]
    return float(max(np.percentile(to_label, 95), np.percentile(to_preds, 95)))


def boxed_hd95(preds: LabelMap, label: LabelMap) -> list[float]:
    """HD95 of each organ, alone, by distance transforms of its box."""
    boxes = enumerate(organ_boxes(preds, label, len(ORGANS)), start=1)
    return [transform_hd95(preds[box] == k, label[box] == k) for k, box in boxes]


def plain_dsc(preds: LabelMap, label: LabelMap) -> list[float]:
    """DSC organ by organ."""
    found = []
    for k in range(1, len(ORGANS) + 1):
        ours, truth = preds == k, label == k
        common, total = np.count_nonzero(ours & truth), np.count_nonzero(ours) + np.count_nonzero(truth)
        found.append(float(2 * common / total))
    return found


def timed(work: Callable[[], list[float]], repeats: int) -> tuple[float, list[float]]:
    """Best time of the repeats, s, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def show(name: str, seconds: float, base: float, remark: str) -> None:
    """Print a line of the table."""
    print(f"{name:<44}{seconds:>9.3f} s{seconds / base:>9.1f} x  {remark}")


def bench_surfaces(preds: LabelMap, label: LabelMap, repeats: int) -> None:
    """Ours against each peer that is here."""
    base, ours = timed(lambda: ours_surfaces(preds, label), repeats)
    show("organseg HD + HD95 + ASD + NSD", base, base, "")
    if importlib.util.find_spec("surface_distance"):
        seconds, theirs = timed(lambda: google_surfaces(preds, label), repeats)
        apart = np.abs(np.subtract(ours, theirs)).max()
        show("surface-distance HD95 + ASD + NSD", seconds, base, f"HD95 up to {apart:.3f} mm apart; goal > 2 x")
    if importlib.util.find_spec("monai"):
        seconds, theirs = timed(lambda: monai_hd95(preds, label), repeats)
        apart = np.abs(np.subtract(ours, theirs)).max()
        show("MONAI HD95 alone", seconds, base, f"HD95 up to {apart:.3f} mm apart; goal >= 8 x")
    seconds, theirs = timed(lambda: boxed_hd95(preds, label), repeats)
    apart = np.abs(np.subtract(ours, theirs)).max()
    show("distance transform of the box, HD95 alone", seconds, base, f"HD95 up to {apart:.3f} mm apart")
    seconds, theirs = timed(lambda: [transform_hd95(preds == 2, label == 2)], 1)
    remark = f"one organ x {len(ORGANS)}; HD95 {abs(ours[1] - theirs[0]):.3f} mm apart"
    show("distance transform of the scan, HD95 alone", len(ORGANS) * seconds, base, remark)


def bench_overlap(preds: LabelMap, label: LabelMap, repeats: int) -> None:
    """One pass against a pass an organ."""
    base, ours = timed(lambda: dsc(overlap_counts(preds, label, len(ORGANS))).tolist(), repeats)
    show("organseg DSC, one pass", base, base, "")
    seconds, theirs = timed(lambda: plain_dsc(preds, label), repeats)
    apart = np.abs(np.subtract(ours, theirs)).max()
    show("DSC organ by organ", seconds, base, f"up to {apart:.1e} apart; goal >= 2 x")


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the best counts")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    preds, label = synthetic_case()
    print(
        f"{len(ORGANS)} organs, {np.count_nonzero(label)} of {label.size} voxels; ratios are to organseg's line above"
    )
    bench_surfaces(preds, label, repeats)
    bench_overlap(preds, label, repeats)
    everything = lambda: [score.dsc for score in evaluate_case(preds, label, [True] * len(ORGANS), SPACING)]  # noqa: E731
    seconds, _ = timed(everything, repeats)
    show("organseg evaluate_case, all of the above", seconds, seconds, "")


if __name__ == "__main__":
    main()
