"""tools.visualize.encodings: the teacher's targets as pre-training has them, and attention against plain autograd."""

import pytest
import torch
from tiny import make_batch, tiny_model

from models import bert
from tools.visualize import encodings


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def inputs(batch) -> tuple:
    return batch["image2"], batch["input_ids"], batch["attention_mask"]


def test_patterns_and_similarity_are_those_that_pre_training_shows(model, batch):
    shown = model.inspect(batch)
    found = encodings.encode(model, *inputs(batch))
    assert torch.equal(found.probabilities.argmax(-1), shown["patterns"])
    assert torch.allclose(found.similarity, shown["similarity"], atol=1e-6)
    assert torch.allclose(found.probabilities.sum(-1), torch.ones(6, 16), atol=1e-5)


@pytest.mark.parametrize("target", ["none", "pixels"])
def test_models_without_patterns_still_give_tokens_and_similarity(batch, target):
    found = encodings.encode(tiny_model(f"mim.target={target}", "itc.negatives=batch").eval(), *inputs(batch))
    assert found.probabilities is None and found.tokens.shape == (6, 16, 32) and found.similarity.shape == (6, 16)


def test_predictions_at_masked_patches_do_not_depend_on_what_is_hidden_there(model, batch):
    uniform = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    masks = encodings.draw_masks(torch.zeros(6, 16), 0.3, 0.07, uniform, guided=False)
    assert masks.sum(1).tolist() == [5] * 6
    images, *text = inputs(batch)
    hidden = masks.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    first = encodings.predict_masked(model, images, *text, masks)
    second = encodings.predict_masked(model, torch.where(hidden, 9.0, images), *text, masks)
    assert first.shape == (6, 5, 24) and torch.allclose(first, second, atol=1e-5)
    places = encodings.masked_places(masks)
    assert all(masks[row, place] for row, group in enumerate(places.tolist()) for place in group)


def test_guided_masks_prefer_similar_patches():
    similarity = torch.zeros(200, 16)
    similarity[:, :4] = 1.0
    uniform = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    guided = encodings.draw_masks(similarity, 0.25, 0.07, uniform, guided=True)
    random = encodings.draw_masks(similarity, 0.25, 0.07, uniform, guided=False)
    assert guided[:, :4].float().mean() > 0.99 and abs(random[:, :4].float().mean() - 0.25) < 0.05


@pytest.mark.parametrize("layer", [None, 1])
def test_word_attention_is_attention_times_its_gradient(batch, monkeypatch, layer):
    model = tiny_model("model.bert.fusion_layers=2").eval()
    net = model.backbone
    found = encodings.word_attention(net, *inputs(batch), layer=layer)

    kept = []

    def plain(q, k, v, mask=None, rows=None, drop=0.0):
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        weights.retain_grad()
        kept.append(weights)
        return weights @ v

    monkeypatch.setattr(bert, "cross_attention", plain)
    images, ids, mask = inputs(batch)
    memory = net.fusion_encoder.project_memory(net.image_encoder(images))
    net.itm_logits(net.fusion_encoder(net.text_encoder(ids, mask), mask, memory))[:, 1].sum().backward()
    weights = kept[layer or 0]
    expected = (weights * weights.grad.clamp(min=0)).mean(1)[:, :, 1:]
    assert torch.allclose(found, expected, atol=1e-7) and expected.abs().max() > 1e-6
