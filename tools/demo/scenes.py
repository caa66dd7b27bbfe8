"""The built-in demo data: drawn scenes with captions, labels, printed words, questions and boxes.

A scene holds one to three objects, each with a shape, a color, a size and a place; one may be a sign with a printed
word. Nothing is downloaded, everything is a pure function of (seed, index):

    scene = make_scene(seed=0, index=7)
    picture = render(scene, size=64)          # PIL RGB, anti-aliased
    captions(scene)                           # five wordings
    questions(scene, 4)                       # each with the answers of ten simulated annotators

`split_of` assigns a scene to train, val or test by a hash of what its objects are (`Scene.signature`): two splits can
never share a scene, whatever the seeds. Lengths are shares of the picture's side; `pixel_box` turns them into pixels.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

COLORS = {"red": (215, 40, 40), "yellow": (250, 225, 55), "green": (45, 155, 65), "blue": (45, 85, 210)}
BACKGROUNDS = {"gray": (150, 152, 156), "pink": (243, 178, 194), "brown": (122, 86, 62), "turquoise": (88, 176, 172)}
FINISHES = ("plain", "cloudy")  # how the background is filled
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.25, "large": 1 / 3}
SIGN_SIZE = (0.5, 0.25)
WORDS = ("stop", "open", "exit", "taxi", "zoo", "sale")
PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
CELLS = list(itertools.product(range(3), range(3)))  # (row, column) in PLACES
NUMBERS = ("zero", "one", "two", "three", "four")
SPLITS = ("train", "val", "test")

MAX_WORDS = 24  # of a caption, commas counted; with [CLS] the 25 tokens of pre-training
SIGN_SHARE = 0.4  # scenes with a sign, of those with more than one object
GRAIN = 3  # pixels of a texture's grain
SUPERSAMPLE = 4  # objects are drawn this many times too large and reduced


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class SceneObject:
    shape: str  # one of SHAPES, or "sign"
    color: str
    size: str
    word: str  # "" unless the object is a sign
    place: str  # a word of PLACES
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the side

    @property
    def label(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def pixel_box(self, size: int) -> list[int]:
        """The box [x0, y0, x1, y1] in pixels; x1 and y1 are the first column and row outside."""
        return [round(edge * size) for edge in self.box]


@dataclass(frozen=True)
class Scene:
    seed: int
    index: int
    background: str  # color
    finish: str  # one of FINISHES
    objects: tuple[SceneObject, ...]  # no two share both color and shape

    @property
    def signature(self) -> tuple:
        """What the objects are, wherever they lie: scenes with equal signatures count as the same scene."""
        return tuple(sorted((o.shape, o.color, o.size, o.word) for o in self.objects))

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.index}/{purpose}")


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the endless series that belongs to `seed`."""
    rng = random.Random(f"{seed}/{index}/scene")
    kinds = _draw_kinds(rng)
    places = _draw_places(rng, [SIGN_SIZE if word else (SIZES[size],) * 2 for _, _, size, word in kinds])
    objects = tuple(SceneObject(*kind, *place) for kind, place in zip(kinds, places, strict=True))
    return Scene(seed, index, rng.choice(list(BACKGROUNDS)), rng.choice(FINISHES), objects)


def split_of(scene: Scene) -> str:
    """Ten percent of all signatures belong to val, twenty to test, the others to train."""
    digest = hashlib.blake2b(repr(scene.signature).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return "val" if bucket == 0 else "test" if bucket < 3 else "train"


def plan(seed: int, counts: dict[str, int]) -> dict[str, list[int]]:
    """{split: indices of the first scenes that fill it}, ascending; val and test hold no signature twice."""
    chosen, seen = {split: [] for split in counts}, set()
    for index in itertools.count():
        if all(len(chosen[split]) == counts[split] for split in counts):
            return chosen
        scene = make_scene(seed, index)
        split, signature = split_of(scene), scene.signature
        room = len(chosen.get(split, ())) < counts.get(split, 0)
        if room and (split == "train" or signature not in seen):
            seen.add(signature)
            chosen[split].append(index)


def _draw_kinds(rng: random.Random) -> list[tuple[str, str, str, str]]:
    """(shape, color, size, word) of each object.

    An object often shares its shape or color with the one before, otherwise few counts would exceed one.
    """
    count = rng.choice((1, 2, 3))  # one alone says most plainly what its words mean
    kinds: list[tuple[str, str, str, str]] = []
    if count > 1 and rng.random() < SIGN_SHARE:
        kinds.append(("sign", rng.choice(list(COLORS)), "large", rng.choice(WORDS)))
    while len(kinds) < count:
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        if kinds and rng.random() < 0.3:
            shape, color = rng.choice([(shape, kinds[-1][1]), (kinds[-1][0], color)])
        if shape != "sign" and all((shape, color) != kind[:2] for kind in kinds):
            kinds.append((shape, color, rng.choice(list(SIZES)), ""))
    return kinds


def _draw_places(rng: random.Random, extents: list[tuple[float, float]]) -> list[tuple[str, tuple]]:
    """(place, box) of objects of these widths and heights, in different cells of a 3x3 grid.

    Drawn again until no two boxes overlap (a sign is wider than its cell). Objects lie in the middle of their cells:
    a small image encoder sees shapes many times sooner so.
    """
    while True:
        places = [place_in(cell, *size) for cell, size in zip(rng.sample(CELLS, len(extents)), extents, strict=True)]
        pairs = itertools.combinations([box for _, box in places], 2)
        if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs):
            return places


def place_in(cell: tuple[int, int], width: float, height: float) -> tuple[str, tuple]:
    """(place, box) of an object in the middle of a cell, moved if it would leave the picture."""
    row, column = cell
    x0 = min(max((column + 0.5) / 3 - width / 2, 0), 1 - width)
    y0 = min(max((row + 0.5) / 3 - height / 2, 0), 1 - height)
    return PLACES[row][column], (x0, y0, x0 + width, y0 + height)


# ---------------------------------------------------------------- relations


def relation(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """How a lies to b: ("left",), ("above",), or both words if neither direction dominates."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    horizontal, vertical = "left" if dx < 0 else "right", "above" if dy < 0 else "below"
    if abs(dx) >= 1.5 * abs(dy):
        return (horizontal,)
    return (vertical,) if abs(dy) >= 1.5 * abs(dx) else (vertical, horizontal)


def _to(a: SceneObject, b: SceneObject) -> str:
    """The words of `relation`."""
    words = {"left": "to the left of", "right": "to the right of"}
    return " and ".join(words.get(part, part) for part in relation(a, b))


def place_words(place: str) -> str:
    """Where a place of PLACES is."""
    words = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    return words.get(place) or ("in the middle" if place == "middle" else f"in the {place} corner")


# ---------------------------------------------------------------- captions


class Writer:
    """Words for a scene, other ones at every call: each method draws anew."""

    def __init__(self, scene: Scene, rng: random.Random):
        self.objects, self.rng = scene.objects, rng
        self.ground = f"a {scene.finish} {scene.background} background"

    def name(self, o: SceneObject, article: str = "a", size: float = 0.4, word: float = 0.8) -> str:
        """A noun phrase; `size` and `word` are the chances that the size and the printed word are named."""
        if o.word:
            return f"{article} {o.label} that says {o.word}" if self.rng.random() < word else f"{article} {o.label}"
        return f"{article} {o.size} {o.label}" if self.rng.random() < size else f"{article} {o.label}"

    def rest(self, *named: SceneObject) -> str:
        """The end of a caption that has named all objects but at most one."""
        others = [o for o in self.objects if o not in named]
        place = f" {place_words(others[0].place)}" if others and self.rng.random() < 0.5 else ""
        return f" with {self.name(others[0], size=0, word=0)}{place}" if others else ""

    def all(self) -> str:
        """The objects as one reads a page, a sign last so that "that says stop" does not cut a sentence in two."""
        places = [place for row in PLACES for place in row]
        *names, last = map(self.name, sorted(self.objects, key=lambda o: (bool(o.word), places.index(o.place))))
        return f"{', '.join(names)} and {last}" if names else last

    def of_two(self, words: Callable[[SceneObject, SceneObject], str]) -> str:
        """`words` of two random objects, a sign second, and the end of the caption."""
        a, b = sorted(self.rng.sample(self.objects, 2), key=lambda o: bool(o.word))
        return f"{words(a, b)}{self.rest(a, b)}"

    def wordings(self) -> list[Callable[[], str]]:
        """The captions that the scene can have beside `listing`."""
        name, everything, ground, objects = self.name, self.all, self.ground, self.objects
        if len(objects) == 1:
            at = place_words(objects[0].place)
            return [
                lambda: f"on {ground} {everything()}",
                lambda: f"{everything()} {at}",
                lambda: f"{at} there is {everything()}",
                lambda: f"{everything()} on {ground}",
            ]
        found = [
            partial(self.of_two, lambda a, b: f"{name(a)} {_to(a, b)} {name(b)}"),
            partial(self.of_two, lambda a, b: f"{name(a, 'the')} is {_to(a, b)} {name(b, 'the')}"),
            partial(self.of_two, lambda a, b: f"{name(a)} {place_words(a.place)} and {name(b)} {place_words(b.place)}"),
            lambda: f"on {ground} {everything()}",
            partial(self.of_two, lambda a, b: f"{_to(b, a)} {name(a, 'the')} there is {name(b)}"),
        ]
        drawn = [o for o in objects if not o.word]
        chains = [(a, b, c) for a, b, c in itertools.permutations(objects, 3) if a in drawn and b in drawn]
        if chains := [(a, b, c) for a, b, c in chains if len(relation(a, b)) == len(relation(a, c)) == 1]:
            found.append(partial(self.chain, chains))
        found += [partial(self.sign, o) for o in objects if o.word]
        level = [(a, b) for a, b in itertools.combinations(objects, 2) if relation(a, b) in (("left",), ("right",))]
        if near := [(a, b) for a, b in level if max(a.box[0], b.box[0]) - min(a.box[2], b.box[2]) < 0.2]:
            found.append(partial(self.side_by_side, near))
        return found

    def listing(self) -> str:
        count = len(self.objects)
        starts = ["a picture of", "we see", "this picture shows"] + [f"{NUMBERS[count]} objects:"] * (count > 1)
        return f"{self.rng.choice(starts)} {self.all()}"

    def chain(self, chains: list) -> str:
        """One object that lies straight beside, above or below two others; only the last of them can be a sign."""
        a, b, c = self.rng.choice(chains)
        again = "" if relation(a, b) == relation(a, c) else f"{_to(a, c)} "
        others = f"{self.name(b, size=0)} and {again}{self.name(c, size=0)}"
        return f"{self.name(a, size=0)} is {_to(a, b)} {others}"

    def sign(self, sign: SceneObject) -> str:
        other = self.rng.choice([o for o in self.objects if o is not sign])
        says = f"the {sign.label} {self.rng.choice(('says', 'reads'))} {sign.word}"
        return f"{says} and {self.name(other)} is {_to(other, sign)} it{self.rest(sign, other)}"

    def side_by_side(self, pairs: list) -> str:
        a, b = sorted(self.rng.choice(pairs), key=lambda o: (bool(o.word), self.rng.random()))
        return f"{self.name(a)} next to {self.name(b)} on {self.ground}{self.rest(a, b)}"


def captions(scene: Scene) -> list[str]:
    """Five differently worded, true descriptions, lower case, of at most MAX_WORDS words each.

    Everything that mirroring the picture would make false contains the word left or right.
    """
    write = Writer(scene, scene.rng("captions"))
    chosen = [write.listing, *write.rng.sample(write.wordings(), 4)]
    write.rng.shuffle(chosen)
    drawn = (iter(wording, None) for wording in chosen)  # again and again, with other objects or fewer details
    return [next(text for text in texts if len(text.replace(",", " ,").split()) <= MAX_WORDS) for texts in drawn]


def named_objects(scene: Scene, caption: str) -> list[bool]:
    """Whether the caption names each object: by color and shape, which no two objects of a scene share."""
    return [o.label in caption for o in scene.objects]


# ---------------------------------------------------------------- questions


def questions(scene: Scene, count: int) -> list[dict]:
    """Up to `count` different questions: {"kind", "question", "answer": ten strings, "answer_type"}.

    At least six of the ten annotators give the true answer. A scene with a sign is always asked what it says.
    """
    rng = scene.rng("questions")
    kinds = [kind for kind in QUESTIONS if kind != "text"]
    rng.shuffle(kinds)
    kinds = ["text"] * any(o.word for o in scene.objects) + kinds
    found: dict[str, dict] = {}
    for kind in itertools.islice(itertools.cycle(kinds), 4 * count + len(kinds)):
        if len(found) == count:
            break
        question, truth = QUESTIONS[kind](scene, rng) or (None, None)
        if question and question not in found:
            dissenters = rng.choice((0, 0, 0, 1, 1, 2, 3, 4))
            answers = [truth] * (10 - dissenters) + [rng.choice(_near_misses(kind, truth)) for _ in range(dissenters)]
            rng.shuffle(answers)
            answer_type = {"yes or no": "yes/no", "how many": "number"}.get(kind, "other")
            found[question] = {"kind": kind, "question": question, "answer": answers, "answer_type": answer_type}
    return list(found.values())


def answer_list() -> list[str]:
    """Every answer that can be true, each once."""
    lists = (["yes", "no"], map(str, range(5)), COLORS, BACKGROUNDS, SHAPES)
    return list(dict.fromkeys(itertools.chain(*lists, *PLACES, WORDS)))


def _near_misses(kind: str, truth: str) -> list[str]:
    """What an annotator who disagrees may say: a neighbor in the list of answers, or another wording."""
    if kind == "yes or no":
        return ["no" if truth == "yes" else "yes"]
    if kind == "how many":
        return [NUMBERS[int(truth)], NUMBERS[int(truth)], str(int(truth) + 1)]  # "two" scores like "2" officially
    if kind == "where":
        coarse = truth.split()
        return coarse if len(coarse) == 2 else ["center", "in the center"] if truth == "middle" else [f"{truth} side"]
    answers = next(answers for answers in map(list, (COLORS, BACKGROUNDS, SHAPES, WORDS)) if truth in answers)
    at = answers.index(truth)
    return [answers[at - 1], answers[(at + 1) % len(answers)]]


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = [o.shape for o in scene.objects]
    unique = [(f"What color is the {o.shape}?", o.color) for o in scene.objects if shapes.count(o.shape) == 1]
    return rng.choice(unique) if unique else None


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """By color, or by an object beside it if only one object can be meant; never a sign's."""
    colors = [o.color for o in scene.objects]
    drawn = [o for o in scene.objects if not o.word]
    asked = [(f"What shape is the {o.color} object?", o.shape) for o in drawn if colors.count(o.color) == 1]
    for a, b in itertools.product(drawn, scene.objects):
        if a is b or len(relation(a, b)) > 1:
            continue
        rivals = [o for o in scene.objects if o is not b and _on_side(o, b, relation(a, b)[0])]
        if rivals == [a]:
            asked.append((f"What shape is {_to(a, b)} the {b.label}?", a.shape))
    return rng.choice(asked) if asked else None


def _on_side(a: SceneObject, b: SceneObject, side: str) -> bool:
    """Whether any part of a lies further to that side than b's center does, so that it might be called so."""
    x, y = b.center
    return {"left": a.box[0] < x, "right": a.box[2] > x, "above": a.box[1] < y, "below": a.box[3] > y}[side]


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    form = rng.randrange(3)
    if form == 0:
        return "How many objects are there?", str(len(scene.objects))
    if form == 1:
        color = rng.choice([o.color for o in scene.objects] + [rng.choice(list(COLORS))])
        return f"How many {color} objects are there?", str(sum(o.color == color for o in scene.objects))
    shape = rng.choice([o.shape for o in scene.objects if not o.word] + [rng.choice(SHAPES)])
    plural = shape + ("es" if shape == "cross" else "s")
    return f"How many {plural} are there?", str(sum(o.shape == shape for o in scene.objects))


def _ask_yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Yes and no are equally likely, whatever is asked."""
    truth = rng.random() < 0.5
    o = rng.choice([o for o in scene.objects if not o.word])
    form = rng.randrange(3 if len(scene.objects) > 1 else 2)
    if form == 0:  # an absent object shares the color or the shape of one that is there
        there = [(x.color, x.shape) for x in scene.objects]
        mixed = [(c, o.shape) for c in COLORS] + [(o.color, s) for s in SHAPES]
        absent = [pair for pair in mixed if pair not in there]
        color, shape = (o.color, o.shape) if truth else rng.choice(absent)
        question = f"Is there a {color} {shape}?"
    elif form == 1:
        other = next(size for size in SIZES if size != o.size)
        question = f"Is the {o.label} {o.size if truth else other}?"
    else:
        b = rng.choice([x for x in scene.objects if x is not o])
        question = f"Is the {o.label} {_to(o, b) if truth else _to(b, o)} the {b.label}?"
    return question, "yes" if truth else "no"


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    return f"Where is the {o.label}?", o.place


def _ask_text(scene: Scene, rng: random.Random) -> tuple[str, str]:
    sign = next(o for o in scene.objects if o.word)
    return f"What does the {rng.choice((sign.label, 'sign'))} say?", sign.word


QUESTIONS = {
    "what color": _ask_color,
    "what shape": _ask_shape,
    "how many": _ask_count,
    "yes or no": _ask_yes_no,
    "where": _ask_where,
    "background": lambda scene, rng: ("What color is the background?", scene.background),
    "text": _ask_text,
}


# ---------------------------------------------------------------- pictures


def render(scene: Scene, size: int, texture: float = 0) -> Image.Image:
    """The scene as an RGB picture of size x size pixels; each object stays inside its `pixel_box`.

    `texture`: how strong colored grains cover the background, as levels of 255 (a uniform deviation up to it).
    """
    rng = scene.rng("paint")
    picture = _paint_background(scene, size, texture, np.random.default_rng(rng.getrandbits(64)))
    for o in scene.objects:
        x0, y0, x1, y1 = o.pixel_box(size)
        paint, mask = _paint_object(o, x1 - x0, y1 - y0, rng)
        picture.paste(paint, (x0, y0), mask)
    return picture


def patch_objects(scene: Scene, size: int, grid: int, least: float = 0.25) -> list[int]:
    """Which object each of grid x grid patches of the rendered picture shows, from left to right, top to bottom.

    The number of the object in `scene.objects` that covers most of the patch, or -1 (background) if none covers
    `least` of it. What counts is the drawn shape, not its box: the hole of a ring is background.
    """
    canvas = np.zeros((len(scene.objects), size, size), np.float32)
    for layer, o in zip(canvas, scene.objects, strict=True):
        x0, y0, x1, y1 = o.pixel_box(size)
        outer, _ = _masks(o.shape, x1 - x0, y1 - y0)
        layer[y0:y1, x0:x1] = np.asarray(outer.reduce(SUPERSAMPLE), np.float32) / 255
    edges = [size * k // grid for k in range(grid)]
    covered = np.add.reduceat(np.add.reduceat(canvas, edges, axis=1), edges, axis=2) * (grid / size) ** 2  # [O, g, g]
    return np.where(covered.max(0) >= least, covered.argmax(0), -1).flatten().tolist()


def _paint_background(scene: Scene, size: int, texture: float, rng: np.random.Generator) -> Image.Image:
    color = np.asarray(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    pixels = np.tile(color, (size, size, 1))
    if scene.finish == "cloudy":
        coarse = Image.fromarray(rng.uniform(-45, 45, (5, 5)).astype(np.float32))
        pixels += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    if texture:
        grains = rng.uniform(-texture, texture, (size // GRAIN + 1, size // GRAIN + 1, 3))
        pixels += grains.repeat(GRAIN, 0).repeat(GRAIN, 1)[:size, :size]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paint_object(o: SceneObject, width: int, height: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """(colors, coverage) of one object, drawn SUPERSAMPLE times too large and reduced."""
    color = tuple(min(255, max(0, channel + rng.randint(-9, 9))) for channel in COLORS[o.color])
    outer, inner = _masks(o.shape, width, height)
    paint = Image.new("RGB", outer.size, tuple(round(channel / 2) for channel in color))
    paint.paste(color, mask=inner)
    if o.word:
        luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
        ink = (255, 255, 255) if luminance < 130 else (15, 15, 15)
        paint.paste(ink, mask=_word_mask(o.word, width, height))
    return paint.reduce(SUPERSAMPLE), outer.reduce(SUPERSAMPLE)


@lru_cache(maxsize=4096)
def _masks(shape: str, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """The shape's mask and the same without its outline, both SUPERSAMPLE times as large as the box."""
    size = width, height = width * SUPERSAMPLE, height * SUPERSAMPLE
    outer = Image.new("L", size, 0)
    draw = ImageDraw.Draw(outer)
    everything = [0, 0, width - 1, height - 1]
    if shape in ("circle", "ring"):
        draw.ellipse(everything, fill=255)
        if shape == "ring":
            draw.ellipse([0.27 * width, 0.27 * height, 0.73 * width, 0.73 * height], fill=0)
    elif shape == "square":
        draw.rectangle(everything, fill=255)
    elif shape == "sign":
        draw.rounded_rectangle(everything, radius=height * 0.2, fill=255)
    else:
        draw.polygon([(x * (width - 1), y * (height - 1)) for x, y in POLYGONS[shape]], fill=255)
    line = max(2, round(0.04 * min(size)))
    padded = ImageOps.expand(outer, line, fill=0)
    thin = padded.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 * (value >= 254))  # erosion by `line`
    return outer, ImageChops.darker(outer, thin.crop((line, line, line + width, line + height)))


def _star() -> list[tuple[float, float]]:
    """The corners of a star that fills the unit square."""
    around = [((0.45 if k % 2 else 1), math.pi * k / 5) for k in range(10)]
    corners = np.array([(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in around])
    return ((corners - corners.min(0)) / np.ptp(corners, 0)).tolist()


_CROSS = [(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)]
_CROSS += [(0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)]
POLYGONS = {"triangle": [(0, 1), (0.5, 0), (1, 1)], "star": _star(), "cross": _CROSS}


@lru_cache(maxsize=4096)
def _word_mask(word: str, width: int, height: int) -> Image.Image:
    """The word in capitals, as large as the sign allows, in Pillow's built-in font."""
    size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    x0, y0, x1, y1 = ImageFont.load_default(100).getbbox(word.upper())
    scale = min(0.86 * size[0] / (x1 - x0), 0.62 * size[1] / (y1 - y0))
    mask = Image.new("L", size, 0)
    line, middle = max(1, SUPERSAMPLE * height // 50), (size[0] / 2, size[1] / 2)
    font = ImageFont.load_default(100 * scale)
    ImageDraw.Draw(mask).text(middle, word.upper(), 255, font, anchor="mm", stroke_width=line)
    return mask
