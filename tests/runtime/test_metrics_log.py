from pathlib import Path

from organseg.runtime.metrics_log import MetricsLog, read_metrics


def test_rows_are_read_back_exactly(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, 5)
    log.log_metrics({"val/dsc": 1 / 3}, 7)
    assert read_metrics(log.path) == [(5, "train/loss", 0.1 + 0.2), (7, "val/dsc", 1 / 3)]


def test_a_resumed_run_continues_the_file_as_if_nothing_had_happened(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path / "metrics.csv")
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    with first.path.open("a") as file:
        file.write("10,loss,0.")  # torn by a kill
    resumed = MetricsLog(tmp_path / "metrics.csv")
    for step in range(6, 12):
        resumed.log_metrics({"loss": float(step)}, step)
    assert read_metrics(first.path) == [(step, "loss", float(step)) for step in range(12)]


def test_what_is_logged_twice_is_written_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    for loss in (0.5, 0.5, 0.25):
        log.log_metrics({"loss": loss, "norm": float("nan")}, 3)
    assert [row[:2] for row in read_metrics(log.path)] == [(3, "loss"), (3, "norm"), (3, "loss"), (3, "norm")]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    log = MetricsLog(tmp_path / "metrics.csv")
    log._last_step = 0
    for step in (1, 2, 3):
        log.log_metrics({"train/loss": 0.5}, step)
    assert capsys.readouterr().err.count("going on without these numbers") == 1
