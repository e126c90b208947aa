"""Alignment is the least-squares similarity: Umeyama's formula, a linear solver, real landmarks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.alignment import ARCFACE_112, AlignmentError, align, similarity_transform

COORDINATES = st.floats(-500, 500, width=32)
POINTS = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=5, max_size=5).map(np.array)


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991, equations 40 to 43, without reflection: [2, 3]."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, b = source - source_mean, target - target_mean
    u, d, vt = np.linalg.svd(b.T @ a / len(source))
    s = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(s) @ vt
    scale = (d * s).sum() / a.var(0).sum()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def linear_least_squares(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The four unknowns a, b, tx, ty of the ten equations [a -b; b a] p + t = q: [2, 3]."""
    rows = [row for x, y in source for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows, float), target.reshape(-1), rcond=None)[0]
    return np.array([[a, -b, tx], [b, a, ty]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


@given(points=POINTS)
def test_it_is_umeyamas_formula_and_the_linear_solution(points: np.ndarray) -> None:
    try:
        ours = similarity_transform(points)
    except AlignmentError:
        assert np.ptp(points, axis=0).max() < 1e-5 or np.abs(umeyama(points, ARCFACE_112)).max() < 1
        return
    if points.std() < 1e-2:
        return  # the twins lose their digits first
    scale = np.abs(ours[:, 2]).max() + 1
    for other in (umeyama, linear_least_squares):
        np.testing.assert_allclose(ours, other(points, ARCFACE_112), atol=1e-5 * scale)


@given(points=POINTS, shifts=st.lists(st.floats(-0.1, 0.1), min_size=4, max_size=4))
def test_no_neighboring_similarity_fits_better(points: np.ndarray, shifts: list[float]) -> None:
    if np.ptp(points, axis=0).min() < 1:
        return
    best = similarity_transform(points)
    a, b, x, y = np.array([best[0, 0], best[1, 0], best[0, 2], best[1, 2]]) + shifts
    other = np.array([[a, -b, x], [b, a, y]])
    errors = [((apply(m, points) - ARCFACE_112) ** 2).sum() for m in (best, other)]
    assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9


def test_a_known_similarity_is_found_again() -> None:
    angle, scale = 0.4, 2.5
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = ARCFACE_112 @ rotation.T + [30, -12]
    found = similarity_transform(moved)
    np.testing.assert_allclose(apply(found, moved), ARCFACE_112, atol=1e-9)
    np.testing.assert_allclose(found[:, :2] @ rotation, np.eye(2), atol=1e-12)


def test_mirrored_landmarks_are_rotated_never_mirrored() -> None:
    mirrored = ARCFACE_112 * [-1, 1] + [112, 0]
    matrix = similarity_transform(mirrored)
    assert np.linalg.det(matrix[:, :2]) > 0
    np.testing.assert_allclose(matrix, umeyama(mirrored, ARCFACE_112), atol=1e-9)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((5, 2)), "all at one place"),
        (np.zeros((4, 2)), r"shape \[4, 2\]; needed are \[5, 2\]"),
        (np.zeros(10), r"shape \[10\]"),
        (np.full((5, 2), np.nan), "finite"),
    ],
)
def test_landmarks_that_determine_nothing_are_refused(points: np.ndarray, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        similarity_transform(points)


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32), np.zeros((0, 9, 3), "u1")],
)
def test_what_is_no_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(AlignmentError, match=r"needed is uint8 \[H, W, 3\]"):
        align(image, ARCFACE_112)


def test_an_aligned_image_stays_as_it_is_and_other_sizes_scale() -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8), (112, 112))
    np.testing.assert_array_equal(align(image, ARCFACE_112), image)
    twice = align(image, ARCFACE_112, size=224)
    expected = cv2.warpAffine(image, np.array([[2.0, 0, 0], [0, 2.0, 0]]), (224, 224))
    np.testing.assert_array_equal(twice, expected)


def test_what_lies_outside_the_image_is_black() -> None:
    image = np.full((112, 112, 3), 200, np.uint8)
    aligned = align(image, ARCFACE_112 - [60, 0])  # the face hangs over the left edge
    assert not aligned[:, :59].any()
    assert (aligned[:, 61:] == 200).all()


def test_real_faces_land_on_the_reference(shared_dir: Path) -> None:
    meta = shared_dir / "data" / "ijbc_layout"
    lines = (meta / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines()
    errors = []
    for line in lines:
        points = np.array(line.split()[1:11], float).reshape(5, 2)
        matrix = similarity_transform(points)
        np.testing.assert_allclose(matrix, umeyama(points, ARCFACE_112), atol=1e-9)
        errors.append(np.abs(apply(matrix, points) - ARCFACE_112).mean())
    assert len(errors) == 627
    assert np.median(errors) < 2  # pixels
