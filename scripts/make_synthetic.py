"""Write a small set of procedurally drawn faces: records to train on and pairs to verify with.

    python scripts/make_synthetic.py OUT [--identities 320 --images-per-identity 15 ...]

Identities differ in geometry (head, eyes, brows, nose, mouth, hair, ears, glasses, beard) and in
coloring; images of one identity differ in pose, light, expression, background, blur and noise.
The identities in OUT/synthetic.bin are not among those in OUT/train.rec. The same seed gives the
same bytes with the same versions of OpenCV and libjpeg-turbo.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError
from data.pairs import write_verification_set
from data.tools.encode import encode_jpeg
from data.tools.record_writer import RecordSetWriter
from utils.cli import cli_command

# These set how hard the set is: IDENTITY scales how much identities differ, the others how much
# images of one identity do; 0 switches a variation off. With these values of the demo an untrained
# r_nano verifies 0.69 of the pairs, a trained one 0.97.
IDENTITY = 1.4
POSE = 0.45
LIGHT = 0.5
EXPRESSION = 0.5
QUALITY = 0.6  # blur and noise

JPEG_QUALITY = 92
FOLDS = 10
_SUPERSAMPLING = 2
_SHIFT = 4  # fractional bits of the coordinates OpenCV draws with
_TRAINING, _VERIFICATION = 0, 1  # streams of random numbers

Color = np.ndarray  # RGB, float [3], 0 to 255
Task = tuple[int, int, int, int, int]  # seed, stream, person, image, size


class Identity:
    """What stays the same in all images of an identity. Lengths are in half head heights."""

    def __init__(self, rng: np.random.Generator) -> None:
        def vary(mean: float, spread: float) -> float:
            """Draws uniformly, so that identities fill the space of looks evenly."""
            return mean + IDENTITY * spread * float(rng.uniform(-1, 1))

        def has(probability: float) -> bool:
            return bool(rng.uniform() < probability)

        self.head_width = vary(0.74, 0.10)
        self.jaw_width = vary(0.80, 0.20)  # share of the head's width, at the mouth
        self.chin_length = vary(1.0, 0.12)
        self.eye_distance = vary(0.31, 0.055)
        self.eye_height = vary(-0.10, 0.07)
        self.eye_width = vary(0.145, 0.035)
        self.eye_opening = vary(0.55, 0.20)
        self.eye_tilt = vary(0.0, 0.22)
        self.brow_gap = vary(0.17, 0.055)
        self.brow_thickness = vary(0.055, 0.035)
        self.brow_length = vary(0.21, 0.05)
        self.brow_tilt = vary(0.0, 0.22)
        self.brow_arch = vary(0.04, 0.04)
        self.nose_length = vary(0.40, 0.10)
        self.nose_width = vary(0.125, 0.05)
        self.mouth_height = vary(0.55, 0.07)
        self.mouth_width = vary(0.26, 0.08)
        self.upper_lip = vary(0.055, 0.035)
        self.lower_lip = vary(0.075, 0.045)
        self.ear_size = vary(0.19, 0.06)
        self.ear_sticks_out = vary(0.05, 0.05)

        self.hair_volume = vary(0.15, 0.13)
        self.hairline = vary(-0.60, 0.16)
        self.hairline_curve = vary(0.10, 0.30)
        self.hair_parting = vary(0.0, 0.28)
        # The hair at the sides ends above the ears, at the chin or on the shoulders.
        self.hair_length = vary(0.35, 0.95)
        self.is_bald = has(0.08)
        self.has_beard, self.has_moustache = has(0.22), has(0.18)
        self.beard_top = vary(0.42, 0.15)
        self.has_glasses = has(0.25)
        self.glasses_size = vary(0.21, 0.04)
        self.glasses_roundness = vary(0.5, 0.45)
        self.glasses_thickness = vary(0.035, 0.018)
        self.glasses_color = np.array(vary_color(rng, (70, 50, 50), 60))
        self.moles = rng.uniform((-0.5, -0.4), (0.5, 0.85), (int(rng.integers(0, 3)), 2))

        self.skin = skin_color(float(rng.uniform()), vary(0, 1))
        self.hair = hair_color(float(rng.uniform()), float(rng.uniform()))
        self.brow = np.clip(self.hair * vary(0.75, 0.25), 5, 235)
        self.eyes = hsv(vary(0.32, 0.28), vary(0.5, 0.35), vary(0.45, 0.3))
        self.lips = self.skin * (0.86, 0.58, 0.60) * vary(1.0, 0.22) + (vary(15, 22), 0, vary(6, 8))
        self.clothes = hsv(float(rng.uniform()), float(rng.uniform(0.1, 0.8)), 0.5)
        if has(0.25):  # dyed
            self.hair = hsv(float(rng.uniform()), vary(0.7, 0.2), vary(0.65, 0.25))
        self.has_headband, self.has_cap, self.has_earrings = has(0.18), has(0.12), has(0.3)
        self.band_color = hsv(float(rng.uniform()), vary(0.6, 0.35), vary(0.6, 0.35))
        self.band_height = vary(-0.62, 0.1)
        self.band_width = vary(0.14, 0.06)
        self.earring_size = vary(0.075, 0.03)
        self.earring_color = hsv(float(rng.uniform()), vary(0.5, 0.4), vary(0.75, 0.2))


def vary_color(rng: np.random.Generator, mean: Sequence[float], spread: float) -> np.ndarray:
    """Draws a color around `mean`: RGB float [3]."""
    return np.clip(np.asarray(mean) + rng.uniform(-spread, spread, 3), 0, 255)


def skin_color(depth: float, undertone: float) -> Color:
    """Returns a color from light (depth 0) to dark (1), from pink (undertone -1) to olive (1)."""
    stops = np.array(
        [(250, 220, 200), (228, 184, 150), (190, 134, 96), (120, 78, 54), (74, 47, 35)]
    )
    place = depth * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    color = stops[below] + (stops[below + 1] - stops[below]) * (place - below)
    return np.clip(color + np.array((-6.0, 4.0, -8.0)) * undertone, 0, 255)


def hair_color(kind: float, shade: float) -> Color:
    """Returns black, brown, red, blond or gray, each in a range of shades."""
    stops = np.array([(25, 20, 22), (80, 50, 32), (150, 66, 30), (222, 180, 110), (180, 178, 176)])
    place = kind * len(stops) * 0.999
    return np.clip(stops[int(place)] * (0.7 + 0.55 * shade), 0, 250)


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Returns RGB float [3] of a hue, a saturation and a value between 0 and 1."""
    angle = 2 * math.pi * (hue % 1)
    wheel = np.cos(angle - np.array((0, 2 / 3 * math.pi, 4 / 3 * math.pi))) * 0.5 + 0.5
    return 255 * max(0.0, value) * (1 - max(0.0, saturation) * (1 - wheel))


class Canvas:
    """Draws shapes given in face coordinates: x to the right, y down, half a head height is 1.

    A point is lifted onto a rounded face and turned by the pose before it is drawn. A `depth` above
    1 sticks out further (nose), and 0 lies in the plane of the outline.

    Args:
        size: Side of the canvas in pixels.
        rng: Decides pose, scale and position.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.pixels = np.empty((size, size, 3), np.uint8)
        self.scale = size * 0.405 * (1 + POSE * rng.uniform(-0.09, 0.09))
        self.center = size * (np.array((0.5, 0.53)) + POSE * rng.uniform(-0.055, 0.055, 2))
        self.yaw, self.pitch, roll = POSE * rng.uniform(-1, 1, 3) * (0.42, 0.24, 0.16)
        self.turn = np.array(((math.cos(roll), math.sin(roll)), (-math.sin(roll), math.cos(roll))))

    def project(self, points: np.ndarray, depth: float) -> np.ndarray:
        """Projects face coordinates [n, 2] to OpenCV's fixed-point pixels, int32 [n, 2]."""
        x, y = points[:, 0], points[:, 1]
        lift = depth * 0.62 * np.sqrt(np.clip(1 - (x / 0.95) ** 2 - (y / 1.25) ** 2, 0, 1))
        turned = np.stack(
            (
                x * math.cos(self.yaw) + lift * math.sin(self.yaw),
                y * math.cos(self.pitch) + lift * math.sin(self.pitch),
            ),
            axis=1,
        )
        flat = turned @ self.turn * self.scale + self.center
        return np.rint(flat * (1 << _SHIFT)).astype(np.int32)

    def fill(self, points: np.ndarray, color: Color, depth: float = 1.0) -> None:
        """Fills a polygon.

        Args:
            points: [n, 2] face coordinates.
            color: Color of the polygon.
            depth: Height of the points above the plane of the outline.
        """
        fixed = self.project(points, depth)
        cv2.fillPoly(self.pixels, [fixed], _rgb(color), cv2.LINE_AA, _SHIFT)

    def line(
        self,
        points: np.ndarray,
        color: Color,
        width: float,
        closed: bool = False,
        depth: float = 1.0,
    ) -> None:
        """Draws a line.

        Args:
            points: [n, 2] face coordinates.
            color: Color of the line.
            width: Width in face coordinates.
            closed: Whether the last point is joined to the first.
            depth: Height of the points above the plane of the outline.
        """
        fixed = self.project(points, depth)
        thickness = max(1, round(width * self.scale))
        cv2.polylines(self.pixels, [fixed], closed, _rgb(color), thickness, cv2.LINE_AA, _SHIFT)


def _rgb(color: Color) -> tuple[int, int, int]:
    red, green, blue = np.clip(color, 0, 255).astype(int).tolist()
    return red, green, blue


def ellipse(
    x: float, y: float, width: float, height: float, begin: float = 0, end: float = 360
) -> np.ndarray:
    """Returns points [n, 2] of an arc.

    Args:
        x: Center.
        y: Center.
        width: Half axis in x.
        height: Half axis in y.
        begin: Degrees clockwise from the right.
        end: Degrees clockwise from the right.
    """
    angles = np.radians(np.linspace(begin, end, 25))
    return np.stack((x + width * np.cos(angles), y + height * np.sin(angles)), axis=1)


def draw_face(person: Identity, rng: np.random.Generator, size: int = 112) -> np.ndarray:
    """Draws one image of an identity, RGB uint8 [size, size, 3]; `rng` decides all that varies."""
    canvas = Canvas(size * _SUPERSAMPLING, rng)
    draw_background(canvas, rng)
    outline = head_outline(person)
    draw_behind_head(canvas, person)
    canvas.fill(outline, person.skin, depth=0.15)
    draw_cheeks_and_beard(canvas, person, outline)
    draw_nose(canvas, person)
    draw_mouth(canvas, person, rng)
    draw_eyes(canvas, person, rng)
    draw_hair(canvas, person)
    draw_headwear(canvas, person)
    image = cv2.resize(canvas.pixels, (size, size), interpolation=cv2.INTER_AREA)
    return photograph(image, canvas, rng)


def head_outline(person: Identity) -> np.ndarray:
    """Returns the head as a closed curve [n, 2], narrower toward the chin."""
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x, y = np.cos(angles), np.sin(angles)
    narrowing = np.where(y > 0, 1 - (1 - person.jaw_width) * y**2 * 1.6, 1.0)
    squared = np.sign(x) * np.abs(x) ** 0.85
    height = np.where(y > 0, person.chin_length, 0.95)
    return np.stack((person.head_width * squared * narrowing, y * height), axis=1)


def draw_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draws a smooth mixture of four colors, one per corner, with some blurred rectangles."""
    size = canvas.pixels.shape[0]

    def muted() -> Color:
        return hsv(rng.uniform(), rng.uniform(0, 0.6), rng.uniform(0.05, 1))

    corners = muted() + rng.uniform(-50, 50, (2, 2, 3))
    corners = np.clip(corners, 0, 255).astype(np.float32)
    canvas.pixels[:] = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(0, 5))):
        x, y, width, height = rng.integers(0, size, 4)
        color = _rgb(muted())
        corner = (int(x + width // 2), int(y + height // 2))
        cv2.rectangle(canvas.pixels, (int(x), int(y)), corner, color, cv2.FILLED)
    canvas.pixels[:] = cv2.blur(canvas.pixels, (15, 15))


def draw_behind_head(canvas: Canvas, person: Identity) -> None:
    """Draws long hair, neck, shoulders and ears."""
    if not person.is_bald and person.hair_length > 0.1:
        width = person.head_width + 0.4 * person.hair_volume + 0.05
        top = ellipse(0, -0.1, width, 0.9 + person.hair_volume, 180, 360)
        foot = np.array(((width * 1.05, person.hair_length), (-width * 1.05, person.hair_length)))
        canvas.fill(np.concatenate((top, foot)), person.hair * 0.75, depth=0)
    neck = np.array(((-0.36, 0.5), (0.36, 0.5), (0.42, 1.7), (-0.42, 1.7)))
    canvas.fill(neck, person.skin * 0.8, depth=0)
    canvas.fill(ellipse(0, 1.95, 1.25, 0.72), person.clothes, depth=0)
    for side in (-1, 1):
        x = side * (person.head_width + person.ear_sticks_out)
        ear = ellipse(x, 0.08, person.ear_size * 0.5, person.ear_size)
        canvas.fill(ear, person.skin * 0.92, depth=0)
        inner = ellipse(x, 0.08, person.ear_size * 0.25, person.ear_size * 0.6)
        canvas.fill(inner, person.skin * 0.75, depth=0)
        if person.has_earrings:
            below = 0.08 + person.ear_size + person.earring_size * 0.6
            earring = ellipse(x, below, person.earring_size * 0.8, person.earring_size)
            canvas.fill(earring, person.earring_color, depth=0)


def draw_cheeks_and_beard(canvas: Canvas, person: Identity, outline: np.ndarray) -> None:
    """Draws the color of the cheeks, moles, beard and moustache."""
    for side in (-1, 1):
        cheek = ellipse(side * 0.34 * person.head_width / 0.74, 0.30, 0.15, 0.11)
        canvas.fill(cheek, person.skin * (1.0, 0.95, 0.95), depth=0.6)
    for x, y in person.moles:
        canvas.fill(ellipse(x, y, 0.032, 0.032), person.skin * 0.45)
    if person.has_beard:
        below = outline[outline[:, 1] > person.beard_top - 0.12]
        inner = ellipse(0, person.beard_top, person.head_width * 0.72, 0.22, 180, 0)
        canvas.fill(np.concatenate((below, inner)), person.brow * 0.8 + person.skin * 0.2, 0.3)
        chin = ellipse(0, person.mouth_height, person.mouth_width * 1.1, person.lower_lip + 0.06)
        canvas.fill(chin, person.skin)
    if person.has_moustache:
        y = person.mouth_height - person.upper_lip - 0.055
        canvas.fill(ellipse(0, y, person.mouth_width * 1.05, 0.06), person.brow)


def draw_nose(canvas: Canvas, person: Identity) -> None:
    """Draws bridge, wings and nostrils, which stick out and so move most when the head turns."""
    top, tip = person.eye_height + 0.03, person.eye_height + person.nose_length
    width = person.nose_width
    bridge = np.array(((-0.05, top), (0.05, top), (width, tip), (0, tip + 0.06), (-width, tip)))
    canvas.fill(bridge, person.skin * 0.93, depth=1.15)
    canvas.fill(ellipse(0, tip - 0.02, width * 0.75, 0.08), person.skin * 1.03, depth=1.3)
    canvas.fill(ellipse(0, (top + tip) / 2, 0.025, 0.14), person.skin * 1.06, depth=1.25)
    for side in (-1, 1):
        nostril = ellipse(side * width * 0.5, tip + 0.035, width * 0.24, 0.022)
        canvas.fill(nostril, person.skin * 0.5, depth=1.15)
        wing = ellipse(side * width * 0.95, tip, 0.03, 0.05)
        canvas.fill(wing, person.skin * 0.83, depth=1.1)


def draw_mouth(canvas: Canvas, person: Identity, rng: np.random.Generator) -> None:
    """Draws two lips, bent by a smile, parted by an open mouth."""
    smile = EXPRESSION * rng.uniform(-0.05, 0.12)
    opened = EXPRESSION * max(0.0, rng.uniform(-0.12, 0.12))
    width = person.mouth_width * (1 + smile)
    across = np.linspace(-1, 1, 13)
    bend = person.mouth_height - smile * across**2
    arch = np.sqrt(np.clip(1 - across**2, 0, 1))
    cupid = arch * (1 - 0.25 * np.exp(-((across / 0.18) ** 2)))
    upper = np.stack((width * across, bend - person.upper_lip * cupid - opened * arch * 0.3), 1)
    lower = np.stack((width * across, bend + person.lower_lip * arch + opened * arch), 1)
    canvas.fill(np.concatenate((upper, lower[::-1])), person.lips)
    gap = np.stack((width * 0.88 * across, bend - opened * arch * 0.3), 1)
    gap_below = np.stack((width * 0.88 * across, bend + opened * arch + 0.012), 1)
    inside = np.array((235.0, 230, 225)) if smile > 0.05 else person.lips * 0.35
    canvas.fill(np.concatenate((gap, gap_below[::-1])), inside if opened > 0.02 else inside * 0.3)


def draw_eyes(canvas: Canvas, person: Identity, rng: np.random.Generator) -> None:
    """Draws eyes, brows and glasses."""
    opening = person.eye_opening * (1 - EXPRESSION * rng.uniform(0, 0.4))
    gaze = EXPRESSION * rng.uniform(-0.3, 0.3, 2)
    raised = EXPRESSION * rng.uniform(-0.02, 0.05)
    width = person.eye_width
    for side in (-1, 1):
        center = np.array((side * person.eye_distance, person.eye_height))
        tilt = np.array((1, -side * person.eye_tilt))
        across = np.linspace(-1, 1, 13)
        lid = width * opening * np.sqrt(np.clip(1 - across**2, 0, 1))
        middle = center + width * across[:, None] * tilt
        upper, lower = middle - lid[:, None] * (0, 1), middle + lid[:, None] * (0, 0.75)
        socket = ellipse(center[0], center[1], width * 1.3, width * 1.05)
        canvas.fill(socket, person.skin * 0.92)
        canvas.fill(np.concatenate((upper, lower[::-1])), np.array((238.0, 236, 232)))
        # The lids cover the iris above and below.
        radius = width * 0.5
        x, y = center + gaze * radius * (1, 0.3)
        iris = ellipse(x, y, radius, radius)
        iris[:, 1] = np.clip(iris[:, 1], center[1] - width * opening, center[1] + width * opening)
        canvas.fill(iris, person.eyes)
        x, y = iris.mean(axis=0)
        pupil = ellipse(x, y, radius * 0.45, min(radius * 0.45, width * opening))
        canvas.fill(pupil, np.zeros(3))
        canvas.fill(ellipse(x - radius * 0.3, y - radius * 0.3, 0.014, 0.014), np.full(3, 250.0))
        canvas.line(upper, person.skin * 0.3, 0.022)

        across = np.linspace(-1, 1, 9)
        base = center - (0, person.brow_gap + raised)
        brow = base + np.stack(
            (
                person.brow_length * across,
                -side * across * person.brow_tilt * person.brow_length
                - person.brow_arch * (1 - across**2),
            ),
            axis=1,
        )
        thick = person.brow_thickness * (0.55 - 0.45 * side * across)[:, None] * (0, 1)
        canvas.fill(np.concatenate((brow - thick, (brow + thick)[::-1])), person.brow)
    if person.has_glasses:
        draw_glasses(canvas, person)


def draw_glasses(canvas: Canvas, person: Identity) -> None:
    """Draws two frames between round and square, a bridge, two temples."""
    color, width = person.glasses_color, person.glasses_thickness
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    shape = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    power = 0.45 + 0.55 * person.glasses_roundness
    shape = np.sign(shape) * np.abs(shape) ** power * (1, 0.55 + 0.3 * person.glasses_roundness)
    for side in (-1, 1):
        center = np.array((side * person.eye_distance, person.eye_height + 0.02))
        canvas.line(center + person.glasses_size * shape, color, width, closed=True, depth=1.2)
        outer = center + np.array((side * person.glasses_size, 0))
        temple = np.array((outer, (side * person.head_width, person.eye_height - 0.02)))
        canvas.line(temple, color, width, depth=0.8)
    inner = person.eye_distance - person.glasses_size
    bridge = np.array(((-inner, person.eye_height), (inner, person.eye_height)))
    canvas.line(bridge, color, width, depth=1.2)


def draw_hair(canvas: Canvas, person: Identity) -> None:
    """Draws the hair in front: between an arc over the head and the hairline."""
    if person.is_bald:
        return
    outer_width = person.head_width + 0.3 * person.hair_volume + 0.03
    outer = ellipse(0, -0.1, outer_width, 0.88 + person.hair_volume, 178, 362)
    across = np.linspace(1, -1, 19)
    bow = person.hairline_curve * (across - person.hair_parting) ** 2
    sides = np.clip(np.abs(across) - 0.8, 0, 1) / 0.2  # the hairline falls to the temples here
    height = np.clip(person.hairline + bow, -0.9, -0.32) * (1 - sides) + sides * min(
        person.hair_length, 0.05
    )
    inner = np.stack((across * outer_width * 0.97, height), axis=1)
    canvas.fill(np.concatenate((outer, inner)), person.hair, depth=0.25)
    for place in np.linspace(-0.7, 0.7, 6):  # strands
        strand = np.array(
            (
                (person.hair_parting * 0.5 + place * 0.3, -0.95 - person.hair_volume * 0.7),
                (place * outer_width, person.hairline - 0.08),
            )
        )
        canvas.line(strand, person.hair * 1.18 + 6, 0.02, depth=0.25)


def draw_headwear(canvas: Canvas, person: Identity) -> None:
    """Draws a cap down to the forehead, or a band around it."""
    if not (person.has_cap or person.has_headband):
        return
    width = person.head_width + 0.3 * person.hair_volume + 0.05
    across = np.linspace(1, -1, 15)
    lower = np.stack((across * width * 0.87, person.band_height + 0.12 * (1 - across**2)), axis=1)
    if person.has_cap:
        top = ellipse(0, person.band_height, width * 0.9, 0.45 + person.hair_volume, 180, 360)
        canvas.fill(np.concatenate((top, lower)), person.band_color, depth=0.3)
    upper = lower[::-1] - np.array((0, person.band_width))
    edge = person.band_color * (0.7 if person.has_cap else 1.0)
    canvas.fill(np.concatenate((lower, upper)), edge, depth=0.3)


def photograph(image: np.ndarray, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Applies light, exposure, a color cast, blur and noise to uint8 [size, size, 3]."""
    size = image.shape[0]
    center, reach = canvas.center / _SUPERSAMPLING, canvas.scale / _SUPERSAMPLING
    x = ((np.arange(size, dtype=np.float32) - center[0]) / reach)[None, :]
    y = ((np.arange(size, dtype=np.float32) - center[1]) / reach)[:, None]
    height = np.exp(-0.7 * (x**2 + 0.7 * y**2))  # a rounded face that fades into the background
    side, above = LIGHT * rng.uniform(-0.75, 0.75), LIGHT * rng.uniform(-0.7, 0.35)
    falls = np.clip(side * x + above * y + 0.75 * height, 0, 1.5)
    exposure = math.exp(LIGHT * rng.uniform(-0.55, 0.35))
    ambient = rng.uniform(0.35, 0.6)
    cast = np.exp(LIGHT * rng.uniform(-0.25, 0.25, 3))
    shade = (exposure * (ambient + 0.8 * falls)).astype(np.float32)
    lit = image.astype(np.float32) * shade[:, :, None] * cast.astype(np.float32)
    contrast = math.exp(LIGHT * rng.uniform(-0.35, 0.2))
    lit = (lit - 128) * contrast + 128 + LIGHT * rng.uniform(-20, 20)
    blur = QUALITY * max(0.0, rng.uniform(-0.8, 1.4))
    if blur > 0.2:
        lit = cv2.GaussianBlur(lit, (0, 0), blur)
    noise = QUALITY * rng.uniform(1, 9)
    lit += noise * rng.standard_normal(lit.shape, dtype=np.float32)
    return np.clip(lit, 0, 255).astype(np.uint8)


def draw_encoded(task: Task) -> bytes:
    """Draws a task's image as JPEG bytes: a pure function, run by the workers."""
    seed, stream, person, image, size = task
    identity = Identity(np.random.default_rng((seed, stream, person)))
    drawn = draw_face(identity, np.random.default_rng((seed, stream, person, image + 1)), size)
    return encode_jpeg(drawn, JPEG_QUALITY)


def make_synthetic(
    out: str | os.PathLike[str],
    *,
    identities: int = 320,
    images_per_identity: int = 15,
    verification_pairs: int = 600,
    seed: int = 0,
    size: int = 112,
    force: bool = False,
    num_processes: int | None = None,
) -> None:
    """Writes OUT/train.rec, train.idx, property, label_map.txt and OUT/synthetic.bin.

    Args:
        out: Folder to write to.
        identities: Number of identities to train on.
        images_per_identity: Images of each.
        verification_pairs: A multiple of 20, for ten folds in order, each half same and half
            different, each with its own identities.
        seed: Seed of the drawing.
        size: Side of the images in pixels.
        force: Whether existing files are replaced.
        num_processes: Number of processes; None takes one per core, at most 4.

    Raises:
        DataError: The numbers do not fit, or the files exist.
    """
    out = Path(out)
    if identities < 1 or images_per_identity < 1 or size < 16:
        raise DataError(
            f"identities={identities}, images_per_identity={images_per_identity}, size={size}: "
            "allowed are 1 or more, 1 or more, 16 or more"
        )
    if verification_pairs < 2 * 2 * FOLDS or verification_pairs % (2 * FOLDS):
        raise DataError(
            f"verification_pairs={verification_pairs}: {FOLDS} folds, each half same and half "
            f"different, need a multiple of {2 * FOLDS}, at least {4 * FOLDS}"
        )
    if not force and (out / "synthetic.bin").exists():
        raise DataError(f"{out / 'synthetic.bin'} already exists; --force replaces it")
    training: list[Task] = [
        (seed, _TRAINING, person, image, size)
        for person in range(identities)
        for image in range(images_per_identity)
    ]
    pairs, same = verification_plan(verification_pairs, seed)
    verifying = [(seed, _VERIFICATION, person, image, size) for person, image in pairs]
    with RecordSetWriter(out, size, force) as writer, _drawing(num_processes) as draw:
        with tqdm(total=len(training) + len(verifying), unit=" images") as bar:
            for task, encoded in zip(training, draw(training), strict=True):
                writer.add(encoded, task[2])
                bar.update()
            faces = []
            for encoded in draw(verifying):
                faces.append(encoded)
                bar.update()
        write_verification_set(out / "synthetic.bin", faces, same, force=force)
        writer.finish([f"synthetic_{person:05d}" for person in range(identities)])


def verification_plan(num_pairs: int, seed: int) -> tuple[list[tuple[int, int]], list[bool]]:
    """Returns (person, image) of 2 * num_pairs faces and num_pairs answers, ten folds in order.

    A fold has its own identities, as many as it has same pairs. No two faces are the same image.

    Args:
        num_pairs: Number of pairs, a multiple of 20.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng((seed, 2))
    per_fold = num_pairs // (2 * FOLDS)
    faces: list[tuple[int, int]] = []
    same: list[bool] = []
    for fold in range(FOLDS):
        people = range(fold * per_fold, (fold + 1) * per_fold)
        for person in people:
            faces += [(person, 0), (person, 1)]
        others = rng.integers(1, per_fold, per_fold)  # a step to another identity of the fold
        for place, step in enumerate(others.tolist()):
            faces += [(people[place], 2), (people[(place + step) % per_fold], 3)]
        same += [True] * per_fold + [False] * per_fold
    # Two different pairs may use image 3 of one identity: give each use a separate number.
    seen: dict[tuple[int, int], int] = {}
    numbered: list[tuple[int, int]] = []
    for person, image in faces:
        uses = seen.get((person, image), 0)
        seen[person, image] = uses + 1
        numbered.append((person, image + uses))
    return numbered, same


@contextmanager
def _drawing(num_processes: int | None) -> Iterator[Callable[[list[Task]], Iterator[bytes]]]:
    """Maps `draw_encoded` over a list in order, in several processes or in this one."""
    count = num_processes or min(4, os.cpu_count() or 1)
    if count == 1:
        yield lambda tasks: map(draw_encoded, tasks)
        return
    # "spawn": a fork of a process that has threads (a test run, say) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=cv2.setNumThreads, initargs=(0,))
    try:
        yield lambda tasks: pool.map(draw_encoded, tasks, chunksize=32)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@cli_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="make_synthetic.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add("--identities", type=int, default=320, help="people to train on (default 320)")
    add("--images-per-identity", type=int, default=15, help="images of each (default 15)")
    add("--verification-pairs", type=int, default=600, help="a multiple of 20 (default 600)")
    add("--seed", type=int, default=0, help="another seed, other people (default 0)")
    add("--size", type=int, default=112, help="pixels per side (default 112)")
    add("--force", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    make_synthetic(
        args.out,
        identities=args.identities,
        images_per_identity=args.images_per_identity,
        verification_pairs=args.verification_pairs,
        seed=args.seed,
        size=args.size,
        force=args.force,
    )
    images = args.identities * args.images_per_identity
    print(
        f"{args.out}: {images} images of {args.identities} identities, and synthetic.bin with "
        f"{args.verification_pairs} pairs of other identities"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
