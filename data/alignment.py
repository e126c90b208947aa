"""Aligns faces: a similarity transform maps five landmarks onto fixed places.

A similarity (rotation, one scale, translation; no mirror image) of the plane is z -> alpha z + beta
on complex numbers. So the best one in the sense of least squares is a regression with one complex
slope: alpha = sum conj(z_i - mean z) (w_i - mean w) / sum |z_i - mean z|^2. Umeyama's formula (PAMI
1991, eq. 40 to 42) gives the same by a singular value decomposition; the tests compare the two.
"""

from __future__ import annotations

import cv2
import numpy as np

from utils.errors import UserError

# Eyes, nose tip, corners of the mouth, left before right as seen in the image: x, y in pixels of a
# 112 x 112 crop, origin at the center of the top left pixel. ArcFace weights are trained on these.
ARCFACE_112 = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
_SMALLEST_SPREAD = 1e-6  # pixels; below it the points are one point


class AlignmentError(UserError):
    """No aligned face can be made from the landmarks or the image; the message says what came."""


def similarity_transform(points: np.ndarray, reference: np.ndarray = ARCFACE_112) -> np.ndarray:
    """Computes the similarity that takes `points` closest to `reference`, for cv2.warpAffine.

    Rotation, scale and translation can reach no smaller sum of squared distances.

    Args:
        points: [n, 2] pixels (x, y), n >= 2.
        reference: [n, 2] pixels (x, y), in the same order.

    Returns:
        float64 [2, 3].

    Raises:
        AlignmentError: The points have another shape than `reference`, are not finite, or determine
            no rotation and scale.
    """
    points = np.asarray(points, dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    if points.shape != reference.shape or points.ndim != 2 or points.shape[1:] != (2,):
        raise AlignmentError(
            f"landmarks of shape {list(points.shape)}; needed are {list(reference.shape)}: x and y "
            "of left eye, right eye, nose, left and right corner of the mouth"
        )
    if not np.isfinite(points).all():
        raise AlignmentError(f"landmarks {points.tolist()}: not all of them are finite numbers")
    source = points[:, 0] + 1j * points[:, 1]
    target = reference[:, 0] + 1j * reference[:, 1]
    from_mean, to_mean = source - source.mean(), target - target.mean()
    spread = float((np.abs(from_mean) ** 2).sum())
    slope = complex(np.vdot(from_mean, to_mean))  # vdot conjugates its first argument
    if not spread > _SMALLEST_SPREAD**2 or not abs(slope) > 0:
        raise AlignmentError(
            f"landmarks {points.tolist()}: they determine no rotation and scale (all at one place, "
            "or in an order that fits nothing); detect the face again"
        )
    alpha = slope / spread
    beta = target.mean() - alpha * source.mean()
    return np.array([[alpha.real, -alpha.imag, beta.real], [alpha.imag, alpha.real, beta.imag]])


def align(image: np.ndarray, points: np.ndarray, size: int = 112) -> np.ndarray:
    """Cuts the aligned face out of an image: bilinear, black outside of the image.

    Args:
        image: uint8 [H, W, 3] in RGB, or in any other order of channels: they are not mixed.
        points: [5, 2] pixels (x, y) in the image.
        size: Side of the result in pixels. `ARCFACE_112` is scaled by size / 112.

    Returns:
        uint8 [size, size, 3].

    Raises:
        AlignmentError: The image is not uint8 [H, W, 3], or `similarity_transform` refuses the
            points.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise AlignmentError(
            f"an image of shape {list(image.shape)}, {image.dtype}; needed is uint8 [H, W, 3]"
        )
    matrix = similarity_transform(points, ARCFACE_112 * (size / 112))
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
