"""Scenes in space: nebula, stars, a planet with a ring, and the spacecraft."""

import math

import numpy as np
from numpy.typing import NDArray

from sandbox.canvas import Canvas, Field, Pen, Point, blend, color, smooth

#: Sky, two colours of the nebula, the planet's two, the engines' glow.
SKIES = (
    ("#060716", "#5a2a8c", "#c2456f", "#d98b52", "#6d3550", "#63e0ff"),
    ("#040a18", "#1c5f9a", "#7a3fb0", "#4fa3c7", "#1d3a6e", "#8ff0ff"),
    ("#08060f", "#8a3a2a", "#e0a050", "#3f9a95", "#1f4a66", "#ffd08a"),
    ("#040d12", "#136f6a", "#3f5fc0", "#c46a86", "#5a2f6a", "#9affe0"),
)

#: The spacecraft, a side view one long, nose to the right, as (how light, outline); drawn in this order.
SPACECRAFT: tuple[tuple[float, tuple[Point, ...]], ...] = (
    (0.24, ((-0.30, -0.05), (0.06, -0.07), (-0.22, -0.20), (-0.40, -0.22))),  # far wing
    (0.36, ((-0.40, -0.06), (-0.50, -0.25), (-0.39, -0.25), (-0.16, -0.08))),  # fin
    (0.30, ((-0.53, -0.055), (-0.38, -0.065), (-0.38, 0.055), (-0.53, 0.045))),  # engines
    (0.78, ((-0.44, -0.07), (-0.30, -0.095), (-0.02, -0.10), (0.20, -0.065), (0.55, 0.012), (-0.44, 0.012))),
    (0.40, ((-0.44, 0.0), (0.55, 0.012), (0.22, 0.055), (-0.08, 0.075), (-0.42, 0.06))),  # belly
    (0.95, ((-0.02, -0.10), (0.20, -0.065), (0.55, 0.012), (0.20, -0.045), (-0.02, -0.08))),  # sunlit back
    (0.12, ((0.03, -0.095), (0.10, -0.118), (0.19, -0.095), (0.27, -0.05), (0.10, -0.062))),  # canopy
    (0.62, ((-0.34, 0.02), (0.10, 0.025), (-0.26, 0.20), (-0.50, 0.22), (-0.43, 0.10))),  # near wing
    (0.34, ((-0.43, 0.10), (-0.50, 0.22), (-0.26, 0.20), (-0.245, 0.185), (-0.46, 0.195))),  # its edge
    (0.22, ((-0.36, -0.03), (0.16, -0.025), (0.16, -0.017), (-0.36, -0.018))),  # seam
)


def paint_space(canvas: Canvas, things: frozenset[str], layout: np.random.Generator) -> None:
    """Everything from the far to the near; what `things` does not name is not painted."""
    sky, cloud, veil, bright, deep, glow = (color(text) for text in SKIES[layout.integers(len(SKIES))])
    nebula(canvas, sky, cloud, veil)
    stars(canvas, 0.0012)
    mirrored = -1 if layout.random() < 0.5 else 1
    if "planet" in things:
        place = (0.5 + mirrored * layout.uniform(0.12, 0.24), layout.uniform(0.30, 0.40))
        planet(canvas, place, layout.uniform(0.18, 0.24), mirrored, bright, deep)
    if "spacecraft" in things:
        place = (0.5 - mirrored * layout.uniform(0.02, 0.10), layout.uniform(0.62, 0.72))
        spacecraft(canvas, place, layout.uniform(0.44, 0.52), mirrored, glow)


def nebula(canvas: Canvas, sky: Field, cloud: Field, veil: Field) -> None:
    """Two veils of gas; one noise shifts where the other is read, which draws it out into threads."""
    canvas.pixels[:] = sky
    shift = ((canvas.noise(3, 5) - 0.5) * canvas.side * 0.45).astype(np.intp)
    rows = mirrored_inside(np.arange(canvas.height)[:, None] + shift, canvas.height)
    columns = mirrored_inside(np.arange(canvas.width)[None, :] - shift, canvas.width)
    gas = canvas.noise(2, 8)
    threads = 0.6 * gas + 0.4 * gas[rows, columns]
    canvas.shine(cloud, smooth(0.36, 0.85, threads) * np.float32(1.4))
    canvas.shine(veil, smooth(0.46, 0.85, threads) * smooth(0.35, 0.7, canvas.noise(2, 4)))
    canvas.pixels *= (0.45 + 0.55 * smooth(0.68, 0.38, canvas.noise(4, 7)))[..., None]  # lanes of dust


def mirrored_inside(places: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Places beyond an edge, folded back, so that no seam shows."""
    folded = size - 1 - np.abs(size - 1 - np.abs(places))
    return np.asarray(np.clip(folded, 0, size - 1), np.intp)


def stars(canvas: Canvas, share: float) -> None:
    """Faint ones as single pixels, a few bright ones with a cross of light."""
    many = canvas.texture.random((canvas.height, canvas.width), dtype=np.float32)
    white = np.ones(3, np.float32)
    canvas.shine(white, np.where(many < share, (many / np.float32(share)) ** 2, 0).astype(np.float32))
    for _ in range(9):
        right, down = canvas.offset(canvas.texture.random(), canvas.texture.random())
        size = canvas.texture.uniform(0.0015, 0.004)
        core = np.exp(-(np.hypot(right, down) / size))
        cross = np.exp(-np.abs(right) / (6 * size) - np.abs(down) / (size * 0.4))
        cross = cross + np.exp(-np.abs(down) / (6 * size) - np.abs(right) / (size * 0.4))
        canvas.shine(white, core + cross * np.float32(0.6))


def planet(canvas: Canvas, place: Point, radius: float, sun: int, bright: Field, deep: Field) -> None:
    """A ball with bands of cloud, lit from one side, air glowing at its rim, and a ring around it."""
    right, down = canvas.offset(*place)
    away = np.hypot(right, down) / np.float32(radius)
    toward = np.sqrt(np.clip(1 - away**2, 0, 1))
    light = np.clip((-0.62 * sun * right - 0.5 * down) / radius + 0.6 * toward, 0, 1)
    wind = (canvas.noise(5, 5) - 0.5) * np.float32(0.35)
    bands = 0.5 + 0.5 * np.sin((down + 0.22 * right * sun) / radius * 7.5 + wind * 14)
    surface = blend(deep, bright, (0.25 + 0.6 * bands + wind)[..., None])
    disc = smooth(1, 1 - 2 / (radius * canvas.side), away)
    canvas.lay(surface * (light**0.8 * 1.45 + 0.015)[..., None], disc)
    lit_side = np.clip(0.5 - (0.6 * sun * right + 0.45 * down) / radius, 0, 1)
    canvas.shine(blend(bright, np.ones(3, np.float32), 0.3), disc * away**7 * lit_side * np.float32(0.55))
    canvas.shine(bright, (1 - disc) * np.exp(-np.clip(away - 1, 0, 9) * 9) * lit_side * np.float32(0.55))

    across, along = right * 0.94 + down * 0.34 * sun, down * 0.94 - right * 0.34 * sun
    orbit = np.hypot(across, along / 0.2) / np.float32(radius)
    grooves = 0.55 + 0.3 * np.sin(orbit * 46) + 0.15 * np.sin(orbit * 113)
    ring = smooth(1.32, 1.38, orbit) * smooth(2.05, 1.98, orbit) * grooves
    in_shadow = smooth(0.25, 0.0, np.abs(along)) * smooth(1.1, 0.9, away)
    front = np.where(along > 0, 1.0, 1 - disc).astype(np.float32)
    canvas.lay(blend(bright, np.full(3, 0.95, np.float32), 0.45), ring * front * (1 - 0.35 * in_shadow) * 0.8)


def spacecraft(canvas: Canvas, place: Point, length: float, facing: int, glow: Field) -> None:
    """The craft `length` short sides long, flying to the right (`facing` 1) or left (-1), engines burning."""
    climb = -0.20
    cosine, sine = math.cos(climb), math.sin(climb)
    scale = length * canvas.side

    def turned(points: tuple[Point, ...]) -> list[Point]:
        return [
            (
                place[0] * canvas.width + facing * (x * cosine - y * sine) * scale,
                place[1] * canvas.height + (x * sine + y * cosine) * scale,
            )
            for x, y in points
        ]

    right, down = canvas.offset(*place)
    ahead = (right * facing * cosine + down * sine) / np.float32(length)
    below = (down * cosine - right * facing * sine) / np.float32(length)
    behind = np.clip(-0.50 - ahead, 0, 9)
    flame = np.exp(-behind / 0.16) * smooth(-0.47, -0.53, ahead)
    for nozzle in (-0.025, 0.03):
        jet = np.exp(-(((below - nozzle) / (0.014 + 0.05 * behind)) ** 2)) * flame
        canvas.shine(glow, jet * np.float32(3))
    canvas.shine(glow, np.exp(-np.hypot(ahead + 0.53, below) / 0.055) * np.float32(1.8))

    steel = color("#c3cfe2")

    pen = Pen(canvas.width, canvas.height)
    for lightness, outline in SPACECRAFT:
        pen.polygon(turned(outline), blend(glow, steel, 0.85) * np.float32(lightness))
    pen.line(turned(((0.06, -0.100), (0.11, -0.110), (0.19, -0.088))), glow, scale / 130)
    pen.line(turned(((-0.40, 0.115), (-0.02, 0.055))), glow * np.float32(0.9), scale / 130)
    for window in range(7):
        x = -0.28 + 0.055 * window
        pen.polygon(turned(((x, -0.06), (x + 0.022, -0.06), (x + 0.022, -0.048), (x, -0.048))), glow)
    for y in (-0.035, 0.015):
        pen.polygon(turned(((-0.545, y), (-0.525, y), (-0.525, y + 0.028), (-0.545, y + 0.028))), glow)
    panels = 0.85 + 0.3 * np.floor(canvas.noise(14, 1, 3) * 6) / 6
    canvas.draw(pen, (panels * (0.72 + 0.45 * smooth(-0.5, 0.45, ahead)))[..., None])
