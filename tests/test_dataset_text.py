import json

import pytest
from conftest import ROOT, refused
from tiny import TOKENIZER, tiny_model

from dataset.text import Tokenizer, checkpoint_tokenizer, clean_caption, clean_question

VOCAB = "configs/bert/vocab.txt"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A Dog, running!", "a dog running"),
        ('it\'s "quoted" (really): a*b#c;d~e?', "its quoted really abcde"),
        ("black-and-white / photo", "black and white photo"),
        ("<PERSON> smiling", "person smiling"),
        ("  two   spaces\tand a\nline \n", "two spaces and a line"),
        ("?!...", ""),
        ("Crème brûlée", "crème brûlée"),
    ],
)
def test_captions_are_cleaned_by_albefs_rules(raw, cleaned):
    assert clean_caption(raw, 30) == cleaned


def test_questions_keep_the_person_placeholder_as_albef_does():
    assert clean_question("Is <person> left-handed?", 30) == "is <person> left handed"
    assert clean_question("a b c d", 2) == "a b"


def test_word_pieces_equal_transformers_own_encoding():
    from transformers import BertTokenizerFast

    lines = open(VOCAB, encoding="utf-8").read().split("\n")[:-1]
    oracle = BertTokenizerFast(vocab={line: i for i, line in enumerate(lines)})
    texts = ["a red dog", "unbelievably naïve emoji", "中文 and 42 flags", ""]
    assert TOKENIZER.word_pieces(texts) == [oracle.encode(text, add_special_tokens=False) for text in texts]


def test_encoding_starts_with_cls_and_has_a_sep_on_request_alone_which_survives_truncation():
    texts = ["a dog", "one two three four five six"]
    ids, mask = TOKENIZER.encode(texts, 5)
    assert (ids[:, 0] == TOKENIZER.cls_id).all() and not (ids == TOKENIZER.sep_id).any()
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] and ids[0, 3:].tolist() == [TOKENIZER.pad_id] * 2
    ids, mask = Tokenizer(VOCAB, sep=True).encode(texts, 5)
    assert ids[0, 3] == ids[1, 4] == TOKENIZER.sep_id and mask.sum(1).tolist() == [4, 5]


def test_a_text_that_names_a_special_token_means_its_characters():
    (ids,) = TOKENIZER.word_pieces(["what [SEP] is it[MASK]"])
    assert TOKENIZER.names(ids) == ["what", "[", "sep", "]", "is", "it", "[", "mask", "]"]


def test_a_checkpoint_trained_with_another_vocabulary_of_whatever_size_or_another_case_is_refused(tmp_path):
    description = {**tiny_model().backbone.description, "bert": {"vocab_size": 30522}}
    refused(lambda: checkpoint_tokenizer("configs/demo/vocab.txt", description), "not the 30522 word pieces")
    assert checkpoint_tokenizer(VOCAB, description).digest == description["vocab"] == Tokenizer(VOCAB).digest
    content = (ROOT / VOCAB).read_text(encoding="utf-8")
    for case, text in ((None, content.replace("\ndog\n", "\nhund\n")), ({"strip_accents": False}, content)):
        (tmp_path / "vocab.txt").write_text(text, encoding="utf-8")
        if case:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(case))
        refused(lambda: checkpoint_tokenizer(tmp_path / "vocab.txt", description), "not the 30522 word pieces")
