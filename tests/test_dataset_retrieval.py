import annotated
import pytest
import torch
from annotated import make, write
from tiny import TOKENIZER

from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainCollate

folder = annotated.folder

CANDIDATES = [
    {"image": "a.png", "caption": ["A dog!", "two dogs", "!"]},
    {"image": "b.png", "caption": "a cat"},
    {"image": "a.png", "caption": ["a third"], "image_id": 7},
]


def test_an_epoch_may_visit_every_image_with_one_of_its_captions(folder):
    texts = {"a": ["one", "two", "three"], "b": ["four"], "c": ["five", "six"]}
    entries = [{"image": f"{name}.png", "caption": text, "image_id": name} for name in "ab" for text in texts[name]]
    entries += [{"image": "c.png", "caption": texts["c"], "image_id": "c"}]
    entries = entries[::-1]
    data = make("retrieval_train", write(folder, entries), per="image")
    assert len(data) == 3
    for epoch in range(12):
        samples = [data[(epoch, i)] for i in range(3)]
        assert [sample["image_id"] for sample in samples] == [0, 1, 2]  # c, b, a: in order of appearance
        assert all(sample["caption"] in texts[name] for name, sample in zip("cba", samples, strict=True))
    assert {data[(epoch, 2)]["caption"] for epoch in range(12)} == set(texts["a"])


@pytest.mark.parametrize("per", ["caption", "image"])
def test_lengths_for_bucketing_are_those_of_the_captions_that_will_be_read(folder, per):
    entries = [{"image": f"{name}.png", "caption": ["x " * 9 + name, "ü"], "image_id": name} for name in "abc"]
    data = make("retrieval_train", write(folder, [*entries[:2], {"image": "c.png", "caption": "dd"}]), per=per)
    for epoch in range(3):
        visits = torch.randperm(len(data)).numpy()
        read = [len(data[(epoch, i)]["caption"]) for i in visits]
        assert data.caption_lengths(epoch, visits).tolist() == read
    data = make("retrieval_train", write(folder, entries))
    collate = PretrainCollate(TOKENIZER, 30)
    lengths = [batch["input_ids"].shape[1] for batch in Loader(BatchIndices(data, 3, bucket_batches=2), collate)]
    assert sorted(lengths) == [2, 11]  # [CLS] and words: the short captions are not padded to the long ones


def test_evaluation_merges_entries_of_one_image_and_keeps_all_captions(folder):
    data = make("retrieval_eval", write(folder, CANDIDATES))
    assert data.images == [str(folder / "a.png"), str(folder / "b.png")]
    assert data.captions == ["a dog", "two dogs", "", "a cat", "a third"]  # one without a word stays a query
    assert data.image_of_caption == [0, 0, 0, 1, 0]
    assert len(data) == 2
