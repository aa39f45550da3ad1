"""`organseg report RUN attention` and `receptive-field` on trained networks, 2D and 3D."""

from pathlib import Path

import pytest
from toy import TOY, organseg

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "btcv_100_utransformer.yaml"


@pytest.mark.slow
def test_pictures_of_a_run(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    organseg("fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", run,
             "--trainer.max_steps=1", *TOY)  # fmt: skip
    case = sorted((toy / "cache" / "phantom").glob("*.h5"))[0].stem
    said = organseg("report", run, "attention", "--case", f"phantom/{case}", "--voxel", 3, 4, 5).stdout.strip()
    assert said == f"{run}/report/attention_phantom_{case}_3_4_5.png"
    assert Path(said).stat().st_size > 10_000
    said = organseg("report", run, "receptive-field").stdout.strip()
    assert Path(said).stat().st_size > 10_000
    failed = organseg("report", run, "attention", "--case", f"phantom/{case}", "--voxel", 999, 0, 0, check=2)
    assert "outside of the cached image" in failed.stderr
