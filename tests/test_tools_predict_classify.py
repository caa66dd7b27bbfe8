"""tools/predict.py embed, classify and evaluate zero-shot, by a small model that has learned the demo's shapes."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from tiny import NO_DROPOUT, TOKENIZER, tiny_config

from dataset.text import clean_caption
from dataset.transforms import test_transform as square
from models.semmim import build_backbone
from semmim import SemMIM
from tools.demo.scenes import BACKGROUNDS, Scene, SceneObject, render
from tools.predict import __main__ as predict
from utils import UserError, save_checkpoint, write_json

square.__test__ = False
SHAPES = ("red ring", "blue square", "green triangle")
SENTENCES = ("a {}", "an image of a {}", "{}")


def shape_image(name, seed):
    """A large object of this color and shape somewhere, the background drawn, 32 x 32 pixels."""
    rng = random.Random(seed)
    x, y, size = rng.uniform(0, 0.2), rng.uniform(0, 0.2), rng.uniform(0.7, 0.8)
    colour, shape = name.split()
    one = SceneObject(shape, colour, "large", "", "center", (x, y, x + size, y + size))
    background = rng.choice(sorted(set(BACKGROUNDS) - {colour}))
    return render(Scene(seed, 0, background, "plain", (one,)), 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """shapes/COLOR_SHAPE/*.png, 12 images a class, and shapes.pth: trained by contrast on other images of them."""
    path = tmp_path_factory.mktemp("classify")
    for shape in SHAPES:
        inside = path / "shapes" / shape.replace(" ", "_")
        inside.mkdir(parents=True)
        for seed in range(12):
            shape_image(shape, seed).save(inside / f"{seed}.png")
    torch.manual_seed(0)
    backbone, _ = build_backbone(tiny_config(*NO_DROPOUT), decoder=False, mlm_head=False)
    train(backbone, steps=40)
    model = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    save_checkpoint(path / "shapes.pth", {"model": model, "description": backbone.description, "stage": "pretrain"})
    return path


def train(backbone, steps):
    """Every image's sentence against those of the other shapes."""
    data = torch.stack([square(32)(shape_image(shape, seed)) for seed in range(100, 150) for shape in SHAPES])
    data = data.view(50, len(SHAPES), *data.shape[1:])
    backbone.text_encoder.embeddings.word_embeddings.requires_grad_(False)  # most of the work, of no use here
    optimizer = torch.optim.AdamW([x for x in backbone.parameters() if x.requires_grad], lr=1e-3)
    labels = torch.arange(len(SHAPES)).repeat(16)
    for step in range(steps):
        rows = torch.randperm(50)[:16]
        sentence = SENTENCES[step % len(SENTENCES)]
        ids, mask = TOKENIZER.encode([clean_caption(sentence.replace("{}", shape), 30) for shape in SHAPES], 30)
        images, texts = backbone.encode_image(data[rows].flatten(0, 1))[1], backbone.encode_text(ids, mask)[1]
        loss = torch.nn.functional.cross_entropy(images @ texts.T / 0.1, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(folder, *command):
    options = ["--checkpoint", str(folder / "shapes.pth"), "--device", "cpu", "--batch_size", "8"]
    predict.main([*command, *options])


def test_the_demos_shapes_are_told_apart_zero_shot_and_counted_as_scikit_counts(folder, capsys, tmp_path):
    run(folder, "evaluate", "zero-shot", str(folder / "shapes"), "--output", str(tmp_path / "rows.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == "36 images, 3 classes" and len(found) == 36
    shown = dict(line.rsplit(maxsplit=1) for line in lines[1:])
    shown = {key.strip(): float(value) for key, value in shown.items()}
    truth, said = [row["class"] for row in found], [row["predicted"] for row in found]
    assert shown["top1"] == pytest.approx(100 * accuracy_score(truth, said), abs=0.01) and shown["top1"] > 80
    assert shown["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(truth, said), abs=0.01)
    assert shown["chance"] == pytest.approx(100 / 3, abs=0.01)
    for shape in SHAPES:
        right = [one == two for one, two in zip(truth, said, strict=True) if one == shape]
        assert shown[shape] == pytest.approx(100 * np.mean(right), abs=0.01)


def test_folders_may_be_called_otherwise_than_their_classes(folder, capsys, tmp_path):
    run(folder, "evaluate", "zero-shot", str(folder / "shapes"))
    expected = capsys.readouterr().out
    for shape in SHAPES:
        (tmp_path / "data" / f"n{shape[0]}").parent.mkdir(exist_ok=True)
        (tmp_path / "data" / f"n{shape[0]}").symlink_to(folder / "shapes" / shape.replace(" ", "_"))
    (tmp_path / "data" / "empty").mkdir()  # no class
    names = tmp_path / "names.json"
    write_json(names, {f"n{shape[0]}": shape for shape in SHAPES})
    run(folder, "evaluate", "zero-shot", str(tmp_path / "data"), "--names", str(names))
    assert capsys.readouterr().out == expected
    write_json(names, {"nr": "ring", "nb": "square"})
    with pytest.raises(UserError, match="the folder ng is not in it"):
        run(folder, "evaluate", "zero-shot", str(tmp_path / "data"), "--names", str(names))


def test_classify_prints_the_most_probable_classes(folder, capsys):
    run(folder, "classify", str(folder / "shapes"), "--classes", *SHAPES, "--top", "3", "--template", "a {}")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    model = SemMIM.from_pretrained(folder / "shapes.pth")
    expected = model.classify([path for path, *_ in lines], SHAPES, ["a {}"])
    assert len(lines) == 36
    for (_, *shown), row in zip(lines, expected, strict=True):
        values = {name: float(value) for name, value in (text.rsplit(" ", 1) for text in shown)}
        assert list(values.values()) == sorted(values.values(), reverse=True)
        assert [values[shape] for shape in SHAPES] == pytest.approx(row.tolist(), abs=1e-3)


def test_embed_writes_the_models_features_in_both_forms(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a ring\n\nA square!\n")
    command = ["embed", str(folder / "shapes"), "--text", "ä triangle", "--texts", str(tmp_path / "texts.txt")]
    run(folder, *command, "--output", str(tmp_path / "features.npz"))
    run(folder, *command, "--output", str(tmp_path / "features.safetensors"))
    arrays = np.load(tmp_path / "features.npz", allow_pickle=False)
    images, texts = arrays["images"].tolist(), arrays["texts"].tolist()
    assert texts == ["ä triangle", "a ring", "A square!"] and len(images) == 36
    model = SemMIM.from_pretrained(folder / "shapes.pth")
    np.testing.assert_allclose(arrays["image_features"], model.encode_image(images).numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["text_features"], model.encode_text(texts).numpy(), atol=1e-6)
    with safe_open(tmp_path / "features.safetensors", "np") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        assert metadata == {"images": images, "texts": texts}
        for key in ("image_features", "text_features"):
            np.testing.assert_array_equal(file.get_tensor(key), arrays[key])


def test_accuracies_are_scikits_also_of_many_classes():
    probabilities = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.randint(0, 8, (200,), generator=torch.Generator().manual_seed(1))  # none of the last class
    found = predict.accuracies(probabilities, labels)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=range(9))
        assert found[f"top{k}"] == pytest.approx(100 * expected)
    expected = balanced_accuracy_score(labels, probabilities.argmax(1).clamp(max=8))
    assert found["mean_per_class"] == pytest.approx(100 * expected) and found["per_class"][8] is None


def test_equal_probabilities_are_no_gift():
    assert predict.accuracies(torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.int64))["top1"] == 0
