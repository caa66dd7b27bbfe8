"""Bad configurations, checkpoints, weights and images: each is one line that names the file and what to change.

Annotations have their own list in test_dataset_bad_input.py, settings without meaning in test_engine_config.py, and
checkpoints that a run is resumed from in test_engine_checkpoint.py.
"""

import copy
import json
import logging
import os
import signal
import struct
import sys
import zipfile
import zlib

import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig as HuggingFaceBertConfig
from transformers import (
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
)

import Pretrain
from dataset.annotations import Source
from dataset.caption import CaptionEvalDataset
from dataset.text import Tokenizer
from dataset.transforms import test_transform as square  # not collected as a test
from engine.config import CAPTION, PRETRAIN, load_config
from models.bert import BertConfig, LMHead, TextEncoder, load_bert_weights
from models.mim import CodebookTarget
from models.semmim import SemMIM, load_backbone
from models.vit import ImageEncoder
from utils import UserError, find_file, load_checkpoint, one_line, reason, run_main


@pytest.fixture(autouse=True)
def no_hanging():
    """Ends the test run where something waits or computes without end."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def refused(call, *parts):
    """The line that the user sees; `parts` must be in it."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 700 and line.isprintable(), line
    for part in parts:
        assert str(part) in line, line
    return line


class Hostile:
    """A pickle of this would make a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


# ------------------------------------------------------------------------------------------------- configurations

NAMES = "abcdefghijkl"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip(NAMES, NAMES[1:], strict=False)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))

FILES = {
    "anchor bomb": (BOMB, "stands for more than 10,000 values"),
    "anchor bomb of maps": (BOMB.replace("[", "{p: [").replace("]", "]}"), "stands for more than 10,000 values"),
    "merge bomb": (MERGE_BOMB, "stands for more than 10,000 values"),
    "an alias within its anchor": ("train: &a {lr: *a}", "line 1: an alias stands within its own anchor"),
    "lists nested without end": ("seed: " + "[" * 50_000, "nested too deeply"),
    "maps nested without end": ("seed: " + "{a: " * 20_000, "nested too deeply"),
    "dashes": ("- " * 50_000, "nested too deeply"),
    "maps nested 100 deep": ("seed: " + "{a: " * 100 + "1" + "}" * 100, "nested more than 50 deep"),
    "many values": ("seed: [" + "1," * 11_000 + "]", "stands for more than 10,000 values"),
    "a large file": ("# comment\n" * 30_000, "more than 200,000 bytes"),
    "5,000 digits": ("seed: " + "7" * 5000, "a number that is too long"),
    "a key of 5,000 digits": ("? " + "7" * 5000 + "\n: 1", "a number that is too long"),
    "1,000 hexadecimal digits": ("seed: 0x" + "f" * 1000, "seed: 1"),
    "a number beyond every float": ("train: {lr: 1" + "0" * 400 + "}", "train.lr: 1000"),
    "infinity": ("train: {lr: 1e999}", "train.lr: inf must be a finite number"),
    "a key that is a number": ("1: 2", "the key 1 is a number, not text"),
    "a key that is null": ("train: {~: 2}", "train: the key None is null, not text"),
    "a key that is true": ("train: {true: 2}", "train: the key True is true/false, not text"),
    "a key that is a list": ("[1, 2]: 3", "the key (1, 2) is a tuple, not text"),
    "a key that is a map": ("? {a: 1}\n: 2", "line 1, column 3: found unhashable key"),
    "a long key": ("x" * 900 + ": 1", "unknown key xxx"),
    "tabs": ("train:\n\tlr: 1.0", "line 2, column 1: found character '\\t'"),
    "binary": (bytes(range(256)), "not a readable YAML file"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not a readable YAML file: 'utf-8' codec"),
    "Latin-1": ("name: é".encode("latin-1"), "not a readable YAML file: 'utf-8' codec"),
    "a zero byte": ("seed: 1\0", "not a readable YAML file: unacceptable character #x0000"),
    "an escaped zero byte": ('text: {vocab: "a\\0b"}', "text.vocab: 'a\\x00b' holds what is no character"),
    "half of a surrogate pair": ('text: {vocab: "\\ud83d"}', "text.vocab: '\\ud83d' holds what is no character"),
    "a Python object": ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "an unknown tag": ("seed: !mine 1", "line 1, column 7: could not determine a constructor for the tag '!mine'"),
    "a date": ("seed: 2026-01-01", "seed: datetime.date(2026, 1, 1) is a date; put it in quotes"),
    "no date": ("seed: 2026-99-99", "a value is not what its form or tag says"),
    "no whole number": ("seed: !!int abc", "a value is not what its form or tag says"),
    "bytes": ("seed: !!binary YQ==", "seed: b'a' is a bytes"),
    "no bytes": ("seed: !!binary a", "failed to decode base64 data"),
    "a set": ("seed: !!set {a}", "seed: {'a'} is a set"),
    "a key that cannot be printed": ('train: {"\\u200b": 2026-01-01}', "train.\\u200b: datetime.date(2026, 1, 1)"),
    "two documents": ("seed: 1\n---\nseed: 2", "another document"),
    "an undefined alias": ("seed: *x", "found undefined alias 'x'"),
    "a wrong merge": ("train: {<<: 1}", "expected a mapping or list of mappings for merging"),
    "another YAML version": ("%YAML 9.9\n---\nseed: 1", "incompatible YAML document"),
    "a list among texts": ("data: {train: [[a.json]]}", "data.train holds a list (['a.json'])"),
    "a number among texts": ("data: {train: [a.json, 3]}", "data.train holds a number (3)"),
    "a text among numbers": ("train: {betas: [0.9, x]}", "train.betas holds text ('x')"),
    "a folder that is a list": ("data: {image_root: [a]}", "data.image_root is a list (['a']); text or a map"),
    "a folder that is a number": ("data: {image_root: {coco: 3}}", "data.image_root: {'coco': 3} must be a folder"),
    "a prefix that is a number": ("data: {image_prefix_map: {a/: 3}}", "data.image_prefix_map.a/: 3 must be text"),
    "arguments that are text": ("model: {bert: {args: x}}", "model.bert.args is text (x); a map is expected"),
    "a codebook that is a number": ("mim: {codebook: 3}", "mim.codebook: 3 must be text"),
    "a base that is a list": ("base: [1]", "base is a list ([1]); the path of a file is expected"),
    "a base with a long name": ("base: " + "a" * 5000, "base aaa"),
    "a base that is a folder": ("base: .", "base . does not exist"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file(tmp_path, case):
    content, part = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(lambda: load_config(path, (), PRETRAIN), part)
    assert str(path) in line or line.startswith(("seed: ", "train.", "data.", "mim.")), line


def test_a_configuration_that_is_a_pipe_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path):
        refused(lambda path=path: load_config(path, (), PRETRAIN), path, "it is no regular file")
    refused(lambda: load_config("a" * 5000, (), PRETRAIN), "--config: aaa", "does not exist")


OVERRIDES = {
    "seed=" + BOMB: "stands for more than 10,000 values",
    "data.train=&a [*a]": "an alias stands within its own anchor",
    "seed=" + "7" * 5000: "a number that is too long",
    "seed=" + "[" * 5000: "nested too deeply",
    "seed=\0": "unacceptable character",
    "text.vocab=\ud83d": "half of a surrogate pair",
    'text.vocab="\\ud83d"': "holds what is no character",
    "seed=!!python/object:os.system 1": "could not determine a constructor",
    "seed=\x1b[31mred\x1b[0m": "not valid YAML",
    "train=\t1": "found character '\\t'",
    "data.image_prefix_map={1: a}": "the key 1 is a number, not text",
    "data.train=[1]": "data.train holds a number (1)",
    "seed=2026-99-99": "a value is not what its form or tag says",
    "a." * 3000 + "a=1": "write it as key.sub=value",
    "." * 3000 + "=1": "write it as key.sub=value",
    "x" * 3000 + "=1": "unknown key",
    "seed": "write it as key.sub=value",
    "seed.a=1": "seed is a map",
    "seed=1\n---\n2": "another document",
    "=1": "write it as key.sub=value",
}


@pytest.mark.parametrize("number", range(len(OVERRIDES)))
def test_an_override(number):
    override, part = list(OVERRIDES.items())[number]
    refused(lambda: load_config(PRETRAIN.schema, [override], PRETRAIN), "--override ", part)


def test_anchors_aliases_and_merges_that_stay_small_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "\ufeffdata:\n  train: [&file a.json, *file]\ntrain: {<<: &rates {lr: 1.0, lr_vit: 2.0}, epochs: 3}\n"
    )
    cfg = load_config(path, (), PRETRAIN)
    assert cfg.data.train == ["a.json", "a.json"] and (cfg.train.lr, cfg.train.lr_vit, cfg.train.epochs) == (1, 2, 3)


def test_a_script_ends_with_one_line_and_no_traceback(tmp_path, capsys, monkeypatch):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    arguments = ["Pretrain.py", "--config", str(tmp_path / "bomb.yaml"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        run_main(Pretrain.main)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.startswith(f"error: {tmp_path / 'bomb.yaml'}: ") and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "lacks [PAD]"), (b"\xff\xfe", "cannot be read"), (b"a\nb\n", "lacks [PAD]"), (None, "not a regular file")],
)
def test_a_vocabulary(tmp_path, content, part):
    path = tmp_path / "vocab.txt"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    refused(lambda: Tokenizer(path), path, part)


def test_a_missing_file_is_looked_for_in_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused(lambda: find_file("no/such", "key")).endswith(f"(looked in {ROOT})")
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: find_file("no/such", "key")).endswith(f"(looked in {tmp_path} and {ROOT})")
    assert find_file("README.md") == ROOT / "README.md"
    refused(lambda: find_file("~nobody-of-that-name/x", "key"), "does not exist")


# ------------------------------------------------------------------------------------------------- checkpoints

DESCRIPTION = {
    "image_encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "args": {}},
    "bert": {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    **{"text_layers": 1, "fusion_layers": 1, "decoder_layers": 1, "embed_dim": 16, "temperature": 0.07, "sep": False},
}
DESCRIPTION["image_encoder"]["args"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def checkpoint(**changes) -> dict:
    """A small checkpoint that `load_backbone` reads; a key that is None is left out."""
    weights = {f"backbone.{name}": value for name, value in SemMIM(DESCRIPTION, False, False).state_dict().items()}
    values = {"model": weights, "description": copy.deepcopy(DESCRIPTION), **changes}
    return {key: value for key, value in values.items() if value is not None}


def described(**changes):
    return checkpoint(description={**copy.deepcopy(DESCRIPTION), **changes})


def weights_with(**changes):
    """`__` stands for a dot."""
    made = checkpoint()
    made["model"] |= {f"backbone.{name.replace('__', '.')}": value for name, value in changes.items()}
    return made


CHECKPOINTS = {
    "no model": (lambda: checkpoint(model=None), "it has no entry model"),
    "no description": (lambda: checkpoint(description=None), "no SemMIM checkpoint"),
    "a list": (lambda: [1, 2], "it has no entry model"),
    "a tensor": (lambda: torch.ones(3), "it has no entry model"),
    "a model of text": (lambda: checkpoint(model="text"), "its entry model is not what"),
    "a model of numbers": (lambda: checkpoint(model={"backbone.a": 3}), "its entry model is not what"),
    "keys that are numbers": (lambda: checkpoint(model={3: torch.ones(1)}), "its entry model is not what"),
    "an empty model": (lambda: checkpoint(model={}), "more layers than the 0 weights"),
    "a description of text": (lambda: checkpoint(description="text"), "its entry description is not what"),
    "an empty description": (lambda: checkpoint(description={"a": 1}), "its entry description is not what"),
    "a description without BERT": (lambda: described(bert=None), "its entry description is not what"),
    "BERT of text": (lambda: described(bert={"vocab_size": "x"}), "its entry description is not what"),
    "an unknown BERT key": (lambda: described(bert={"surprise": 1}), "its entry description is not what"),
    "layers of text": (lambda: described(text_layers="x"), "its entry description is not what"),
    "a temperature below 0": (lambda: described(temperature=-1.0), "its entry description is not what"),
    "a temperature of text": (lambda: described(temperature="x"), "its entry description is not what"),
    "another width": (lambda: described(embed_dim=8), "vision_proj.weight has the shape [16, 32] instead of [8, 32]"),
    "another weight": (lambda: weights_with(text_proj__bias=torch.ones(3)), "text_proj.bias has the shape [3]"),
    "odd positions": (
        lambda: weights_with(image_encoder__vit__pos_embed=torch.ones(1, 9, 32)),
        "image_encoder.vit.pos_embed has the shape [1, 9, 32] instead of [1, 5, 32]",
    ),
    "positions of one axis": (lambda: weights_with(image_encoder__vit__pos_embed=torch.ones(9)), "has the shape [9]"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(tmp_path, case):
    make, part = CHECKPOINTS[case]
    torch.save(make(), tmp_path / "checkpoint.pth")
    refused(lambda: load_backbone(tmp_path / "checkpoint.pth"), tmp_path / "checkpoint.pth", part)


def test_the_checkpoint_that_the_others_vary_is_usable(tmp_path):
    torch.save(checkpoint(), tmp_path / "checkpoint.pth")
    assert load_backbone(tmp_path / "checkpoint.pth")[2]
    assert load_backbone(tmp_path / "checkpoint.pth", image_size=48)[0].image_encoder.grid == 3


# ------------------------------------------------------------------- files that are none, as checkpoint and as weights


def text(path):
    path.write_text("not a checkpoint\n" * 100)


def cut_off(path):
    torch.save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:5000])


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "nothing")


def escape_codes(path):
    path.write_bytes(b"\x80\x02c\x1b[31mevil\nsystem\nq\x00.")


NO_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": text,
    "HTML": lambda path: path.write_text("<!DOCTYPE html><html>Not found</html>"),
    "cut off": cut_off,
    "another archive": archive,
    "hostile": lambda path: torch.save({"model": Hostile(path.with_name("made"))}, path),
    "hostile, old format": lambda path: torch.save(
        {"model": Hostile(path.with_name("made"))}, path, _use_new_zipfile_serialization=False
    ),
    "a whole module": lambda path: torch.save(nn.Linear(2, 2), path),
    "escape codes": escape_codes,
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", NO_FILES)
@pytest.mark.parametrize("reader", ["checkpoint", "image weights", "text weights"])
def test_a_file_that_is_none(tmp_path, case, reader):
    path = tmp_path / "file.pth"
    NO_FILES[case](path)
    readers = {
        "checkpoint": lambda: load_checkpoint(path),
        "image weights": lambda: tiny_encoder(weights=str(path)),
        "text weights": lambda: load_bert_weights(str(path), TextEncoder(BERT, 1)),
    }
    line = refused(readers[reader], path)
    assert not (tmp_path / "made").exists() and "weights_only" not in line and "\x1b" not in line and "[1m" not in line


def test_a_safetensors_file_that_is_none(tmp_path):
    for content in (b"", b"\xff" * 100, (10**15).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}"):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        refused(lambda path=path: tiny_encoder(weights=str(path)), path)


def test_torchs_page_of_advice_is_what_it_found():
    advice = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those steps "
        "only if you trust the source of the checkpoint\x1b[0m. \n\t(1) In PyTorch 2.6, we changed the default of "
        "the `weights_only` argument ...\n\tWeightsUnpickler error: Unsupported global: GLOBAL posix.mkdir was not an "
        "allowed global by default."
    )
    assert reason(ValueError(advice)) == "it holds posix.mkdir, which is no tensor and could run code"
    assert reason(ValueError("\x1b[1mbold\x1b[0m\nnext")) == "bold" and reason(KeyError()) == "KeyError"
    assert one_line("word " * 100, 50) == ("word " * 9 + "word") + " ..." and one_line("x" * 300).endswith("xx ...")


# ------------------------------------------------------------------------------------------------- text weights

BERT = BertConfig(60, 32, 4, 64, max_position_embeddings=40)


def bert_folder(folder, config=(), **changes):
    """A published-style folder with the model's sizes; config: changes of config.json, changes: of the weights."""
    shape = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    made = HuggingFaceBertConfig(**shape, num_hidden_layers=1, max_position_embeddings=40)
    weights = {key: value.clone().contiguous() for key, value in BertForMaskedLM(made).state_dict().items()}
    weights |= {f"bert.{key.replace('__', '.')}": value for key, value in changes.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    values = config if isinstance(config, str) else json.dumps({**made.to_dict(), **dict(config)})
    (folder / "config.json").write_text(values)
    return str(folder)


WORDS = "embeddings__word_embeddings__weight"
BERTS = {
    "ReLU": ({"config": {"hidden_act": "relu"}}, "config.json: hidden_act is 'relu', the model computes 'gelu'"),
    "the tanh GELU": ({"config": {"hidden_act": "gelu_new"}}, "config.json: hidden_act is 'gelu_new'"),
    "an activation that is a list": ({"config": {"hidden_act": [1]}}, "config.json: hidden_act is [1]"),
    "RoBERTa": ({"config": {"model_type": "roberta"}}, "config.json: model_type is 'roberta', the model computes BERT"),
    "XLM-RoBERTa": ({"config": {"model_type": "xlm-roberta"}}, "config.json: model_type is 'xlm-roberta'"),
    "ELECTRA": ({"config": {"model_type": "electra"}}, "config.json: model_type is 'electra'"),
    "relative positions": (
        {"config": {"position_embedding_type": "relative_key"}},
        "config.json: position_embedding_type is 'relative_key'",
    ),
    "other heads": ({"config": {"num_attention_heads": 2}}, "has num_attention_heads 2, the model 4"),
    "another epsilon": ({"config": {"layer_norm_eps": 1e-5}}, "has layer_norm_eps 1e-05, the model 1e-12"),
    "no JSON": ({"config": "{"}, "config.json: not valid JSON (line 1"),
    "a list": ({"config": "[]"}, "config.json: holds list, not the map"),
    "deep JSON": ({"config": "[" * 100_000}, "config.json: a model's configuration that cannot be read"),
    "long numbers": ({"config": '{"hidden_size": ' + "7" * 5000 + "}"}, "config.json: a model's configuration that"),
    "another vocabulary": ({WORDS: torch.ones(500, 32)}, "pytorch_model.bin: has vocab_size 500, the model 60"),
    "fewer words": ({WORDS: torch.ones(56, 32)}, "pytorch_model.bin: has vocab_size 56, the model 60"),
    "words of one axis": ({WORDS: torch.ones(60)}, "pytorch_model.bin: not a BERT checkpoint (no word embeddings)"),
    "no number": ({WORDS: torch.full((60, 32), torch.nan)}, "word_embeddings.weight holds values that are not finite"),
    "sparse": ({WORDS: torch.eye(60, 32).to_sparse()}, "word_embeddings.weight is a sparse, quantized"),
    "a name with escape codes": ({"\x1b[31mred": torch.ones(1)}, "unknown entry '\\x1b[31mred'"),
}


@pytest.mark.parametrize("case", BERTS)
def test_text_weights(tmp_path, case):
    options, part = BERTS[case]
    source = bert_folder(tmp_path, **options)
    refused(lambda: load_bert_weights(source, TextEncoder(BERT, 1)), tmp_path, part)


def test_the_text_weights_that_the_others_vary_are_usable(tmp_path):
    for config in ({}, {"hidden_act": "gelu_python"}):
        assert load_bert_weights(bert_folder(tmp_path, config), TextEncoder(BERT, 1))


@pytest.mark.parametrize("rows", [64, 128])
def test_padded_word_embeddings_give_the_vocabularys_rows_and_say_so(tmp_path, rows):
    words = torch.randn(rows, 32)
    source = bert_folder(tmp_path, {"vocab_size": rows}, embeddings__word_embeddings__weight=words)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    weights["cls.predictions.bias"] = torch.randn(rows)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    encoder, head = TextEncoder(BERT, 1), LMHead(BERT)
    lines = load_bert_weights(source, encoder, mlm_head=head)
    assert lines[0].endswith(f"has {rows} rows of word embeddings, the vocabulary 60 words: the others are padding")
    assert torch.equal(encoder.embeddings.word_embeddings.weight, words[:60])
    assert torch.equal(head.bias, weights["cls.predictions.bias"][:60])


# ------------------------------------------------------------------------------------------------- image weights

QUICK, EXACT = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"
SHAPE = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def tiny_encoder(image_size=32, name=QUICK, weights="random"):
    return ImageEncoder(name, image_size, SHAPE, weights)


def timm_weights(name=QUICK, drop=(), size=32, **changes):
    weights = timm.create_model(name, img_size=size, num_classes=0, **SHAPE).state_dict()
    weights |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in weights.items() if key not in drop}


def clip_weights(drop=(), **changes):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    weights = CLIPVisionModel(config).state_dict()
    weights = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in weights.items()}
    weights |= {f"vision_model.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in weights.items() if key.removeprefix("vision_model.") not in drop}


QUERIES = "encoder.layers.0.self_attn.k_proj.weight"
POSITIONS = "embeddings.position_embedding.weight"
VITS = {
    "distilled": (
        lambda: timm_weights(dist_token=torch.ones(1, 1, 32), pos_embed=torch.ones(1, 6, 32)),
        "has a distillation token; take the weights of a plain Vision Transformer",
    ),
    "without [CLS]": (lambda: timm_weights(drop=["cls_token"], pos_embed=torch.ones(1, 4, 32)), "has no [CLS] token"),
    "distilled positions alone": (lambda: timm_weights(pos_embed=torch.ones(1, 6, 32)), "pos_embed has 6 positions"),
    "[CLS]-less positions alone": (lambda: timm_weights(pos_embed=torch.ones(1, 4, 32)), "pos_embed has 4 positions"),
    "images that are no squares": (lambda: timm_weights(pos_embed=torch.ones(1, 9, 32)), "pos_embed has 9 positions"),
    "no positions": (lambda: timm_weights(pos_embed=torch.ones(1, 0, 32)), "pos_embed has 0 positions"),
    "flat positions": (lambda: timm_weights(pos_embed=torch.ones(32)), "pos_embed has the shape [32]"),
    "wide positions": (lambda: timm_weights(pos_embed=torch.ones(1, 17, 64)), "pos_embed has the shape [1, 17, 64]"),
    "no number": (lambda: timm_weights(norm__bias=torch.full((32,), torch.inf)), "norm.bias holds values that are not"),
    "complex": (
        lambda: timm_weights(norm__bias=torch.ones(32, dtype=torch.cfloat)),
        "norm.bias is a sparse, quantized",
    ),
    "keys that are numbers": (lambda: {1: torch.ones(1)}, "neither timm's, Hugging Face's nor OpenAI's names"),
    "CLIP without positions": (lambda: clip_weights(drop=[POSITIONS]), "pos_embed is missing"),
    "CLIP without keys": (
        lambda: clip_weights(drop=[QUERIES]),
        "the queries, keys and values of blocks.0.attn.q.weight",
    ),
    "CLIP without a norm": (lambda: clip_weights(drop=["pre_layrnorm.bias"]), "norm_pre.bias is missing"),
}


@pytest.mark.parametrize("case", VITS)
def test_image_weights(tmp_path, case):
    make, part = VITS[case]
    path = tmp_path / "vit.pth"
    torch.save(make(), path)
    refused(lambda: tiny_encoder(64, weights=str(path)), path, part)


CLIP, TIMM = {"model_type": "clip"}, {"architecture": EXACT}
ACTIVATIONS = {
    "LAION's CLIP": (QUICK, clip_weights, {**CLIP, "vision_config": {"hidden_act": "gelu"}}, "activation gelu, "),
    "OpenAI's CLIP": (EXACT, clip_weights, {**CLIP, "vision_config": {}}, "activation quick_gelu, "),
    "a CLIP image tower": (EXACT, clip_weights, {"model_type": "clip_vision_model"}, "activation quick_gelu, "),
    "the tanh GELU": (QUICK, clip_weights, {**CLIP, "vision_config": {"hidden_act": "gelu_new"}}, "gelu_tanh, "),
    "ReLU": (EXACT, clip_weights, {"model_type": "clip_vision_model", "hidden_act": "relu"}, "activation relu, "),
    "timm's LAION": (QUICK, timm_weights, TIMM, "activation gelu, "),
    "timm's QuickGELU": (EXACT, timm_weights, {"architecture": QUICK}, "activation quick_gelu, "),
    "timm's OpenAI": (EXACT, timm_weights, {**TIMM, "pretrained_cfg": {"tag": "openai"}}, "activation quick_gelu, "),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_image_weights_made_with_another_activation(tmp_path, case, caplog):
    name, make, config, part = ACTIVATIONS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(make(), tmp_path / "pytorch_model.bin")
    own = {QUICK: "quick_gelu", EXACT: "gelu"}
    told = f"{tmp_path / 'config.json'}: its weights were made with the activation"
    line = refused(lambda: tiny_encoder(name=name, weights=str(tmp_path)), told, part)
    assert f"model.image_encoder.name computes {own[name]}" in line
    if case not in ("ReLU", "the tanh GELU"):
        with caplog.at_level(logging.WARNING, "semmim"):
            tiny_encoder(name=EXACT if name == QUICK else QUICK, weights=str(tmp_path))  # the other one fits
        assert not caplog.messages


def test_openais_weights_under_a_name_without_quickgelu_are_refused():
    line = refused(lambda: tiny_encoder(name=EXACT, weights="openai"), f"model.image_encoder.name: {EXACT}.openai")
    assert line.endswith(f"take {QUICK}.openai")


@pytest.mark.parametrize("name", [QUICK, EXACT])
@pytest.mark.parametrize("make", [clip_weights, timm_weights])
@pytest.mark.parametrize("config", [None, {"model_type": "bert", "hidden_act": "gelu"}])
def test_clip_weights_that_cannot_say_their_activation_are_one_line_of_warning(tmp_path, name, make, config, caplog):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous().clone() for key, value in make().items()}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "semmim"):
        tiny_encoder(name=name, weights=str(tmp_path))
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert f"{tmp_path / 'model.safetensors'}: the file does not say its activation" in caplog.messages[0]


def test_a_plain_vision_transformer_is_no_case_for_that_warning(tmp_path, caplog):
    torch.save(timm_weights("vit_tiny_patch16_224"), tmp_path / "vit.pth")
    tiny_encoder(name="vit_tiny_patch16_224", weights=str(tmp_path / "vit.pth"))
    assert not caplog.messages


# ------------------------------------------------------------------------------------------------- the codebook


def codebook(folder, config=(), drop=(), **changes):
    """A small FlavaImageCodebook's folder."""
    made = FlavaImageCodebookConfig(hidden_size=8, vocab_size=32, num_blocks_per_group=1)
    weights = {key: value.clone() for key, value in FlavaImageCodebook(made).state_dict().items()} | changes
    torch.save({key: value for key, value in weights.items() if key not in drop}, folder / "pytorch_model.bin")
    values = config if isinstance(config, str) else json.dumps({**made.to_dict(), **dict(config)})
    (folder / "config.json").write_text(values)


BIAS = "blocks.input.bias"
CODEBOOKS = {
    "hostile": (lambda folder: codebook(folder, extra=Hostile(folder / "made")), "posix.mkdir, which is no tensor"),
    "no weights": (lambda folder: None, "the folder has none of model.safetensors, pytorch_model.bin"),
    "no configuration": (lambda folder: (codebook(folder), (folder / "config.json").unlink()), "no config.json"),
    "no JSON": (lambda folder: codebook(folder, "{"), "config.json: not valid JSON"),
    "sizes of text": (lambda folder: codebook(folder, {"hidden_size": "x"}), "config.json"),
    "groups of null": (lambda folder: codebook(folder, {"num_groups": None}), "config.json"),
    "huge sizes": (lambda folder: codebook(folder, {"hidden_size": 10**6}), "has the shape"),
    "a missing weight": (lambda folder: codebook(folder, drop=[BIAS]), f"{BIAS} is missing"),
    "a weight too many": (lambda folder: codebook(folder, surprise=torch.ones(1)), "surprise has no place"),
    "another shape": (lambda folder: codebook(folder, **{BIAS: torch.ones(3)}), f"{BIAS} has the shape [3]"),
    "no number": (lambda folder: codebook(folder, **{BIAS: torch.full((8,), torch.nan)}), f"{BIAS} holds values that"),
}


@pytest.mark.parametrize("case", CODEBOOKS)
def test_a_codebook(tmp_path, case):
    make, part = CODEBOOKS[case]
    make(tmp_path)
    refused(lambda: CodebookTarget(str(tmp_path)), tmp_path, part)
    assert not (tmp_path / "made").exists()


def test_the_codebook_that_the_others_vary_is_usable(tmp_path):
    codebook(tmp_path)
    assert CodebookTarget(str(tmp_path))(torch.rand(1, 3, 16, 16)).shape == (1, 4)


# ------------------------------------------------------------------------------------------------- images


def png(path, **options):
    Image.new("RGB", (30, 20), "red").save(path, "PNG", **options)


def truncated(path):
    png(path)
    path.write_bytes(path.read_bytes()[:60])


def oversized(path):
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    png(path)
    content = bytearray(path.read_bytes())
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(bytes(content))


IMAGES = {
    "absent": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "truncated": truncated,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "EPS": lambda path: Image.new("RGB", (30, 20)).save(path, "EPS"),
    "PDF": lambda path: Image.new("RGB", (30, 20)).save(path, "PDF"),
    "SVG": lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "a decompression bomb": oversized,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IMAGES)
def test_an_image(tmp_path, case):
    png(tmp_path / "a.png")
    IMAGES[case](tmp_path / "b.jpg")
    entries = [{"image": name, "caption": "red", "image_id": name} for name in ("a.png", "b.jpg")]
    (tmp_path / "split.json").write_text(json.dumps(entries))

    def read():
        data = CaptionEvalDataset(Source(tmp_path / "split.json"), square(8), "val")
        return [data[i] for i in range(2)]

    refused(read, tmp_path / "b.jpg", "evaluation needs every image")


def test_the_stage_of_captions_has_these_rules_too():
    refused(lambda: load_config(CAPTION.schema, ["data.image_root={a: 3}"], CAPTION), "data.image_root")
