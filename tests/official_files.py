"""Small files in the layouts in which the data sets are published, written from their published descriptions."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import encoded

from dataset import create_dataset
from engine.config import STAGES, load_config
from tools.prepare import __main__ as prepare


@pytest.fixture
def source(tmp_path):
    """A folder of downloads with Karpathy's files; a test module that wants it has `source = official.source`."""
    folder = tmp_path / "downloads"
    karpathy_coco(folder)
    karpathy_flickr(folder)
    return folder


@pytest.fixture
def run(tmp_path, source, capsys):
    """Runs a preparation of what is in `source`; returns what it printed."""

    def run(name, *options):
        prepare.main([name, "--source", str(source), "--output", str(tmp_path / "data"), "--workers", "1", *options])
        return capsys.readouterr().out

    return run


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def open_set(kind: str, *overrides: str, split: str | None = None, config: str | None = None):
    """A data set of the project made from one of its configurations, as its stage makes it."""
    stage = STAGES[kind.split("_")[0]]
    cfg = load_config(f"configs/{config}.yaml" if config else stage.schema, overrides, stage)
    return create_dataset(kind, cfg, split)


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def picture(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A smooth random image that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, number: int, size: tuple[int, int] = (96, 72), quality: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, size).save(path, quality=quality)
    return path


def karpathy_image(imgid: int, split: str, captions: list[str], cocoid: int | None = None, photo: int = 0) -> dict:
    sentences = [
        {"tokens": text.lower().split(), "raw": text, "imgid": imgid, "sentid": 100 * imgid + i}
        for i, text in enumerate(captions)
    ]
    entry = {"sentids": [s["sentid"] for s in sentences], "imgid": imgid, "sentences": sentences, "split": split}
    if cocoid is None:
        return {**entry, "filename": f"{photo}.jpg"}
    folder = "train2014" if split == "train" else "val2014"
    return {**entry, "filepath": folder, "filename": f"COCO_{folder}_{cocoid:012d}.jpg", "cocoid": cocoid}


def five(subject: str) -> list[str]:
    return [f"A {subject} number {i}.\n" for i in range(5)]


def karpathy_coco(folder: Path) -> Path:
    """Two images of train, one of restval (as in the file: the splits are mixed), two of val, two of test."""
    images = [
        karpathy_image(0, "test", five("dog"), 391895),
        karpathy_image(1, "restval", [*five("cat"), "A cat &amp; a mat"], 522418),
        karpathy_image(2, "val", five("bus"), 184613),
        karpathy_image(3, "train", ["A red kite", "A red kite", " \n", "a kite", "kites"], 57870),
        karpathy_image(4, "train", five("horse"), 222016),
        karpathy_image(5, "test", five("bird"), 60623),
        karpathy_image(6, "val", five("boat"), 318219),
    ]
    return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def karpathy_flickr(folder: Path) -> Path:
    images = [
        karpathy_image(0, "train", five("girl"), photo=1000092795),
        karpathy_image(1, "train", five("boy"), photo=10002456),
        karpathy_image(2, "val", five("man"), photo=1018148011),
        karpathy_image(3, "test", five("woman"), photo=1007129816),
    ]
    return write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def coco_captions(folder: Path, split: str, numbers: list[int], photos: dict[int, int] | None = None) -> Path:
    images = []
    for n in numbers:
        name = f"COCO_{split}_{n:012d}.jpg" if split.endswith("2014") else f"{n:012d}.jpg"
        photo = (photos or {}).get(n, 5000 + n)
        address = f"http://farm5.staticflickr.com/4153/{photo}_cc378fbbc8_z.jpg"
        images.append({"license": 5, "file_name": name, "height": 480, "flickr_url": address, "id": n})
    captions = [{"image_id": n, "id": 10 * n, "caption": f"A thing {n}"} for n in numbers]
    captions += [{"image_id": numbers[0], "id": 7, "caption": "  "}, {"image_id": 999, "id": 8, "caption": "lost"}]
    content = {"info": {"year": 2014}, "images": images, "licenses": [{"id": 5, "name": "x"}], "annotations": captions}
    return write_json(folder / "annotations" / f"captions_{split}.json", content)


def visual_genome(folder: Path, coco_ids: dict[int, int | None], flickr_ids: dict[int, int] | None = None) -> None:
    """One element an image, 100 x 100 pixels, whose regions are the phrases of `PHRASES`."""
    images, regions, pairs = [], [], []
    for n, coco_id in coco_ids.items():
        address = f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' if n % 2 else ''}/{n}.jpg"
        ids = {"image_id": n, "coco_id": coco_id, "flickr_id": (flickr_ids or {}).get(n)}
        images.append({"width": 100, "url": address, "height": 100, **ids})
        found = [
            {"region_id": 100 * n + i, "width": side, "height": side, "phrase": text, "y": 1, "x": 2, "synsets": []}
            for i, (text, side) in enumerate(PHRASES)
        ]
        regions.append({"regions": found, "id": n})
        clock = {"question": "What color is the clock?", "image_id": n, "qa_id": 1000 + n, "answer": "Green."}
        who = {"question": "Who?", "image_id": n, "qa_id": 2000 + n, "answer": "."}
        pairs.append({"id": n, "qas": [clock, who]})
    write_json(folder / "image_data.json", images)
    write_json(folder / "region_descriptions.json", regions)
    write_json(folder / "question_answers.json", pairs)


PHRASES = [  # phrase, side of its square region in an image of 100 x 100
    ("the clock is green in colour", 50),
    ("The clock is green in colour.", 80),  # the same sentence of a larger region
    ("a man &amp; a bicycle", 40),
    ("shade is along the street", 10),
    ("clock", 90),
    (" ", 30),
]


def nocaps(folder: Path, count: int = 4) -> Path:
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [
        {"id": n, "open_images_id": f"{n:016x}", "file_name": f"{n:016x}.jpg", "license": 0, "domain": domains[n % 3]}
        for n in range(count)
    ]
    captions = [
        {"image_id": n, "id": 10 * n + i, "caption": f"Thing {n} {i}."} for n in range(count) for i in range(10)
    ]
    captions[3]["caption"] = "\n"
    content = {"licenses": [], "info": {"year": 2018}, "images": images, "annotations": captions}
    return write_json(folder / "nocaps_val_4500_captions.json", content)


def vqa_questions(folder: Path, split: str, pairs: list[tuple[int, int, str]]) -> Path:
    """pairs: (question id, image id, question)"""
    questions = [{"image_id": image, "question": text, "question_id": number} for number, image, text in pairs]
    task = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split, "questions": questions}
    return write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", task)


def vqa_annotations(folder: Path, split: str, answers: dict[tuple[int, int], list[str]]) -> Path:
    """answers: {(question id, image id): ten answers}"""
    annotations = []
    for (number, image), given in answers.items():
        ten = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(given, 1)]
        kinds = {"question_type": "what is", "answer_type": "other", "question_id": number, "image_id": image}
        annotations.append({**kinds, "multiple_choice_answer": max(given, key=given.count), "answers": ten})
    content = {"info": {}, "data_subtype": split, "annotations": annotations, "data_type": "mscoco"}
    return write_json(folder / f"v2_mscoco_{split}_annotations.json", content)


def img2dataset_sample(key: str, caption: str, url: str, image: bytes) -> dict[str, bytes]:
    meta = {"caption": caption, "url": url, "key": key, "status": "success", "sha256": f"of the original {key}"}
    return {f"{key}.jpg": image, f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(meta, indent=4).encode()}


def img2dataset_shard(folder: Path, shard: int, samples: dict[str, bytes], tar: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if tar:
        pack(folder / f"{shard:05d}.tar", samples)
    for name, content in ({} if tar else samples).items():
        (folder / f"{shard:05d}").mkdir(exist_ok=True)
        (folder / f"{shard:05d}" / name).write_bytes(content)


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpeg(number: int, size: tuple[int, int] = (96, 72), quality: int = 90) -> bytes:
    return encoded(picture(number, size), quality=quality)
