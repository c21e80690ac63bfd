"""Generate the embedded demo set: small scenes whose layout shows where in the picture a patch comes from.

    python data/demo/make_demo.py              # rewrites the tars of pictures and of masks in this folder

Rows differ by the gradient of the sky, the horizon, and a ground that becomes coarser towards the viewer.
Columns differ by the sun in the upper left, faces lit from the left, shadows that fall to the right, and
light that fades to the right. So two hundred pictures suffice to learn both tasks: filling in removed
patches, and naming the cell of visible ones.

Every picture has its own seed (split, class, number), so the tars are byte-identical in every run.
Another version of Pillow or libjpeg may draw or compress a few pixels differently. The bytes then change,
but not the scenes.

Opaque strokes also leave their label on a second canvas, which becomes a mask for semantic segmentation.

Lengths are in final pixels (x to the right, y down, 0..64). Drawing happens at 4x and is averaged
down at the end.
"""

import argparse
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, ...]
Point = tuple[float, float]

# Pixels of a side, and the factor of oversampling.
SIDE = 64
K = 4
PER_CLASS = {"train": 20, "val": 5}
# A tar member takes a 512-byte header and whole 512-byte blocks, so a picture of two blocks wastes nothing.
JPEG_BYTES = 1024
# What a mask's values 0, 1, ... mean. An object is what the class is named after; trees have their own label.
LABELS = ("sky", "hills", "ground", "water", "wall", "floor", "object", "tree")
# The value of pixels on borders, where no label prevails. Segmentation ignores 255 by custom.
BORDER = 255
# Colours of the zenith, the horizon and the sunlight, for several times of day. The sky is the largest cue
# for the row.
SKIES = [
    ((52, 112, 196), (190, 219, 240), (255, 248, 220)),
    ((84, 142, 208), (232, 228, 208), (255, 238, 190)),
    ((70, 84, 150), (250, 190, 140), (255, 205, 130)),
    ((60, 52, 108), (238, 140, 120), (255, 176, 120)),
    ((112, 130, 150), (205, 210, 212), (240, 240, 235)),
    ((36, 88, 140), (176, 222, 214), (250, 250, 225)),
]
GRASS = [(114, 156, 60), (140, 164, 70), (90, 142, 74), (168, 160, 80), (98, 134, 54)]
PAINT = [
    (206, 52, 44),
    (232, 174, 46),
    (46, 108, 190),
    (232, 226, 210),
    (70, 150, 120),
    (176, 84, 146),
    (228, 114, 52),
    (92, 98, 116),
]
WOOD = [(176, 112, 62), (200, 152, 98), (128, 80, 52)]
GLASS = (196, 220, 232)
DARK = (30, 28, 32)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Interpolate from colour a (t = 0) to colour b (t = 1)."""
    return tuple(int(p + (q - p) * t) for p, q in zip(a, b))


class Scene:
    """A canvas at 4x, and the strokes that the classes share. Light always comes from the upper left.

    Opaque strokes leave their label on a second canvas. Shadows, light and translucent strokes leave none.
    """

    def __init__(self, rng: Random):
        self.rng = rng
        self.image = Image.new("RGB", (SIDE * K, SIDE * K))
        self.labels = Image.new("L", self.image.size)
        self.means("sky")
        self.zenith, self.haze, self.sun = rng.choice(SKIES)
        self.y, self.x = np.mgrid[0 : SIDE * K, 0 : SIDE * K] / K
        noise = Image.fromarray(
            np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (64, 64), np.uint8)
        )
        self.noise = np.asarray(noise.resize((1024, 1024), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
        self.place()

    def place(self, x: float = 0.0, y: float = 0.0, size: float = 1.0) -> None:
        """Make later strokes relative to an object that stands on (x, y) and has this size."""
        self.origin = (x, y)
        self.size = size

    def means(self, label: str, where: np.ndarray | None = None) -> None:
        """Give later strokes this label. The part of the canvas where (H, W) is true gets it at once."""
        self.label = LABELS.index(label)
        if where is not None:
            self.labels.paste(self.label, (0, 0), Image.fromarray(where))

    def pixels(self, points: Sequence[Point]) -> list[Point]:
        """Points of the current object -> points of the canvas."""
        return [
            ((self.origin[0] + self.size * x) * K, (self.origin[1] + self.size * y) * K) for x, y in points
        ]

    def tone(self, colour: Colour, factor: float) -> Colour:
        """A colour in more light (factor > 1, towards sunlight) or less light (< 1, towards black)."""
        if factor <= 1:
            return mix((0, 0, 0), colour, factor)
        return mix(colour, self.sun, factor - 1)

    # -- strokes
    # -------------------------------------------------------------------------------------------------------
    def stroke(self, shape: str, points: Sequence[Point], colour: Colour, *rest: int) -> None:
        """Draw a shape of ImageDraw, and leave the current label if the colour is opaque."""
        corners = self.pixels(points)
        getattr(ImageDraw.Draw(self.image, "RGBA"), shape)(corners, colour, *rest)
        if len(colour) == 3:
            getattr(ImageDraw.Draw(self.labels), shape)(corners, self.label, *rest)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """A filled polygon. A fourth value of the colour is its opacity, 0 to 255."""
        self.stroke("polygon", points, colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A filled rectangle from (x0, y0) to (x1, y1)."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse around (x, y)."""
        self.stroke("ellipse", [(x - rx, y - ry), (x + rx, y + ry)], colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line through the points, at least one pixel of the canvas wide."""
        self.stroke("line", points, colour, max(1, round(width * self.size * K)))

    def ball(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An oval that becomes lighter towards the upper left."""
        for t in np.linspace(0, 1, 7):
            self.oval(
                x - 0.32 * rx * t,
                y - 0.32 * ry * t,
                rx * (1 - 0.72 * t),
                ry * (1 - 0.72 * t),
                self.tone(colour, 0.62 + 0.68 * t),
            )

    def barrel(self, y0: float, w0: float, y1: float, w1: float, colour: Colour, light: float = 1.3) -> None:
        """An upright round body around x = 0, of half-width w0 at y0 and w1 at y1, darker to the right."""
        for t in np.linspace(-1, 0.72, 7):
            self.polygon(
                [(w0 * t, y0), (w0, y0), (w1, y1), (w1 * t, y1)], self.tone(colour, light - 0.38 * (t + 1))
            )

    def shadow(self, points: Sequence[Point], strength: float = 0.5, blur: float = 0.7) -> None:
        """Darken a part of the ground, with soft edges."""
        # A dark blue, as the sky lights what the sun does not reach.
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self.pixels(points), fill=int(255 * strength))
        self.image.paste((18, 22, 40), (0, 0), mask.filter(ImageFilter.GaussianBlur(blur * K)))

    def cast(self, x0: float, x1: float, height: float) -> None:
        """The shadow of an upright object from x0 to x1. It falls to the right and towards the viewer."""
        reach = 0.75 * height
        low = 0.2 * height
        self.shadow([(x0, 0), (x1, -0.6), (x1 + reach, low - 1), (x0 + reach, low + 1.5)])

    def blend(self, colour: Colour, alpha: np.ndarray) -> None:
        """Lay a colour over the canvas with an opacity (H, W) in [0, 1]."""
        layer = Image.fromarray(np.clip(np.round(alpha * 255), 0, 255).astype(np.uint8))
        self.image.paste(colour, (0, 0), layer)

    # -- backgrounds
    # ---------------------------------------------------------------------------------------------------
    def sky(self, horizon: float) -> None:
        """A gradient from zenith to horizon, the sun in the upper left, up to three clouds to its right."""
        rng = self.rng
        self.means("sky")
        self.blend(self.zenith, self.y * 0 + 1)
        self.blend(self.haze, np.clip(self.y / horizon, 0, 1) ** 1.3)
        x = rng.uniform(5, 15)
        y = rng.uniform(5, 0.42 * horizon)
        self.blend(self.sun, 0.85 * np.exp(-np.hypot(self.x - x, self.y - y) / 12))
        self.oval(x, y, 2.6, 2.6, mix(self.sun, (255, 255, 255), 0.7))
        for _ in range(rng.randint(0, 3)):
            x = rng.uniform(24, 60)
            y = rng.uniform(4, 0.55 * horizon)
            puffs = [(x + rng.uniform(-5, 5), rng.uniform(1.2, 2.6)) for _ in range(5)]
            for dy, colour in ((0.7, mix(self.haze, self.zenith, 0.45)), (0, mix(self.haze, self.sun, 0.8))):
                for px, r in puffs:
                    self.oval(px, y + dy - 0.3 * r, 1.6 * r, 0.75 * r, colour)

    def hills(self, horizon: float, height: float) -> None:
        """Two waves of hills on the horizon, the far one paler."""
        self.means("hills")
        colour = self.rng.choice(GRASS)
        phase = self.rng.uniform(0, 6)
        wave = self.rng.uniform(0.06, 0.12)
        for depth in (0, 1):
            top = [
                (
                    x,
                    horizon
                    - height * (1 - 0.45 * depth) * (0.55 + 0.45 * np.sin(wave * x + phase + 2.4 * depth)),
                )
                for x in range(0, SIDE + 1, 2)
            ]
            self.polygon(
                [(0, horizon + 1), *top, (SIDE, horizon + 1)], mix(colour, self.haze, 0.62 - 0.3 * depth)
            )

    def ground(self, horizon: float, colour: Colour, grain: float = 0.42, stretch: float = 1.0) -> None:
        """A plane in perspective, with a texture that is fine at the horizon and coarse at the lower edge."""
        # `near` is 0 at the horizon and 1 at the lower edge.
        below = self.y >= horizon
        self.means("ground", below)
        near = np.clip((self.y - horizon) / (SIDE - horizon), 0, 1)
        self.blend(mix(colour, self.haze, 0.45), below)
        self.blend(mix(colour, (0, 0, 0), 0.08), below * near**0.6)
        # Distance along the plane; the constant keeps the horizon finite.
        depth = 1 / (near + 0.12)
        u = (self.x - 32) * depth * 0.25 / stretch + 500
        v = depth * 5
        # The texture repeats after its 1024 pixels.
        grains = (
            self.noise[(v * 16).astype(int) % 1024, (u * 16).astype(int) % 1024]
            * below
            * grain
            * (0.25 + near)
        )
        self.blend((12, 16, 22), np.maximum(-grains, 0))
        self.blend(self.sun, np.maximum(grains, 0) * 0.8)

    def water(self, horizon: float, colour: Colour) -> None:
        """A ground with waves, which reflects the sky and the sun."""
        self.ground(horizon, mix(colour, self.zenith, 0.4), grain=0.55, stretch=4)
        self.means("water", self.y >= horizon)
        # A path of light below the sun that widens towards the viewer.
        glitter = np.exp(-(((self.x - 10) / (4 + 0.2 * np.abs(self.y - horizon))) ** 2))
        self.blend(self.sun, 0.55 * glitter * (self.y >= horizon))

    def room(self, floor: float) -> None:
        """A wall, a window in the upper left, floor boards towards the viewer, a patch of light on them."""
        rng = self.rng
        wall = self.rng.choice([(222, 204, 170), (180, 198, 188), (206, 180, 186), (166, 186, 214)])
        self.means("wall", self.y < floor)
        self.blend(wall, self.y * 0 + 1)
        self.blend(
            mix(wall, (0, 0, 0), 0.5),
            np.clip(self.x / SIDE * 0.75 + 0.35 * (1 - self.y / floor) - 0.15, 0, 1),
        )
        self.box(0, floor - 2, SIDE, floor, mix(wall, (0, 0, 0), 0.35))
        self.ground(floor, rng.choice(WOOD), grain=0.15)
        self.means("floor", self.y >= floor)
        for x in range(-150, 215, 14):
            self.line([(32 + (x - 32) * 0.35, floor), (x, SIDE)], 0.35, (40, 24, 14, 130))
        x = rng.uniform(4, 8)
        y = rng.uniform(5, 9)
        w = rng.uniform(6, 7.5)
        h = rng.uniform(7, 9)
        self.shadow(
            [(x + w, y), (x + 2 * w + 4, y + 2), (x + 2 * w + 4, y + 2 * h + 3), (x, y + 2 * h + 3)], 0.3
        )
        # What lies behind the panes belongs to the wall.
        self.means("wall")
        self.box(x - 1, y - 1, x + 2 * w + 2, y + 2 * h + 2, (240, 236, 224))
        for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
            self.box(
                x + i * (w + 1),
                y + j * (h + 1),
                x + i * (w + 1) + w,
                y + j * (h + 1) + h,
                mix(self.zenith, self.haze, 0.3 + 0.5 * j),
            )
        self.polygon(
            [(x + 6, floor + 2), (x + 21, floor + 2), (x + 32, SIDE), (x + 10, SIDE)], self.sun + (80,)
        )

    def finish(self) -> Image.Image:
        """Fade the light to the right and into the corners, and average 4x4 pixels into one."""
        corners = (((self.x - 26) / 40) ** 2 + ((self.y - 28) / 42) ** 2) ** 1.5
        self.blend((10, 10, 26), np.clip(0.24 * (self.x / SIDE) ** 1.2 + 0.09 * corners, 0, 1))
        return self.image.resize((SIDE, SIDE), Image.Resampling.BOX)

    def mask(self) -> Image.Image:
        """The label that covers more than half of a pixel, 64x64 in mode L, and BORDER where none does."""
        blocks = np.asarray(self.labels).reshape(SIDE, K, SIDE, K)
        shares = np.stack([(blocks == label).mean((1, 3)) for label in range(len(LABELS))])
        values = np.where(shares.max(0) > 0.5, shares.argmax(0), BORDER)
        return Image.fromarray(values.astype(np.uint8))


# -- the classes: each function draws one scene
# ---------------------------------------------------------------------------------
def balloon(s: Scene, rng: Random) -> None:
    """A hot-air balloon over a meadow, and its shadow."""
    meadow(s, rng.uniform(48, 54), 9)
    s.place(rng.uniform(40, 46), rng.uniform(58, 60))
    s.shadow([(0, 0), (4, -1.5), (10, -1.2), (13, 0.4), (6, 2)])
    r = rng.uniform(8, 13)
    first, second = rng.sample(PAINT, 2)
    s.means("object")
    s.place(rng.uniform(22, 48), rng.uniform(r + 2, 47 - 2.2 * r), r)
    s.polygon([(-0.8, 0.55), (0.8, 0.55), (0.18, 1.55), (-0.18, 1.55)], s.tone(first, 0.7))
    s.ball(0, 0, 1, 1.05, first)
    for width, colour in ((0.78, second), (0.26, first)):
        # Ovals of decreasing width, lighter to the left, make the gores.
        for t in np.linspace(0, 0.4, 5):
            s.oval(
                -t * width, -0.3 * t, width * (1 - 1.5 * t), 1.04 - 0.5 * t, s.tone(colour, 0.75 + 1.2 * t)
            )
    for x in (-0.18, 0.18):
        s.line([(x * 1.1, 1.45), (x, 1.9)], 0.04, (60, 40, 30))
    s.box(-0.24, 1.8, 0.24, 2.2, (150, 100, 56))


def boat(s: Scene, rng: Random) -> None:
    """A sailing boat on water."""
    horizon = rng.uniform(28, 38)
    hull = rng.choice(PAINT)
    sail = rng.choice(PAINT + PAINT[3:4] * 3)
    s.sky(horizon)
    # Half of the boats have land behind them.
    if rng.random() < 0.5:
        s.hills(horizon, rng.uniform(2, 5))
    s.water(horizon, rng.choice([(36, 92, 130), (30, 110, 120), (50, 80, 120)]))
    s.place(rng.uniform(22, 42), rng.uniform(horizon + 9, 55), rng.uniform(0.8, 1.3))
    s.shadow([(-8, 1), (9, 1), (15, 5), (0, 6)], 0.45, 1.2)
    s.means("object")
    s.line([(0, -23), (0, -2)], 0.7, (70, 48, 34))
    s.polygon([(-0.8, -22), (-0.8, -4), (-9, -4)], s.tone(sail, 1.3))
    s.polygon([(0.8, -23), (11, -4.5), (0.8, -4)], s.tone(sail, 0.8))
    s.polygon([(-10, -3), (12, -3.6), (8, 2), (-7, 2)], s.tone(hull, 0.72))
    s.polygon([(-10, -3), (2, -3.3), (1, 2), (-7, 2)], s.tone(hull, 1.1))


def bridge(s: Scene, rng: Random) -> None:
    """A stone bridge with arches over water."""
    horizon = rng.uniform(30, 36)
    stone = rng.choice([(186, 168, 140), (160, 156, 152), (190, 130, 98)])
    s.sky(horizon)
    s.hills(horizon, rng.uniform(6, 11))
    s.water(horizon, (52, 108, 122))
    deck = horizon - rng.uniform(4, 9)
    foot = horizon + rng.uniform(11, 16)
    width = rng.uniform(16, 24)
    s.shadow([(0, foot), (SIDE, foot), (SIDE, foot + 9), (0, foot + 5)], 0.5, 1.2)
    s.means("object")
    behind = s.image.copy()
    labels = s.labels.copy()
    holes = Image.new("L", s.image.size)
    s.box(0, deck, SIDE, foot, stone)
    start = rng.uniform(-width, 0)
    for x in np.arange(start, SIDE, width):
        corners = [(x + 2.4) * K, (deck + 3.5) * K, (x + width - 2.4) * K, foot * K]
        ImageDraw.Draw(holes).rounded_rectangle(
            corners, (width / 2 - 2.5) * K, 255, corners=(True, True, False, False)
        )
        s.box(x - 2.4, deck + 4, x - 1.2, foot, s.tone(stone, 1.5))
    # The inside of the arches, in shade; then the view through them.
    s.image.paste(s.tone(stone, 0.5), (0, 0), holes)
    opening = ImageChops.darker(holes, ImageChops.offset(holes, 5, 2))
    s.image.paste(behind, (0, 0), opening)
    s.labels.paste(labels, (0, 0), opening)
    s.box(0, deck - 1.6, SIDE, deck + 0.8, s.tone(stone, 1.4))
    s.box(0, deck + 0.8, SIDE, deck + 1.5, s.tone(stone, 0.6))


def car(s: Scene, rng: Random) -> None:
    """A car on a road."""
    meadow(s, rng.uniform(28, 36), 9)
    top = rng.uniform(43, 47)
    paint = rng.choice(PAINT)
    start = rng.randint(-16, 0)
    s.box(0, top - 1, SIDE, top, (206, 198, 182))
    s.box(0, top, SIDE, SIDE, (92, 92, 98))
    for x in range(start, 80, 16):
        s.polygon([(x, 58.5), (x + 8, 58.5), (x + 8.5, 60), (x, 60)], (236, 230, 210))
    s.place(rng.uniform(18, 42), rng.uniform(52, 55.5), rng.uniform(0.9, 1.3))
    s.shadow([(-12, 0), (12, -1), (19, 2.2), (-6, 3.2)], 0.65)
    s.means("object")
    # The direction in which it drives.
    m = rng.choice([-1, 1])
    for colour, outline in (
        (s.tone(paint, 0.8), [(-9, -5.5), (-5.5, -10.5), (3, -10.5), (8, -5.5)]),
        (GLASS, [(-7.3, -5.8), (-4.8, -9.5), (-1.2, -9.5), (-1.2, -5.8)]),
        (mix(GLASS, (60, 90, 130), 0.3), [(0, -5.8), (0, -9.5), (2.6, -9.5), (6.2, -5.8)]),
        (paint, [(-13, -1.2), (-12.5, -5.6), (8, -5.9), (12.5, -4.4), (13.2, -1.2)]),
    ):
        s.polygon([(m * x, y) for x, y in outline], colour)
    s.box(-10, -5.6, 8, -4.8, s.tone(paint, 1.5))
    s.box(-12.8, -2.2, 12.8, -0.8, s.tone(paint, 0.6))
    for x in (-7.5, 7.5):
        s.oval(x, -0.8, 2.8, 2.8, DARK)
        s.oval(x - 0.3, -1, 1.2, 1.2, (196, 196, 200))


def house(s: Scene, rng: Random) -> None:
    """A house with two visible sides."""
    meadow(s, rng.uniform(34, 42), 8)
    s.place(rng.uniform(7, 24), rng.uniform(47, 55), rng.uniform(0.9, 1.25))
    w = rng.uniform(11, 14)
    side = rng.uniform(9, 14)
    h = rng.uniform(11, 14)
    eave = 0.55 * 13
    wall = rng.choice([(240, 228, 202), (230, 194, 154), (214, 216, 222), (204, 126, 100)])
    roof = rng.choice([(170, 66, 48), (104, 78, 70), (92, 98, 116)])
    window = rng.choice([(250, 214, 130), (58, 76, 104)])
    s.means("object")
    s.cast(2, w + side, h)
    s.polygon([(w, 0), (w + side, -2), (w + side, -h), (w, -h)], s.tone(wall, 0.62))
    s.polygon([(0, 0), (w, 0), (w, -h), (w / 2, -h - eave), (0, -h)], s.tone(wall, 1.3))
    s.box(w + side - 5, -h - 10, w + side - 2.5, -h - 2, s.tone(roof, 0.75))
    ridge = -h - eave - 1
    s.polygon([(w / 2, ridge), (w / 2 + side, ridge), (w + side + 1.2, -h + 0.8), (w + 0.8, -h + 0.8)], roof)
    s.line([(-1.2, -h + 1), (w / 2, ridge), (w + 0.8, -h + 1)], 1.3, s.tone(roof, 1.3))
    s.box(0.38 * w, -0.55 * h, 0.64 * w, 0, rng.choice(PAINT))
    for x0, x1 in ((0.1 * w, 0.28 * w), (0.74 * w, 0.92 * w), (w + 0.3 * side, w + 0.65 * side)):
        s.box(x0, -0.72 * h, x1, -0.42 * h, window)


def lamp(s: Scene, rng: Random) -> None:
    """A standard lamp in a room."""
    floor = rng.uniform(43, 50)
    shade = rng.choice(PAINT)
    w = rng.uniform(6.5, 9)
    s.room(floor)
    x = rng.uniform(34, 52)
    y = rng.uniform(floor + 4, 60)
    height = rng.uniform(28, 38)
    s.place(x, y)
    s.shadow([(-2, 0), (3, 0), (15, 3), (10, 4)])
    s.blend((255, 230, 160), 0.8 * np.exp(-np.hypot((s.x - x) / 1.2, s.y - y + height - 8) / 10))
    s.means("object")
    s.oval(0, 0, 5, 1.4, (58, 48, 42))
    s.barrel(-height + 6, 0.7, 0, 0.7, (120, 100, 80), 1.6)
    s.barrel(-height, 0.55 * w, -height + 9, w, mix(shade, (255, 226, 150), 0.25), 1.5)
    s.box(-w, -height + 8.2, w, -height + 9, (255, 246, 206))


def mountain(s: Scene, rng: Random) -> None:
    """Three mountains with snow, and pines."""
    horizon = rng.uniform(42, 48)
    rock = rng.choice([(126, 122, 134), (140, 122, 108), (108, 124, 140)])
    s.sky(horizon)
    s.means("object")
    # Ranges of x and of the height. The most distant peak comes first.
    peaks = [(46, 58, 18, 25), (6, 18, 16, 22), (26, 40, 30, 36)]
    for depth, (x0, x1, low, high) in enumerate(peaks):
        s.place(rng.uniform(x0, x1), horizon + 1, rng.uniform(low, high))
        colour = mix(rock, s.haze, 0.45 - 0.2 * depth)
        w = rng.uniform(0.75, 0.95)
        bend = rng.uniform(-0.04, 0.1)
        s.polygon([(-w, 0), (0, -1), (w, 0)], s.tone(colour, 1.4))
        shaded = [(0, -1), (bend, -0.75), (bend - 0.05, -0.5), (bend + 0.12, -0.25), (0.1, 0), (w, 0)]
        s.polygon(shaded, s.tone(colour, 0.68))
        s.polygon(
            [(0, -1), (-0.3 * w, -0.7), (-0.17 * w, -0.74), (-0.06, -0.64), (bend, -0.75)], (252, 250, 246)
        )
        s.polygon([(0, -1), (bend, -0.75), (0.14 * w + bend, -0.7), (0.3 * w, -0.7)], (176, 190, 222))
    s.place()
    s.ground(horizon, rng.choice(GRASS))
    for _ in range(rng.randint(3, 6)):
        pine(s, rng, rng.uniform(3, 61), rng.uniform(horizon + 3, 60))


def table(s: Scene, rng: Random) -> None:
    """A table in a room, with a cup and sometimes a fruit."""
    s.room(rng.uniform(38, 44))
    left = rng.uniform(10, 18)
    w = rng.uniform(36, 42)
    wood = rng.choice(WOOD)
    cup = rng.choice(PAINT)
    s.means("object")
    s.place(left, rng.uniform(36, 42))
    s.shadow([(3, 18), (w, 17), (w + 12, 22), (14, 24)], 0.5, 1.5)
    for x, y in ((4, 16), (w - 5, 16), (1, 22), (w - 3, 22)):
        s.box(x, 6, x + 2, y, s.tone(wood, 0.55))
        s.box(x, 6, x + 0.7, y, wood)
    s.polygon([(4, 0), (w - 4, 0), (w, 6), (0, 6)], s.tone(wood, 1.3))
    s.box(0, 6, w, 8.2, s.tone(wood, 0.6))
    x = rng.uniform(8, w - 18)
    y = rng.uniform(3, 5)
    if rng.random() < 0.6:
        s.ball(x + 13, y - 1.6, 2.4, 2.2, rng.choice([(204, 60, 44), (226, 150, 40), (150, 176, 60)]))
    s.place(left + x, s.origin[1] + y, rng.uniform(0.9, 1.4))
    s.shadow([(-2, 0), (3, -1), (11, 0.4), (8, 1.6)])
    s.oval(3.6, -4, 2, 2.2, s.tone(cup, 0.7))
    s.oval(3.6, -4, 1, 1.2, s.tone(wood, 0.9))
    s.barrel(-7, 3.6, 0, 2.8, cup)
    s.oval(0, -7, 3.6, 1.1, s.tone(cup, 1.5))
    s.oval(0, -6.9, 2.9, 0.8, (70, 42, 26))


def tower(s: Scene, rng: Random) -> None:
    """A lighthouse or tower on a hill."""
    horizon = rng.uniform(40, 46)
    land = rng.choice(GRASS)
    w = rng.uniform(5, 7)
    height = rng.uniform(36, 42)
    s.sky(horizon)
    if rng.random() < 0.6:
        s.water(horizon, (40, 96, 128))
    else:
        s.ground(horizon, rng.choice(GRASS))
    s.place(rng.uniform(26, 42), rng.uniform(51, 54))
    s.means("ground")
    s.polygon([(-28, 14), (-18, 3), (-8, -1), (9, -1), (20, 4), (32, 14)], land)
    # The side of the hill away from the light.
    s.polygon([(9, -1), (20, 4), (32, 14), (6, 14)], s.tone(land, 0.75))
    s.means("object")
    s.cast(-w, w, 26)
    wall, band = rng.choice(
        [
            ((242, 238, 228), rng.choice(PAINT[:3])),
            ((196, 178, 152), (176, 158, 132)),
            ((214, 208, 198), (84, 88, 104)),
        ]
    )
    # Five rings in turn, narrower towards the top.
    for row in range(5):
        (y0, w0), (y1, w1) = (((t / 5 - 1) * (height - 11), w * (0.7 + 0.06 * t)) for t in (row, row + 1))
        s.barrel(y0, w0, y1, w1, (wall, band)[row % 2])
    s.place(s.origin[0], s.origin[1] - height + 11)
    s.box(-0.9 * w, -1.6, 0.9 * w, 0, s.tone(wall, 0.5))
    s.barrel(-6.2, 0.5 * w, -1.6, 0.5 * w, (255, 226, 140), 1.4)
    s.polygon([(-0.75 * w, -6.2), (0, -11), (0.75 * w, -6.2)], s.tone(band, 0.8))
    s.polygon([(-0.75 * w, -6.2), (0, -11), (0, -6.2)], s.tone(band, 1.25))


def tree(s: Scene, rng: Random) -> None:
    """A tree on a meadow, sometimes with pines."""
    meadow(s, rng.uniform(36, 44), 7)
    for _ in range(rng.randint(0, 3)):
        pine(s, rng, rng.uniform(4, 60), rng.uniform(46, 50))
    leaves = rng.choice(
        [(84, 140, 50), (64, 122, 60), (206, 126, 40), (222, 160, 56), (134, 158, 58), (216, 146, 168)]
    )
    s.place(rng.uniform(18, 40), rng.uniform(52, 58), rng.uniform(0.85, 1.2))
    s.shadow([(0, 0), (1.5, -0.5), (14, -2), (28, 1), (24, 5), (12, 3)])
    s.means("tree")
    s.barrel(-22, 1.3, 0, 2.6, (112, 80, 54), 1.4)
    # Many small balls, lighter in the upper left.
    for _ in range(26):
        t = rng.random() ** 0.5
        angle = rng.uniform(0, 2 * np.pi)
        x = 9.5 * t * np.cos(angle)
        y = 8 * t * np.sin(angle)
        r = rng.uniform(2.6, 4.2)
        s.ball(x, y - 24, r, 0.9 * r, s.tone(leaves, np.clip(0.95 - 0.025 * (x + y), 0.65, 1.25)))


def meadow(s: Scene, horizon: float, height: float) -> None:
    """Sky, hills and grass."""
    s.sky(horizon)
    s.hills(horizon, s.rng.uniform(0.4, 1) * height)
    s.ground(horizon, s.rng.choice(GRASS))


def pine(s: Scene, rng: Random, x: float, y: float) -> None:
    """A pine whose foot is at (x, y)."""
    s.means("tree")
    # Larger towards the viewer.
    s.place(x, y, 0.25 + (y - 38) / 22)
    green = rng.choice([(52, 104, 62), (66, 112, 56), (46, 92, 76)])
    s.cast(-1.5, 1.5, 8)
    s.box(-0.6, -2, 0.6, 0, (74, 52, 38))
    for base, w in ((-6, 2.2), (-3.7, 3.1), (-1.4, 4)):
        s.polygon([(0, base - 5), (w, base), (-w, base)], s.tone(green, 0.7))
        s.polygon([(0, base - 5), (0.2 * w, base), (-w, base)], s.tone(green, 1.3))


CLASSES: dict[str, Callable[[Scene, Random], None]] = {
    f.__name__: f for f in (balloon, boat, bridge, car, house, lamp, mountain, table, tower, tree)
}


def draw(split: str, name: str, number: int) -> tuple[Image.Image, Image.Image]:
    """Draw one scene: its picture, 64x64 RGB, and its mask, 64x64 in mode L.

    The same arguments give the same scene.
    """
    # A text as seed: Python hashes it in the same way in every process.
    rng = Random(f"{split}/{name}/{number}")
    scene = Scene(rng)
    CLASSES[name](scene, rng)
    return scene.finish(), scene.mask()


def encode(image: Image.Image) -> bytes:
    """Compress a picture as JPEG with the best quality that fits JPEG_BYTES.

    Raises ValueError if no quality fits.
    """
    # 4:2:0 and optimised Huffman tables are the smallest that all decoders read.
    for quality in range(92, 20, -2):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
        if stream.tell() <= JPEG_BYTES:
            return stream.getvalue()
    raise ValueError(f"a scene does not fit in {JPEG_BYTES} bytes: give it less texture")


def encode_mask(mask: Image.Image) -> bytes:
    """Compress a mask as PNG, which keeps every value."""
    stream = io.BytesIO()
    mask.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member to a tar."""
    # Its time, user and group are 0 by default, so the bytes do not depend on the machine.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write(out: Path, split: str) -> None:
    """Write a split as uncompressed USTAR files.

    `<split>.tar` gets the members <class>/<nnnn>.jpg, `masks/<split>.tar` the members <class>/<nnnn>.png.
    """
    (out / "masks").mkdir(parents=True, exist_ok=True)
    with (
        tarfile.open(out / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as pictures,
        tarfile.open(out / "masks" / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as masks,
    ):
        # The classes take turns, so that any prefix of the files is balanced.
        for number in range(PER_CLASS[split]):
            for name in CLASSES:
                picture, mask = draw(split, name, number)
                add(pictures, f"{name}/{number:04d}.jpg", encode(picture))
                add(masks, f"{name}/{number:04d}.png", encode_mask(mask))


def main() -> None:
    """Write the tars of both splits, and the names of the labels."""
    parser = argparse.ArgumentParser(description="generate the demo set: pictures and masks")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder for train.tar, val.tar, masks/",
    )
    args = parser.parse_args()
    for split in PER_CLASS:
        write(args.out, split)
    (args.out / "masks" / "classes.txt").write_text("".join(f"{label}\n" for label in LABELS))


if __name__ == "__main__":
    main()
