"""Weights and model configurations of others: one table of bad inputs for each reader; each is one line that names the
file and what to change, and no code of a file runs. (Checkpoints of this project: test_models_semmim.py.)
"""

import json
import os

import pytest
import timm
import torch
from conftest import refused
from tiny import save_codebook
from torch import nn
from transformers import BertConfig as HuggingFaceBertConfig
from transformers import BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

from models.bert import BertConfig, TextEncoder, load_bert_weights
from models.mim import CodebookTarget
from models.vit import ImageEncoder
from models.weights import check_weights, load_exactly, read_weights
from utils import load_checkpoint

pytestmark = pytest.mark.usefixtures("no_hanging")


# ------------------------------------------------------------------------------------------------ the strict core


def layers(**changes) -> dict:
    """The weights of two layers, some replaced or, by None, taken out; `__` stands for a dot."""
    weights = pair().state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in weights.items() if value is not None}


def pair() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (layers(first__bias=None), "a.pth: first.bias is missing; help"),
        (layers(first__bias=None, second__bias=None), "a.pth: first.bias is missing (and 1 more); help"),
        (layers(third=torch.ones(1)), "a.pth: third has no place in the model; help"),
        (layers(first__bias=torch.ones(4)), "a.pth: first.bias has the shape [4] instead of [3]; help"),
        (layers(first__bias=torch.full((3,), torch.nan)), "a.pth: first.bias holds values that are not finite"),
    ],
)
def test_a_misfit_is_one_line_and_changes_nothing(weights, message):
    module = pair()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refused(lambda: load_exactly(module, weights, "a.pth", "help"), message)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_fitting_weights_are_copied_and_the_caller_says_what_may_lack_or_be_left_over():
    module, weights = pair(), layers(second__bias=None, third=torch.ones(1))
    kept = module["second"].bias.clone()
    load_exactly(module, weights, "a.pth", "help", lacking="second.", extra=True)
    assert torch.equal(module["first"].weight, weights["first.weight"]) and torch.equal(module["second"].bias, kept)
    call = (pair().state_dict(), layers(first__bias=None), "a.pth", "help")
    refused(lambda: check_weights(*call, lacking="second."), "a.pth: first.bias is missing")


# ------------------------------------------------------------------------------------------------ files that are none


class Hostile:
    """A pickle of this would make a folder if it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile(path, **options):
    torch.save({"model": Hostile(path.with_name("made"))}, path, **options)


def cut_off(path):
    torch.save({"model": pair().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-500])


NO_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "HTML": lambda path: path.write_text("<!DOCTYPE html><html>Not found</html>" * 100),
    "cut off": cut_off,
    "hostile": hostile,
    "hostile, old format": lambda path: hostile(path, _use_new_zipfile_serialization=False),
    "TorchScript": lambda path: torch.jit.script(nn.Linear(2, 2)).save(path),
    "a whole module": lambda path: torch.save(nn.Linear(2, 2), path),
    "a pipe": lambda path: os.mkfifo(path),
    "absent": lambda path: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NO_FILES)
@pytest.mark.parametrize("reader", [load_checkpoint, lambda path: read_weights(str(path))], ids=["own", "others'"])
def test_a_file_that_is_none(tmp_path, case, reader):
    path = tmp_path / "file.pth"
    NO_FILES[case](path)
    line = refused(lambda: reader(path), path)
    assert not (tmp_path / "made").exists() and "weights_only" not in line and "\x1b" not in line and "[1m" not in line


def test_a_safetensors_file_that_is_none(tmp_path):
    for content in (b"", b"\xff" * 100, (10**15).to_bytes(8, "little") + b"{}"):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        refused(lambda path=path: read_weights(str(path)), path)


@pytest.mark.parametrize("source", ["./no/such/folder", "package:no_such_package", "package:os.path", "missing.pt"])
def test_a_missing_source_is_named(source):
    refused(lambda: load_bert_weights(source, TextEncoder(BERT, 1)), source.split(":")[-1].removeprefix("./"))


def test_looking_for_a_package_runs_nothing_of_it(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "__init__.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    refused(lambda: load_bert_weights("package:notes.weights", TextEncoder(BERT, 1)), "no Python package")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ BERT's

BERT = BertConfig(60, 32, 4, 64, max_position_embeddings=40)


def bert_folder(folder, config=(), drop="no weight", **changes):
    """A published-style folder with the model's sizes; config: changes of config.json, changes: of the weights."""
    shape = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    made = HuggingFaceBertConfig(**shape, num_hidden_layers=1, max_position_embeddings=40)
    weights = {key: value.clone().contiguous() for key, value in BertForMaskedLM(made).state_dict().items()}
    weights |= {f"bert.{key.replace('__', '.')}": value for key, value in changes.items()}
    torch.save({key: value for key, value in weights.items() if drop not in key}, folder / "pytorch_model.bin")
    values = config if isinstance(config, str) else json.dumps({**made.to_dict(), **dict(config)})
    (folder / "config.json").write_text(values)
    return str(folder)


WORDS = "embeddings__word_embeddings__weight"
BERTS = {
    "ReLU": ({"config": {"hidden_act": "relu"}}, "hidden_act 'relu', the model's is gelu"),
    "RoBERTa": ({"config": {"model_type": "roberta"}}, "model_type 'roberta', the model's is bert"),
    "other heads": ({"config": {"num_attention_heads": 2}}, "num_attention_heads 2, the model's is 4"),
    "another epsilon": ({"config": {"layer_norm_eps": 1e-5}}, "layer_norm_eps 1e-05, the model's is 1e-12"),
    "no JSON": ({"config": "{"}, "config.json: a model's configuration that cannot be read"),
    "another vocabulary": ({WORDS: torch.ones(61, 32)}, "word_embeddings.weight has the shape [61, 32] instead of [60"),
    "a missing weight": ({"drop": "layer.0.output.dense.bias"}, "output.dense.bias is missing"),
    "no weights": ({"drop": ""}, "not a BERT checkpoint"),
}


@pytest.mark.parametrize("case", BERTS)
def test_text_weights(tmp_path, case):
    options, part = BERTS[case]
    source = bert_folder(tmp_path, **options)
    refused(lambda: load_bert_weights(source, TextEncoder(BERT, 1)), tmp_path, part)


def test_weights_of_the_hubs_cache_are_found_by_name_and_compared_with_their_vocabulary_if_it_has_one(
    tmp_path, monkeypatch
):
    snapshot = tmp_path / "models--me--bert" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--bert" / "refs").mkdir()
    (tmp_path / "models--me--bert" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    bert_folder(snapshot)
    (tmp_path / "ours.txt").write_text("a\nb")
    for part in ("no file beside it says", "its vocabulary is text.vocab's"):
        assert load_bert_weights("me/bert", TextEncoder(BERT, 1), vocab=str(tmp_path / "ours.txt"))[0].endswith(part)
        (snapshot / "vocab.txt").write_text("a\nb")
    refused(lambda: load_bert_weights("me/other", TextEncoder(BERT, 1)), "me/other: no such file or folder here")


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_weights_with_another_vocabulary_of_the_same_size_are_refused(tmp_path, form):
    pieces, source, vocab = [f"word{i}" for i in range(60)], bert_folder(tmp_path), str(tmp_path / "ours.txt")
    (tmp_path / "ours.txt").write_text("\r\n".join(pieces) + "\r\n")

    def load(pieces):
        given = {"model": {"vocab": {piece: i for i, piece in enumerate(pieces)}}}
        (tmp_path / form).write_text("\n".join(pieces) if form == "vocab.txt" else json.dumps(given))
        return load_bert_weights(source, TextEncoder(BERT, 1), vocab=vocab)[0]

    assert load(pieces).endswith("its vocabulary is text.vocab's")
    part = "word piece 7 is 'zebra', that of text.vocab"
    refused(lambda: load([*pieces[:7], "zebra", *pieces[8:]]), tmp_path / form, part)


# ------------------------------------------------------------------------------------------------ ViT's

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


KEYS = "encoder.layers.0.self_attn.k_proj.weight"
POSITIONS = "embeddings.position_embedding.weight"
VITS = {
    "distilled": (lambda: timm_weights(dist_token=torch.ones(1, 1, 32)), "dist_token has no place"),
    "without [CLS]": (lambda: timm_weights(drop=["cls_token"]), "cls_token is missing"),
    "another shape": (lambda: timm_weights(norm__bias=torch.ones(31)), "norm.bias has the shape [31]"),
    "CLIP without positions": (
        lambda: clip_weights(drop=[POSITIONS]),
        "neither timm's nor Hugging Face's nor OpenAI's",
    ),
    "CLIP without keys": (lambda: clip_weights(drop=[KEYS]), "blocks.0.attn.qkv.weight is missing"),
}


@pytest.mark.parametrize("case", VITS)
def test_image_weights(tmp_path, case):
    make, part = VITS[case]
    path = tmp_path / "vit.pth"
    torch.save(make(), path)
    refused(lambda: tiny_encoder(64, weights=str(path)), path, part)


@pytest.mark.parametrize(
    "name, config, part",
    [
        (QUICK, {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, "activation 'gelu', "),
        (EXACT, {"model_type": "clip", "vision_config": {}}, "activation 'quick_gelu', "),
        (EXACT, {"architecture": EXACT, "pretrained_cfg": {"tag": "openai"}}, "activation 'quick_gelu', "),
    ],
    ids=["LAION's CLIP", "OpenAI's CLIP", "timm's OpenAI"],
)
def test_image_weights_made_with_another_activation(tmp_path, name, config, part):
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(clip_weights(), tmp_path / "pytorch_model.bin")
    refused(lambda: tiny_encoder(name=name, weights=str(tmp_path)), tmp_path, part)
    tiny_encoder(name=EXACT if name == QUICK else QUICK, weights=str(tmp_path))  # the other one fits


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    "name, values",
    [
        ("preprocessor_config.json", {"image_mean": HALF["mean"], "image_std": HALF["std"]}),
        ("config.json", {"pretrained_cfg": HALF}),
        ("open_clip_config.json", {"preprocess_cfg": HALF}),
    ],
)
def test_weights_that_state_another_mean_than_clips_are_refused(tmp_path, name, values):
    torch.save(timm_weights(), tmp_path / "pytorch_model.bin")
    (tmp_path / name).write_text(json.dumps(values))
    refused(lambda: tiny_encoder(weights=str(tmp_path)), tmp_path, "mean [0.5, 0.5, 0.5]")


def test_openais_weights_under_a_name_without_quickgelu_are_refused():
    line = refused(lambda: tiny_encoder(name=EXACT, weights="openai"), f"model.image_encoder.name: {EXACT}.openai")
    assert line.endswith(f"take {QUICK}.openai")


# ------------------------------------------------------------------------------------------------ the codebook


def test_a_codebook_without_its_configuration_is_one_line(tmp_path):
    (save_codebook(tmp_path) / "config.json").unlink()
    refused(lambda: CodebookTarget(str(tmp_path)), tmp_path / "config.json: cannot be read")
