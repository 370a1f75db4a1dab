"""Scenes on land and water: an hour's sky, mountains or dunes or a city, a lake or sea, and what stands in front."""

from dataclasses import dataclass

import numpy as np

from sandbox.canvas import Canvas, Field, Pen, Point, blend, color, smooth
from sandbox.cosmos import spacecraft, stars

#: The hour: sky above, sky at the horizon, the sun or moon.
SKIES = {
    "neon": ("#0b0524", "#b31d86", "#6df3ff"),
    "night": ("#050a1f", "#2a4674", "#e9f0ff"),
    "sunset": ("#2c2a66", "#f7925a", "#ffdf9c"),
    "snow": ("#5f8ec4", "#eaf2fb", "#ffffff"),
    "desert": ("#4a8cc4", "#fbe2b8", "#fff3cc"),
    "autumn": ("#6f93b3", "#f8e2bf", "#fff1c9"),
    "day": ("#3277c2", "#d3ebf8", "#fff8de"),
}
#: The land: far away, near by.
LANDS = {
    "snow": ("#8fa9c8", "#2c4766"),
    "desert": ("#e2ab6c", "#a85f2c"),
    "autumn": ("#c98745", "#4a2010"),
    "city": ("#6d7fa0", "#151b2e"),
    "trees": ("#7fa58c", "#12301f"),
    "water": ("#6d9fae", "#163f4c"),
    "plain": ("#86a7b4", "#24443a"),
}


@dataclass(frozen=True)
class Scene:
    """What the painting steps below agree on; places are shares of width and height."""

    things: frozenset[str]
    top: Field
    haze: Field
    light: Field
    far: Field
    near: Field
    dark: bool
    horizon: float
    sun: Point


def paint_land(canvas: Canvas, things: frozenset[str], layout: np.random.Generator) -> None:
    """Everything from the far to the near: what comes later covers what came before."""
    scene = plan(things, layout)
    sky(canvas, scene)
    if "spacecraft" in things:
        spacecraft(canvas, (layout.uniform(0.4, 0.6), 0.25), 0.3, 1, scene.light)
    if "desert" in things:
        dunes(canvas, scene, layout)
    elif "city" not in things:
        ranges(canvas, scene, layout)
    if "city" in things:
        city(canvas, scene, layout)
    if "water" in things:
        water(canvas, scene)
    foreground(canvas, scene, layout)


def plan(things: frozenset[str], layout: np.random.Generator) -> Scene:
    hour = next((name for name in SKIES if name in things), "day")
    place = next((name for name in LANDS if name in things), "plain")
    top, haze, light = (color(text) for text in SKIES[hour])
    far, near = (color(text) for text in LANDS[place])
    dark = hour in ("night", "neon")
    if dark or hour == "sunset":  # the land takes on the colour of the sky when the sun is low
        far, near = blend(far, haze, 0.45) * np.float32(0.7), blend(near, top, 0.55) * np.float32(0.5)
    horizon = layout.uniform(0.58, 0.64) if "water" in things else layout.uniform(0.60, 0.68)
    height = layout.uniform(0.68, 0.86) if hour == "sunset" else layout.uniform(0.24, 0.42)
    sun = (layout.uniform(0.22, 0.78), horizon * height)
    return Scene(things, top, haze, light, far, near, dark, horizon, sun)


def sky(canvas: Canvas, scene: Scene) -> None:
    rise = smooth(0, scene.horizon, canvas.v)[..., None] ** np.float32(1.2)
    canvas.pixels[:] = blend(scene.top, scene.haze, rise)
    if scene.dark:
        stars(canvas, 0.0015)
    away = np.hypot(*canvas.offset(*scene.sun))
    radius = 0.05 if scene.dark else 0.06
    halo = np.exp(-((away / 0.14) ** 1.1)) * (0.35 if scene.dark else 0.6)
    canvas.shine(scene.light, halo + np.exp(-((away / 0.5) ** 2)) * 0.15)
    canvas.lay(scene.light, smooth(radius, radius - 2 / canvas.side, away))
    if "clouds" in scene.things or not scene.dark:
        clouds(canvas, scene)


def clouds(canvas: Canvas, scene: Scene) -> None:
    """Noise drawn out sideways, thinner toward the horizon, lit from above."""
    shape = canvas.noise(3, 6, 2.8)
    cover = smooth(0.50, 0.72, shape) * smooth(scene.horizon, 0.15, canvas.v) * np.float32(0.8)
    under = smooth(0.5, 0.85, np.roll(shape, -canvas.side // 40, axis=0))
    tint = blend(scene.light, scene.haze, 0.45) * np.float32(0.45 if scene.dark else 1.0)
    canvas.lay(tint * (1.06 - 0.3 * under)[..., None], cover)


def skyline(canvas: Canvas, layout: np.random.Generator, cells: int, roughness: float) -> Field:
    """A line of hills, one height (0 to 1) a column; `roughness` from 0.25 (dunes) to 0.55 (crags)."""
    height = np.zeros(canvas.width)
    for octave in range(8):
        knots = layout.random((cells << octave) + 2)
        place = canvas.u[0] * (cells << octave)
        left = place.astype(np.intp)
        part = smooth(0, 1, place - left) if roughness < 0.4 else place - left
        height += roughness**octave * (knots[left] * (1 - part) + knots[left + 1] * part)
    return np.asarray((height - height.min()) / (height.max() - height.min()), np.float32)


def ranges(canvas: Canvas, scene: Scene, layout: np.random.Generator) -> None:
    """Mountains or hills in five rows, each paler the farther it is, with mist at its foot."""
    high = "mountains" in scene.things
    rows = 2 if "water" in scene.things and not high else 5
    for row in range(rows):
        nearness = (row + 1) / rows
        foot = scene.horizon if "water" in scene.things else scene.horizon + 0.30 * nearness**1.5
        size = (0.34 if high else 0.10) * (1 - 0.6 * nearness)
        line = foot - size * (skyline(canvas, layout, 3 + row, 0.48 if high else 0.34) - 0.1)
        depth = canvas.v - line[None, :]
        paint = blend(blend(scene.far, scene.near, nearness), scene.haze, 0.5 * (1 - nearness))
        relief = canvas.noise(9, 6)
        toward_sun = 1 if scene.sun[0] > 0.5 else -1
        below, aside = (np.diff(relief, axis=axis, append=relief.take([-1], axis)) for axis in (0, 1))
        slope = np.clip((below + aside * toward_sun) * (canvas.side / 25), -1, 1)
        face: Field = paint * (1 + 0.30 * slope)[..., None]
        if high and ("snow" in scene.things or row == 0):
            white = smooth(0.03, -0.01, depth - 0.3 * size + 0.35 * (relief - 0.5)) * (1 - 0.7 * nearness)
            face = blend(face, blend(scene.light, scene.haze, 0.35) * (1 + 0.35 * slope)[..., None], white[..., None])
        mist = smooth(0, 0.26, depth) * (0.45 * (1 - nearness))
        canvas.lay(blend(face, scene.haze, mist[..., None]), smooth(-1 / canvas.height, 1 / canvas.height, depth))


def dunes(canvas: Canvas, scene: Scene, layout: np.random.Generator) -> None:
    """Four crests; of each, the side turned to the sun is lit and the other lies in shadow."""
    ripples = canvas.noise(10, 5, 7)
    for row in range(4):
        nearness = (row + 1) / 4
        line = scene.horizon + 0.26 * nearness**1.4 - (0.10 + 0.10 * nearness) * skyline(canvas, layout, 2, 0.28)
        depth = canvas.v - line[None, :]
        bend = 0.5 * (canvas.v - scene.horizon)  # the crest's edge runs down the dune at a slant
        wide = canvas.width // 14
        climb = np.convolve(np.diff(line, append=line[-1]), np.ones(wide) / wide, "same") * canvas.width
        leaning = np.interp(canvas.u + bend, canvas.u[0], climb).astype(np.float32)
        lit = smooth(-0.18, 0.18, leaning * (-1 if scene.sun[0] > 0.5 else 1))
        paint = blend(blend(scene.far, scene.near, 0.25 + 0.6 * nearness), scene.haze, 0.35 * (1 - nearness))
        shade = 0.62 + 0.5 * lit + 0.25 * (ripples - 0.5) * nearness - 0.5 * np.clip(depth, 0, 0.3)
        canvas.lay(paint * shade[..., None], smooth(-1 / canvas.height, 1 / canvas.height, depth))


def city(canvas: Canvas, scene: Scene, layout: np.random.Generator) -> None:
    """Three rows of towers, haze between the rows."""
    for row in range(3):
        nearness = (row + 1) / 3
        foot = scene.horizon + (0 if "water" in scene.things else 0.08 * nearness + 0.03)
        pen = Pen(canvas.width, canvas.height)
        left = -layout.uniform(0, 0.05) * canvas.side
        while left < canvas.width:
            wide = canvas.side * layout.uniform(0.035, 0.09) * (0.6 + 0.6 * nearness)
            tall = canvas.height * layout.uniform(0.08, 0.36) * (1.15 - 0.4 * nearness)
            tall *= 1.45 if layout.random() < 0.15 else 1
            bottom = canvas.height * (foot if "water" in scene.things else 1)
            tower(pen, scene, layout, nearness, (left, canvas.height * foot - tall, left + wide, bottom), canvas.side)
            left += wide + layout.uniform(0, 0.012) * canvas.side
        canvas.draw(pen)
        fog = np.exp(-(((canvas.v - foot) / 0.12) ** 2)) * (0.45 * (1 - nearness)) * np.ones_like(canvas.u)
        canvas.lay(scene.haze, fog)


def tower(
    pen: Pen,
    scene: Scene,
    layout: np.random.Generator,
    nearness: float,
    walls: tuple[float, float, float, float],
    side: int,
) -> None:
    """A tower between `walls` (left, top, right, bottom), some of its windows lit."""
    left, top, right, bottom = walls
    lamps = (scene.light, blend(scene.light, color("#ffc46b"), 0.7), blend(scene.haze, color("#ff5ad0"), 0.4))
    paint = blend(blend(scene.far, scene.near, nearness), scene.haze, 0.35 * (1 - nearness))
    pen.box(left, top, right, bottom, paint)
    if layout.random() < 0.3:
        middle = (left + right) / 2
        pen.line([(middle, top - 0.6 * (right - left)), (middle, top)], paint, side / 300)
    step = side / 75
    across, down = max(1, int((right - left) / step) - 1), int(min(bottom - top, side * 0.7) / step / 1.2)
    lit = layout.random((across, down)) < (0.45 if scene.dark else 0.25)
    for column, story in np.argwhere(lit).tolist():
        lamp = blend(paint, lamps[layout.integers(3)], layout.uniform(0.35, 1) * (0.4 + 0.6 * nearness))
        x, y = left + (column + 0.75) * step, top + (story + 0.6) * step * 1.2
        pen.box(x, y, x + step * 0.5, y + step * 0.55, lamp)


def water(canvas: Canvas, scene: Scene) -> None:
    """What stands above the horizon, mirrored and rippled, darker with nearness, and the sun's path on it."""
    shore = int(scene.horizon * canvas.height)
    near = (np.arange(canvas.height - shore, dtype=np.float32) / (canvas.height - shore))[:, None]
    ripples = canvas.noise(16, 5, 9)[shore:] - 0.5
    mirrored = np.clip(shore - 1 - near * shore * 0.85 - ripples * near * shore * 0.25, 0, shore - 1)
    sideways = np.arange(canvas.width) + ripples * (0.02 + 0.1 * near) * canvas.side
    reflection = canvas.pixels[mirrored.astype(np.intp), np.clip(sideways, 0, canvas.width - 1).astype(np.intp)]
    depth = blend(scene.near, scene.top, 0.5)
    surface = blend(reflection * np.float32(0.9), depth, (0.12 + 0.42 * near + 0.5 * ripples)[..., None])
    path = np.exp(-(((canvas.u - scene.sun[0]) / (0.035 + 0.10 * near)) ** 2)) * np.clip(ripples * 6, 0, 1)
    canvas.pixels[shore:] = surface + scene.light * (path * 0.75)[..., None]


def foreground(canvas: Canvas, scene: Scene, layout: np.random.Generator) -> None:
    """What stands in front, as shapes against the light."""
    ink = scene.near * np.float32(0.45)
    glow = blend(scene.light, color("#ffb84a"), 0.6)
    shore = canvas.height * scene.horizon
    unit = canvas.side * 0.08
    side = layout.choice([-1.0, 1.0])
    aside = (0.5 + side * layout.uniform(0.24, 0.34)) * canvas.width
    middle = (0.5 - side * layout.uniform(0.02, 0.16)) * canvas.width

    pen = Pen(canvas.width, canvas.height)
    if "birds" in scene.things:
        birds(pen, canvas, shore, ink, layout)
    if "lighthouse" in scene.things:
        lighthouse(pen, aside, shore + unit * 0.5, unit, ink, scene)
    if "boat" in scene.things:
        boat(pen, middle, shore + unit * 1.5, unit * 0.9, ink, scene)
    if "trees" in scene.things:
        trees(pen, canvas, scene, layout)
    if "cabin" in scene.things:
        ground = shore + unit * (0.3 if "water" in scene.things else 2.8)
        cabin(pen, aside, ground, unit, ink, glow)
    canvas.draw(pen)
    if "lighthouse" in scene.things and "water" in scene.things:
        beam(canvas, (aside / canvas.width, (shore - unit * 3.4) / canvas.height), glow)


def birds(pen: Pen, canvas: Canvas, shore: float, ink: Field, layout: np.random.Generator) -> None:
    for _ in range(7):
        x, y = layout.uniform(0.1, 0.9) * canvas.width, layout.uniform(0.15, 0.7) * shore
        wing = canvas.side * layout.uniform(0.009, 0.02)
        pen.line([(x + wing * a, y + wing * b) for a, b in ((-1, -0.4), (-0.4, -0.3), (0, 0.1))], ink, wing * 0.16)
        pen.line([(x + wing * a, y + wing * b) for a, b in ((0, 0.1), (0.4, -0.3), (1, -0.4))], ink, wing * 0.16)


def lighthouse(pen: Pen, x: float, y: float, unit: float, ink: Field, scene: Scene) -> None:
    """A striped tower on a rock; (x, y) is the foot of the rock, `unit` about half the tower's width."""
    rock = [(-3.2, 0.1), (-2.4, -0.35), (-1.5, -0.5), (-0.8, -0.85), (0.9, -0.8), (1.7, -0.45), (2.3, -0.4), (3.2, 0.1)]
    pen.polygon([(x + a * unit, y + b * unit) for a, b in rock], ink)
    white = scene.light * np.float32(0.45 if scene.dark else 0.92)
    red = color("#b5342c") * np.float32(0.45 if scene.dark else 1.0)
    foot = y - 0.75 * unit
    for stripe in range(6):
        wide, narrow = (0.48 - 0.035 * step for step in (stripe, stripe + 1))
        low, high = foot - stripe * 0.5 * unit, foot - (stripe + 1) * 0.5 * unit
        corners = [(x - wide * unit, low), (x + wide * unit, low), (x + narrow * unit, high), (x - narrow * unit, high)]
        pen.polygon(corners, white if stripe % 2 else red)
    head = foot - 3.0 * unit
    pen.box(x - 0.4 * unit, head - 0.08 * unit, x + 0.4 * unit, head, ink)
    pen.box(x - 0.2 * unit, head - 0.45 * unit, x + 0.2 * unit, head - 0.08 * unit, color("#fff3c0"))
    roof = [(-0.32, -0.43), (0.0, -0.8), (0.32, -0.43)]
    pen.polygon([(x + a * unit, head + b * unit) for a, b in roof], ink)


def beam(canvas: Canvas, lamp: Point, glow: Field) -> None:
    right, down = canvas.offset(*lamp)
    reach = np.abs(right) + 0.02
    ray = np.exp(-(((down - 0.12 * right) / (0.012 + 0.11 * reach)) ** 2)) * np.exp(-reach / 0.35)
    canvas.shine(glow, ray * 0.35 + np.exp(-np.hypot(right, down) / 0.02) * 0.9)


def boat(pen: Pen, x: float, y: float, unit: float, ink: Field, scene: Scene) -> None:
    hull = [(-1.05, -0.02), (1.15, -0.08), (0.75, 0.32), (-0.75, 0.32)]
    main = [(-0.04, -0.12), (-0.04, -2.0), (0.35, -1.1), (0.9, -0.16)]
    jib = [(-0.16, -0.12), (-0.12, -1.75), (-0.95, -0.14)]
    for outline, paint in (
        (hull, ink),
        (main, blend(scene.light, scene.haze, 0.15)),
        (jib, blend(scene.light, scene.haze, 0.6) * np.float32(0.85)),
    ):
        pen.polygon([(x + a * unit, y + b * unit) for a, b in outline], paint)


def trees(pen: Pen, canvas: Canvas, scene: Scene, layout: np.random.Generator) -> None:
    """Two rows of firs; at a lake, the near row leaves the middle open."""
    lake = "water" in scene.things
    for row in range(2):
        for place in np.sort(layout.uniform(-0.03, 1.03, 20 + 10 * row)):
            tall = canvas.side * layout.uniform(0.12, 0.28) * (0.55 + 0.6 * row)
            foot = scene.horizon + (0.01 if lake and not row else 0.19 + 0.18 * row + 0.2 * lake)
            tint = blend(scene.near, scene.far, 0.28 * (1 - row)) * (layout.uniform(0.5, 0.8) + 0.25 * (1 - row))
            if not (lake and 0.2 < place < 0.8) or (not row and abs(place - 0.5) > 0.2):
                fir(pen, place * canvas.width, foot * canvas.height, tall * (1.2 if lake and row else 1), tint)


def fir(pen: Pen, x: float, foot: float, tall: float, tint: Field) -> None:
    pen.box(x - tall * 0.02, foot - tall * 0.2, x + tall * 0.02, foot + tall * 0.05, tint * np.float32(0.7))
    for tier in range(6):
        low, half = foot - tall * (0.08 + 0.15 * tier), tall * 0.25 * (1 - tier / 6.6)
        left = [(x, low - tall * 0.3), (x - half, low), (x - half * 0.4, low - tall * 0.03)]
        right = [(x + half * 0.4, low - tall * 0.03), (x + half, low)]
        pen.polygon(left + right, tint * np.float32(0.9 + 0.03 * tier))


def cabin(pen: Pen, x: float, ground: float, unit: float, ink: Field, glow: Field) -> None:
    pen.box(x - unit, ground - 1.0 * unit, x + unit, ground + 0.1 * unit, ink)
    roof = [(-1.35, -0.9), (-0.7, -1.85), (0.7, -1.85), (1.35, -0.9)]
    pen.polygon([(x + a * unit, ground + b * unit) for a, b in roof], ink * np.float32(0.6))
    pen.box(x + 0.35 * unit, ground - 2.25 * unit, x + 0.6 * unit, ground - 1.6 * unit, ink * np.float32(0.6))
    for left in (-0.65, 0.3):
        pen.box(x + left * unit, ground - 0.72 * unit, x + (left + 0.36) * unit, ground - 0.34 * unit, glow)
