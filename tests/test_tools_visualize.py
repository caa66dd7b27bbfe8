"""tools.visualize on checkpoints of a very small model: files, numbers, choices, the teacher's targets as trained."""

import json

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from tiny import make_batch, save_codebook, tiny_config, tiny_model

from tools.demo import scenes
from tools.visualize import __main__ as visualize
from tools.visualize import encodings, figures
from utils import save_checkpoint


def write_checkpoint(path, *overrides, stage="pretrain") -> None:
    model, config = tiny_model(*overrides), tiny_config(*overrides)
    save_checkpoint(path, {"model": model.state_dict(), "config": config.to_dict(), "stage": stage})


def draw(path, *more) -> dict:
    arguments = ["--checkpoint", path, "--images", 24, "--device", "cpu", *more]
    visualize.main(list(map(str, arguments)))
    return {file.name: file for file in (path.parent / "figures").glob("[!.]*")}


def test_figures_and_numbers_of_the_built_in_scenes(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint.pth")
    files = draw(tmp_path / "checkpoint.pth")
    names = ["figure2_encoding_head", "figure2_k-means_of_pixels", "figure3", "masking"]
    assert sorted(files) == sorted([*(f"{name}.png" for name in names), "numbers.json"])
    assert all(Image.open(files[f"{name}.png"]).width > 500 for name in names)
    found = json.loads(files["numbers.json"].read_text())
    assert found["images"] == 24 and found["patches"] == 24 * 16
    assert set(found["agreement"]) == {"encoding head", "k-means of pixels"}
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found["masked"].values())
    assert found["agreement"]["k-means of pixels"]["background"] > 0.3  # colors are what pixels are about
    assert "masked by the text" in capsys.readouterr().out


def test_images_of_ones_own_with_the_dvae_beside_ours(tmp_path):
    codebook, entries = save_codebook(tmp_path / "codebook"), []
    for number in range(6):
        scene = scenes.make_scene(1, number)
        scenes.render(scene, 40).save(tmp_path / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": scenes.captions(scene)})
    (tmp_path / "data.json").write_text(json.dumps([*entries, {"image": "absent.png", "caption": "nothing"}]))
    write_checkpoint(tmp_path / "checkpoint.pth")
    files = draw(tmp_path / "checkpoint.pth", "--data", tmp_path / "data.json", "--codebook", codebook)
    assert "figure2_dvae.png" in files and "numbers.json" not in files


@pytest.mark.parametrize("overrides", [["mim.target=pixels"], ["mim.target=none", "itc.negatives=batch"]])
def test_models_without_an_encoding_head_or_a_teacher(tmp_path, overrides):
    write_checkpoint(tmp_path / "checkpoint.pth", *overrides)
    files = draw(tmp_path / "checkpoint.pth")
    assert "figure2_encoding_head.png" not in files and "masking.png" in files


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    write_checkpoint(tmp_path / "vqa.pth", stage="vqa")
    refused(lambda: draw(tmp_path / "vqa.pth"), "a checkpoint of vqa; the figures need one of Pretrain.py")


def test_examples_are_the_clearest_and_at_most_two_of_an_image():
    assignment = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]])
    score = torch.tensor([[0.5, 0.9, 0.7, 1.0], [0.1, 1.0, 1.0, 0.8]])
    assert encodings.Clustering(assignment, score).examples(1, 4) == [(0, 1), (1, 3), (0, 2), (1, 0)]


def test_a_perfect_clustering_agrees_with_its_labels_and_a_shuffled_one_does_not():
    chosen = [scenes.make_scene(2, index) for index in range(12)]
    known = visualize.patch_labels(chosen, [scenes.captions(scene)[0] for scene in chosen], 64, 8)
    _, flat = np.unique(np.char.add(known["color"], known["background"]), return_inverse=True)
    found = visualize.agreement(flat, known)
    assert found["color"] == found["background"] == pytest.approx(1) and found["class"] < 0.5
    shuffled = visualize.agreement(np.random.default_rng(0).permutation(flat), known)
    assert all(abs(shuffled[label]) < 0.1 for label in visualize.LABELS)


def test_the_masking_figure_hides_the_masked_patches():
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, :8] = True
    figure = figures.masking_figure([Image.new("RGB", (64, 64), "blue")], ["a dog"], {"masked": mask})
    shown = figures.pixels(figure)
    gray, blue = (
        (shown - torch.tensor(color)[:, None, None]).abs().amax(0) < 0.02 for color in ((0.5,) * 3, (0, 0, 1.0))
    )
    assert int(blue.sum()) == pytest.approx(3 * int(gray.sum()), rel=0.1)  # one whole image and a half; half an image


def test_patterns_and_similarity_are_those_that_pre_training_shows():
    model, batch = tiny_model().eval(), make_batch()
    shown = model.inspect(batch)
    similarity, patterns = encodings.encode(model, batch["image2"], batch["input_ids"], batch["attention_mask"])
    assert torch.equal(patterns.assignment, shown["patterns"]) and patterns.score.max() <= 1
    assert torch.allclose(similarity, shown["similarity"], atol=1e-6)
