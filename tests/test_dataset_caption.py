from functools import partial

import annotated
import torch
from annotated import make, write
from tiny import TOKENIZER

from dataset.annotations import Source
from dataset.caption import CaptionCollate, CaptionEvalDataset, caption_tokens, entry_prompt
from dataset.loader import BatchIndices, Loader
from dataset.transforms import test_transform as square  # not collected as a test
from utils import IGNORE

folder = annotated.folder

KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": f"{name}.png",
            "cocoid": 10 + number,
            "split": split,
            "sentences": [{"raw": f"A {name} one."}, {"raw": f"{name} two"}],
            "object_label": "dog&&frisbee&&dog",
        }
        for number, (name, split) in enumerate([("a", "train"), ("b", "restval"), ("c", "val"), ("d", "test")])
    ],
}


def test_karpathys_file_gives_train_with_restval_and_the_asked_evaluation_split(folder):
    (folder / "val2014").symlink_to(folder)
    file = write(folder, KARPATHY)
    train = make("caption_train", file, prompt=partial(entry_prompt, prompt="An image of", object_labels=True))
    assert [train[i]["caption"] for i in range(len(train))] == ["a a one.", "a two", "a b one.", "b two"]
    assert train[3]["references"] == ["A b one.", "b two"] and train[3]["prompt"] == "an image of dog frisbee"
    for split, name in (("val", "c"), ("test", "d")):
        data = CaptionEvalDataset(Source(file), square(8), split, partial(entry_prompt, object_labels=True))
        assert data.images == [str(folder / f"{name}.png")] and len(data.references[0]) == 2  # where the link leads
        assert data.prompts == ["dog frisbee"]
    assert data.ids == [13]


def test_nocaps_keeps_domains_and_ids(folder):
    entries = [
        {"image": "a.png", "img_id": 5, "caption": ["x"], "domain": "near-domain"},
        {"image": "b.png", "img_id": 6, "caption": ["y"], "domain": "out"},
        {"image": "c.png", "img_id": 7, "domain": "in-domain"},
        {"image": "d.png", "img_id": 8, "caption": []},
    ]
    data = make("caption_eval", write(folder, entries))
    assert data.ids == [5, 6, 7, 8] and data.domains == ["near", "out", "in", None]
    assert data.references == [["x"], ["y"], [], []]


def test_targets_are_the_words_and_sep_and_a_cut_caption_does_not_end():
    ids, target = caption_tokens(TOKENIZER, ["a red dog", "dog"], max_tokens=3)
    a, red, dog = TOKENIZER.word_pieces(["a red dog"])[0]
    assert ids.tolist() == [[TOKENIZER.cls_id, a, red], [TOKENIZER.cls_id, dog, TOKENIZER.pad_id]]
    assert target.tolist() == [[a, red, dog], [dog, TOKENIZER.sep_id, IGNORE]]


def test_batches_hold_prompts_captions_and_references_and_replace_broken_images(folder):
    (folder / "b.png").write_bytes(b"oops")
    entries = [{"image": f"{name}.png", "caption": [f"a {name}"]} for name in "abc"]
    data = make("caption_train", write(folder, entries), prompt=lambda entry: "look")
    (batch,) = Loader(BatchIndices(data, 3), CaptionCollate(TOKENIZER, 25, 25))
    assert batch["image"].shape == (3, 3, 8, 8) and batch["prompt_ids"].shape == (3, 2)
    assert batch["input_ids"].shape == batch["target"].shape == (3, 3)
    assert len(batch["references"]) == 3 and "b.png" in batch["bad"][0]
    assert torch.equal(batch["target"][:, -1], torch.full((3,), TOKENIZER.sep_id))
