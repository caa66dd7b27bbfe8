"""tools/convert.py against ALBEF's forward pass, written out here on ALBEF's own key names."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import Retrieval
from models.semmim import load_backbone
from tools import convert as albef
from utils import UserError

WIDTH, HEADS, PATCH, EMBED, INNER = 128, 2, 16, 24, 96
VIT_DEPTH, BERT_DEPTH = 2, 12  # ALBEF's BERT has 6 layers for the text and 6 for the fusion


@functools.cache  # the word embeddings take a while to draw; no test changes a state in place
def albef_state(grid: int, fine_tuned: bool) -> dict:
    """Random weights under the names of ALBEF.pth (fine_tuned: of mscoco.pth)."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) * 0.1 + ("orm" in name and name.endswith("weight"))

    def linear(name: str, out: int, inner: int) -> None:
        add(name + ".weight", out, inner)
        add(name + ".bias", out)

    def norm(name: str) -> None:
        add(name + ".weight", WIDTH)
        add(name + ".bias", WIDTH)

    add("visual_encoder.cls_token", 1, 1, WIDTH)
    add("visual_encoder.pos_embed", 1, 1 + grid**2, WIDTH)
    add("visual_encoder.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    add("visual_encoder.patch_embed.proj.bias", WIDTH)
    for i in range(VIT_DEPTH):
        block = f"visual_encoder.blocks.{i}."
        norm(block + "norm1")
        norm(block + "norm2")
        linear(block + "attn.qkv", 3 * WIDTH, WIDTH)
        linear(block + "attn.proj", WIDTH, WIDTH)
        linear(block + "mlp.fc1", 4 * WIDTH, WIDTH)
        linear(block + "mlp.fc2", WIDTH, 4 * WIDTH)
    norm("visual_encoder.norm")
    bert = "text_encoder." if fine_tuned else "text_encoder.bert."
    state[bert + "embeddings.position_ids"] = torch.arange(40)[None]
    for table, rows in (("word", 30522), ("position", 40), ("token_type", 2)):
        add(f"{bert}embeddings.{table}_embeddings.weight", rows, WIDTH)
    norm(bert + "embeddings.LayerNorm")
    for i in range(BERT_DEPTH):
        layer = f"{bert}encoder.layer.{i}."
        for kind in ("attention", "crossattention")[: 1 + (i >= 6)]:
            for part in ("query", "key", "value"):
                linear(f"{layer}{kind}.self.{part}", WIDTH, WIDTH)
            linear(f"{layer}{kind}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}{kind}.output.LayerNorm")
        linear(layer + "intermediate.dense", INNER, WIDTH)
        linear(layer + "output.dense", WIDTH, INNER)
        norm(layer + "output.LayerNorm")
    if not fine_tuned:
        linear("text_encoder.cls.predictions.transform.dense", WIDTH, WIDTH)
        norm("text_encoder.cls.predictions.transform.LayerNorm")
        add("text_encoder.cls.predictions.bias", 30522)
        state["text_encoder.cls.predictions.decoder.weight"] = state[bert + "embeddings.word_embeddings.weight"]
        state["text_encoder.cls.predictions.decoder.bias"] = state["text_encoder.cls.predictions.bias"]
    linear("vision_proj", EMBED, WIDTH)
    linear("text_proj", EMBED, WIDTH)
    linear("itm_head", 2, WIDTH)
    for name in ("visual_encoder.norm.weight", f"{bert}encoder.layer.0.output.dense.bias", "vision_proj.weight"):
        part, rest = name.split(".", 1)
        state[f"{part}_m.{rest}"] = torch.zeros(3)
    state |= {"image_queue": torch.zeros(EMBED, 8), "text_queue": torch.zeros(EMBED, 8), "temp": torch.tensor(0.05)}
    state |= {"idx_queue": torch.zeros(1, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return state


FUSION = [
    key
    for key in albef_state(grid=2, fine_tuned=True)
    if key.startswith(tuple(f"text_encoder.encoder.layer.{i}." for i in range(6, 12)))
]


def attend(w: dict, name: str, x: torch.Tensor, other: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """BERT's attention of x [1, L, D] to `other` [1, S, D], of which keep [S] is not padding."""
    query, key, value = (
        F.linear(y, w[f"{name}.self.{part}.weight"], w[f"{name}.self.{part}.bias"]).unflatten(2, (HEADS, -1))
        for part, y in (("query", x), ("key", other), ("value", other))
    )
    scores = torch.einsum("blhd,bshd->bhls", query, key) / (WIDTH // HEADS) ** 0.5
    weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    out = torch.einsum("bhls,bshd->blhd", weights, value).flatten(2)
    return residual(w, f"{name}.output", out, x)


def residual(w: dict, name: str, inner: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = F.linear(inner, w[name + ".dense.weight"], w[name + ".dense.bias"]) + x
    return F.layer_norm(out, (WIDTH,), w[name + ".LayerNorm.weight"], w[name + ".LayerNorm.bias"], 1e-12)


def bert_layers(w: dict, bert: str, layers: range, x, keep, image=None):
    for i in layers:
        name = f"{bert}encoder.layer.{i}"
        x = attend(w, name + ".attention", x, x, keep)
        if image is not None:
            x = attend(w, name + ".crossattention", x, image, torch.ones(image.shape[1], dtype=torch.bool))
        inner = F.gelu(F.linear(x, w[name + ".intermediate.dense.weight"], w[name + ".intermediate.dense.bias"]))
        x = residual(w, name + ".output", inner, x)
    return x


def reference(w: dict, picture: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor) -> tuple[float, float]:
    """(ITC similarity, ITM logit of a match) of one image [3, S, S] and one padded text [L]."""
    v = {key.removeprefix("visual_encoder."): value for key, value in w.items()}
    x = F.conv2d(picture[None], v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([v["cls_token"], x.flatten(2).transpose(1, 2)], 1) + v["pos_embed"]
    for i in range(VIT_DEPTH):
        b = f"blocks.{i}."
        y = F.layer_norm(x, (WIDTH,), v[b + "norm1.weight"], v[b + "norm1.bias"], 1e-6)
        q, k, u = F.linear(y, v[b + "attn.qkv.weight"], v[b + "attn.qkv.bias"]).unflatten(2, (3, HEADS, -1)).unbind(2)
        weights = (torch.einsum("blhd,bshd->bhls", q, k) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        y = torch.einsum("bhls,bshd->blhd", weights, u).flatten(2)
        x = x + F.linear(y, v[b + "attn.proj.weight"], v[b + "attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), v[b + "norm2.weight"], v[b + "norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, v[b + "mlp.fc1.weight"], v[b + "mlp.fc1.bias"]))
        x = x + F.linear(y, v[b + "mlp.fc2.weight"], v[b + "mlp.fc2.bias"])
    image = F.layer_norm(x, (WIDTH,), v["norm.weight"], v["norm.bias"], 1e-6)

    bert = "text_encoder.bert." if "text_encoder.bert.embeddings.LayerNorm.bias" in w else "text_encoder."
    e = bert + "embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "token_type_embeddings.weight"][0]
    x = (x + w[e + "position_embeddings.weight"][: len(ids)])[None]
    x = F.layer_norm(x, (WIDTH,), w[e + "LayerNorm.weight"], w[e + "LayerNorm.bias"], 1e-12)
    text = bert_layers(w, bert, range(6), x, keep)
    fused = bert_layers(w, bert, range(6, 12), text, keep, image)
    projected = (
        F.normalize(F.linear(part[0, 0], w[name + ".weight"], w[name + ".bias"]), dim=0)
        for part, name in ((image, "vision_proj"), (text, "text_proj"))
    )
    itc = torch.dot(*projected)
    return float(itc), float(F.linear(fused[0, 0], w["itm_head.weight"], w["itm_head.bias"])[1])


def convert(tmp_path, state: dict, wrap: bool = True):
    torch.save({"model": state, "epoch": 3} if wrap else state, tmp_path / "albef.pth")
    (tmp_path / "out" / "converted.pth").unlink(missing_ok=True)
    albef.main([str(tmp_path / "albef.pth"), str(tmp_path / "out" / "converted.pth")])
    return tmp_path / "out" / "converted.pth"


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_similarities_and_matching_logits_are_albefs(tmp_path, capsys, fine_tuned):
    state = albef_state(grid=3, fine_tuned=fine_tuned)
    path = convert(tmp_path, state, wrap=not fine_tuned)
    shown = capsys.readouterr().out
    assert "48 px" in shown
    backbone, rest, _ = load_backbone(path)
    assert rest["description"]["sep"] is False
    assert float(backbone.temperature()) == pytest.approx(0.05)
    backbone.eval()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(2, 3, 48, 48, generator=generator)
    ids = torch.randint(1, 30522, (2, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        image_embeds, image_feat = backbone.encode_image(pictures)
        text_embeds, text_feat = backbone.encode_text(ids, mask)
        memory = backbone.fusion_encoder.project_memory(image_embeds)
        itm = backbone.itm_logits(backbone.fusion_encoder(text_embeds, mask, memory))[:, 1]
        itc = (image_feat * text_feat).sum(1)
        expected = [reference(state, pictures[i], ids[i], mask[i].bool()) for i in range(2)]
    assert torch.allclose(itc, torch.tensor([value for value, _ in expected]), atol=1e-4)
    assert torch.allclose(itm, torch.tensor([value for _, value in expected]), atol=1e-4)
    assert abs(expected[0][1] - expected[1][1]) > 1e-2  # the logits say something


def test_the_word_scores_of_a_pre_training_file_are_albefs(tmp_path):
    state = albef_state(grid=2, fine_tuned=False)
    backbone, _, _ = load_backbone(convert(tmp_path, state), mlm_head=True)
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    w = {key.removeprefix("text_encoder.cls.predictions."): value for key, value in state.items()}
    x = F.gelu(F.linear(hidden, w["transform.dense.weight"], w["transform.dense.bias"]))
    x = F.layer_norm(x, (WIDTH,), w["transform.LayerNorm.weight"], w["transform.LayerNorm.bias"], 1e-12)
    expected = F.linear(x, w["decoder.weight"], w["decoder.bias"])
    with torch.no_grad():
        assert torch.allclose(backbone.mlm_logits(hidden), expected, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(2)}, "text_decoder"),
        ({"visual_encoder.extra": torch.zeros(2)}, r"visual_encoder\.extra has no place"),
        ({"vision_proj.weight": None}, r"vision_proj\.weight is missing"),  # the description needs this one
        (dict.fromkeys(FUSION), r"text_encoder\.encoder\.layer\.6\.\S* is missing"),
        ({"itm_head.bias": torch.zeros(3)}, r"itm_head\.bias has the shape \[3\] instead of \[2\]"),
        ({"visual_encoder.pos_embed": torch.zeros(1, 8, WIDTH)}, r"visual_encoder\.pos_embed has the shape"),
        ({"visual_encoder.patch_embed.proj.weight": torch.zeros(96, 3, PATCH, PATCH)}, "96 and 128 wide"),
        ({"temp": None}, "temp is missing"),
        ({"temp": torch.tensor(-0.1)}, "temp is -0.1"),
    ],
)
def test_a_file_of_another_kind_is_a_one_line_error(change, message):
    state = albef_state(grid=2, fine_tuned=True) | change
    with pytest.raises(UserError, match=message) as error:
        albef.convert({key: value for key, value in state.items() if value is not None}, "albef.pth")
    assert "\n" not in str(error.value)


def test_retrieval_evaluates_a_converted_file_at_another_resolution(tmp_path):
    path = convert(tmp_path, albef_state(grid=2, fine_tuned=True))
    entries = []
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        entries.append({"image": f"{i}.png", "caption": [f"image {i}"]})
    (tmp_path / "split.json").write_text(json.dumps(entries))
    files = [f"data.{split}=[{tmp_path / 'split.json'}]" for split in ("val", "test")]
    settings = ["data.image_root=none", "data.num_workers=0", "image_size=48", "eval.folds=0", "train.precision=fp32"]
    start = ["--config", "configs/Retrieval_coco.yaml", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    Retrieval.main([*start, "--checkpoint", str(path), "--evaluate", "--override", *files, *settings])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"]["itm_ir_r10"] == 100
