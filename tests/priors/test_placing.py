"""Every voxel gets the prior of its absolute position in its case (METHOD.md 2.1)."""

import numpy as np
import torch

from organseg.priors import Prior, build_prior, place

FLOOR = 1e-3


def prior_of(masks, bins, spacing=(1.0, 1.0, 1.0)) -> Prior:
    size = np.max([[np.ptp(axis) + 1 for axis in np.nonzero(mask)] for mask in masks], axis=0)
    return Prior("liver", build_prior(masks, bins), tuple(size * np.array(spacing)), spacing, bins, ("a/b",))


def blob(seed: int, shape=(9, 8, 7)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[2:7, 1:6, 2:6] = np.random.default_rng(seed).random((5, 5, 4)) < 0.7
    mask[2, 1, 2] = mask[6, 5, 5] = True
    return mask


def middle(mask: np.ndarray) -> np.ndarray:
    return np.array([(axis.min() + axis.max()) / 2 for axis in np.nonzero(mask)])


def test_a_prior_lies_on_the_mask_that_it_was_built_of():
    mask = blob(0)
    prior = prior_of([mask], bins=99)
    found = place([prior], torch.eye(4)[None], torch.tensor(middle(mask))[None, None].float(), mask.shape, FLOOR)
    torch.testing.assert_close(found[0, 0], torch.from_numpy(np.where(mask, 1 - FLOOR, FLOOR)).float())


def test_slices_and_patches_alike():
    masks = [blob(seed) for seed in range(3)]
    prior = prior_of(masks, bins=2)
    centre = torch.tensor([[[4.2, 3.1, 3.7]]])
    whole = place([prior], torch.eye(4)[None], centre, (9, 8, 7), FLOOR)[0, 0]
    for z in range(9):
        at = torch.eye(4)
        at[0, 3] = z
        torch.testing.assert_close(place([prior], at[None], centre, (8, 7), FLOOR)[0, 0], whole[z])
    corner = torch.eye(4)
    corner[:3, 3] = torch.tensor([2.0, 1, 3])
    part = place([prior], corner[None], centre, (4, 5, 3), FLOOR)[0, 0]
    torch.testing.assert_close(part, whole[2:6, 1:6, 3:6])


def test_a_slice_reads_its_bin_and_nothing_of_its_neighbours():
    stairs = np.zeros((7, 1, 1), bool)
    stairs[1:6] = True
    prior = Prior("liver", np.array([[[0.2]], [[0.7]]], np.float32), (5.0, 1.0, 1.0), (1.0, 1.0, 1.0), 2, ())
    found = place([prior], torch.eye(4)[None], torch.tensor([[[3.0, 0, 0]]]), (7, 1, 1), FLOOR).flatten()
    expected = torch.tensor([FLOOR, 0.2, 0.2, 0.2, 0.7, 0.7, FLOOR])  # floor(2 i / 5): three slices, then two
    torch.testing.assert_close(found, expected)


def test_in_mm_whatever_the_grid():
    """A voxel of another spacing reads the prior of its place."""
    prior = Prior("liver", np.arange(1, 5, dtype=np.float32)[:, None, None] / 10, (12.0, 2.0, 2.0), (3.0, 2, 2), 4, ())
    fine = torch.diag(torch.tensor([1.0, 1, 1, 1]))
    found = place([prior], fine[None], torch.tensor([[[10.0, 0, 0]]]), (21, 1, 1), FLOOR).flatten()
    # The box covers 4 to 16 mm, three a bin; a border belongs to the upper one.
    expected = [FLOOR] * 4 + [0.1] * 3 + [0.2] * 3 + [0.3] * 3 + [0.4] * 3 + [FLOOR] * 5
    torch.testing.assert_close(found, torch.tensor(expected))


def test_linear_in_the_plane_and_nothing_beyond():
    prior = Prior("liver", np.array([[[0.2, 0.6]]], np.float32), (1.0, 1.0, 2.0), (1.0, 1.0, 1.0), 1, ())
    half = torch.diag(torch.tensor([1.0, 1, 0.5, 1]))
    found = place([prior], half[None], torch.tensor([[[0.0, 0, 1.0]]]), (1, 1, 5), FLOOR).flatten()
    # Centres of the two voxels at 0.5 and 1.5 mm.
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.4, 0.6, 0.3]))


def test_through_augmentation():
    """A turned and zoomed slice: the pixel's place in the case decides, not its index."""
    mask = blob(1, (9, 9, 9))
    prior, centre = prior_of([mask], bins=5), torch.tensor(middle(mask))[None, None].float()
    whole = place([prior], torch.eye(4)[None], centre, mask.shape, FLOOR)[0, 0]
    turned = torch.tensor([[1.0, 0, 0, 4], [0, 0, 1, 0], [0, -1, 0, 8], [0, 0, 0, 1]])
    found = place([prior], turned[None], centre, (9, 9), FLOOR)[0, 0]
    expected = torch.stack([torch.stack([whole[4, x, 8 - y] for x in range(9)]) for y in range(9)])
    torch.testing.assert_close(found, expected)


def test_a_patch_that_is_turned_from_z_to_y_voxel_by_voxel():
    """Its first axis goes down y and its second up z, so that each row of a plane reads another slice."""
    spacing, centre = (2.0, 1.0, 1.0), np.array([10.0, 6.0, 5.5])
    prior = prior_of([blob(seed) for seed in range(3)], 3, spacing)
    to_mm = np.array([[0.0, 2, 0, 4], [-1, 0, 0, 9], [0, 0, 1, 1], [0, 0, 0, 1]])
    size, expected = (9, 8, 8), np.full((9, 8, 8), FLOOR)
    for index in np.ndindex(size):
        mm = (to_mm @ (*index, 1))[:3]
        z, y, x = (int(n) for n in (mm - centre) / spacing + (np.array(prior.size) - 1) / 2)
        if 0 <= z < prior.size[0] and 0 <= y < prior.size[1] and 0 <= x < prior.size[2]:
            expected[index] = np.clip(prior.probs[z * 3 // prior.size[0], y, x], FLOOR, 1 - FLOOR)
    assert len(np.unique(expected)) > 5
    to_mm, centre = torch.from_numpy(to_mm).float(), torch.from_numpy(centre).float()
    found = place([prior], to_mm[None], centre[None, None], size, FLOOR)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(expected).float())


def test_organs_without_a_position_or_a_prior_are_neutral():
    prior = prior_of([blob(0)], bins=5)
    centre = torch.tensor([[[4.0, 3, 3], [4.0, 3, 3]], [[float("nan")] * 3, [4.0, 3, 3]]])
    found = place([prior, None], torch.eye(4).repeat(2, 1, 1), centre, (9, 8, 7), FLOOR)
    assert found.shape == (2, 2, 9, 8, 7)
    assert (found[1, 0] == 0.5).all() and (found[:, 1] == 0.5).all() and (found[0, 0] != 0.5).any()


def test_the_floor_holds_inside_of_the_box_too_and_nothing_is_certain():
    prior = prior_of([blob(seed) for seed in range(2)], bins=5)
    found = place([prior], torch.eye(4)[None], torch.tensor([[[4.0, 3, 3]]]), (9, 8, 7), 0.01)
    assert found.min() == torch.tensor(0.01) and found.max() == torch.tensor(0.99)
