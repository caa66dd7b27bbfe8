"""The Python interface: semmim.SemMIM against the stages' own evaluation, its folders, and the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from tiny import TOKENIZER, Notes, noise, tiny_config

from dataset.transforms import open_image
from engine.config import CAPTION, RETRIEVAL, VQA, load_config
from evaluation.caption import Captioner
from evaluation.retrieval import Ranker, extract
from evaluation.vqa import Answerer
from models.caption import CaptionModel
from models.semmim import build_backbone, load_backbone
from models.vqa import VQAModel
from semmim import SemMIM, files
from tools import export
from utils import save_checkpoint, write_json

CPU = torch.device("cpu")
TEXTS = ["A red bus, here!", "two dogs", "a-b c"]
QUESTIONS = ["what is it?", "is it red?", "how many dogs are there here?"]
STAGES = {
    "pretrain": None,
    "retrieval": ("configs/Retrieval_coco.yaml", RETRIEVAL),
    "caption": ("configs/Caption_coco.yaml", CAPTION),
    "vqa": ("configs/VQA.yaml", VQA),
}
OVERRIDES = {
    "retrieval": ["rerank.score=itm+itc/t", "rerank.k=3", "eval.folds=0", "data.max_words=2"],
    "caption": ["generation.min_tokens=2", "generation.max_tokens=4", "text.prompt=a picture of"],
    "vqa": ["answer.max_tokens=3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images, annotations, and a run's folder for each stage with a checkpoint of random weights."""
    path = tmp_path_factory.mktemp("semmim")
    for number in range(3):
        noise(30 + number, 40, number).save(path / f"{number}.png")
    write_json(path / "retrieval.json", [{"image": f"{i}.png", "caption": [TEXTS[i]]} for i in range(3)])
    write_json(path / "caption.json", [{"image": f"{i}.png", "caption": ["a dog"], "image_id": i} for i in range(3)])
    entries = [{"image": f"{i}.png", "question": QUESTIONS[i], "question_id": i, "answer": "dog"} for i in range(3)]
    write_json(path / "vqa.json", entries)
    torch.manual_seed(0)
    model = CaptionModel(build_backbone(tiny_config("model.image_encoder.image_size=32"))[0], TOKENIZER)
    for stage in STAGES:
        (path / stage).mkdir()
        content = {"model": model.state_dict(), "description": model.backbone.description, "stage": stage}
        if STAGES[stage]:
            content["config"] = config(path, stage).to_dict()
        if stage == "retrieval":
            content["model"] = {key: x for key, x in content["model"].items() if ".decoder." not in key}
            content["best"] = {"order": "itc", "r_mean": 1.5, "epoch": 2}
        save_checkpoint(path / stage / "checkpoint_best.pth", {**content, "progress": {"step": 7}})
    write_json(path / "retrieval" / "metrics.json", {"test": {"itm_tr_r1": 12.345, "images": 3}})
    return path


def config(folder, stage):
    """The stage's configuration on the images of `folder`."""
    file, kind = STAGES[stage]
    data = [f"data.{split}=[{folder}/{stage}.json]" for split in ("val", "test")]
    more = ["eval.splits=[test]"] if stage != "vqa" else ["data.val_scores=[]"]
    own = ["data.image_root=none", "image_size=32", "data.num_workers=0", "train.precision=fp32", "eval.batch_size=2"]
    return load_config(file, [*data, *more, *own, *OVERRIDES[stage]], kind)


def images(folder):
    return [folder / f"{number}.png" for number in range(3)]


def loaded(folder, stage, **options):
    return SemMIM.from_pretrained(folder / stage / "checkpoint_best.pth", **options)


# ---------------------------------------------------------------------------------- against the stages' evaluation


def test_features_are_those_of_the_retrieval_script(folder, tmp_path):
    cfg = config(folder, "retrieval")
    dataset = Ranker(cfg, TOKENIZER, CPU, Notes(tmp_path)).datasets["test"]
    backbone, _, _ = load_backbone(folder / "retrieval" / "checkpoint_best.pth")
    found_images, found_texts = extract(backbone.eval(), dataset, TOKENIZER, cfg, CPU, "fp32")
    model = loaded(folder, "retrieval", batch_size=2)
    torch.testing.assert_close(model.encode_image(images(folder)), found_images.feats, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), found_texts.feats, atol=1e-6, rtol=0)


def test_captions_are_those_of_the_captioning_script(folder, tmp_path):
    captioner = Captioner(config(folder, "caption"), TOKENIZER, CPU, Notes(tmp_path))
    backbone, _, _ = load_backbone(folder / "caption" / "checkpoint_best.pth", decoder=True)
    expected = captioner.caption(CaptionModel(backbone, TOKENIZER), "test")
    assert loaded(folder, "caption", batch_size=2).caption(images(folder)) == expected


def test_answers_are_those_of_the_vqa_script(folder, tmp_path):
    answerer = Answerer(config(folder, "vqa"), TOKENIZER, CPU, Notes(tmp_path))
    backbone, _, _ = load_backbone(folder / "vqa" / "checkpoint_best.pth", decoder=True)
    expected = answerer.predict(VQAModel(backbone, TOKENIZER), "test")
    model = loaded(folder, "vqa", batch_size=2)
    assert [texts[place] for place, texts in enumerate(model.answer(images(folder), QUESTIONS))] == expected


@pytest.mark.parametrize("answers", [None, ["dog", "a red bus", "two"]], ids=["written", "chosen"])
def test_several_questions_are_answered_as_one_by_one_and_encode_an_image_once(folder, answers):
    model, encoded = loaded(folder, "vqa", batch_size=2), []
    one_by_one = [[model.answer(path, text, answers=answers)[0] for text in QUESTIONS] for path in images(folder)]
    assert model.answer(images(folder), QUESTIONS[1], answers=answers) == [texts[1] for texts in one_by_one]
    model.backbone.image_encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    assert model.answer(images(folder), QUESTIONS, answers=answers) == one_by_one
    assert encoded == [2, 1]
    assert answers is None or {text for texts in one_by_one for text in texts} <= set(answers)


@torch.no_grad()
def test_match_is_the_fusion_encoders_probability_pair_by_pair(folder):
    model = loaded(folder, "pretrain", batch_size=2)
    found, net = model.match(images(folder), TEXTS), model.backbone
    memory = net.fusion_encoder.project_memory(
        net.encode_image(torch.stack([*map(model.preprocess, images(folder))]))[0]
    )
    for column, text in enumerate(model.clean(TEXTS)):
        ids, mask = (x.expand(3, -1) for x in TOKENIZER.encode([text], 30))
        fused = net.fusion_encoder(net.encode_text(ids, mask)[0], mask, memory)
        torch.testing.assert_close(found[:, column], net.itm_logits(fused).softmax(-1)[:, 1], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ what it takes


def test_images_and_texts_are_the_same_in_every_form(folder):
    model, path = loaded(folder, "retrieval"), images(folder)[0]
    image = open_image(path)
    one = model.preprocess(image)
    found = model.encode_image([str(path), path, image, Image.open(path), one])
    assert all(torch.equal(row, found[0]) for row in found)
    forms = [torch.stack([one, one]), (x for x in [path, path]), path, one]
    for form, count in zip(forms, (2, 2, 1, 1), strict=True):
        torch.testing.assert_close(model.encode_image(form), found[:count])
    expected = model.encode_text(TEXTS)
    for form in (tuple(TEXTS), np.array(TEXTS), (text for text in TEXTS)):
        assert torch.equal(model.encode_text(form), expected)
    assert torch.equal(model.encode_text(TEXTS[0]), model.encode_text(TEXTS[:1]))
    assert model.match(path, TEXTS[0]).shape == (1, 1)


def test_labels_are_a_list_or_joined_and_several_captions_are_a_list_an_image(folder):
    model = loaded(folder, "caption", batch_size=2)
    assert model.caption(images(folder), labels="dog&&bus") == model.caption(images(folder), labels=["dog", "bus"])
    found = model.caption(images(folder), num_return=2)
    assert [len(texts) for texts in found] == [2, 2, 2]
    assert [texts[0] for texts in found] == model.caption(images(folder))
    model = loaded(folder, "vqa")
    once = model.answer(images(folder), QUESTIONS, labels=["dog", "bus"], ocr=["stop", "now"])
    assert once == model.answer(images(folder), QUESTIONS, labels="dog&&bus", ocr="stop now")


def test_it_stays_in_eval_mode(folder):
    model = loaded(folder, "retrieval")
    expected = model.encode_image(images(folder))
    assert torch.nn.ModuleList([model]).train().training and torch.equal(model.encode_image(images(folder)), expected)


def truncated(folder):
    """Opened, and not yet read to its end."""
    path = folder / "truncated.png"
    path.write_bytes((folder / "0.png").read_bytes()[:900])
    return Image.open(path)


@pytest.mark.parametrize(
    "stage, wrong, message",
    [
        ("retrieval", lambda m, f: m.encode_image("absent.png"), "absent.png: No such file"),
        ("retrieval", lambda m, f: m.encode_image([3]), "3 is no image"),
        ("retrieval", lambda m, f: m.encode_image(torch.rand(3, 32, 32)), "Tensor (3, 32, 32) is no image"),
        ("retrieval", lambda m, f: m.encode_image(m.preprocess(f / "0.png") * torch.nan), "image features are NaN"),
        ("retrieval", lambda m, f: m.encode_image(Image.new("RGB", (0, 0))), "0 x 0 pixels"),
        ("retrieval", lambda m, f: m.encode_image(truncated(f)), "truncated.png: cannot be used"),
        ("retrieval", lambda m, f: m.encode_text(["a", "!?"]), "nothing is left"),
        ("retrieval", lambda m, f: m.encode_text("\udcff"), "surrogate"),
        ("retrieval", lambda m, f: m.encode_text(["a", None]), "None is no text"),
        ("retrieval", lambda m, f: m.caption([]), "take a checkpoint of Caption.py"),
        ("retrieval", lambda m, f: m.class_features(["dog", "cat"], ["a photo"]), "where the name of the class"),
        ("retrieval", lambda m, f: m.classify(f / "0.png", ["dog", "dog"]), "no choice"),
        ("caption", lambda m, f: m.encode_image(f / "0.png"), "take a checkpoint of Pretrain.py or Retrieval.py"),
        ("caption", lambda m, f: m.caption(f / "0.png", num_return=9), "at most 5 sentences"),
        ("vqa", lambda m, f: m.answer(f / "0.png", "what?", answers="yes"), "are no choice"),
    ],
)
def test_wrong_input_is_one_line(folder, stage, wrong, message):
    refused(lambda: wrong(loaded(folder, stage), folder), message)


def test_texts_that_are_cut_are_counted_in_one_line(folder, caplog):
    model = loaded(folder, "retrieval")  # two words
    for use in (model.encode_text, partial(model.match, images(folder)), partial(model.search, images(folder))):
        caplog.clear(), model._warned.clear(), use(TEXTS)
        assert caplog.messages == ["2 of 3 texts are longer than the model reads and cut, first 'a red bus here'"]
    caplog.clear()
    model, long = loaded(folder, "vqa"), "dog " * 40
    for _ in range(2):
        model.answer(images(folder), [*QUESTIONS[:2], long], ocr=long, labels=long, answers=["cat", long])
    loaded(folder, "caption").caption(images(folder), prompt=long)
    cut = ["1 of 2 answers", "1 of 3 questions", "1 of 1 OCR texts", "1 of 1 labels", "1 of 1 prompts"]
    assert [line.split(" are")[0] for line in caplog.messages] == cut


def test_what_was_never_learned_is_said_once(folder, caplog):
    vqa = loaded(folder, "vqa")
    for _ in range(2):
        vqa.caption(images(folder)), vqa.answer(images(folder), QUESTIONS[0])
    assert caplog.messages == ["vqa/checkpoint_best.pth (stage: vqa): never trained to caption; do not expect much"]


def test_probabilities_of_classes_are_the_softmax_of_their_mean_features_cosines(folder):
    model, templates, classes = loaded(folder, "retrieval"), ("{}", "a {} here"), ["dog", "bus"]
    means = [model.encode_text([t.replace("{}", c) for t in templates]).mean(0) for c in classes]
    features = torch.stack([mean / mean.norm() for mean in means])
    expected = (model.encode_image(images(folder)) @ features.T / model.temperature).softmax(-1)
    torch.testing.assert_close(model.classify(images(folder), classes, templates), expected)
    torch.testing.assert_close(model.classify(images(folder), model.class_features(classes, templates)), expected)


@pytest.mark.parametrize("images_ask", [False, True])
def test_search_orders_by_cosine_and_the_first_k_by_log_odds_plus_cosine_over_temperature(folder, images_ask):
    model = loaded(folder, "retrieval", batch_size=2)
    cosine = model.encode_image(images(folder)) @ model.encode_text(TEXTS).T
    odds = model.match(images(folder), TEXTS).logit()
    cosine, odds = (cosine, odds) if images_ask else (cosine.T, odds.T)
    contrast = model.search(images(folder), TEXTS, images_ask=images_ask, k=0)
    for row, hits in enumerate(model.search(images(folder), TEXTS, images_ask=images_ask, k=2)):
        first = cosine[row].argsort(descending=True).tolist()
        score = (odds[row] + cosine[row] / model.temperature).tolist()
        assert [hit.number for hit in contrast[row]] == first and all(hit.score is None for hit in contrast[row])
        assert [hit.number for hit in hits] == sorted(first[:2], key=lambda i: -score[i]) + first[2:]
        assert [hit.cosine for hit in hits] == pytest.approx([cosine[row, hit.number].item() for hit in hits], abs=1e-5)
        assert [hit.score for hit in hits[:2]] == pytest.approx([score[hit.number] for hit in hits[:2]], abs=1e-3)
        assert hits[2].score is None


# ------------------------------------------------------------------------------------------------- saving and loading


def uses(model, paths):
    """What a model finds, as far as it can."""
    found = []
    if model.stage in ("pretrain", "retrieval"):
        found = [model.encode_image(paths).tolist(), model.encode_text(TEXTS).tolist()]
        found.append(model.match(paths, TEXTS).tolist())
    return [*found, model.caption(paths), model.answer(paths, QUESTIONS)] if "vqa" in model.settings else found


@pytest.mark.parametrize("stage", STAGES)
def test_every_stages_export_gives_the_same_as_its_checkpoint_elsewhere(folder, tmp_path, monkeypatch, stage):
    export.main([str(folder / stage), str(tmp_path / "out")])
    assert not list(tmp_path.rglob("*.p*t*h")) and str(folder) not in (tmp_path / "out" / "config.json").read_text()
    expected = uses(loaded(folder, stage), images(folder))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", None)  # what would read a pickle
    model = SemMIM.from_pretrained("moved")
    assert uses(model, images(folder)) == expected
    assert (model.stage, model.content.step) == (stage, 7)
    model.save_pretrained("moved")  # onto itself
    model.save_pretrained("again")
    for name in ("config.json", "model.safetensors", "vocab.txt", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()


def test_an_export_in_the_hubs_cache_is_loaded_by_its_name_as_its_card_says(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, model = tmp_path / "models--me--small", loaded(folder, "retrieval")
    snapshot = model.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    again = SemMIM.from_pretrained("me/small")
    assert uses(again, images(folder)) == uses(model, images(folder))
    text = (snapshot / "README.md").read_text()
    assert '"itm_tr_r1": 12.345' in text and "library_name: semmim" in text
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER_OR_REPOSITORY", str(snapshot)).replace("image.jpg", str(images(folder)[0]))
    exec(compile(code, "card", "exec"), {})


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("config.json", None, "holds neither config.json"),
        ("vocab.txt", None, "vocab.txt is missing"),
        ("model.safetensors", b"no weights", "not a readable weight file"),
        ("config.json", b"{", "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, tmp_path, name, damage, message):
    loaded(folder, "retrieval").save_pretrained(tmp_path)
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    refused(lambda: SemMIM.from_pretrained(tmp_path), message)


def test_an_export_that_was_killed_is_written_again(folder, tmp_path, monkeypatch):
    def killed(*_, **options):
        raise KeyboardInterrupt

    model = loaded(folder, "retrieval")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "save_file", killed)
        model.save_pretrained(tmp_path)
    refused(lambda: SemMIM.from_pretrained(tmp_path), "model.safetensors is missing; export the model again")
    assert uses(SemMIM.from_pretrained(model.save_pretrained(tmp_path)), images(folder)) == uses(model, images(folder))


def test_only_an_export_is_written_over(folder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(lambda: export.main([str(folder / "vqa"), str(tmp_path)]), "something else than an exported model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json"]
    assert (tmp_path / "README.md").read_text() == "mine"
    refused(lambda: export.main([str(folder / "vqa"), str(tmp_path / "README.md")]), "README.md")


def test_a_name_that_is_nowhere_is_one_line():
    refused(lambda: SemMIM.from_pretrained("output/absent"), "output/absent: no such file or folder here")
    for name in ("run/absent.pth", "/absent", "output/demo/absent"):
        refused(lambda name=name: SemMIM.from_pretrained(name), f"{name} does not exist")


def test_what_pyproject_installs_suffices_from_anywhere(folder, tmp_path):
    lists = re.search(r"packages = (\[.*\])\npy-modules = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    for name in [*json.loads(lists[1]), *(f"{name}.py" for name in json.loads(lists[2]))]:
        (tmp_path / name).symlink_to(ROOT / name)
    code = f"from semmim import SemMIM; print(SemMIM.from_pretrained({str(folder / 'vqa')!r}).stage)"
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, **options)
    assert run.stdout == "vqa\n", run.stderr
