"""Augmentation of 2D slices: rotation, translation, scaling and intensity (METHOD.md 0 and 4); no flips, ever.

Flips would teach that a left kidney may lie on the right. This is the only file that knows albumentations; what an
augmentation did to the plane is read off three points that travel through it, so that positions in mm stay exact.
"""

import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for newer releases

import albumentations as A

cv2.setNumThreads(0)  # one sample is too small to share, and workers are the parallelism


@dataclass(frozen=True)
class SliceAugmentation:
    """Ranges of the random changes to a slice; `None` in a data module switches all of them off.

    The gain is as wide as contrast phases are: a kidney has 15 HU without contrast and 230 HU with it, while fat stays
    where it is, near the mean. Trained with 0.9 to 1.1 alone, a network does not find kidneys without contrast.

    Attributes:
        rotation_degrees: Largest rotation to either side.
        scale: Smallest and largest zoom.
        shift: Largest translation to either side, as a share of the slice.
        gain: Smallest and largest factor of the normalised intensities.
        offset: Largest shift of the normalised intensities to either side.
    """

    rotation_degrees: float = 11.5
    scale: tuple[float, float] = (0.85, 1.18)
    shift: float = 0.12
    gain: tuple[float, float] = (0.6, 1.4)
    offset: float = 0.2

    def compose(self, floor: float) -> "SliceTransform":
        """The transform that applies these ranges to images whose air is `floor`."""
        return SliceTransform(self, floor)


class _GainAndOffset(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations has no types
    """image * gain + offset, unclipped: albumentations' own brightness and contrast clip floats to 0..1."""

    def __init__(self, gain: tuple[float, float], offset: float) -> None:
        super().__init__(p=1)
        self.gain = gain
        self.offset = offset

    def get_params(self) -> dict[str, Any]:
        """Draw from the generator that `Compose` seeds."""
        return {
            "factor": self.py_random.uniform(*self.gain),
            "shift": self.py_random.uniform(-self.offset, self.offset),
        }

    def apply(self, img: NDArray[np.float32], factor: float, shift: float, **_: Any) -> NDArray[np.float32]:
        """Change one image."""
        return img * np.float32(factor) + np.float32(shift)


class SliceTransform:
    """Applies a `SliceAugmentation` to one slice and its label."""

    def __init__(self, ranges: SliceAugmentation, floor: float) -> None:
        self.compose = A.Compose(
            [
                A.Affine(
                    rotate=(-ranges.rotation_degrees, ranges.rotation_degrees),
                    scale=ranges.scale,
                    keep_ratio=True,
                    translate_percent=(-ranges.shift, ranges.shift),
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    fill=floor,
                    fill_mask=0,
                    p=1,
                ),
                _GainAndOffset(ranges.gain, ranges.offset),
            ],
            keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
        )

    def __call__(
        self, image: NDArray[np.float32], label: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
        """Change a slice.

        Args:
            image: [H, W] float32, normalised; what comes in from outside is `floor`.
            label: [H, W]; what comes in from outside is 0.
            rng: Decides everything.

        Returns:
            Image and label of the same shapes, and the 3 x 3 matrix (x, y, 1) before -> (x, y, 1) after, in pixels.
        """
        side = float(max(image.shape))
        corners = np.array([[0, 0], [side, 0], [0, side]])
        self.compose.set_random_seed(int(rng.integers(2**31)))
        result: dict[str, Any] = self.compose(image=image, mask=label, keypoints=corners)
        origin, right, down = np.asarray(result["keypoints"], dtype=np.float64)
        matrix = np.eye(3)
        matrix[:2, 0], matrix[:2, 1], matrix[:2, 2] = (right - origin) / side, (down - origin) / side, origin
        return result["image"], result["mask"], matrix
