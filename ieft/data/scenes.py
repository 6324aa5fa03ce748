"""Synthetic aerial scenes with captions, in the manner of RSICD and UCM-Captions, drawn from a seed without downloads.

A scene is planned (`Plan`: ground, water, objects with count and colour), drawn, and described in five sentences. Each
sentence is true of the plan and none says left, right, above or below, so that it stays true under flips and quarter
turns.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SPLITS = {"train": 1000, "validation": 100, "test": 100}
CANVAS = 192  # scenes are drawn at this size and reduced

COLOURS = {
    "white": (238, 238, 232), "grey": (140, 142, 146), "red": (186, 62, 50), "blue": (52, 104, 186),
    "green": (58, 140, 66), "brown": (124, 84, 52), "yellow": (222, 192, 84), "dark": (40, 52, 62),
}  # fmt: skip
# Ground -> base colour, roughness of its texture, and how a sentence names it.
GROUNDS = {
    "meadow": ((116, 158, 84), 10, ("a green meadow", "a grassland")),
    "forest": ((38, 84, 48), 16, ("a dense forest", "many green trees")),
    "desert": ((212, 184, 134), 9, ("a yellow desert", "a sandy desert")),
    "farmland": ((150, 146, 84), 8, ("farmland", "striped farmland")),
    "bareland": ((146, 116, 92), 14, ("bare land", "brown bare land")),
    "snow": ((226, 230, 236), 7, ("snow", "white snow")),
    "town": ((168, 164, 160), 12, ("a residential area", "a town with small roofs")),
}
WATERS = {"blue": (48, 98, 150), "green": (62, 118, 92), "brown": (122, 98, 66)}
COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four", 9: "many"}


@dataclass(frozen=True)
class Kind:
    """A kind of thing: its names, and the colours and counts it comes in; no colours where the name says enough."""

    singular: str
    plural: str
    colours: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1, 2, 3, 4)


KINDS = {
    "tank": Kind("storage tank", "storage tanks", ("white", "grey", "red")),
    "house": Kind("house", "houses", ("red", "blue", "brown"), (1, 2, 3, 4, 9)),
    "building": Kind("large building", "large buildings", ("white", "grey", "blue"), (1, 2, 3)),
    "court": Kind("tennis court", "tennis courts", ("green", "blue", "red"), (1, 2, 4)),
    "pool": Kind("swimming pool", "swimming pools", (), (1, 2)),
    "plane": Kind("plane", "planes", (), (1, 2, 3, 4)),
    "pivot": Kind("circular field", "circular fields", ("green", "brown", "yellow"), (1, 2, 4)),
    "stadium": Kind("stadium", "stadiums", ("white", "red", "blue"), (1,)),
    "pitch": Kind("football field", "football fields", (), (1, 2)),
    "diamond": Kind("baseball field", "baseball fields", (), (1, 2)),
    "panels": Kind("solar panel", "solar panels", (), (9,)),
    "cars": Kind("car in a parking lot", "cars in a parking lot", (), (9,)),
    "lake": Kind("lake", "lakes", ("blue", "green", "dark"), (1,)),
    "ship": Kind("ship", "ships", ("white", "red", "dark"), (1, 2, 3, 4, 9)),
    "island": Kind("island", "islands", ("green", "yellow"), (1, 2)),
}
ON_LAND = tuple(name for name in KINDS if name not in ("ship", "island"))


@dataclass(frozen=True)
class Thing:
    """A group of objects of one kind and colour."""

    kind: str
    count: int
    colour: str | None


@dataclass(frozen=True)
class Line:
    """A river, road or railway that crosses the whole scene."""

    kind: str
    colour: str | None
    curved: bool
    bridge: bool  # a road crosses the river


@dataclass(frozen=True)
class Plan:
    """The content of a scene. With `sea`, the first thing is on the water and the others on land behind the beach."""

    ground: str
    things: tuple[Thing, ...]
    line: Line | None = None
    sea: str | None = None


@dataclass(frozen=True)
class Scene:
    """A square RGB image and its five captions."""

    image: Image.Image
    captions: list[str]


def draw_scene(seed: int, index: int, *, size: int = 96) -> Scene:
    """The scene of one index: the same pixels and sentences on every call, in any order and any process."""
    plan = plan_scene(np.random.default_rng([seed, index, 0]))
    image = draw_plan(plan, np.random.default_rng([seed, index, 1]))
    captions = describe_plan(plan, np.random.default_rng([seed, index, 2]))
    return Scene(image.resize((size, size), Image.Resampling.LANCZOS), captions)


# Planning ------------------------------------------------------------------------------------------------------------


def plan_scene(generator):
    """Draw a `Plan`: a fifth of the scenes are coasts, half of the others are crossed by a line."""
    ground = _pick(generator, list(GROUNDS))
    if generator.random() < 0.2:
        afloat = _plan_thing(generator, _pick(generator, ("ship", "ship", "island")))
        ashore = (_plan_thing(generator, _pick(generator, ON_LAND)),) if generator.random() < 0.6 else ()
        return Plan(ground, (afloat, *ashore), sea=_pick(generator, ("blue", "green")))
    line = _plan_line(generator) if generator.random() < 0.5 else None
    kinds = generator.choice(ON_LAND, size=1 if generator.random() < 0.35 else 2, replace=False)
    return Plan(ground, tuple(_plan_thing(generator, str(kind)) for kind in kinds), line)


def _plan_thing(generator, kind):
    colours = KINDS[kind].colours
    return Thing(kind, int(_pick(generator, KINDS[kind].counts)), _pick(generator, colours) if colours else None)


def _plan_line(generator):
    kind = _pick(generator, ("river", "river", "road", "railway"))
    river = kind == "river"
    colour = _pick(generator, list(WATERS)) if river else None
    return Line(kind, colour, curved=bool(generator.random() < 0.5), bridge=river and bool(generator.random() < 0.4))


def _pick(generator, choices):
    return choices[int(generator.integers(len(choices)))]


# Drawing -------------------------------------------------------------------------------------------------------------


def draw_plan(plan, generator):
    """Draw a plan at `CANVAS` pixels, with a random flip or quarter turn."""
    image = _draw_ground(plan.ground, generator)
    pen = ImageDraw.Draw(image)
    if plan.sea:
        _draw_sea(pen, plan.sea, generator)
        places = [(43, 96), (146, 100)]
    elif plan.line:
        _draw_line(pen, plan.line, generator)
        lone = (126, 50) if plan.line.bridge else (126, 98)
        places = [(124, 46), (130, 146)] if len(plan.things) == 2 else [lone]
    else:
        places = [(60, 62), (134, 132)] if len(plan.things) == 2 else [(96, 96)]
    for thing, (x, y) in zip(plan.things, places, strict=False):
        _draw_thing(pen, thing, x + _jitter(generator, 6), y + _jitter(generator, 6), generator)
    return _finish(image, generator)


def _draw_ground(ground, generator):
    colour, roughness, _ = GROUNDS[ground]
    coarse = Image.fromarray(generator.normal(128, 50, (12, 12)).clip(0, 255).astype(np.uint8))
    clouds = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), dtype=np.float64) - 128
    shade = clouds / 50 * roughness * 0.7 + generator.normal(0, roughness * 0.6, (CANVAS, CANVAS))
    if ground == "farmland":
        shade += _plough(generator)
    if ground == "desert":
        shade += 9 * np.sin(np.arange(CANVAS)[:, None] * 0.16 + clouds / 22)
    image = Image.fromarray((np.array(colour) + shade[:, :, None]).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    if ground == "forest":
        _scatter(generator, 420, lambda x, y: _draw_tree(pen, x, y, 4 + 3 * generator.random(), generator))
    elif ground in ("meadow", "snow"):
        _scatter(generator, 14, lambda x, y: _draw_tree(pen, x, y, 3, generator))
    elif ground == "town":
        _draw_streets(pen, generator)
    return image


def _plough(generator):
    """Plots of different brightness with horizontal or vertical furrows: (CANVAS, CANVAS)."""
    shade = np.empty((CANVAS, CANVAS))
    rows = np.arange(CANVAS)[:, None] + np.zeros(CANVAS)
    for top in (0, 64, 128):
        for left in (0, 96):
            furrows = rows if generator.random() < 0.5 else rows.T
            plot = generator.uniform(-18, 18) + 16 * (np.sin(furrows * 0.6) > 0)
            shade[top : top + 64, left : left + 96] = plot[top : top + 64, left : left + 96]
    return shade


def _scatter(generator, count, draw):
    for x, y in generator.random((count, 2)) * CANVAS:
        draw(x, y)


def _draw_tree(pen, x, y, radius, generator):
    _disc(pen, x + 1.5, y + 1.5, radius, (22, 44, 26))
    green = 70 + int(generator.integers(50))
    _disc(pen, x, y, radius, (green // 2, green, green // 2 + 4))


def _draw_streets(pen, generator):
    """Small grey roofs along streets."""
    for street in range(0, CANVAS + 1, 48):
        pen.line([(0, street), (CANVAS, street)], fill=(118, 118, 120), width=5)
        pen.line([(street, 0), (street, CANVAS)], fill=(118, 118, 120), width=5)
    for x in range(8, CANVAS, 16):
        for y in range(8, CANVAS, 16):
            if x % 48 > 6 and y % 48 > 6 and generator.random() < 0.85:
                shade = 176 + int(generator.integers(50))
                _box(pen, x + 1, y + 1, 5, 4, (92, 92, 92))
                _box(pen, x, y, 5, 4, (shade, shade - 10, shade - 22))


def _draw_sea(pen, colour, generator):
    edge = [(86 + 7 * np.sin(y / 26 + generator.random()), y) for y in range(-8, CANVAS + 9, 8)]
    corners = [(-1, CANVAS + 9), (-1, -9)]
    pen.polygon([(x + 14, y) for x, y in edge] + corners, fill=(232, 216, 172))  # the beach
    pen.polygon([(x + 3, y) for x, y in edge] + corners, fill=(222, 232, 234))  # the surf
    pen.polygon(edge + corners, fill=WATERS[colour])
    for x, y in generator.random((50, 2)) * (74, CANVAS):
        pen.line([(x, y), (x + 6, y + 2)], fill=tuple(int(c * 1.12) for c in WATERS[colour]))


def _line_points(line, generator):
    bend = 20 if line.curved else 0
    phase = generator.random() * 6.28
    return [(40 + bend * np.sin(y / 30 + phase), y) for y in range(-20, CANVAS + 21, 4)]


def _draw_line(pen, line, generator):
    points = _line_points(line, generator)
    if line.kind == "river":
        for half_width, shade in ((19, 0.7), (16, 1.0)):  # the banks, then the water
            for x, y in points:
                _disc(pen, x, y, half_width, tuple(int(c * shade) for c in WATERS[line.colour]))
        if line.bridge:
            pen.line([(-2, 97), (CANVAS, 97)], fill=(70, 72, 76), width=17)
            pen.line([(-2, 96), (CANVAS, 96)], fill=(186, 186, 188), width=13)
    elif line.kind == "road":
        pen.line(points, fill=(88, 90, 94), width=20, joint="curve")
        for start, end in zip(points[::4], points[2::4], strict=False):
            pen.line([start, end], fill=(240, 236, 200), width=2)
    else:
        pen.line(points, fill=(104, 88, 76), width=20, joint="curve")
        for x, y in points:
            pen.line([(x - 9, y), (x + 9, y)], fill=(60, 48, 42), width=2)
        for side in (-5, 5):
            pen.line([(x + side, y) for x, y in points], fill=(206, 206, 210), width=2)


def _draw_thing(pen, thing, x, y, generator):
    """All units of a thing in rows around (x, y)."""
    colour = COLOURS.get(thing.colour)
    if thing.kind in ("panels", "cars"):
        _draw_lot(pen, thing.kind, x, y, generator)
        return
    if thing.kind == "plane":
        _box(pen, x, y, 44, 40, (128, 130, 134))  # the apron
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 9: 3}[thing.count]
    rows = -(-thing.count // columns)
    reach = {1: 27, 2: 19, 3: 14, 4: 17, 9: 10}[thing.count]
    narrow = thing.kind in ("ship", "house") and thing.count == 1
    for unit in range(thing.count):
        dx = (unit % columns - (columns - 1) / 2) * 2.2 * reach
        dy = (unit // columns - (rows - 1) / 2) * 2.2 * reach
        _draw_unit(pen, thing.kind, colour, x + dx, y + dy, reach * (0.75 if narrow else 1), generator)


def _draw_lot(pen, kind, x, y, generator):
    _box(pen, x, y, 42, 34, (96, 98, 102) if kind == "cars" else (150, 140, 112))
    if kind == "panels":
        for row in range(-27, 28, 11):
            _box(pen, x, y + row, 38, 4, (34, 46, 104))
            pen.line([(x - 37, y + row), (x + 37, y + row)], fill=(104, 124, 190))
        return
    for row in (-24, -8, 8, 24):
        for column in range(-36, 37, 8):
            if generator.random() < 0.85:
                paint = _pick(generator, [COLOURS[name] for name in ("white", "red", "blue", "dark", "white")])
                _box(pen, x + column, y + row, 2.4, 5, paint)


def _draw_unit(pen, kind, colour, x, y, r, generator):
    """One thing of radius r pixels, with its shadow."""
    if kind == "tank":
        _disc(pen, x + r * 0.22, y + r * 0.22, r * 0.9, (54, 54, 54))
        _disc(pen, x, y, r * 0.9, colour)
        _disc(pen, x - r * 0.1, y - r * 0.1, r * 0.5, _lighter(colour))
    elif kind in ("house", "building"):
        _draw_roof(pen, kind, colour, x, y, r)
    elif kind == "pivot":
        _disc(pen, x, y, r, colour)
        angle = generator.random() * 6.28
        pen.line([(x, y), (x + r * np.cos(angle), y + r * np.sin(angle))], fill=_lighter(colour), width=3)
        pen.ellipse(_around(x, y, r * 0.6), outline=_lighter(colour))
    elif kind == "lake":
        for dx, dy, scale in ((0, 0, 1.0), (r * 0.7, r * 0.3, 0.7), (-r * 0.6, -r * 0.3, 0.75)):
            _disc(pen, x + dx, y + dy, r * scale, {"blue": (42, 92, 160), "green": (52, 124, 96)}.get(
                _name_of(colour), (26, 38, 50)))  # fmt: skip
    elif kind == "island":
        _disc(pen, x, y, r * 1.05, (228, 214, 168))
        _disc(pen, x, y, r * 0.8, colour)
    elif kind == "ship":
        bow = [(x, y - r * 1.25), (x + r * 0.45, y - r * 0.6), (x + r * 0.45, y + r), (x - r * 0.45, y + r)]
        pen.polygon([(px + 3, py + 3) for px, py in bow], fill=(24, 48, 70))
        pen.polygon([*bow, (x - r * 0.45, y - r * 0.6)], fill=colour)
        _box(pen, x, y + r * 0.5, r * 0.28, r * 0.22, (206, 206, 206))
    elif kind == "plane":
        _draw_plane(pen, x, y, r)
    else:
        _draw_ground_for_sport(pen, kind, colour, x, y, r)


def _draw_roof(pen, kind, colour, x, y, r):
    width, height = (r * 0.85, r * 0.65) if kind == "house" else (r, r * 0.8)
    _box(pen, x + r * 0.25, y + r * 0.25, width, height, (50, 48, 46))
    _box(pen, x, y, width, height, colour)
    if kind == "house":
        pen.rectangle([x - width, y, x + width, y + height], fill=_darker(colour))  # the far side of the gable
    else:
        for side in (-0.5, 0.1):
            _box(pen, x + side * r, y - r * 0.3, r * 0.16, r * 0.16, _darker(colour))


def _draw_plane(pen, x, y, r):
    white, shadow = (244, 244, 246), (78, 80, 84)
    for offset, paint in ((3, shadow), (0, white)):
        px, py = x + offset, y + offset
        pen.line([(px, py - r), (px, py + r)], fill=paint, width=max(3, int(r * 0.28)))
        pen.polygon(
            [(px - r, py + r * 0.35), (px, py - r * 0.3), (px + r, py + r * 0.35), (px, py + r * 0.1)], fill=paint
        )
        pen.polygon([(px - r * 0.4, py + r), (px, py + r * 0.6), (px + r * 0.4, py + r)], fill=paint)


def _draw_ground_for_sport(pen, kind, colour, x, y, r):
    chalk = (242, 242, 238)
    if kind == "pool":
        _box(pen, x, y, r * 0.95, r * 0.65, (226, 222, 212))
        _box(pen, x, y, r * 0.78, r * 0.48, (64, 196, 226))
        for lane in (-0.16, 0.16):
            pen.line([(x - r * 0.78, y + lane * r), (x + r * 0.78, y + lane * r)], fill=(176, 234, 246))
    elif kind == "court":
        _box(pen, x, y, r * 0.7, r, colour)
        pen.rectangle([x - r * 0.5, y - r * 0.8, x + r * 0.5, y + r * 0.8], outline=chalk, width=2)
        pen.line([(x - r * 0.6, y), (x + r * 0.6, y)], fill=chalk, width=2)
    elif kind == "stadium":
        pen.ellipse([x - r * 1.35, y - r, x + r * 1.35, y + r], fill=colour)
        pen.ellipse([x - r * 1.05, y - r * 0.72, x + r * 1.05, y + r * 0.72], fill=(178, 92, 66))
        pen.ellipse([x - r * 0.85, y - r * 0.54, x + r * 0.85, y + r * 0.54], fill=(66, 152, 70))
    elif kind == "pitch":
        for stripe in range(6):
            left = x - r + stripe * r / 3
            pen.rectangle(
                [left, y - r * 0.65, left + r / 3, y + r * 0.65], fill=((60, 150, 64), (78, 170, 80))[stripe % 2]
            )
        pen.rectangle([x - r * 0.92, y - r * 0.57, x + r * 0.92, y + r * 0.57], outline=chalk, width=2)
        pen.line([(x, y - r * 0.57), (x, y + r * 0.57)], fill=chalk, width=2)
        pen.ellipse(_around(x, y, r * 0.22), outline=chalk, width=2)
    else:
        pen.pieslice([x - r * 1.2, y - r * 1.2, x + r * 1.2, y + r * 1.2], 225, 315, fill=(84, 156, 72))
        pen.polygon([(x, y + r * 0.1), (x - r * 0.5, y - r * 0.4), (x, y - r * 0.9), (x + r * 0.5, y - r * 0.4)],
                    fill=(196, 142, 92), outline=chalk)  # fmt: skip


def _finish(image, generator):
    """Blur, scale brightness, add sensor noise, and apply one of the 8 flips and quarter turns."""
    image = image.filter(ImageFilter.GaussianBlur(0.6))
    pixels = np.asarray(image, dtype=np.float64) * generator.uniform(0.9, 1.1) + generator.normal(
        0, 3, (CANVAS, CANVAS, 1)
    )
    pixels = np.rot90(pixels, int(generator.integers(4)))
    pixels = pixels[:, ::-1] if generator.random() < 0.5 else pixels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _disc(pen, x, y, r, colour):
    pen.ellipse(_around(x, y, r), fill=colour)


def _box(pen, x, y, half_width, half_height, colour):
    pen.rectangle([x - half_width, y - half_height, x + half_width, y + half_height], fill=colour)


def _around(x, y, r):
    return [x - r, y - r, x + r, y + r]


def _lighter(colour):
    return tuple(min(255, int(c + (255 - c) * 0.4)) for c in colour)


def _darker(colour):
    return tuple(int(c * 0.72) for c in colour)


def _name_of(colour):
    return next(name for name, value in COLOURS.items() if value == colour)


def _jitter(generator, reach):
    return generator.uniform(-reach, reach)


# Describing ----------------------------------------------------------------------------------------------------------


def describe_plan(plan, generator, *, num_brief=1):
    """Five different sentences that name every fact; only the last `num_brief` may omit some."""
    captions = []
    while len(captions) < 5:
        sentence = _sentence(plan, generator, brief=len(captions) >= 5 - num_brief)
        if sentence not in captions:
            captions.append(sentence)
    return captions


WITH_LINE = (
    "{things} {be} beside {line} in {ground} .",
    "{line} goes through {ground} near {things} .",
    "there {be} {things} next to {line} in {ground} .",
    "{ground} with {things} and {line} .",
    "in {ground} there is {line} with {things} beside it .",
)
ON_GROUND = (
    "{things} {be} surrounded by {ground} .",
    "there {be} {things} in {ground} .",
    "{ground} with {things} in it .",
    "{things} {be} in the middle of {ground} .",
    "we can see {things} in {ground} .",
)
AT_SEA = (
    "{afloat} {is_afloat} in the {sea} sea near a beach with {ashore} .",
    "a beach separates {ashore} from a {sea} sea with {afloat} .",
    "there {is_afloat} {afloat} in the {sea} sea and {ashore} behind the beach .",
    "{ashore} and a yellow beach are beside a {sea} sea with {afloat} .",
    "near {ashore} there is a {sea} sea with {afloat} .",
)
BRIEF = (
    "{first} {is_first} in {ground} .",
    "{first} {is_first} near {other} .",
    "there {is_first} {first} beside {other} .",
)


def _sentence(plan, generator, *, brief):
    ground = _pick(generator, GROUNDS[plan.ground][2])
    things = [_name_thing(thing) for thing in plan.things]
    if plan.sea:
        ashore = f"{things[1]} in {ground}" if len(things) == 2 else ground
        words = {"afloat": things[0], "is_afloat": _be(plan.things[0]), "ashore": ashore, "sea": plan.sea}
        return _pick(generator, AT_SEA).format(**words)
    first = int(generator.integers(len(things)))
    others = things[:first] + things[first + 1 :] + ([_name_line(plan.line)] if plan.line else [])
    if brief:
        words = {"first": things[first], "is_first": _be(plan.things[first]), "ground": ground}
        template = _pick(generator, BRIEF if others else BRIEF[:1])
        return template.format(**words, other=_pick(generator, others) if others else "")
    in_order = things if first == 0 else things[::-1]
    be = "are" if len(things) == 2 else _be(plan.things[0])
    words = {"things": " and ".join(in_order), "be": be, "ground": ground}
    if plan.line is None:
        return _pick(generator, ON_GROUND).format(**words)
    return _pick(generator, WITH_LINE).format(**words, line=_name_line(plan.line))


def _name_thing(thing):
    kind = KINDS[thing.kind]
    words = [COUNT_WORDS[thing.count], thing.colour, kind.singular if thing.count == 1 else kind.plural]
    phrase = " ".join(word for word in words if word)
    return f"an {phrase[2:]}" if phrase.startswith("a island") else phrase


def _be(thing):
    return "is" if thing.count == 1 else "are"


def _name_line(line):
    words = ["a", "curved" if line.curved else "straight", line.colour, line.kind]
    return " ".join(word for word in words if word) + (" with a bridge over it" if line.bridge else "")
