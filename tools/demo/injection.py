"""Pretrain.py on crowded scenes whose view 2 is degraded: what is injected text worth? (docs/study.md, Table 7)

    python -m tools.demo.injection --view occluded --text own --config configs/demo/Pretrain.yaml ...

All further arguments are Pretrain.py's, `mim.inject_from` among them. View 1, which ITC sees, stays as it is. --text is
what the layers of the image encoder get: the pair's own caption, another pair's (shuffled), or the own one without
what the object is (where). Captions must be those of tools.demo.crowd; data.num_workers must be 0.
"""

import argparse
import runpy
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import dataset.pretrain
import models.pretrain
from tools.demo import crowd, scenes
from utils import ROOT, UserError, run_main

BLUR, CONTRAST, NOISE = 5, 0.3, 20  # pixels of the box that is averaged, share of the contrast, levels of 255
VIEWS = ("whole", "blurred", "occluded")  # occluded: blurred, and a gray third covers the object that the caption names
TEXTS = ("own", "shuffled", "where")


def degrade(images: Tensor, captions: list[str], view: str, generator: torch.Generator) -> Tensor:
    """View 2, uint8 [B, 3, S, S]: blurred, of low contrast, noisy, and occluded if asked for."""
    if view == "whole":
        return images
    border = BLUR // 2
    pixels = F.avg_pool2d(F.pad(images.float(), (border,) * 4, mode="reflect"), BLUR, stride=1)
    mean = pixels.mean((2, 3), keepdim=True)
    pixels = mean + CONTRAST * (pixels - mean)
    if view == "occluded":
        edges = [round(images.shape[-1] * k / 3) for k in range(4)]
        for image, color, caption in zip(pixels, mean, captions, strict=True):
            named = [caption.endswith(f" {scenes.place_words(place)}") for place in crowd.ATTRIBUTES["place"]]
            row, column = scenes.CELLS[named.index(True)]
            image[:, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = color
    noise = NOISE * torch.randn(images.shape, generator=generator)
    return (pixels + noise).round().clamp(0, 255).to(torch.uint8)


def injected_texts(captions: list[str], text: str) -> list[str]:
    """What the image encoder gets with each image."""
    if text == "own":
        return captions
    if text == "shuffled":
        return [*captions[1:], captions[0]]
    kept = ([word for word in caption.split() if word not in (*crowd.PIXELS, *scenes.COLORS)] for caption in captions)
    return [" ".join("object" if word in scenes.SHAPES else word for word in words) for words in kept]


class Collate(dataset.pretrain.PretrainCollate):
    """PretrainCollate with view 2 degraded; injected_ids, injected_mask [B, L'] unless the text is the own."""

    def __init__(self, *args, view: str, text: str):
        super().__init__(*args)
        self.view, self.text = view, text

    def batch(self, samples: list[dict]) -> dict:
        batch, captions = super().batch(samples), [sample["caption"] for sample in samples]
        noise = torch.Generator().manual_seed(int(batch["image2"].sum()))  # a function of the batch: exact at --resume
        batch["image2"] = degrade(batch["image2"], captions, self.view, noise)
        if self.text != "own":
            other = self.tokenizer.encode(injected_texts(captions, self.text), self.max_tokens)
            batch["injected_ids"], batch["injected_mask"] = other
        return batch


class PretrainModel(models.pretrain.PretrainModel):
    """The layers of both image encoders get the text of `injected_ids`; all else, masks included, the caption."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.uses_queue:
            raise UserError("itc.negatives: queue: its text teacher would get the injected text, too; choose batch")

    def injected(self, batch: dict) -> tuple[dict, Tensor]:
        ids, mask = batch["injected_ids"], batch["injected_mask"]
        other = {**batch, "input_ids": ids, "attention_mask": mask, "padded": True}
        return other, self.backbone.text_encoder(ids, mask)

    @torch.no_grad()
    def teach(self, batch, text_embeds, text_feat):
        return super().teach(*self.injected(batch), text_feat)

    def mim_losses(self, batch, image_embeds, text_embeds, teacher):
        other, embeds = self.injected(batch)
        return super().mim_losses(other, image_embeds, embeds, teacher)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.demo.injection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--view", choices=VIEWS, required=True)
    parser.add_argument("--text", choices=TEXTS, default="own")
    args, others = parser.parse_known_args(argv)
    dataset.pretrain.PretrainCollate = partial(Collate, view=args.view, text=args.text)
    if args.text != "own":
        models.pretrain.PretrainModel = PretrainModel
    sys.argv[1:] = others
    runpy.run_path(str(ROOT / "Pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    run_main(main)
