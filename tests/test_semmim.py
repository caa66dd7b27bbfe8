"""The Python interface: semmim.SemMIM against the stages' own evaluation, its folders, and the hub."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import TOKENIZER, Notes, tiny_config

from dataset.transforms import open_image
from engine.config import CAPTION, RETRIEVAL, VQA, load_config
from evaluation.caption import Captioner
from evaluation.retrieval import Ranker
from evaluation.vqa import Answerer
from models.caption import CaptionModel
from models.semmim import build_backbone, load_backbone
from models.vit import ImageEncoder
from models.vqa import VQAModel
from semmim import SemMIM, card
from tools import export
from utils import UserError, save_checkpoint, write_json

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
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
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


def test_random_positions_begin_as_asked_for():
    encoders = {}
    for start in ("normal", "sincos"):
        torch.manual_seed(0)
        encoders[start] = build_backbone(tiny_config(f"model.image_encoder.positions={start}"))[0].image_encoder
    normal, sincos = encoders["normal"], encoders["sincos"]
    assert normal.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    torch.testing.assert_close(sincos.vit.pos_embed[:, 0], normal.vit.pos_embed[:, 0])  # [CLS] has no place
    # MAE's formula, written out: a quarter of the width each for sin of y, sin of x, cos of y, cos of x (timm's order)
    quarter = sincos.width // 4
    y, x = np.divmod(np.arange(sincos.num_patches), sincos.grid)
    omega = 10000.0 ** -(np.arange(quarter) / quarter)
    expected = np.concatenate([f(np.outer(place, omega)) for f in (np.sin, np.cos) for place in (y, x)], axis=1)
    np.testing.assert_allclose(sincos.vit.pos_embed[0, 1:].detach().numpy(), expected, atol=1e-6)
    assert sincos.vit.pos_embed.requires_grad


def test_sine_cosine_positions_need_a_width_of_four_parts():
    encoder = ImageEncoder("vit_tiny_patch16_224", 32, {"embed_dim": 30, "depth": 1, "num_heads": 3})
    with pytest.raises(UserError, match="positions: sincos needs a width that is a multiple of 4, not 30"):
        encoder.start_from_sincos()


def config(folder, stage):
    """The stage's configuration on the images of `folder`."""
    file, kind = STAGES[stage]
    data = [f"data.{split}=[{folder}/{stage}.json]" for split in ("val", "test")] + [
        "data.image_root=none",
        "image_size=32",
    ]
    more = ["eval.splits=[test]"] if stage != "vqa" else ["data.val_scores=[]"]
    own = ["data.num_workers=0", "train.precision=fp32", "eval.batch_size=2"]
    return load_config(file, [*data, *more, *own, *OVERRIDES[stage]], kind)


def images(folder):
    return [folder / f"{number}.png" for number in range(3)]


def loaded(folder, stage, **options):
    return SemMIM.from_pretrained(folder / stage / "checkpoint_best.pth", **options)


# ---------------------------------------------------------------------------------- against the stages' evaluation


def test_features_are_those_of_the_retrieval_script(folder, tmp_path):
    ranker = Ranker(config(folder, "retrieval"), TOKENIZER, CPU, Notes(tmp_path))
    backbone, _, _ = load_backbone(folder / "retrieval" / "checkpoint_best.pth")
    found_images, found_texts = ranker.features(backbone, ranker.datasets["test"])
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
    assert model.answer(images(folder), QUESTIONS) == expected
    one = model.answer(images(folder)[0], QUESTIONS)  # one image, more questions than a batch
    assert one == [model.answer(images(folder)[0], question)[0] for question in QUESTIONS]
    assert model.answer(images(folder), QUESTIONS[0])[1] == model.answer(images(folder)[1], QUESTIONS[0])[0]


def test_a_closed_list_is_chosen_from_by_probability(folder):
    model, answers = loaded(folder, "vqa"), ["dog", "a red bus", "two"]
    found = model.answer(images(folder), QUESTIONS, answers=answers)
    alone = [model.answer(path, text, answers=answers)[0] for path, text in zip(images(folder), QUESTIONS, strict=True)]
    assert found == alone and set(found) <= set(answers)


def test_match_is_the_fusion_encoders_probability_pair_by_pair(folder):
    model = loaded(folder, "pretrain", batch_size=2)
    found = model.match(images(folder), TEXTS)
    assert found.shape == (3, 3)
    backbone, _, _ = load_backbone(folder / "pretrain" / "checkpoint_best.pth")
    backbone.eval()
    for row, path in enumerate(images(folder)):
        for column, text in enumerate(model.clean(TEXTS)):
            embeds, _ = backbone.encode_image(model.preprocess(open_image(path))[None])
            ids, mask = TOKENIZER.encode([text], 30)
            fused = backbone.fuse(
                backbone.encode_text(ids, mask)[0], mask, backbone.fusion_encoder.project_memory(embeds)
            )
            expected = backbone.itm_logits(fused).softmax(-1)[0, 1].item()
            assert found[row, column].item() == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ what it takes


def test_an_image_is_the_same_as_a_path_a_pil_image_an_array_and_a_tensor(folder):
    model, path = loaded(folder, "retrieval"), images(folder)[0]
    image = open_image(path)
    kinds = [str(path), path, image, np.asarray(image), model.preprocess(image)]
    found = model.encode_image(kinds)
    assert all(torch.equal(row, found[0]) for row in found)
    for again in (torch.stack([kinds[-1]] * 2), path):
        torch.testing.assert_close(model.encode_image(again), found[: 2 if again is not path else 1])
    assert model.encode_image([]).shape == (0, 16) and model.match([], TEXTS).shape == (0, 3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda model: model.encode_image("absent.png"), "absent.png: no such file"),
        (lambda model: model.encode_image(3), "a int is no image"),
        (lambda model: model.encode_image(torch.zeros(3, 8, 8)), "takes \\[3, 32, 32\\]"),
        (lambda model: model.encode_text(["a", "!?"]), "nothing is left"),
        (lambda model: model.caption([]), "no decoder"),
        (lambda model: model.answer("a.png", "what?"), "no decoder"),
        (lambda model: model.class_features(["dog"], ["a photo"]), "where the name of the class"),
        (lambda model: model.class_features([]), "no class"),
    ],
)
def test_wrong_input_is_one_line(folder, wrong, message):
    with pytest.raises(UserError, match=message):
        wrong(loaded(folder, "retrieval"))


def test_numbers_of_images_and_questions_must_agree(folder):
    with pytest.raises(UserError, match="3 images and 2 questions"):
        loaded(folder, "vqa").answer(images(folder), QUESTIONS[:2])


def test_what_was_never_learned_is_said(folder):
    assert "never learned to answer" in loaded(folder, "pretrain").unlearned("vqa")
    assert "never learned to write captions" in loaded(folder, "vqa").unlearned("caption")
    assert loaded(folder, "pretrain").unlearned("caption") is None and loaded(folder, "vqa").unlearned("vqa") is None


def test_probabilities_of_classes_are_the_softmax_of_their_mean_features_cosines(folder):
    model, templates, classes = loaded(folder, "retrieval"), ("{}", "a {} here"), ["dog", "bus"]
    means = [model.encode_text([t.replace("{}", c) for t in templates]).mean(0) for c in classes]
    features = torch.stack([mean / mean.norm() for mean in means])
    expected = (model.encode_image(images(folder)) @ features.T / model.temperature).softmax(-1)
    torch.testing.assert_close(model.classify(images(folder), classes, templates), expected)


# ------------------------------------------------------------------------------------------------- saving and loading


def uses(model, paths):
    """What a model finds, as far as it can."""
    found = [model.encode_image(paths).tolist(), model.encode_text(TEXTS).tolist(), model.match(paths, TEXTS).tolist()]
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


def test_the_model_card_leaves_out_the_machine_and_the_schedule():
    metrics = {
        "loss": 2.5,
        "loss/itc": 0.5,
        "lr_rest": 1e-5,
        "pairs_per_second": 70.0,
        "eta_seconds": 0.0,
        "tflops": 0.1,
        "minutes": 30.0,
    }
    lines = card.results({**metrics, "val": {"itc_r_mean": 50.0}})
    assert lines[-3:] == ["| loss | 2.50 |", "| loss/itc | 0.50 |", "| val / itc_r_mean | 50.00 |"]


def test_the_model_card_holds_the_runs_numbers_and_code_that_runs(folder, tmp_path):
    model = loaded(folder, "retrieval")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| test / itm_tr_r1 | 12.35 |" in card and "library_name: semmim" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER_OR_REPOSITORY", str(tmp_path)).replace("image.jpg", str(images(folder)[0]))
    exec(compile(code, "card", "exec"), {})
    from huggingface_hub import ModelCard

    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "zero-shot-image-classification"


def test_what_is_pushed_to_the_hub_is_loaded_from_it(folder, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    repository = tmp_path / "cache" / "models--me--small"  # as the hub's cache has it

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return f"https://hub/{repo_id}"

    url = "https://huggingface.co/me/small"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(url))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = loaded(folder, "caption")
    assert model.push_to_hub("me/small") == "https://hub/me/small"
    again = SemMIM.from_pretrained("me/small", cache_dir=tmp_path / "cache", local_files_only=True)
    assert uses(again, images(folder)) == uses(model, images(folder))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("config.json", None, "config.json is missing|holds neither"),
        ("vocab.txt", None, "vocab.txt is missing"),
        ("model.safetensors", b"no weights", "not a readable weight file"),
        ("config.json", b"{}", "not of a SemMIM model"),
        ("config.json", b"{", "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, tmp_path, name, damage, message):
    loaded(folder, "retrieval").save_pretrained(tmp_path)
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=message):
        SemMIM.from_pretrained(tmp_path)


def test_a_name_that_is_nowhere_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="absent.pth does not exist"):
        SemMIM.from_pretrained("absent.pth")
    with pytest.raises(UserError, match="nobody/nothing: no such file or folder here"):
        SemMIM.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(UserError, match="something else"):
        export.main([str(folder / "vqa"), str(folder)])


def test_settings_of_an_older_or_edited_folder_are_checked(folder, tmp_path):
    loaded(folder, "vqa").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["vqa"]["answer"]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="settings.vqa.answer is missing"):
        SemMIM.from_pretrained(tmp_path)


def test_it_is_imported_from_anywhere_after_an_editable_install(folder, tmp_path):
    """Built and put beside an interpreter's packages as pip does it, without network."""
    pytest.importorskip("setuptools")
    wheel = "import os, sys; from setuptools.build_meta import build_editable as build; print(build(sys.argv[1]))"
    copy = tmp_path / "clone"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines() or pytest.skip("no git checkout"):
        if not name.startswith(("tests", "docs")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    site = tmp_path / "site"
    site.mkdir()
    built = subprocess.run([sys.executable, "-c", wheel, str(site)], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    shutil.unpack_archive(next(site.glob("*.whl")), site, "zip")
    code = (
        f"import site; site.addsitedir({str(site)!r}); from semmim import SemMIM; import semmim; "
        f"print(semmim.__file__); print(SemMIM.from_pretrained({str(folder / 'vqa')!r}).stage)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "env": environment}
    run = subprocess.run([sys.executable, "-c", code], cwd=site, **options)
    assert run.stdout.splitlines() == [str(copy / "semmim" / "__init__.py"), "vqa"], run.stderr[-2000:]
    (site / "models.py").touch()  # a module of the user's own
    run = subprocess.run([sys.executable, "-c", code], cwd=site, **options)
    assert "semmim needs its own module models" in run.stderr.splitlines()[-1]
