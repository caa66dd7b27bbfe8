"""docs/reproduce.md's commands, in their order, on small stand-ins of the official files: tools.check_data then finds
every file that the configurations name, and no fault."""

import json
import shlex
import shutil
import subprocess
from itertools import count
from pathlib import Path

import official_files as official
import pytest

from tools import check_data
from tools.prepare import __main__ as prepare
from utils import ROOT

DOCUMENT = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def commands(tool):
    """The document's command lines of a tool, with one line for every turn of a shell loop, as argument lists."""
    lines = []
    for line in DOCUMENT.splitlines():
        loop, body = line.split("; do ", 1) if line.startswith("for config in") else ("", line)
        for config in loop.removeprefix("for config in ").split() or [""]:
            if body.startswith(f"python -m tools.{tool} "):
                lines.append(shlex.split(body.replace("; done", "").replace("$config", config))[3:])
    return lines


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """The stand-ins where the document puts the downloads; its web images are img2dataset's."""
    folder = tmp_path / "downloads"
    official.karpathy_coco(folder / "coco")
    official.coco_captions(folder / "coco", "train2014", [57870, 222016])
    official.karpathy_flickr(folder / "flickr30k")
    official.visual_genome(folder / "vg", {1: None, 2: 391895, 3: 57870, 4: 522418})
    official.nocaps(folder / "nocaps")
    ten = ["red"] * 10
    for split, image in (("train2014", 57870), ("val2014", 184613)):
        questions = [(100 * image + i, image, f"What colour is it, {i}?") for i in range(9)]
        if split == "val2014":
            questions += [(7, 522418, "Is it red?"), (8, 318219, "Is it blue?")]
        official.vqa_questions(folder / "vqa", split, questions)
        official.vqa_annotations(folder / "vqa", split, {(number, place): ten for number, place, _ in questions})
    official.vqa_questions(folder / "vqa", "test2015", [(201, 262144, "What is this?")])
    minival = [184613, 522418]  # the second one is none of Karpathy's val, and Visual Genome has it as image 4
    official.write_json(folder / "vqa/minival.json", [{"img_id": f"COCO_val2014_{n:012d}"} for n in minival])
    rows = [(f"a thing {i}", f"http://x.org/{i}.jpg") for i in range(3)]
    (folder / "cc3m").mkdir()
    (folder / "cc3m/Train_GCC-training.tsv").write_text("".join(f"{text}\t{url}\n" for text, url in rows))
    captions, urls = zip(*rows, strict=True)
    official.write_json(folder / "sbu/sbu-captions-all.json", {"image_urls": urls, "captions": captions})
    for number, name in enumerate(("cc3m", "sbu")):
        samples = {}
        for i, (caption, url) in enumerate(rows):
            samples |= official.img2dataset_sample(f"{i:09d}", caption, url, official.jpeg(500 + 10 * number + i))
        official.img2dataset_shard(tmp_path / f"data/{name}/images", 0, samples, tar=False)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return folder


def save_images():
    """An image of its own for every path that the prepared files name."""
    numbers = count()
    roots = {"data/pretrain": "data/pretrain", "data/coco/annotations": "data/coco/images"}
    roots |= {"data/flickr30k/annotations": "data/flickr30k", "data/nocaps": "data/nocaps/images"}
    for path in sorted(Path("data").rglob("*.json")):
        root = roots.get(str(path.parent))
        for entry in json.loads(path.read_text()) if root or str(path.parent) == "data/vqa" else []:
            if isinstance(entry, dict) and "image" in entry:
                folder = root or ("data/visual_genome" if entry["dataset"] == "vg" else "data/coco/images")
                image = (Path(folder) / entry["image"]).resolve()
                if not image.exists():
                    official.save(image, next(numbers))


def test_the_documents_commands_lead_from_the_downloads_to_sound_data(downloads, capsys):
    steps = commands("prepare")
    assert [step[0] for step in steps] == ["flickr30k", "coco", "vg", *["cc3m", "sbu"] * 2, "nocaps", "vqa"]
    links = [line for line in DOCUMENT.splitlines() if line.startswith("ln ")]
    subprocess.run(["bash", "-ec", "\n".join(links)], check=True)
    assert all((downloads / "vqa" / name).is_file() for name in ("image_data.json", "question_answers.json"))
    for step in steps:
        prepare.main([*step, "--workers", "1"])
    out = capsys.readouterr().out
    assert "run tools.prepare" not in out  # nothing that a later step needs is missing
    asked = {entry["image"] for entry in json.loads(Path("data/vqa/vg_qa.json").read_text())}
    assert asked == {"VG_100K_2/1.jpg", "VG_100K/2.jpg", "VG_100K_2/3.jpg"}  # not 4, an image of the minival
    assert Path("data/vqa/answer_list.json").is_file()  # which the check does not read
    save_images()
    for step in commands("check_data"):
        check_data.main([*step, "--workers", "1"])  # would leave by SystemExit
    assert capsys.readouterr().out.count("no fault found") == 6
