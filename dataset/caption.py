"""Captioning: pictures with reference captions, from Karpathy's split file, plain lists or NoCaps.

Entries of one file may be
    {"filepath", "filename", "sentences": [{"raw"}], "cocoid" | "imgid", "split"}     Karpathy's dataset_coco.json
    {"image", "caption": str | [str], "image_id"}                                     plain lists (ALBEF, BLIP)
    {"image", "caption": [str], "img_id", "domain"}                                   NoCaps
and may all carry mPLUG's "object_label": "dog&&frisbee". Where entries name a `split`, only those of the asked
one are taken.
"""

import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import StringTable, load_annotations
from dataset.common import EmptyCaption, TrainDataset, may_flip, read_for_evaluation, sample_places, sample_rng
from dataset.text import Tokenizer
from dataset.transforms import open_image, test_transform, train_transform
from utils import UserError

log = logging.getLogger(__name__)

# Karpathy's test and val are 5,000 pictures each; `restval`, the rest of COCO's validation set, is trained on.
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
DOMAINS = ("in", "near", "out")  # of NoCaps; its files say "near-domain"
IGNORE = -100  # target of a position that counts for no loss, torch's own convention
COCO_NAME = re.compile(r"COCO_\w+_0*(\d+)\.\w+$")


def load_captions(
    files: str | Path | Sequence[str | Path],
    split: str,
    image_root: str | Path | Mapping[str, str] | None = None,
    image_prefix_map: Mapping[str, str] | None = None,
) -> list[dict]:
    """The entries of a split ("train", "val" or "test") as {image, captions, image_id, labels, domain}.

    image: the path to open; captions: list of str, as they stand (empty where a test set publishes none);
    image_id: the entry's, else COCO's number in the file name, else None; labels: list of str; domain: one of
    DOMAINS or None. Raises UserError naming file, entry and key.
    """

    def plain(entry: dict, where: str) -> dict | None:
        if "split" in entry and entry["split"] not in KARPATHY_SPLITS[split]:
            return None
        return _plain_entry(entry, where)

    entries = load_annotations(files, "caption", image_root, image_prefix_map, convert=plain)
    if not entries:
        raise UserError(f"{files}: no entry has the split {' or '.join(KARPATHY_SPLITS[split])}")
    return entries


def _plain_entry(entry: dict, where: str) -> dict:
    """Any of the three kinds of entry in the form that `load_captions` returns."""
    plain = {"image": entry.get("image"), "dataset": entry.get("dataset"), "captions": entry.get("caption", [])}
    identifiers = [entry[key] for key in ("image_id", "img_id", "cocoid", "imgid") if key in entry]
    if "sentences" in entry and "filename" in entry:
        sentences = entry["sentences"]
        if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
            raise UserError(f"{where}: 'sentences' must be a list of {{\"raw\": text}} (Karpathy's format)")
        plain["captions"] = [sentence["raw"] for sentence in sentences]
        plain["image"] = "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part)
    if plain["image"] is None:
        raise UserError(f"{where} has no 'image', and no 'filename' with 'sentences'; see dataset/caption.py's formats")
    if isinstance(plain["captions"], str):
        plain["captions"] = [plain["captions"]]
    if not isinstance(plain["captions"], list) or not all(isinstance(text, str) for text in plain["captions"]):
        raise UserError(f"{where}: 'caption' must be a string or a list of strings")
    if not isinstance(entry.get("object_label", ""), str):
        raise UserError(f"{where}: 'object_label' must be a string, labels joined by && (mPLUG's format)")
    number = COCO_NAME.search(str(plain["image"]))
    plain["image_id"] = identifiers[0] if identifiers else int(number[1]) if number else None
    plain["labels"] = split_labels(entry.get("object_label", ""))
    plain["domain"] = _domain(entry.get("domain"), where)
    return {key: value for key, value in plain.items() if value is not None}


def _domain(name, where: str) -> str | None:
    if name is None:
        return None
    short = str(name).removesuffix("-domain")
    if short not in DOMAINS:
        raise UserError(f"{where}: 'domain' is {name!r}, it must be one of {', '.join(DOMAINS)} (or in-domain, ...)")
    return short


def split_labels(object_label: str) -> list[str]:
    """mPLUG's "dog&&frisbee&&dog" -> ["dog", "frisbee"]"""
    return list(dict.fromkeys(label.strip() for label in object_label.split("&&") if label.strip()))


def target_text(caption: str) -> str:
    """A caption as the decoder learns it: lower case, punctuation kept (mPLUG)."""
    return " ".join(caption.lower().split())


def prompt_text(prompt: str, labels: Sequence[str]) -> str:
    """What the text encoder reads: the prompt, then the object labels."""
    return " ".join([prompt.strip(), *labels]).strip().lower()


class CaptionTrainDataset(TrainDataset):
    """Pictures and captions to learn from.

    per: "caption", an epoch visits every (picture, caption); "image", every picture with one of its captions
    drawn. object_labels: whether the prompt names the entry's labels.

    `dataset[(epoch, index)]` (or `dataset[index]` for epoch 0) is a dict: image [3,S,S], caption (lower case),
    prompt, references (all captions of the picture, as they stand), path, bad (as PretrainDataset).
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        seed: int = 0,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        per: str = "caption",
        prompt: str = "",
        object_labels: bool = False,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        ops: int = 2,
        magnitude: float = 7,
    ):
        merged: dict[str, dict] = {}
        for entry in load_captions(files, "train", image_root, image_prefix_map):
            merged.setdefault(entry["image"], {**entry, "captions": []})["captions"] += entry["captions"]
        entries = [entry for entry in merged.values() if entry["captions"]]
        if not entries:
            raise UserError(f"{files}: no entry has a caption to learn from")
        counts = [len(entry["captions"]) for entry in entries]
        self.paths = StringTable(entry["image"] for entry in entries)
        self.prompts = StringTable(prompt_text(prompt, entry["labels"] if object_labels else ()) for entry in entries)
        self.captions = StringTable(caption for entry in entries for caption in entry["captions"])
        self.start = np.cumsum([0, *counts], dtype=np.int64)  # [images + 1], an image's captions
        self.image_of_caption = np.repeat(np.arange(len(entries)), counts)
        self.per, self.seed = per, seed
        self.transform = train_transform(image_size, crop_scale, flip, ops, magnitude)

    def __len__(self) -> int:
        return len(self.captions) if self.per == "caption" else len(self.paths)

    def caption_length(self, epoch: int, index: int) -> int:
        """Characters of the caption of this visit, for sorting by length."""
        return len(self.captions[self._draw(index, sample_rng(self.seed, epoch, index))[1]])

    def references(self, image: int) -> list[str]:
        """All captions of a picture (by its number in `paths`), as they stand."""
        return [self.captions[i] for i in range(self.start[image], self.start[image + 1])]

    def _draw(self, index: int, rng: random.Random) -> tuple[int, int]:
        """(picture, caption) of a visit"""
        if self.per == "caption":
            return int(self.image_of_caption[index]), index
        return index, rng.randrange(self.start[index], self.start[index + 1])

    def _sample(self, index: int, rng: random.Random) -> dict:
        image, caption = self._draw(index, rng)
        path, references = self.paths[image], self.references(image)
        text = target_text(self.captions[caption])
        if not text:
            raise EmptyCaption(f"{path}: an empty caption")
        picture = self.transform(open_image(path), rng, all(may_flip(reference.lower()) for reference in references))
        return {
            "image": picture,
            "caption": text,
            "prompt": self.prompts[image],
            "references": references,
            "path": path,
        }


class CaptionEvalDataset(Dataset):
    """The pictures of a split, each `image_id` once: `dataset[i]` is (picture i as float32 [3,S,S], i).

    images, ids, prompts: of each picture; references: its captions; domains: NoCaps' in, near or out, else
    None. An unreadable picture is a UserError: results must stay comparable.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        split: str,
        *,
        image_size: int,
        image_root: str | Path | Mapping[str, str] | None = None,
        image_prefix_map: Mapping[str, str] | None = None,
        prompt: str = "",
        object_labels: bool = False,
    ):
        merged: dict[str | int, dict] = {}
        for entry in load_captions(files, split, image_root, image_prefix_map):
            if "image_id" not in entry:
                raise UserError(f"{files}: the entry of {entry['image']} has no 'image_id', which results need")
            merged.setdefault(entry["image_id"], {**entry, "captions": []})["captions"] += entry["captions"]
        entries = list(merged.values())
        self.ids = list(merged)
        self.images = [entry["image"] for entry in entries]
        self.references = [entry["captions"] for entry in entries]
        self.domains = [entry.get("domain") for entry in entries]
        self.prompts = [prompt_text(prompt, entry["labels"] if object_labels else ()) for entry in entries]
        self.transform = test_transform(image_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_for_evaluation(self.images[index], self.transform), index


class CaptionCollate:
    """List of samples of CaptionTrainDataset -> batch dict.

    image [B,3,S,S]; prompt_ids, prompt_mask [B,P]; input_ids, target [B,T]: the decoder's input [CLS] caption and
    what it has to say, caption [SEP], IGNORE behind it; references (list of lists of str), paths, bad.
    `max_tokens` bounds T, that is the tokens to generate; a caption cut there is not taught to end.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_prompt_tokens: int):
        self.tokenizer, self.max_tokens, self.max_prompt_tokens = tokenizer, max_tokens, max_prompt_tokens

    def __call__(self, samples: list[dict]) -> dict:
        places = sample_places(samples)
        if "unusable" in places:
            return places
        batch = {"image": torch.stack([sample["image"] for sample in samples])}
        prompts = [sample["prompt"] for sample in samples]
        batch["prompt_ids"], batch["prompt_mask"] = self.tokenizer.encode(prompts, self.max_prompt_tokens)
        captions = [sample["caption"] for sample in samples]
        batch["input_ids"], batch["target"] = caption_tokens(self.tokenizer, captions, self.max_tokens)
        references = [sample["references"] for sample in samples]
        return {**batch, "references": references, **places}


def caption_tokens(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Captions to input_ids `[CLS] w1 .. wn [PAD]..` and target `w1 .. wn [SEP] IGNORE..`, [B,T], T <= max_tokens."""
    rows = [[*ids, tokenizer.sep_id][:max_tokens] for ids in tokenizer.word_pieces(captions)]
    length = max(map(len, rows))
    target = torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows], dtype=torch.int64)
    input_ids = torch.cat([torch.full((len(rows), 1), tokenizer.cls_id), target[:, :-1]], 1)
    return input_ids.masked_fill((input_ids == IGNORE) | (input_ids == tokenizer.sep_id), tokenizer.pad_id), target
