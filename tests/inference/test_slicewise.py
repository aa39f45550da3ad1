"""A whole case slab by slab is the whole case at once (METHOD.md 4), with bounded memory."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from organseg.batch import View, WholeCase
from organseg.inference import segment_slices
from organseg.volumes import Normalisation

CPU = torch.device("cpu")


def case_of(image: np.ndarray, shape: tuple[int, int, int] | None = None, normalise=None) -> WholeCase:
    return WholeCase(
        key="tiny/case0",
        number=0,
        image=image,
        normalise=normalise or (lambda values: values.astype(np.float32)),
        shape=shape or image.shape,
        spacing=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        truth=None,
        annotated=np.ones(3, bool),
    )


def one_hot(view: View) -> torch.Tensor:
    """[b, 1, H, W] of integers 0..3 -> probabilities [b, 4, H, W]."""
    return (view["image"] == torch.arange(4.0).view(1, 4, 1, 1)).float()


def most(probs: torch.Tensor) -> torch.Tensor:
    return probs.argmax(dim=1)


def network(view: View) -> torch.Tensor:
    """Smooth probabilities of three classes, each slice by itself."""
    return smooth(view["image"])


def smooth(image: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.sigmoid(image * 2), torch.sigmoid(1 - image), torch.sigmoid(image.square() - 1)], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("slices", [1, 2, 37])
def test_what_the_network_says_is_what_comes_out(batch_size, slices):
    labels = np.random.default_rng(0).integers(0, 4, (slices, 6, 5)).astype(np.int16)
    preds = segment_slices(case_of(labels), one_hot, most, device=CPU, batch_size=batch_size)
    assert preds.dtype == np.uint8
    assert (preds == labels).all()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize(
    "shape",
    [
        (20, 9, 7),  # as it is
        (20, 18, 21), (20, 13, 8),  # finer in the plane
        (20, 5, 4),  # coarser
        (40, 9, 7), (33, 9, 7), (61, 11, 10),  # finer along z
        (10, 9, 7), (3, 9, 7), (7, 12, 5), (1, 9, 7),  # coarser
    ],
)  # fmt: skip
def test_resampling_is_that_of_the_whole_volume_at_once(shape, batch_size):
    image = np.random.default_rng(1).normal(size=(20, 9, 7)).astype(np.float32)
    kept = []
    preds = segment_slices(
        case_of(image, shape),
        network,
        most,
        device=CPU,
        batch_size=batch_size,
        keep=lambda _, p: kept.append(p.clone()),
    )
    whole = smooth(torch.from_numpy(image).unsqueeze(1))  # [Z, C, Y, X]
    # Linear along z and in the plane, borders on borders: F.interpolate does all axes of a volume at once.
    expected = F.interpolate(whole.transpose(0, 1)[None], shape, mode="trilinear", align_corners=False)[0]
    found = torch.cat(kept).transpose(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    sure = expected.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-4
    assert sure.float().mean() > 0.99
    assert (torch.from_numpy(preds)[sure] == expected.argmax(0)[sure]).all()


def test_one_slice_becomes_many_equal_ones():
    image = np.random.default_rng(2).normal(size=(1, 6, 6)).astype(np.float32)
    preds = segment_slices(case_of(image, (5, 6, 6)), network, most, device=CPU)
    alone = segment_slices(case_of(image), network, most, device=CPU)
    assert (preds == alone).all()


@pytest.mark.parametrize("shape", [(50, 4, 4), (17, 8, 8), (120, 4, 4)])
def test_keep_sees_every_slice_once_and_in_order(shape):
    image = np.random.default_rng(3).normal(size=(50, 4, 4)).astype(np.float32)
    seen, decided = [], []
    preds = segment_slices(
        case_of(image, shape), network, most, device=CPU,
        keep=lambda start, probs: (seen.extend(range(start, start + len(probs))), decided.append(most(probs))),
    )  # fmt: skip
    assert seen == list(range(shape[0]))
    assert (torch.cat(decided).numpy() == preds).all()


@pytest.mark.parametrize("slices", [30, 31, 64])
def test_the_network_sees_every_slice_once_normalised(slices):
    image = np.random.default_rng(4).integers(-500, 500, (slices, 4, 4)).astype(np.int16)
    normalise = Normalisation((-160.0, 300.0), 20.0, 90.0)
    seen = []

    def look(view: View) -> torch.Tensor:
        assert view["image"].dtype == torch.float32 and len(view["image"]) <= 16
        seen.append(view["image"][:, 0].clone())
        return network(view)

    segment_slices(case_of(image, (2 * slices, 4, 4), normalise), look, most, device=CPU)
    assert torch.equal(torch.cat(seen), torch.from_numpy(normalise(image)))


def peak_of_live_outputs(have: int, want: int) -> int:
    """The most slices of network output that were alive at once."""
    alive, peak = 0, 0

    def forget(count: int) -> None:
        nonlocal alive
        alive -= count

    def count(view: View) -> torch.Tensor:
        nonlocal alive, peak
        output = network(view).numpy()  # the tensor made of it keeps this array alive, and every view does
        weakref.finalize(output, forget, len(output))
        alive += len(output)
        peak = max(peak, alive)
        return torch.from_numpy(output)

    image = np.zeros((have, 4, 4), np.float32)
    segment_slices(case_of(image, (want, 4, 4)), count, most, device=CPU)
    assert alive <= 32
    return peak


@pytest.mark.parametrize("factor", [1, 3, 0.5])
def test_memory_does_not_grow_with_the_number_of_slices(factor):
    short, long = (peak_of_live_outputs(n, int(n * factor)) for n in (80, 640))
    assert long <= max(short, 64)
    assert long < 100


def test_decisions_may_be_any_integers():
    def decide(probs: torch.Tensor) -> torch.Tensor:
        return torch.where(probs[:, 1] > 0.5, 255, 7)

    preds = segment_slices(case_of(np.zeros((3, 4, 4), np.float32)), network, decide, device=CPU)
    assert preds.dtype == np.uint8 and (preds == 255).all()


def test_the_network_is_told_where_its_slices_lie():
    """In mm from the first voxel of the working grid, whatever grid is wanted."""
    seen = []

    def look(view: View) -> torch.Tensor:
        seen.append(view)
        return network(view)

    case = case_of(np.zeros((20, 4, 6), np.float32), (40, 4, 3))
    case.spacing, case.centre = (2.5, 0.5, 4.0), np.array([[10.0, 2, 3], [np.nan] * 3])
    segment_slices(case, look, most, device=CPU)
    assert [view["case"] for view in seen] == [["tiny/case0"] * 16, ["tiny/case0"] * 4]
    places = torch.cat([view["index_to_mm"] for view in seen])
    assert torch.equal(places @ torch.tensor([0.0, 2, 3, 1]), torch.tensor([[5.0 * z, 1, 6, 1] for z in range(20)]))
    centres = torch.cat([view["centre"] for view in seen])
    assert centres.shape == (20, 2, 3) and (centres[:, 0] == torch.tensor([10.0, 2, 3])).all()
    assert centres[:, 1].isnan().all()


def test_a_device_without_memory_for_all_slices_of_a_batch_gets_fewer():
    image = np.random.default_rng(0).normal(size=(37, 6, 5)).astype(np.float32)
    seen = []

    def small(view: View) -> torch.Tensor:
        seen.append(len(view["image"]))
        if seen[-1] > 5:
            raise torch.OutOfMemoryError("full")
        return network(view)

    found = segment_slices(case_of(image), small, most, device=CPU)
    assert (found == segment_slices(case_of(image), network, most, device=CPU)).all()
    assert seen == [16, 8, *[4] * 9, 1]

    def none(view: View) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        segment_slices(case_of(image), none, most, device=CPU)
