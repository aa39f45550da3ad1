"""The script behind `make demo`, small."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm


@pytest.mark.slow
def test_the_demo_ends_with_its_table(tmp_path: Path) -> None:
    words = [sys.executable, warm.TOOLS / "demo.py", "--out", tmp_path / "demo", "--cases", 6, "--shape", 24, 32, 32]
    words += ["--steps", 60]
    environment = warm.environment_of({})
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| DSC % | naive | inerrant0 | inerrant |" in " ".join(done.stdout.split())
    for method in ("naive", "inerrant0", "inerrant"):
        assert (tmp_path / "demo" / "runs" / method / "report" / "index.html").stat().st_size > 10_000
    assert len(list((tmp_path / "demo" / "predictions").glob("*.nii.gz"))) == 1
