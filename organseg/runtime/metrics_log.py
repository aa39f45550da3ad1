"""`metrics.csv`: every logged number of a run, one a line, that a resumed run continues instead of erasing."""

import csv
import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from organseg.errors import StorageError
from organseg.files import publish_text

HEADER = ["step", "metric", "value"]


class MetricsLog(Logger):
    """Appends (step, metric, value) to a CSV file.

    A resumed run logs some steps again. The first number of an earlier step than the last one in the file drops all
    lines from that step on, so that the file reads as if nothing had happened. What is logged twice is written once.
    Where the disk is full, one warning is given, and training goes on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._last_step: int | None = None
        self._last_rows: list[tuple[int, str, str]] = []
        self._failed = False

    @property
    def name(self) -> str:
        """No subfolder."""
        return ""

    @property
    def version(self) -> str:
        """No versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the metrics of a step."""
        step = step or 0
        rows = [(step, name, repr(float(value))) for name, value in sorted(metrics.items()) if name != "epoch"]
        if rows == self._last_rows:
            return
        try:
            if self._last_step is None or step < self._last_step:
                self._keep_before(step)
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        except (OSError, StorageError) as error:
            if not self._failed:
                print(f"organseg: warning: {self.path}: {error}; going on without these numbers", file=sys.stderr)
            self._failed = True
        self._last_step, self._last_rows = step, rows

    def _keep_before(self, step: int) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows((s, name, repr(value)) for s, name, value in read_metrics(self.path) if s < step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(self.path, text.getvalue())


class StepOffset(Logger):
    """Another logger, whose steps begin at `offset`: the phases of a run on one axis."""

    def __init__(self, logger: Logger, offset: int) -> None:
        super().__init__()
        self.logger = logger
        self.offset = offset

    @property
    def name(self) -> str | None:
        """The other's."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """The other's."""
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        """The other's."""
        return self.logger.save_dir

    @property
    def experiment(self) -> Any:
        """The other's."""
        return getattr(self.logger, "experiment", None)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As the other does."""
        self.logger.log_hyperparams(params, *args, **kwargs)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """At the step on the run's axis."""
        self.logger.log_metrics(dict(metrics), (step or 0) + self.offset)

    def save(self) -> None:
        """As the other does."""
        self.logger.save()

    def finalize(self, status: str) -> None:
        """As the other does."""
        self.logger.finalize(status)


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """All whole lines of a `metrics.csv`; [] where there is none. A line torn by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for cells in csv.reader(path.read_text().splitlines()[1:]):
        try:
            step, name, value = cells
            rows.append((int(step), name, float(value)))
        except ValueError:
            continue
    return [row for row in rows if not math.isinf(row[2])]
