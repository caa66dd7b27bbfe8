"""Captioning: images with reference captions, for training and for evaluation."""

import random
from collections.abc import Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from dataset.annotations import Source, load_captions
from dataset.cache import StringTable
from dataset.common import CaptionedDataset, Collate, EmptyCaption, EvalDataset, Transform, starts
from dataset.text import LOWER_CASE, Tokenizer, has_word
from dataset.transforms import Augment, stack_pixels
from dataset.vqa import encode_answers
from utils import IGNORE, UserError, one_line


def target_text(caption: str, lower: bool = True) -> str:
    """A caption as the decoder learns it: lower case, punctuation kept (mPLUG)."""
    return " ".join((caption.lower() if lower else caption).split())


def prompt_text(prompt: str, labels: Sequence[str], lower: bool = True) -> str:
    """What the text encoder reads: the prompt, then the object labels."""
    text = " ".join([prompt.strip(), *labels]).strip()
    return text.lower() if lower else text


def entry_prompt(entry: dict, prompt: str = "", object_labels: bool = False, lower: bool = True) -> str:
    """The prompt of an entry of `load_captions`. object_labels: whether it names the entry's labels."""
    return prompt_text(prompt, entry["labels"] if object_labels else (), lower)


class CaptionTrainDataset(CaptionedDataset):
    """Images and captions to learn from.

    prompt: entry -> what the text encoder reads, see `entry_prompt`; per: "caption", an epoch visits every (image,
    caption); "image", every image with one of its captions drawn.

    A sample is a dict: image [3,S,S], caption (as `target_text` has it), prompt, references (all captions of the image,
    as they stand), path, bad.
    """

    def __init__(
        self, source: Source, transform: Augment, prompt=entry_prompt, per="caption", language=LOWER_CASE, seed: int = 0
    ):
        entries = [entry for entry in load_captions(source, "train") if entry["captions"]]
        if not entries:
            raise UserError(f"{source.files}: no entry has a caption to learn from")
        captions = [entry["captions"] for entry in entries]
        self.prompts = StringTable(map(prompt, entries))
        self.start = starts(captions)  # [images + 1], an image's captions
        self.language = language
        self.transform = transform
        images = np.repeat(np.arange(len(entries)), np.diff(self.start))
        texts = StringTable(chain.from_iterable(captions))
        groups = self.start if per == "image" else None
        super().__init__((entry["image"] for entry in entries), texts, images, groups, seed=seed)

    def references(self, image: int) -> list[str]:
        """All captions of an image (by its number in `paths`), as they stand."""
        return [self.captions[i] for i in range(self.start[image], self.start[image + 1])]

    def _sample(self, index: int, rng: random.Random) -> dict:
        caption = self.draw_caption(index, rng)
        image = int(self.image_of_caption[caption])
        path, references = self.paths[image], self.references(image)
        text = target_text(self.captions[caption], self.language.lower)
        if not has_word(text):
            raise EmptyCaption(f"{one_line(path, 1000)}: an empty caption")
        allow_flip = all(map(self.language.may_flip, references))
        return {
            "image": self.transform(self.read_image(image), rng, allow_flip),
            "caption": text,
            "prompt": self.prompts[image],
            "references": references,
            "path": path,
        }


class CaptionEvalDataset(EvalDataset):
    """The images of a split, each `image_id` once.

    images, ids, prompts: of each image; references: its captions; domains: NoCaps' in, near or out, else None.
    """

    def __init__(self, source: Source, transform: Transform, split: str, prompt=entry_prompt):
        entries = load_captions(source, split)
        super().__init__([entry["image"] for entry in entries], transform)
        self.ids = [entry["image_id"] for entry in entries]
        self.references = [entry["captions"] for entry in entries]
        self.domains = [entry["domain"] for entry in entries]
        self.prompts = list(map(prompt, entries))


class CaptionCollate(Collate):
    """List of samples of CaptionTrainDataset -> batch dict.

    image [B,3,S,S]; prompt_ids [B,P]; prompt_mask [B,P], None if no prompt is padded; input_ids, target [B,T]: the
    decoder's input [CLS] caption and what it has to say, caption [SEP], IGNORE behind it; references (list of lists of
    str), paths, bad.
    `max_tokens` bounds T, that is the tokens to generate; a caption cut there is not taught to end.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_prompt_tokens: int):
        self.tokenizer, self.max_tokens, self.max_prompt_tokens = tokenizer, max_tokens, max_prompt_tokens

    def batch(self, samples: list[dict]) -> dict:
        prompt_ids, mask = self.tokenizer.encode([sample["prompt"] for sample in samples], self.max_prompt_tokens)
        captions = [sample["caption"] for sample in samples]
        input_ids, target = caption_tokens(self.tokenizer, captions, self.max_tokens)
        return {
            "image": stack_pixels([sample["image"] for sample in samples]),
            "prompt_ids": prompt_ids,
            "prompt_mask": self.tokenizer.padding(mask),
            "input_ids": input_ids,
            "target": target,
            "references": [sample["references"] for sample in samples],
        }


def caption_tokens(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Captions to input_ids `[CLS] w1 .. wn [PAD]..` and target `w1 .. wn [SEP] IGNORE..`, [B,T], T <= max_tokens."""
    input_ids, target, mask = encode_answers(tokenizer, captions, max_tokens)
    return input_ids, target.masked_fill(mask == 0, IGNORE)
