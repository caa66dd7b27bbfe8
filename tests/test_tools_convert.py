"""tools/convert.py against ALBEF's forward pass, of timm's ViT and transformers' BERT, whose names ALBEF's file has."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tiny import noise
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import Retrieval
from models.semmim import load_backbone
from tools import convert as albef
from utils import UserError

WIDTH, PATCH, EMBED = 128, 16, 24
SHAPE = dict(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=96, max_position_embeddings=40)


class Albef(nn.Module):
    """Layers 0 to 5 of its BERT read the text, 6 to 11 (`fusion`) attend to the image, too."""

    def __init__(self, grid: int):
        super().__init__()
        size = {"img_size": grid * PATCH, "patch_size": PATCH, "embed_dim": WIDTH}
        self.visual_encoder = VisionTransformer(**size, depth=2, num_heads=2, num_classes=0)
        self.text = BertForMaskedLM(BertConfig(**SHAPE, num_hidden_layers=6))
        decoder = {"is_decoder": True, "add_cross_attention": True}  # transformers' way to have cross-attention
        self.fusion = BertModel(BertConfig(**SHAPE, num_hidden_layers=6, **decoder)).encoder
        self.vision_proj, self.text_proj = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
        self.itm_head = nn.Linear(WIDTH, 2)

    @torch.no_grad()
    def forward(
        self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ITC similarities, ITM logits of a match) of images [B, 3, S, S] and padded texts [B, L]."""
        image = self.visual_encoder.forward_features(pictures)
        text = self.text.bert(ids, attention_mask=mask).last_hidden_state
        both_ways = (1.0 - mask)[:, None, None, :].expand(-1, 1, ids.shape[1], -1) * -1e9
        fused = self.fusion(text, attention_mask=both_ways, encoder_hidden_states=image).last_hidden_state
        feats = (F.normalize(layer(x[:, 0]), dim=1) for layer, x in ((self.vision_proj, image), (self.text_proj, text)))
        return torch.mul(*feats).sum(1), self.itm_head(fused[:, 0])[:, 1]


@functools.cache  # the word embeddings take a while to draw; no test changes a state in place
def albef_state(grid: int, fine_tuned: bool) -> tuple[Albef, dict]:
    """A model of random weights, and its state dict under the names of ALBEF.pth (fine_tuned: of mscoco.pth)."""
    torch.manual_seed(0)
    model = Albef(grid).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    bert, state = "text_encoder." if fine_tuned else "text_encoder.bert.", {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "fusion":
            _, number, rest = rest.split(".", 2)
            state[f"{bert}encoder.layer.{6 + int(number)}.{rest}"] = value
        elif name.startswith("text.bert."):
            state[bert + name.removeprefix("text.bert.")] = value
        elif part != "text" or not fine_tuned:
            state[f"text_encoder.{rest}" if part == "text" else name] = value
    for name in ("visual_encoder.norm.weight", f"{bert}encoder.layer.0.output.dense.bias", "vision_proj.weight"):
        part, rest = name.split(".", 1)
        state[f"{part}_m.{rest}"] = torch.zeros(3)
    state |= {"image_queue": torch.zeros(EMBED, 8), "text_queue": torch.zeros(EMBED, 8), "temp": torch.tensor(0.05)}
    state |= {"idx_queue": torch.zeros(1, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return model, state | {f"{bert}embeddings.position_ids": torch.arange(40)[None]}


def convert(tmp_path, state: dict, wrap: bool = True):
    torch.save({"model": state, "epoch": 3} if wrap else state, tmp_path / "albef.pth")
    albef.main([str(tmp_path / "albef.pth"), str(tmp_path / "out" / "converted.pth")])
    return tmp_path / "out" / "converted.pth"


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_similarities_and_matching_logits_are_albefs(tmp_path, capsys, fine_tuned):
    model, state = albef_state(grid=3, fine_tuned=fine_tuned)
    path = convert(tmp_path, state, wrap=not fine_tuned)
    assert "48 px" in capsys.readouterr().out
    backbone, rest, _ = load_backbone(path, mlm_head=not fine_tuned)
    assert rest["description"]["sep"] is False
    assert backbone.temperature().item() == pytest.approx(0.05)
    backbone.eval()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(2, 3, 48, 48, generator=generator)
    ids = torch.randint(1, 30522, (2, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        image_embeds, image_feat = backbone.encode_image(pictures)
        text_embeds, text_feat = backbone.encode_text(ids, mask)
        memory = backbone.fusion_encoder.project_memory(image_embeds)
        fused = backbone.fusion_encoder(text_embeds, mask, memory)
        itc, itm = model(pictures, ids, mask)
        torch.testing.assert_close((image_feat * text_feat).sum(1), itc, atol=1e-4, rtol=0)
        torch.testing.assert_close(backbone.itm_logits(fused)[:, 1], itm, atol=1e-4, rtol=0)
        if not fine_tuned:
            torch.testing.assert_close(backbone.mlm_logits(fused), model.text.cls(fused), atol=1e-4, rtol=0)
    assert abs(itm[0] - itm[1]) > 1e-2  # the logits say something


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(2)}, "text_decoder"),
        ({"vision_proj.weight": None}, r"vision_proj\.weight is missing"),  # the description needs this one
        ({"text_encoder.encoder.layer.6.output.dense.bias": None}, r"layer\.0\.output\.dense\.bias is missing"),
        ({"visual_encoder.pos_embed": torch.zeros(1, 8, WIDTH)}, r"pos_embed has the shape"),
    ],
)
def test_a_file_of_another_kind_is_a_one_line_error(change, message):
    state = albef_state(grid=2, fine_tuned=True)[1] | change
    with pytest.raises(UserError, match=message):
        albef.convert({key: value for key, value in state.items() if value is not None}, "albef.pth")


def test_retrieval_evaluates_a_converted_file_at_another_resolution(tmp_path):
    path = convert(tmp_path, albef_state(grid=2, fine_tuned=True)[1])
    entries = []
    for i in range(5):
        noise(40, 40, i).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": [f"image {i}"]})
    (tmp_path / "split.json").write_text(json.dumps(entries))
    files = [f"data.{split}=[{tmp_path / 'split.json'}]" for split in ("val", "test")]
    settings = ["data.image_root=none", "data.num_workers=0", "image_size=48", "eval.folds=0", "train.precision=fp32"]
    start = ["--config", "configs/Retrieval_coco.yaml", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    Retrieval.main([*start, "--checkpoint", str(path), "--evaluate", "--override", *files, *settings])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"]["itm_ir_r10"] == 100
