"""A finished run, for tests that go on from one."""

from pathlib import Path

import pytest
from toy import TOY, organseg

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A finished run with validation, and the command that made it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command = ["fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", run, *TOY,
               "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--data.init_args.val_share=0.3",
               "--data.init_args.label_share=1.0"]  # fmt: skip
    organseg(*command, "--trainer.precision=32-true")
    return run, command
