"""What a checkpoint or an exported folder says of its model: nothing that it holds runs, fetches or takes memory."""

import copy
import pickle
import resource
import time
from dataclasses import asdict

import pytest
import torch
from conftest import keys_of, refused

from engine.config import PRETRAIN, load_config
from models.bert import BertConfig
from models.semmim import SemMIM, build_backbone, load_backbone, project
from utils import UserError

DESCRIPTION = {
    "image_encoder": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "drop_path_rate": 0.1},
    },
    "bert": asdict(BertConfig(vocab_size=60, hidden_size=32, num_attention_heads=4, intermediate_size=64)),
    **{"text_layers": 2, "fusion_layers": 1, "decoder_layers": 1, "embed_dim": 16, "temperature": 0.07, "sep": False},
}
WITHOUT_A_SHAPE = (
    *("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "layer_norm_eps", "pad_token_id", "sep", "temperature"),
)
ODD = (None, True, "x", "", [], {}, -1, 0, 7, 2.5, 10**6, 10**30, -1e300, float("nan"), float("inf"), torch.ones(2))


def changed(key: str, value) -> dict:
    """The description with another value of a dotted key."""
    description = copy.deepcopy(DESCRIPTION)
    place, (*maps, last) = description, key.split(".")
    for name in maps:
        place = place[name]
    place[last] = value
    return description


@pytest.fixture(scope="module")
def weights() -> dict:
    return {f"backbone.{name}": value for name, value in SemMIM(DESCRIPTION).state_dict().items()}


def load(description, weights):
    return load_backbone("a.pth", loaded={"model": weights, "description": description}, decoder=True)


@pytest.mark.parametrize("key", keys_of(DESCRIPTION))
def test_an_odd_value_in_a_description_is_one_line_soon_and_without_memory(weights, key):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for value in ODD:
        try:
            backbone, _, _ = load(changed(key, value), weights)
        except UserError as error:
            assert str(error).startswith("a.pth: ") and "\n" not in str(error), value
        else:
            assert key.rpartition(".")[2] in WITHOUT_A_SHAPE or value is True, value  # which is 1
            assert backbone.eval().encode_text(torch.ones(1, 3, dtype=torch.long), None)[1].isfinite().all(), value
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    "name, value",
    [
        *[("checkpoint_path", "notes.bin"), ("pretrained", True), ("pretrained_cfg", {"file": "notes.bin"})],
        *[("cache_dir", "here"), ("features_only", True), ("block_fn", "os.system")],
    ],
)
def test_no_door_lets_an_argument_through_that_loads_or_builds_something_else(
    weights, tmp_path, monkeypatch, name, value
):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "notes.bin").write_bytes(pickle.dumps(Touch()))
    monkeypatch.chdir(tmp_path)
    description = changed(f"image_encoder.args.{name}", value)
    refused(lambda: load(description, weights), f"{name}: ", "cannot be set here")
    cfg = load_config(PRETRAIN.schema, ["model.image_encoder.weights=random", "model.bert.weights=random"], PRETRAIN)
    cfg.model.image_encoder.args[name] = value
    refused(lambda: build_backbone(cfg), f"{name}: ", "cannot be set here")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny_patch16_224", "./vit_tiny_patch16_224", "vit_tiny.a/b"])
def test_a_name_that_is_no_vision_transformer_of_timms_is_refused(weights, name):
    refused(lambda: load(changed("image_encoder.name", name), weights), "has no Vision Transformer")


def test_heads_that_rank_compute_in_fp32_under_autocast():
    """In bf16 the matching logits of 4,000 pairs that are alike have some hundred values."""
    net, draws = SemMIM(DESCRIPTION), torch.Generator().manual_seed(0)
    fused = (torch.randn(1, 1, net.itm_head.in_features) + 0.01 * torch.randn(4000, 1, 32, generator=draws)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(net.itm_head(fused)[..., 1].unique()) < 1000
        logits, cosines = net.itm_logits(fused), project(net.text_proj, fused)
    assert torch.equal(logits, net.itm_logits(fused.float()))
    assert torch.equal(cosines, project(net.text_proj, fused.float())) and len(logits[:, 1].unique()) > 3500


def test_the_check_draws_no_random_number_and_a_stage_may_leave_parts_out(weights):
    torch.manual_seed(1)
    SemMIM(DESCRIPTION, decoder=False, mlm_head=False)
    expected = torch.rand(3)
    torch.manual_seed(1)
    backbone, _, lines = load_backbone("a.pth", loaded={"model": weights, "description": DESCRIPTION}, image_size=64)
    assert backbone.decoder is None and "not used here: decoder, mlm_head" in lines[-1]
    torch.manual_seed(1)
    load_backbone("a.pth", loaded={"model": weights, "description": DESCRIPTION})
    assert torch.equal(torch.rand(3), expected)


TEXT_PROJ = "backbone.text_proj.weight"
TAMPERED = {  # what: (the weights that take the place of those of the model, other entries, the end of the line)
    "expanded without bound": ({TEXT_PROJ: torch.ones(1).expand(10**9, 10**6)}, {}, "text_proj.weight has the shape"),
    "weights without a place": ({}, {"description": DESCRIPTION | {"text_layers": 1}}, "has no place"),
    "no map": ({}, {"model": None}, "its entry model is not what"),
    "no names": ({}, {"model": {3: torch.ones(1)}}, "its entry model is not what"),
    "no weights": ({}, {"model": {}}, "more layers than the 0 weights"),
    "no description": ({}, {"description": None}, "no SemMIM checkpoint"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_checkpoint_that_is_none_of_this_project_is_one_line(weights, what):
    values, entries, words = TAMPERED[what]
    loaded = {"model": weights | values, "description": DESCRIPTION} | entries
    refused(lambda: load_backbone("a.pth", loaded=loaded, decoder=True), "a.pth: ", words)


def test_a_stage_that_writes_needs_a_decoder(weights):
    without = {name: value for name, value in weights.items() if "decoder." not in name}
    refused(lambda: load(DESCRIPTION, without), "a.pth: the checkpoint has no decoder")
