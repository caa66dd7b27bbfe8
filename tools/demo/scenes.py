"""The built-in demo data: drawn scenes with captions, labels, printed words, questions and boxes.

A scene holds one to three objects, each with a shape, a color, a size and a place; one of them may
be a sign with a printed word. Nothing is downloaded, everything is a pure function of (seed, index):

    scene = make_scene(seed=0, index=7)
    picture = render(scene, size=64)          # PIL RGB, anti-aliased
    captions(scene)                           # five wordings
    questions(scene, 4)                       # each with the answers of ten simulated annotators

`split_of` assigns a scene to train, val or test by a hash of what its objects are (`Scene.signature`): two
splits can never share a scene, whatever the seeds. Lengths are shares of the picture's side; `pixel_box`
turns them into pixels.
"""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

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
NUMBERS = ("zero", "one", "two", "three", "four")
SPLITS = ("train", "val", "test")

MAX_WORDS = 24  # of a caption, commas counted; with [CLS] the 25 tokens of pre-training
SIGN_SHARE = 0.4  # scenes with a sign, of those with more than one object
SUPERSAMPLE = 4


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
    places, boxes = _draw_layout(rng, [kind[0] for kind in kinds], [kind[2] for kind in kinds])
    objects = tuple(
        SceneObject(*kind, place=place, box=box) for kind, place, box in zip(kinds, places, boxes, strict=True)
    )
    return Scene(seed, index, rng.choice(list(BACKGROUNDS)), rng.choice(FINISHES), objects)


def split_of(scene: Scene) -> str:
    """Ten percent of all signatures belong to val, twenty to test, the others to train."""
    digest = hashlib.blake2b(repr(scene.signature).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return "val" if bucket == 0 else "test" if bucket < 3 else "train"


def plan(seed: int, counts: dict[str, int]) -> dict[str, list[int]]:
    """The first scenes of the series that fill each split; val and test hold no signature twice.

    Returns {split: ascending scene indices}.
    """
    chosen = {split: [] for split in counts}
    seen = set()
    for index in itertools.count():
        if all(len(chosen[split]) >= counts[split] for split in counts):
            return chosen
        scene = make_scene(seed, index)
        split = split_of(scene)
        if len(chosen.get(split, ())) >= counts.get(split, 0):
            continue
        if split != "train":
            if scene.signature in seen:
                continue
            seen.add(scene.signature)
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
        if shape == "sign" or any((shape, color) == kind[:2] for kind in kinds):
            continue
        kinds.append((shape, color, rng.choice(list(SIZES)), ""))
    return kinds


def _draw_layout(rng: random.Random, shapes: list[str], sizes: list[str]) -> tuple[list[str], list[tuple]]:
    """Different cells of a 3x3 grid, drawn again until no two boxes overlap (a sign is wider than its cell).

    Objects lie in the middle of their cells: a small image encoder sees shapes many times sooner so.
    """
    extents = [SIGN_SIZE if shape == "sign" else (SIZES[size],) * 2 for shape, size in zip(shapes, sizes, strict=True)]
    while True:
        cells = rng.sample([(row, column) for row in range(3) for column in range(3)], len(shapes))
        boxes = []
        for (row, column), (width, height) in zip(cells, extents, strict=True):
            x0 = min(max((column + 0.5) / 3 - width / 2, 0), 1 - width)
            y0 = min(max((row + 0.5) / 3 - height / 2, 0), 1 - height)
            boxes.append((x0, y0, x0 + width, y0 + height))
        pairs = itertools.combinations(boxes, 2)
        if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs):
            return [PLACES[row][column] for row, column in cells], boxes


# ---------------------------------------------------------------- labels and relations


def object_label(scene: Scene) -> str:
    """The object labels as mPLUG writes a detector's: "red circle&&white sign"."""
    return "&&".join(o.label for o in scene.objects)


def ocr_tokens(scene: Scene, size: int) -> list[list]:
    """[[box in pixels, word], ...] of the printed words; empty in a scene without a sign."""
    return [[o.pixel_box(size), o.word] for o in scene.objects if o.word]


def object_boxes(scene: Scene, size: int) -> list[dict]:
    return [{"label": o.label, "box": o.pixel_box(size)} for o in scene.objects]


def relation(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """How a lies to b: ("left",), ("above",), or both words if neither direction dominates."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    horizontal, vertical = "left" if dx < 0 else "right", "above" if dy < 0 else "below"
    if abs(dx) >= 1.5 * abs(dy):
        return (horizontal,)
    if abs(dy) >= 1.5 * abs(dx):
        return (vertical,)
    return vertical, horizontal


def _neighbors(a: SceneObject, b: SceneObject) -> bool:
    """Side by side with little between them."""
    gap = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
    return relation(a, b) in (("left",), ("right",)) and gap < 0.2


# ---------------------------------------------------------------- captions


def captions(scene: Scene, count: int = 5) -> list[str]:
    """`count` (at most 5) differently worded, true descriptions, lower case, of at most MAX_WORDS words each.

    Everything that mirroring the picture would make false contains the word left or right.
    """
    rng = scene.rng("captions")
    if len(scene.objects) == 1:
        wordings = [_background_first, _place, _place_first, _background_last]
    else:
        wordings = [_relation_phrase, _relation_sentence, _places, _background_first, _relation_first]
    if _chains(scene):
        wordings.append(_chain)
    if any(o.word for o in scene.objects):
        wordings.append(_sign_first)
    if any(_neighbors(a, b) for a, b in itertools.combinations(scene.objects, 2)):
        wordings.append(_side_by_side)
    chosen = [_listing, *rng.sample(wordings, count - 1)]
    rng.shuffle(chosen)
    return [_short_enough(wording, scene, rng) for wording in chosen]


def _short_enough(wording: Callable[[Scene, random.Random], str], scene: Scene, rng: random.Random) -> str:
    """Words the scene again, with other objects or fewer details, until the caption keeps to MAX_WORDS."""
    while True:
        caption = wording(scene, rng)
        if len(caption.replace(",", " ,").split()) <= MAX_WORDS:
            return caption


def _name(o: SceneObject, rng: random.Random, article: str = "a", size: float = 0.4, word: float = 0.8) -> str:
    """A noun phrase; `size` and `word` are the chances that the size and the printed word are named."""
    adjectives = [o.size] if not o.word and rng.random() < size else []
    words = [*adjectives, o.color, o.shape]
    tail = f" that says {o.word}" if o.word and rng.random() < word else ""
    return f"{article} {' '.join(words)}{tail}"


def _relation_words(a: SceneObject, b: SceneObject) -> str:
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    return " and ".join(words[part] for part in relation(a, b))


def _place_words(o: SceneObject) -> str:
    if o.place in ("left", "right"):
        return f"on the {o.place}"
    if o.place in ("top", "bottom"):
        return f"at the {o.place}"
    return "in the middle" if o.place == "middle" else f"in the {o.place} corner"


def _background_words(scene: Scene) -> str:
    return f"a {scene.finish} {scene.background} background"


def _in_order(scene: Scene) -> list[SceneObject]:
    """The objects as one reads a page, a sign last so that "that says stop" does not cut a sentence in two."""
    rows = [place for row in PLACES for place in row]
    return sorted(scene.objects, key=lambda o: (bool(o.word), rows.index(o.place)))


def _pair(scene: Scene, rng: random.Random) -> tuple[SceneObject, SceneObject]:
    """Two random objects; a sign comes second."""
    a, b = rng.sample(scene.objects, 2)
    return (b, a) if a.word else (a, b)


def _rest(scene: Scene, rng: random.Random, *named: SceneObject) -> str:
    """The end of a caption that has named all objects but at most one."""
    others = [o for o in scene.objects if o not in named]
    place = f" {_place_words(others[0])}" if others and rng.random() < 0.5 else ""
    return f" with {_name(others[0], rng, size=0, word=0)}{place}" if others else ""


def _list(scene: Scene, rng: random.Random) -> str:
    *names, last = (_name(o, rng) for o in _in_order(scene))
    return f"{', '.join(names)} and {last}" if names else last


def _relation_phrase(scene: Scene, rng: random.Random) -> str:
    a, b = _pair(scene, rng)
    return f"{_name(a, rng)} {_relation_words(a, b)} {_name(b, rng)}{_rest(scene, rng, a, b)}"


def _relation_sentence(scene: Scene, rng: random.Random) -> str:
    a, b = _pair(scene, rng)
    return f"{_name(a, rng, 'the')} is {_relation_words(a, b)} {_name(b, rng, 'the')}{_rest(scene, rng, a, b)}"


def _places(scene: Scene, rng: random.Random) -> str:
    a, b = _pair(scene, rng)
    return f"{_name(a, rng)} {_place_words(a)} and {_name(b, rng)} {_place_words(b)}{_rest(scene, rng, a, b)}"


def _listing(scene: Scene, rng: random.Random) -> str:
    count = len(scene.objects)
    start = rng.choice(
        ("a picture of", "we see", "this picture shows", f"{NUMBERS[count]} objects:")[: 3 + (count > 1)]
    )
    return f"{start} {_list(scene, rng)}"


def _background_first(scene: Scene, rng: random.Random) -> str:
    return f"on {_background_words(scene)} {_list(scene, rng)}"


def _background_last(scene: Scene, rng: random.Random) -> str:
    return f"{_list(scene, rng)} on {_background_words(scene)}"


def _place(scene: Scene, rng: random.Random) -> str:
    """Of a scene with one object, as `_place_first`."""
    return f"{_list(scene, rng)} {_place_words(scene.objects[0])}"


def _place_first(scene: Scene, rng: random.Random) -> str:
    return f"{_place_words(scene.objects[0])} there is {_list(scene, rng)}"


def _relation_first(scene: Scene, rng: random.Random) -> str:
    """The inverse order: "above the blue star there is a red circle"."""
    b, a = _pair(scene, rng)
    return f"{_relation_words(a, b)} {_name(b, rng, 'the')} there is {_name(a, rng)}{_rest(scene, rng, a, b)}"


def _chains(scene: Scene) -> list[tuple[SceneObject, SceneObject, SceneObject]]:
    """Triples (a, b, c) in which a lies straight beside, above or below b and c; a sign can only be c."""
    triples = itertools.permutations(scene.objects, 3)
    return [
        (a, b, c)
        for a, b, c in triples
        if len(relation(a, b)) == len(relation(a, c)) == 1 and not a.word and not b.word
    ]


def _chain(scene: Scene, rng: random.Random) -> str:
    a, b, c = rng.choice(_chains(scene))
    second = "" if relation(a, b) == relation(a, c) else f"{_relation_words(a, c)} "
    objects = f"{_name(b, rng, size=0)} and {second}{_name(c, rng, size=0)}"
    return f"{_name(a, rng, size=0)} is {_relation_words(a, b)} {objects}"


def _sign_first(scene: Scene, rng: random.Random) -> str:
    sign = next(o for o in scene.objects if o.word)
    other = rng.choice([o for o in scene.objects if o is not sign])
    verb = rng.choice(("says", "reads"))
    relation = f"{_name(other, rng)} is {_relation_words(other, sign)} it"
    return f"the {sign.label} {verb} {sign.word} and {relation}{_rest(scene, rng, sign, other)}"


def _side_by_side(scene: Scene, rng: random.Random) -> str:
    pairs = [pair for pair in itertools.combinations(scene.objects, 2) if _neighbors(*pair)]
    a, b = sorted(rng.choice(pairs), key=lambda o: (bool(o.word), rng.random()))
    return f"{_name(a, rng)} next to {_name(b, rng)} on {_background_words(scene)}{_rest(scene, rng, a, b)}"


# ---------------------------------------------------------------- questions


def questions(scene: Scene, count: int) -> list[dict]:
    """Up to `count` different questions: {"kind", "question", "answer": ten strings, "answer_type"}.

    At least six of the ten annotators give the true answer. A scene with a sign is always asked what it says.
    """
    rng = scene.rng("questions")
    kinds = [kind for kind in _QUESTIONS if kind != "text"]
    rng.shuffle(kinds)
    if any(o.word for o in scene.objects):
        kinds.insert(0, "text")
    found: dict[str, dict] = {}
    for kind in itertools.islice(itertools.cycle(kinds), 4 * count + len(kinds)):
        if len(found) == count:
            break
        asked = _QUESTIONS[kind](scene, rng)
        if asked and asked[0] not in found:
            question, truth = asked
            found[question] = {
                "kind": kind,
                "question": question,
                "answer": _ten_answers(kind, truth, rng),
                "answer_type": {"yes or no": "yes/no", "how many": "number"}.get(kind, "other"),
            }
    return list(found.values())


def answer_list() -> list[str]:
    """Every answer that can be true, each once."""
    lists = (["yes", "no"], map(str, range(5)), COLORS, BACKGROUNDS, SHAPES)
    return list(dict.fromkeys(itertools.chain(*lists, *PLACES, WORDS)))


def _ten_answers(kind: str, truth: str, rng: random.Random) -> list[str]:
    dissenters = rng.choice((0, 0, 0, 1, 1, 2, 3, 4))
    answers = [truth] * (10 - dissenters) + [rng.choice(_near_misses(kind, truth)) for _ in range(dissenters)]
    rng.shuffle(answers)
    return answers


def _near_misses(kind: str, truth: str) -> list[str]:
    """What an annotator who disagrees may say: a neighbor in the list of answers, or another wording."""
    if kind == "yes or no":
        return ["no" if truth == "yes" else "yes"]
    if kind == "how many":
        return [NUMBERS[int(truth)], NUMBERS[int(truth)], str(int(truth) + 1)]  # "two" scores like "2" officially
    if kind == "where":
        coarse = truth.split()
        return coarse if len(coarse) == 2 else ["center", "in the center"] if truth == "middle" else [f"{truth} side"]
    lists = (list(COLORS), list(BACKGROUNDS), list(SHAPES), WORDS)
    answers = next(answers for answers in lists if truth in answers)
    at = answers.index(truth)
    return [answers[at - 1], answers[(at + 1) % len(answers)]]


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = [o.shape for o in scene.objects]
    unique = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if not unique:
        return None
    o = rng.choice(unique)
    return f"What color is the {o.shape}?", o.color


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
            asked.append((f"What shape is {_relation_words(a, b)} the {b.label}?", a.shape))
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
        mixed = [(c, o.shape) for c in COLORS] + [(o.color, s) for s in SHAPES]
        absent = [pair for pair in mixed if all(pair != (x.color, x.shape) for x in scene.objects)]
        color, shape = (o.color, o.shape) if truth else rng.choice(absent)
        question = f"Is there a {color} {shape}?"
    elif form == 1:
        other = next(size for size in SIZES if size != o.size)
        question = f"Is the {o.label} {o.size if truth else other}?"
    else:
        b = rng.choice([x for x in scene.objects if x is not o])
        pair = (o, b) if truth else (b, o)
        question = f"Is the {o.label} {_relation_words(*pair)} the {b.label}?"
    return question, "yes" if truth else "no"


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    o = rng.choice(scene.objects)
    return f"Where is the {o.label}?", o.place


def _ask_background(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "What color is the background?", scene.background


def _ask_text(scene: Scene, rng: random.Random) -> tuple[str, str]:
    sign = next(o for o in scene.objects if o.word)
    return f"What does the {rng.choice((sign.label, 'sign'))} say?", sign.word


_QUESTIONS = {
    "what color": _ask_color,
    "what shape": _ask_shape,
    "how many": _ask_count,
    "yes or no": _ask_yes_no,
    "where": _ask_where,
    "background": _ask_background,
    "text": _ask_text,
}


# ---------------------------------------------------------------- pictures


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of size x size pixels; each object stays inside its `pixel_box`."""
    rng = scene.rng("paint")
    picture = _paint_background(scene, size, np.random.default_rng(rng.getrandbits(64)))
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
    best = covered.argmax(0)
    return np.where(covered.max(0) >= least, best, -1).flatten().tolist()


def named_objects(scene: Scene, caption: str) -> list[bool]:
    """Whether the caption names each object: by color and shape, which no two objects of a scene share."""
    return [re.search(rf"\b{o.label}\b", caption) is not None for o in scene.objects]


def _paint_background(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    base = np.asarray(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    if scene.finish == "cloudy":
        coarse = Image.fromarray(rng.uniform(-45, 45, (5, 5)).astype(np.float32))
        change = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    else:
        change = np.zeros((size, size), np.float32)
    return Image.fromarray((base + change[..., None]).clip(0, 255).astype(np.uint8))


def _paint_object(o: SceneObject, width: int, height: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """(colors, coverage) of one object, drawn SUPERSAMPLE times too large and reduced."""
    color = tuple(min(255, max(0, channel + rng.randint(-9, 9))) for channel in COLORS[o.color])
    outer, inner = _masks(o.shape, width, height)
    paint = Image.new("RGB", outer.size, tuple(round(channel / 2) for channel in color))
    fill = Image.new("RGB", outer.size, color)
    paint.paste(fill, mask=inner)
    if o.word:
        luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
        ink = (255, 255, 255) if luminance < 130 else (15, 15, 15)
        paint.paste(ink, mask=_word_mask(o.word, width, height))
    return paint.reduce(SUPERSAMPLE), outer.reduce(SUPERSAMPLE)


@lru_cache(maxsize=4096)
def _masks(shape: str, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """The shape's mask and the same without its outline, both SUPERSAMPLE times as large as the box."""
    size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    outer = Image.new("L", size, 0)
    draw = ImageDraw.Draw(outer)
    everything = [0, 0, size[0] - 1, size[1] - 1]
    if shape in ("circle", "ring"):
        draw.ellipse(everything, fill=255)
    if shape == "ring":
        draw.ellipse([0.27 * size[0], 0.27 * size[1], 0.73 * size[0], 0.73 * size[1]], fill=0)
    elif shape == "square":
        draw.rectangle(everything, fill=255)
    elif shape == "sign":
        draw.rounded_rectangle(everything, radius=size[1] * 0.2, fill=255)
    elif shape != "circle":
        draw.polygon([(x * (size[0] - 1), y * (size[1] - 1)) for x, y in _outline(shape)], fill=255)
    line = max(2, round(0.04 * min(size)))
    padded = ImageOps.expand(outer, line, fill=0)
    thin = padded.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 * (value >= 254))  # erosion by `line`
    return outer, ImageChops.darker(outer, thin.crop((line, line, line + size[0], line + size[1])))


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a polygon that fills the unit square."""
    if shape == "star":
        angles = [math.pi * k / 5 for k in range(10)]
        points = [
            ((0.45 if k % 2 else 1) * math.sin(a), -(0.45 if k % 2 else 1) * math.cos(a)) for k, a in enumerate(angles)
        ]
    elif shape == "triangle":
        points = [(0, 1), (0.5, 0), (1, 1)]
    else:  # a cross
        points = [(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)]
        points += [(0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)]
    columns, rows = zip(*points, strict=True)
    return tuple(
        ((x - min(columns)) / (max(columns) - min(columns)), (y - min(rows)) / (max(rows) - min(rows)))
        for x, y in points
    )


@lru_cache(maxsize=4096)
def _word_mask(word: str, width: int, height: int) -> Image.Image:
    """The word in capitals, as large as the sign allows, in Pillow's built-in font."""
    size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    trial = ImageFont.load_default(100)
    x0, y0, x1, y1 = trial.getbbox(word.upper())
    scale = min(0.86 * size[0] / (x1 - x0), 0.62 * size[1] / (y1 - y0))
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    draw.text(
        (size[0] / 2, size[1] / 2),
        word.upper(),
        fill=255,
        font=ImageFont.load_default(100 * scale),
        anchor="mm",
        stroke_width=max(1, SUPERSAMPLE * height // 50),
    )
    return mask
