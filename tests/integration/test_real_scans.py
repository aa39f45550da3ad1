"""Real scans (ORGANSEG_TEST_DATA): import, check, prepare, and a prediction that a file's orientation cannot change."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from toy import TOY, organseg

from organseg.checkpoints import load_checkpoint
from organseg.runtime.checkpoint_io import save_checkpoint

pytestmark = pytest.mark.skipif(not os.environ.get("ORGANSEG_TEST_DATA"), reason="ORGANSEG_TEST_DATA is not set")
CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "btcv_30_inerrant0.yaml"
BTCV = Path(os.environ.get("ORGANSEG_TEST_DATA", ".")) / "btcv"


@pytest.fixture(scope="module")
def checkpoint(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose last layer was drawn wildly: it predicts every organ somewhere, which a young one does not."""
    folder = tmp_path_factory.mktemp("wild")
    organseg("fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", folder / "run", *TOY,
             "--trainer.max_steps=1", "--model.init_args.network.init_args.width=16")  # fmt: skip
    content = load_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    generator = torch.Generator().manual_seed(0)
    weight = content["state_dict"]["network.head.weight"]
    content["state_dict"]["network.head.weight"] = 5 * torch.randn(weight.shape, generator=generator)
    content["state_dict"]["network.head.bias"].zero_()
    save_checkpoint(content, folder / "wild.ckpt")
    return folder / "wild.ckpt"


@pytest.mark.slow
def test_same_labels_at_the_same_positions_in_other_orientations(checkpoint: Path, tmp_path: Path) -> None:
    source = nibabel.load(BTCV / "RawData" / "Training" / "img" / "img0022.nii.gz").slicer[:, :, 40:72]
    array = np.asarray(source.dataobj)
    scans = tmp_path / "scans"
    scans.mkdir()
    nibabel.save(source, scans / "given.nii.gz")
    turned = {"permuted": ((2, 0, 1), (1, 1, 1)), "flipped": ((0, 1, 2), (-1, -1, 1)), "both": ((1, 2, 0), (1, -1, -1))}
    for name, (order, signs) in turned.items():
        turn = np.stack([np.argsort(order), np.array(signs)[np.argsort(order)]], axis=1).astype(float)
        data = nibabel.orientations.apply_orientation(array, turn)
        affine = source.affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)
        image = nibabel.Nifti1Image(np.ascontiguousarray(data), affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        nibabel.save(image, scans / f"{name}.nii.gz")
    organseg("predict", "--ckpt_path", checkpoint, "--input", scans, "--out", tmp_path / "out")

    reference = nibabel.load(tmp_path / "out" / "given.nii.gz")
    labels = np.asarray(reference.dataobj)
    assert len(np.unique(labels)) >= 5
    for name in turned:
        image = nibabel.load(scans / f"{name}.nii.gz")
        other = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert other.shape == image.shape
        assert np.array_equal(other.affine, image.affine)
        # Each voxel of the other file lies at a world position, and there the reference has the same label.
        index = np.stack(np.meshgrid(*map(np.arange, other.shape), indexing="ij"), axis=-1).reshape(-1, 3)
        world = nibabel.affines.apply_affine(other.affine, index)
        there = nibabel.affines.apply_affine(np.linalg.inv(reference.affine), world)
        nearest = np.rint(there).astype(int)
        assert np.abs(there - nearest).max() < 1e-3
        assert np.array_equal(np.asarray(other.dataobj).reshape(-1), labels[tuple(nearest.T)])


@pytest.mark.slow
def test_btcv_is_imported_checked_and_prepared(tmp_path: Path) -> None:
    organseg("import", "btcv", BTCV, "--out", tmp_path / "btcv.yaml")
    done = organseg("check", tmp_path / "btcv.yaml")
    assert "24 of 24 cases can be used" in done.stdout
    assert "img0035: RawData/Training/label/label0035.nii.gz: gallbladder: found no voxel" in done.stderr
    done = organseg("prepare", tmp_path / "btcv.yaml", "--out", tmp_path / "cache", "--size", 128)
    assert "24 cases prepared" in done.stdout
    assert "24 were current" in organseg("prepare", tmp_path / "btcv.yaml", "--out", tmp_path / "cache",
                                         "--size", 128).stdout  # fmt: skip
