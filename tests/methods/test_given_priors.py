"""Priors of one data set in a run on another: other modality, grid and organs (METHOD.md 2.1: all in mm)."""

import numpy as np
import pytest
from scipy import ndimage
from stippled import GRID, ball_model, coarse_of, data_of, method, trainer
from synthetic import make_cache, write_dataset

from organseg.data.module import collate
from organseg.runtime.checkpoint_io import save_checkpoint
from organseg.volumes import WorkingGrid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

THERE = ("liver", "left_kidney", "spleen")
HERE = ("spleen", "right_kidney", "liver")


def test_priors_of_ct_lie_around_the_organs_of_mr(cache, tmp_path, monkeypatch, capfd):
    ct = data_of(cache, organs=THERE)
    first = method(coarse_of(ct, tmp_path / "ct.ckpt"), THERE)
    trainer(tmp_path / "ct").fit(first, ct)
    save_checkpoint({"state_dict": first.state_dict()}, tmp_path / "prior.ckpt")
    dataset = write_dataset(tmp_path / "mr", 5, name="other", seed=20, head={"modality": "MR"})
    make_cache(dataset, tmp_path / "cache", WorkingGrid(spacing=(7.0, 6.0, 12.0)))
    mr = data_of(tmp_path / "cache", organs=HERE)
    assert mr.preprocessing.normalisation is None
    module = method(coarse_of(mr, tmp_path / "mr.ckpt"), HERE, prior=tmp_path / "prior.ckpt", position="naive")
    found = np.array([[52.0, 120, 190], [44.0, 200, 80], [70.0, 130, 90]], np.float32)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(found, 30.0))
    trainer(tmp_path / "run").fit(module, mr)
    assert "no prior of right_kidney:" in capfd.readouterr().err
    samples = data_of(tmp_path / "cache", organs=HERE).samples()
    batch = collate([samples[step, 0] for step in range(6)])
    rows, columns = batch["image"].shape[2:]
    seen = module.prior_of(batch, (rows, columns)).numpy()
    assert (seen[:, 1] == 0.5).all()
    for k, theirs in ((0, first.known.priors[2]), (2, first.known.priors[0])):
        assert theirs.organ == HERE[k] and theirs.spacing == GRID
        for b, case in enumerate(batch["case"]):
            index = np.stack(np.meshgrid(0, range(rows), range(columns), indexing="ij"), axis=-1)[0]
            to_mm = batch["index_to_mm"][b].numpy()
            mm = index @ to_mm[:3, :3].T + to_mm[:3, 3]
            voxel = (mm - module.centres[case][k]) / GRID + (np.array(theirs.size) - 1) / 2
            number = int(np.floor(voxel[0, 0, 0] + 0.5 + 1e-3))
            expected = np.zeros((rows, columns))
            if 0 <= number < theirs.size[0]:
                plane = theirs.probs[number * len(theirs.probs) // theirs.size[0]]
                place = np.moveaxis(voxel[..., 1:], -1, 0)
                expected = ndimage.map_coordinates(plane, place, order=1, mode="grid-constant")
            np.testing.assert_allclose(seen[b, k], expected.clip(1e-3, 1 - 1e-3), atol=2e-4)
    assert (seen[:, [0, 2]] > 0.5).any(axis=(0, 2, 3)).all()
    for case in mr.cohort.train:  # unannotated organs by the coarse model, annotated ones by their boxes
        expected = np.where(case.known[:, None], case.centres(), found)
        np.testing.assert_allclose(module.centres[case.key], expected, atol=8.0)
