"""What a network is shown of a whole case: images, and where they lie in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from organseg.batch import View, WholeCase


def view_of(case: WholeCase, image: Tensor, corners: Sequence[Sequence[int]], device: torch.device) -> View:
    """A view of slices or patches.

    Args:
        case: The case.
        image: [b, 1, *S], normalised.
        corners: b indices (z, y, x) of the case's working grid where the images have their first voxels.
        device: Where the network is.
    """
    spacing = torch.tensor(case.working_spacing)
    index_to_mm = torch.diag(torch.tensor([*case.working_spacing, 1.0])).repeat(len(image), 1, 1)
    index_to_mm[:, :3, 3] = torch.tensor(corners, dtype=torch.float32) * spacing
    centre = torch.empty(0, 3) if case.centre is None else torch.from_numpy(case.centre).float()
    return {
        "image": image.to(device),
        "case": [case.key] * len(image),
        "index_to_mm": index_to_mm.to(device),
        "centre": centre.expand(len(image), *centre.shape).to(device),
    }
