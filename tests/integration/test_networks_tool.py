"""`tools/networks.py`: what is finished is not done again, and ends in tables and paired tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import TOY

TOOL = Path(__file__).parents[2] / "tools" / "networks.py"


@pytest.mark.slow
def test_two_networks_are_compared(toy: Path, tmp_path: Path) -> None:
    words = [sys.executable, TOOL, "--cache", toy / "cache", "--out", tmp_path, "--prefix", "mirrored_100",
             "--networks", "unet", "mhsa"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*more: str) -> str:
        done = subprocess.run([*map(str, words), *more], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Half of the five patients are held out, so that there is something to compare.
    run(*TOY, "--trainer.max_steps=3", "--data.init_args.folds=2")
    shown = run()
    assert "$ organseg" not in shown
    assert "| unet | 1 |" in shown and "| mhsa | 1 |" in shown
    assert "mhsa: " in shown and "with Holm" in shown
    assert (tmp_path / "mirrored_100" / "cases.csv").read_text().startswith("network,seed,organ,case,dsc\n")
