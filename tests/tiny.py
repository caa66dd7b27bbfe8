"""A very small SemMIM and batches for it, shared by the tests."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataset.text import Tokenizer
from engine.config import PRETRAIN, load_config
from models.pretrain import Draws, build_pretrain_model

TOKENIZER = Tokenizer("configs/bert/vocab.txt")
TINY = [
    "model.image_encoder.name=vit_tiny_patch16_224",
    "model.image_encoder.image_size=32",
    "model.image_encoder.args={embed_dim: 32, depth: 3, num_heads: 2, patch_size: 8}",
    "model.image_encoder.weights=random",
    "model.bert.weights=random",
    "model.bert.args={hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}",
    "model.bert.text_layers=1",
    "model.bert.fusion_layers=1",
    "model.bert.decoder_layers=1",
    "model.embed_dim=16",
    "itc.queue_size=20",
    "mim.inject_from=3",
    "mim.head={hidden: 32, patterns: 24, normalize: true}",
    "train.batch_size=6",
]
NO_DROPOUT = [
    "model.bert.args={hidden_size: 32, num_attention_heads: 2, intermediate_size: 64, hidden_dropout_prob: 0.0,"
    " attention_probs_dropout_prob: 0.0}"
]
CAPTIONS = [
    "a red circle left of a blue square",
    "green star",
    "two yellow triangles above a small grey box",
    "a big green star",
    "the word stop on a white sign",
    "a yellow ring below a blue cross",
    "three dots",
    "a brown dog beside a cat",
]


def tiny_config(*overrides: str):
    """The paper's configuration, shrunk, with `overrides` on top."""
    return load_config(PRETRAIN.schema, [*TINY, *overrides], PRETRAIN)


def tiny_model(*overrides: str, seed: int = 0):
    """A PretrainModel with random weights that are a function of `seed`."""
    torch.manual_seed(seed)
    return build_pretrain_model(tiny_config(*overrides), TOKENIZER)[0]


def make_batch(size: int = 6, seed: int = 0, captions: list[str] | None = None) -> dict:
    """Random images with captions; ids are those of the rows."""
    generator = torch.Generator().manual_seed(seed)
    captions = captions or [CAPTIONS[(i + seed) % len(CAPTIONS)] for i in range(size)]
    input_ids, attention_mask = TOKENIZER.encode(captions, 25)
    return {
        "image1": torch.randn(size, 3, 32, 32, generator=generator),
        "image2": torch.randn(size, 3, 32, 32, generator=generator),
        "codebook_image": torch.rand(size, 3, 32, 32, generator=generator),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_id": torch.arange(size) + 100 * seed,
        "caption_id": torch.tensor([CAPTIONS.index(c) if c in CAPTIONS else hash(c) for c in captions]),
    }


def make_draws(batch: dict, seed: int = 0, patches: int = 16) -> Draws:
    """The random numbers of one step on `batch`, a function of `seed`."""
    size, length = batch["input_ids"].shape
    return Draws.sample(size, patches, length, torch.Generator().manual_seed(seed))


def draws_part(draws: Draws, rows: slice, length: int) -> Draws:
    """The draws of some rows, cut to `length` tokens."""
    cut = {name: value[rows] for name, value in vars(draws).items()}
    return Draws(**{name: x[:, :length] if name.startswith("mlm") else x for name, x in cut.items()})


def noise(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The content of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save_codebook(folder: Path) -> Path:
    """A very small codebook of random weights (mim.codebook)."""
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    config = FlavaImageCodebookConfig(hidden_size=8, vocab_size=32, num_blocks_per_group=1)
    FlavaImageCodebook(config).save_pretrained(folder)
    return folder


def gray_images(folder: Path, count: int) -> list[str]:
    """Write images of one gray each, 0.png, 1.png, ...; `gray_level` tells a transformed image's number."""
    for level in range(count):
        Image.new("RGB", (40, 30), (20 * level,) * 3).save(folder / f"{level}.png")
    return [f"{level}.png" for level in range(count)]


def gray_level(images: Tensor) -> Tensor:
    """[n, 3, S, S] -> [n] the number of each of `gray_images`"""
    mean, std = 0.48145466, 0.26862954  # of the red channel, as CLIP normalizes
    return ((images[:, 0].mean((1, 2)) * std + mean) * 255 / 20).round().long()


class Naming(nn.Module):
    """A model that says of each of `gray_images` the text of its number, as a caption and as an answer."""

    def __init__(self, texts: Iterable[str]):
        super().__init__()
        self.ids = [[*ids, TOKENIZER.sep_id] for ids in TOKENIZER.word_pieces(list(texts))]

    def generate(self, images: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, options) -> tuple[Tensor, None]:
        assert not self.training
        return TOKENIZER.pad([self.ids[level] for level in gray_level(images).tolist()])[0], None

    def answer(self, batch: dict, options) -> Tensor:
        return self.generate(batch["image"][batch["image_rows"]], None, None, options)[0]


class Notes:
    """An evaluation's record: a folder, and lists of what it was told."""

    def __init__(self, folder: Path):
        self.dir, self.lines, self.logged, self.metrics = folder, [], [], None

    def info(self, message: str) -> None:
        self.lines.append(message)

    def log(self, step: int, values: dict[str, float], split: str, final: bool = False) -> None:
        self.logged.append((step, split, values))

    def write_metrics(self, metrics: dict) -> None:
        self.metrics = metrics
