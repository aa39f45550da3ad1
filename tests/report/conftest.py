"""A tiny tested run, made with the project's own writers: three cases that differ in nothing but their predictions."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from organseg.batch import IGNORE
from organseg.data.cache import CaseArrays, CaseHeader, write_case
from organseg.metrics import CaseRow, diagonal_mm, evaluate_case, write_case_table
from organseg.report import write_report
from organseg.runtime.metrics_log import MetricsLog
from organseg.volumes import resample_image, resample_label, write_label

SHAPE, SPACING = (12, 40, 48), (5.0, 2.0, 2.5)
WORKING_SHAPE = (12, 20, 24)
AFFINE = np.diag([2.5, 2.0, 5.0, 1.0])
STORED = ("right_kidney", "liver", "left_kidney", "spleen")
"""The cache's order. The spleen is not annotated."""
ORGANS = ("liver", "left_kidney", "right_kidney", "spleen")
"""The run's order: another one, so that organs must be matched by name."""
BOXES = {
    "right_kidney": np.s_[2:7, 20:30, 8:14],  # low x: the patient's right
    "left_kidney": np.s_[2:7, 20:30, 34:40],
    "liver": np.s_[7:11, 12:28, 8:30],  # high z: above the kidneys
}


def image() -> np.ndarray:
    """A body of 40 HU in air."""
    scan = np.full(SHAPE, -1000, np.int16)
    scan[:, 4:36, 4:44] = 40
    return scan


def label_map(order: tuple[str, ...]) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    for organ, box in BOXES.items():
        label[box] = order.index(organ) + 1
    label[0, 5, 5] = IGNORE
    return label


def predictions() -> dict[str, np.ndarray]:
    perfect = np.where(label_map(ORGANS) == IGNORE, 0, label_map(ORGANS)).astype(np.uint8)
    half, poor = perfect.copy(), np.zeros_like(perfect)
    half[:, 25:] = 0
    poor[8, 14:18, 10:14] = 1
    return {"toy/a": half, "toy/b": poor, "toy/c": perfect}


@dataclass(frozen=True)
class Run:
    path: Path
    cache: Path
    rows: list[CaseRow]

    organs = ORGANS
    boxes = BOXES
    spacing = SPACING

    @property
    def predictions(self) -> Path:
        return self.path / "test" / "predictions"

    def options(self, **init_args: object) -> None:
        """Write the config with other data options."""
        data = {"class_path": "organseg.data.SliceDataModule", "init_args": {"cache": str(self.cache), **init_args}}
        network = {"class_path": "organseg.networks.UNet", "init_args": {"width": 16, "depth": 5}}
        model = {"class_path": "organseg.methods.PartialLabelModule", "init_args": {"organs": None, "network": network}}
        config = {"seed": 7, "trainer": {"max_steps": 2700}, "model": model, "data": data}
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that a test may spoil."""
    return make_run(tmp_path)


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with its report, for tests that only look."""
    run = make_run(tmp_path_factory.mktemp("reported"))
    write_report(run.path)
    return run


def make_run(folder: Path) -> Run:
    run = Run(folder / "runs" / "toy_30", folder / "cache", [])
    (run.predictions / "toy").mkdir(parents=True)
    (run.cache / "toy").mkdir(parents=True)
    run.options(organs=None, label_share=0.3, fold=0, folds=5)
    header = CaseHeader(
        key="", patient="", modality="CT", organs=STORED, annotated=STORED[:3], spacing=(5.0, 4.0, 5.0),
        affine=tuple(map(tuple, AFFINE.tolist())), source_shape=SHAPE, source_spacing=SPACING, image_sha256="",
        label_sha256="", preprocessing={"size": 20},
    )  # fmt: skip
    stored = label_map(STORED)
    arrays = CaseArrays(resample_image(image(), WORKING_SHAPE), resample_label(stored, WORKING_SHAPE), stored)
    for key, preds in predictions().items():
        write_case(run.cache / f"{key}.h5", replace(header, key=key, patient=key), arrays)
        write_label(run.predictions / f"{key}.nii.gz", preds, AFFINE)
        scores = evaluate_case(preds, label_map(ORGANS), [True, True, True, False], SPACING)
        run.rows.extend(
            CaseRow(key, organ, score, diagonal_mm(SHAPE, SPACING)) for organ, score in zip(ORGANS, scores, strict=True)
        )
    write_case_table(run.path / "test" / "cases.csv", run.rows)
    log = MetricsLog(run.path / "metrics.csv")
    for step in range(9, 100, 10):
        log.log_metrics({"train/loss": 1.5 - step / 100, "pace/samples_per_s": 48.0, "pace/data_wait": 0.01}, step)
    log.log_metrics({"val/dsc": 0.7, "val/dsc/liver": 0.9, "lr-AdamW": 1e-3}, 99)
    return run
