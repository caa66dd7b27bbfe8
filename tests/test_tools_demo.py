"""The demo data: what is true is judged from pixel boxes and attributes by code of this file alone."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import contents

from tools.demo import __main__ as make_demo_data
from tools.demo import scenes
from utils import UserError

SIZE = 256
MANY = [scenes.make_scene(3, index) for index in range(400)]
CONFIGS = Path(__file__).parent.parent / "configs"

COLOR = "red|yellow|green|blue"
SHAPE = "circle|square|triangle|star|cross|ring|sign"
PHRASE = re.compile(
    rf"(?P<article>an?|the) (?:(?P<size>small|large) )?"
    rf"(?P<color>{COLOR}) (?P<shape>{SHAPE})(?: that says (?P<word>\w+))?"
)
REL = r"((?:above|below)(?: and to the (?:left|right) of)?|to the (?:left|right) of)"
CORNERS = r"in the (?:top|bottom) (?:left|right) corner"
PLACE = rf"({CORNERS}|at the top|at the bottom|on the left|on the right|in the middle)"
GROUND = r"on a (plain|cloudy) (gray|pink|brown|turquoise) background"


# ---------------------------------------------------------------- an independent judge of captions


def boxes_of(scene, mirrored=False):
    boxes = [o.pixel_box(SIZE) for o in scene.objects]
    return [[SIZE - x1, y0, SIZE - x0, y1] if mirrored else [x0, y0, x1, y1] for x0, y0, x1, y1 in boxes]


def relation_holds(a, b, words):
    """The directions named hold for the centers; a single one also for the whole boxes."""
    shift = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    named = re.findall("left|right|above|below", words)
    far = {"left": -shift[0], "right": shift[0], "above": -shift[1], "below": shift[1]}
    if len(named) == 2:
        return all(far[name] > 0.1 * SIZE for name in named)
    apart = {"left": a[2] <= b[0], "right": a[0] >= b[2], "above": a[3] <= b[1], "below": a[1] >= b[3]}
    return apart[named[0]] and far[named[0]] > max(map(abs, shift)) - 1e-6


def place_holds(box, words):
    third = [int((box[k] + box[k + 2]) / 2 / SIZE * 3) for k in (0, 1)]
    column = 0 if "left" in words else 2 if "right" in words else 1
    row = 0 if "top" in words else 2 if "bottom" in words else 1
    return third == [column, row]


def is_true(caption, scene, mirrored=False):
    """Whether the scene is as the caption says; AssertionError for a caption outside the known wordings."""
    boxes, named = boxes_of(scene, mirrored), []
    for phrase in PHRASE.finditer(caption):
        wanted = {key: value for key, value in phrase.groupdict().items() if value and key != "article"}
        fitting = [k for k, o in enumerate(scene.objects) if all(getattr(o, key) == wanted[key] for key in wanted)]
        if len(fitting) != 1 or fitting[0] in named:
            return False
        named += fitting
    skeleton = PHRASE.sub("#", caption)
    if m := re.fullmatch(rf"(.*) with #(?: {PLACE})?", skeleton):  # the last of the objects, after all the others
        if m[2] is not None and not place_holds(boxes[named[-1]], m[2]):
            return False
        skeleton = m[1]
    count, ground = len(scene.objects), (scene.finish, scene.background)

    def related(i, j, words):
        return relation_holds(boxes[named[i]], boxes[named[j]], words)

    def at(i, words):
        return place_holds(boxes[named[i]], words)

    def near(a, b):
        beside = relation_holds(a, b, "left") or relation_holds(a, b, "right")
        return beside and max(a[0], b[0]) - min(a[2], b[2]) <= 0.2 * SIZE + 1

    wordings = {
        rf"# (?:is )?{REL} #": lambda m: related(0, 1, m[1]),
        rf"{REL} # there is #": lambda m: related(1, 0, m[1]),
        rf"# is {REL} # and (?:{REL} )?#": lambda m: related(0, 1, m[1]) and related(0, 2, m[2] or m[1]),
        rf"# (?:says|reads) (\w+) and # is {REL} it": lambda m: (
            scene.objects[named[0]].word == m[1] and related(1, 0, m[2])
        ),
        rf"# {PLACE} and # {PLACE}": lambda m: at(0, m[1]) and at(1, m[2]),
        rf"# {PLACE}|{PLACE} there is #": lambda m: count == 1 and at(0, m[1] or m[2]),
        r"(?:a picture of|(two|three) objects:|we see|this picture shows) #(?:(?:, #)* and #)?": lambda m: (
            len(named) == count and m[1] in (None, {1: "one", 2: "two", 3: "three"}[count])
        ),
        rf"{GROUND} #(?:(?:, #)* and #)?": lambda m: m.groups() == ground,
        rf"# {GROUND}": lambda m: count == 1 and m.groups() == ground,
        rf"# next to # {GROUND}": lambda m: m.groups() == ground and near(*(boxes[k] for k in named[:2])),
    }
    found = [holds(m) for wording, holds in wordings.items() if (m := re.fullmatch(wording, skeleton))]
    assert len(found) == 1, f"unknown wording: {caption}"
    return found[0]


def test_captions_are_five_true_wordings_of_bounded_length_that_mirroring_keeps_true_without_left_and_right():
    kept = 0
    for scene in MANY:
        written = scenes.captions(scene)
        assert len({PHRASE.sub("#", caption) for caption in written}) == 5
        for caption in written:
            assert len(caption.replace(",", " ,").split()) <= 24
            assert len(PHRASE.findall(caption)) == len(scene.objects)
            assert is_true(caption, scene), (caption, scene)
            if not re.search("left|right", caption):
                kept += 1
                assert is_true(caption, scene, mirrored=True), (caption, scene)
    assert kept > 200


def test_every_word_is_in_berts_vocabulary_and_in_the_demos_own_part_of_it():
    known, own = ((CONFIGS / name / "vocab.txt").read_text(encoding="utf-8").split() for name in ("bert", "demo"))
    assert len(own) == len(set(own)) and set(own) < set(known)
    texts = [caption for scene in MANY for caption in scenes.captions(scene)]
    texts += [asked["question"].lower() for scene in MANY for asked in scenes.questions(scene, 8)]
    texts += scenes.answer_list() + [o.label for scene in MANY for o in scene.objects] + list(scenes.WORDS)
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert words - set(own) == set()


# ---------------------------------------------------------------- scenes and pictures


@pytest.mark.parametrize("option", ["--train=-1", "--val=3001", "--test=6001", "--size=8", "--texture=256"])
def test_numbers_that_no_data_can_have_are_refused_before_work(tmp_path, option):
    with pytest.raises(UserError, match=option.replace("=", " is ")):
        make_demo_data.main(["--output", str(tmp_path), option])


def test_splits_share_no_scene_and_evaluation_repeats_none():
    counts = {"train": 3000, "val": 300, "test": 600}
    chosen = scenes.plan(0, counts)
    kinds = {split: {scenes.make_scene(0, i).signature for i in found} for split, found in chosen.items()}
    assert {split: len(found) for split, found in chosen.items()} == counts
    assert len(kinds["val"]) == 300 and len(kinds["test"]) == 600
    assert len(set.union(*kinds.values())) == sum(map(len, kinds.values()))


def drawn(scene, o, size):
    """Where the picture of one object differs from the bare background: [size, size]"""
    alone, bare = (dataclasses.replace(scene, objects=objects) for objects in ((o,), ()))
    return np.abs(np.asarray(scenes.render(alone, size), int) - np.asarray(scenes.render(bare, size), int)).sum(-1) > 30


def test_a_texture_lies_under_the_objects():
    for scene in MANY[:20]:
        plain, textured = (np.asarray(scenes.render(scene, 72, texture), int) for texture in (0, 80))
        ground = np.array(scenes.patch_objects(scene, 72, 72, least=0.01)).reshape(72, 72) == -1
        inside = np.array(scenes.patch_objects(scene, 72, 72, least=1)).reshape(72, 72) >= 0
        moved = np.abs(textured - plain)
        assert 15 < moved[ground].mean() < 45 and not moved[inside].any()


@pytest.mark.parametrize("size", [64, 225])
def test_boxes_lie_apart_and_hold_exactly_the_pixels_of_their_objects(size):
    for scene in MANY[:60]:
        covered = np.zeros((size, size), int)
        for o in scene.objects:
            box = x0, y0, x1, y1 = o.pixel_box(size)
            rows, columns = np.nonzero(drawn(scene, o, size))
            left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert 0 <= x0 <= left and right <= x1 <= size and 0 <= y0 <= top and bottom <= y1 <= size, (o, box)
            assert right - left >= 0.75 * (x1 - x0) and bottom - top >= 0.75 * (y1 - y0), (o, box)
            covered[y0:y1, x0:x1] += 1
        assert covered.max() <= 1


def test_a_patch_belongs_to_the_object_whose_pixels_fill_it():
    size, grid, compared = 96, 6, 0
    for scene in MANY[:60]:
        shares = np.stack([drawn(scene, o, size).reshape(grid, 16, grid, 16).mean((1, 3)) for o in scene.objects])
        clear = np.abs(shares.max(0) - 0.25) > 0.12  # outlines are mixed with the background
        expected = np.where(shares.max(0) >= 0.25, shares.argmax(0), -1)
        found = np.array(scenes.patch_objects(scene, size, grid)).reshape(grid, grid)
        assert (found == expected)[clear].all(), scene
        compared += clear.sum()
    assert compared > 0.8 * 60 * grid**2


# ---------------------------------------------------------------- questions


def truth_of(question, scene):
    """The answer, found again from the boxes and attributes."""
    boxes = {o.label: o.pixel_box(SIZE) for o in scene.objects}
    objects, places = {o.label: o for o in scene.objects}, [place for row in scenes.PLACES for place in row]
    there = scene.objects

    def the_only(answers):
        (answer,) = answers
        return answer

    def yes(holds):
        return "yes" if holds else "no"

    answers = {
        rf"What color is the ({SHAPE})\?": lambda m: the_only(o.color for o in there if o.shape == m[1]),
        rf"What shape is the ({COLOR}) object\?": lambda m: the_only(o.shape for o in there if o.color == m[1]),
        rf"What shape is {REL} the ([\w ]+)\?": lambda m: the_only(
            o.shape for o in there if relation_holds(boxes[o.label], boxes[m[2]], m[1])
        ),
        r"How many objects are there\?": lambda m: str(len(there)),
        rf"How many ({COLOR}) objects are there\?": lambda m: str(sum(o.color == m[1] for o in there)),
        rf"How many ({SHAPE})e?s are there\?": lambda m: str(sum(o.shape == m[1] for o in there)),
        r"Is there an? ([\w ]+)\?": lambda m: yes(m[1] in objects),
        rf"Is the ((?:{COLOR}) \w+) (small|large)\?": lambda m: yes(m[2] == objects[m[1]].size),
        rf"Is the ([\w ]+?) {REL} the ([\w ]+)\?": lambda m: yes(relation_holds(boxes[m[1]], boxes[m[3]], m[2])),
        r"Where is the ([\w ]+)\?": lambda m: the_only(place for place in places if place_holds(boxes[m[1]], place)),
        r"What color is the background\?": lambda m: scene.background,
        rf"What does the (?:(?:{COLOR}) )?sign say\?": lambda m: the_only(o.word for o in there if o.word),
    }
    return the_only(found(m) for pattern, found in answers.items() if (m := re.fullmatch(pattern, question)))


def test_questions_cover_every_kind_balance_yes_and_no_and_most_of_ten_annotators_are_right():
    allowed, kinds, yes_no, disputed = scenes.answer_list(), Counter(), Counter(), 0
    assert len(set(allowed)) == len(allowed)
    for scene in MANY:
        asked = scenes.questions(scene, 4)
        assert len(asked) == 4
        for question in asked:
            truth, votes = Counter(question["answer"]).most_common(1)[0]
            assert len(question["answer"]) == 10 and votes >= 6 and truth in allowed
            assert truth == truth_of(question["question"], scene), (question, scene)
            kinds[question["kind"]] += 1
            yes_no[truth] += question["kind"] == "yes or no"
            disputed += votes < 10
    assert len(kinds) == 7 and min(kinds.values()) > 50
    assert 0.35 < yes_no["yes"] / yes_no.total() < 0.65
    assert disputed > len(MANY)  # of 4 questions a scene one or more: annotators do disagree


# ---------------------------------------------------------------- files


def write(folder, options=""):
    sizes = f"--train 20 --val 5 --test 8 --size 48 --workers 1 {options}"
    make_demo_data.main([*sizes.split(), "--output", str(folder)])


def test_files_do_not_depend_on_the_number_of_workers_and_are_left_alone(tmp_path, capsys):
    write(tmp_path / "demo set")
    write(tmp_path / "b", "--workers 3")
    before = contents(tmp_path / "demo set")
    assert contents(tmp_path / "b") == before
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write(tmp_path / "demo set")
    with pytest.raises(UserError, match="demo set: must be a new or an empty folder"):
        write(tmp_path / "demo set", "--seed 1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert "already" in capsys.readouterr().out


def test_files_have_the_published_formats(tmp_path):
    write(tmp_path)
    data = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(data["pretrain"]) == 20 and len(data["pretrain"][0]["caption"]) == 5
    assert len(data["retrieval_train"]) == 100 and isinstance(data["retrieval_train"][0]["caption"], str)
    questions = data["vqa_train"] + data["vqa_val"] + data["vqa_test"]
    assert len({entry["question_id"] for entry in questions}) == len(questions) == 4 * 33
    for entry in questions:
        assert entry["dataset"] == "vqa" and len(entry["answer"]) == 10
        assert {label["label"] for label in data["boxes"][entry["image"]]} == set(entry["object_label"].split("&&"))
        assert all(len(position) == 4 and token in scenes.WORDS for position, token in entry["ocr"])
        assert (tmp_path / entry["image"]).is_file()
    assert len(data["boxes"]) == 33 and "yes" in data["answer_list"]
