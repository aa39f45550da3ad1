"""`organseg report RUN attention` and `receptive-field` on trained networks, 2D and 3D."""

import csv
from pathlib import Path

import pytest
import yaml
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


@pytest.mark.slow
def test_a_3d_transformer_from_fit_to_its_attention(toy: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "volumes.yaml"
    # As the README says: a 3D network, and patches; the patch is thinner than the cases.
    config.write_text(yaml.safe_dump({
        "data": {"class_path": "organseg.data.PatchDataModule", "init_args": {"patch_size": [16, 24, 20]}},
        "model": {"init_args": {"network": {"dims": 3, "depth": 3}, "levels": 2, "heads": 2}},
    }))  # fmt: skip
    organseg("fit", "--config", CONFIG, "--config", config, "--data.init_args.datasets=[btcv]",
             "--data.init_args.cache", toy / "cache", "--out", run, "--trainer.max_steps=2", *TOY)  # fmt: skip
    organseg("test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    with (run / "test" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"].split("/")[0] for row in rows} == {"btcv"} and len({row["organ"] for row in rows}) == 7
    case = rows[0]["case"]
    said = organseg("report", run, "attention", "--case", case, "--voxel", 23, 4, 5).stdout.strip()
    assert said == f"{run}/report/attention_{case.replace('/', '_')}_23_4_5.png"
    assert Path(said).stat().st_size > 10_000
    organseg("report", run, "receptive-field")
