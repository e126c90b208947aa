"""Draws are functions of (seed, epoch, image), as likely as stated, and applied as drawn."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data.augment import (
    DEFAULTS,
    ERASED,
    PRESETS,
    Augmentation,
    Draws,
    apply,
    draw,
    mirror,
    parse_augmentation,
)
from data.order import flip_mask

SIZE = 112
NONE = Augmentation(flip=0)
IDENTITY = np.eye(3, 4, dtype=np.float32)


def drawn(words: list[str], count: int = 20_000, seed: int = 1, epoch: int = 2) -> Draws:
    return draw(parse_augmentation(words, flip=False), np.arange(count), seed, epoch, SIZE)


def image() -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def changed(draws: Draws, name: str) -> np.ndarray:
    """Which images `name` happens to: bool [b]."""
    return {
        "crop": draws.crop[:, 2] * draws.crop[:, 3] < SIZE * SIZE,
        "resize": draws.side != SIZE,
        "low_res": draws.side != SIZE,
        "blur": draws.blur > 1,
        "hsv": (draws.color != IDENTITY).any(axis=(1, 2)),
        "gray": (draws.color != IDENTITY).any(axis=(1, 2)),
        "photometric": (draws.color != IDENTITY).any(axis=(1, 2)),
        "erase": draws.erase[:, 2] > 0,
    }[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_happens_as_often_as_stated_and_alone(name: str) -> None:
    draws = drawn([f"{name}=0.3"])
    assert abs(changed(draws, name).mean() - 0.3) < 0.02
    others = [
        o
        for o in ("crop", "blur", "erase", "resize", "hsv")
        if o != name
        and {o, name} not in ({"resize", "low_res"}, {"hsv", "gray"}, {"hsv", "photometric"})
    ]
    assert not any(changed(draws, other).any() for other in others)
    assert not draws.flip.any()


@pytest.mark.parametrize("name", DEFAULTS)
def test_draws_depend_on_image_epoch_and_seed_only(name: str) -> None:
    whole, words = drawn([f"{name}=0.5"]), [f"{name}=0.5"]
    some = np.array([19_999, 3, 500])
    part = draw(parse_augmentation(words, flip=False), some, 1, 2, SIZE)
    for field, values in vars(part).items():
        assert np.array_equal(values, vars(whole)[field][some])
    masks = [changed(drawn(words, seed=s, epoch=e), name) for s in (1, 2) for e in (2, 3)]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert abs((mask == other).mean() - 0.5) < 0.02


def test_different_augmentations_happen_independently() -> None:
    draws = draw(
        parse_augmentation(["blur=0.5", "erase=0.5", "gray=0.5"]), np.arange(20_000), 1, 1, SIZE
    )
    masks = [draws.flip, *(changed(draws, name) for name in ("blur", "erase", "gray"))]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert abs(np.corrcoef(mask, other)[0, 1]) < 0.03


def test_ranges_are_those_of_the_documentation() -> None:
    side = drawn(["resize=1"]).side / SIZE
    assert (side.min(), side.max()) == (0.5, pytest.approx(0.8, abs=0.01))
    side = drawn(["low_res=1"]).side / SIZE
    assert side.min() == pytest.approx(0.2, abs=0.01)
    assert set(drawn(["low_res=1"]).down.tolist()) == {0, 1, 2}
    assert set(drawn(["blur=1"]).blur.tolist()) == {3, 5}
    for words, low, high in ((["crop=1"], 0.2, 1.0), (["erase=1"], 0.02, 0.33)):
        boxes = getattr(drawn(words), words[0].split("=")[0])
        area = boxes[:, 2] * boxes[:, 3] / SIZE**2
        assert low * 0.7 < area.min() < low * 1.2
        assert high * 0.9 < area.max() <= high * 1.05
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= SIZE).all()


def test_flips_alone_are_the_mask_that_they_have_always_been() -> None:
    indices = np.arange(1000)
    assert np.array_equal(draw(Augmentation(), indices, 3, 1, SIZE).flip, flip_mask(indices, 3, 1))


@pytest.mark.parametrize("name", DEFAULTS)
def test_applying_changes_the_drawn_images_and_no_others(name: str) -> None:
    draws = drawn([f"{name}=0.5"], count=40)
    original = image()
    for row, happens in enumerate(changed(draws, name)):
        result = original.copy()
        apply(draws, row, result)
        assert np.array_equal(result, original) != happens


def test_what_is_applied_is_what_the_names_say() -> None:
    original = image()

    def applied(words: list[str], row: int = 0) -> tuple[np.ndarray, Draws]:
        draws, result = drawn(words, 8), original.copy()
        apply(draws, row, result)
        return result, draws

    result, draws = applied(["crop=1"])
    top, left, height, width = draws.crop[0]
    inside = np.zeros((SIZE, SIZE), bool)
    inside[top : top + height, left : left + width] = True
    assert np.array_equal(result[inside], original[inside])
    assert not result[~inside].any()

    result, draws = applied(["erase=1"])
    top, left, height, width = draws.erase[0]
    assert (result[top : top + height, left : left + width] == ERASED).all()
    assert (result != original).any(axis=2).sum() <= height * width

    result, _ = applied(["gray=1"])
    assert (result.max(axis=2) - result.min(axis=2)).max() <= 1
    luma = original @ np.array([0.299, 0.587, 0.114])
    assert np.abs(result[:, :, 0] - luma).max() < 1

    result, _ = applied(["blur=1"])
    assert result.astype(float).var() < original.astype(float).var()
    assert np.abs(result.mean() - original.mean()) < 1

    for row in range(8):
        result, _ = applied(["hsv=1"], row)
        luma_after = result @ np.array([0.299, 0.587, 0.114])
        kept = (result > 0).all(axis=2) & (result < 255).all(axis=2)
        assert np.abs(luma_after - luma)[kept].max() < 2.5  # hue and saturation leave luma alone


def test_flipping_comes_last_and_mirrors() -> None:
    draws = draw(Augmentation(flip=1.0, erase=1.0), np.arange(4), 1, 1, SIZE)
    plain, mirrored = image(), image()
    apply(draws, 0, mirrored)
    draws.flip[:] = False
    apply(draws, 0, plain)
    assert np.array_equal(mirrored, plain[:, ::-1])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 111, 112, 224])
def test_mirroring_in_place_is_mirroring(width: int) -> None:
    original = np.random.default_rng(width).integers(0, 256, (5, width, 3), dtype=np.uint8)
    mirrored = original.copy()
    mirror(mirrored)
    assert np.array_equal(mirrored, original[:, ::-1])


def test_presets_are_what_was_published() -> None:
    assert parse_augmentation(["dali_aug"]) == Augmentation(resize=0.1, blur=0.2, hsv=0.2, gray=0.1)
    assert parse_augmentation(["adaface"]) == Augmentation(crop=0.2, low_res=0.2, photometric=0.2)
    assert parse_augmentation([], flip=False) == NONE
    assert parse_augmentation(["adaface", "crop=0.5", "erase"]) == Augmentation(
        crop=0.5, low_res=0.2, photometric=0.2, erase=0.25
    )
    assert set(PRESETS["dali_aug"]) | set(PRESETS["adaface"]) < set(DEFAULTS)


@pytest.mark.parametrize(
    "word", ["blurr", "erase=2", "erase=x", "dali_aug=0.5", "", "flip=1", "=1"]
)
def test_a_wrong_word_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are dali_aug, adaface, crop") as error:
        parse_augmentation([word])
    assert repr(word) in str(error.value)
