"""Generation against transformers' `generate`, token for token."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig as HFConfig
from transformers import BertLMHeadModel, DynamicCache, EncoderDecoderCache, TopKLogitsWarper, TopPLogitsWarper

from models.bert import BertConfig, TextDecoder
from models.generation import Generation, filter_logits, generate, written_tokens
from utils import UserError

VOCAB = 60
CLS, SEP, PAD = 1, 2, 3  # transformers pads beams with [SEP] if [PAD] is 0
TOKENS = SimpleNamespace(cls_id=CLS, sep_id=SEP, pad_id=PAD)
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module", params=[0.0, 3.0], ids=["long", "short"])
def pair(request):
    """transformers' decoder and ours with the same weights; their [SEP] is rare or frequent."""
    torch.manual_seed(0)
    hf = BertLMHeadModel(HFConfig(**SHAPE, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))  # large enough that every token depends on the others
        hf.cls.predictions.bias[SEP] += request.param
    decoder = TextDecoder(BertConfig(**SHAPE), 2).eval()
    weights = {k.removeprefix("bert."): v for k, v in hf.state_dict().items()}
    own = decoder.state_dict()
    decoder.load_state_dict({k: v for k, v in weights.items() if k in own})
    return hf, decoder


@pytest.fixture(scope="module")
def memory():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(7, 5, dtype=torch.int64)
    mask[1, 3:] = mask[4, 1:] = 0
    return 2 * torch.randn(7, 5, 32, generator=generator), mask


def written(decoder, memory, seed=None, **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return generate(decoder, *memory, TOKENS, Generation(**options), generator)


def theirs(hf, memory, **options):
    """transformers' result without the start token, and its scores."""
    memory, mask = memory
    out = hf.generate(
        input_ids=torch.full((len(memory), 1), CLS),
        encoder_hidden_states=memory,
        encoder_attention_mask=mask,
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        bos_token_id=CLS,
        eos_token_id=SEP,
        pad_token_id=PAD,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        max_new_tokens=12,
        **options,
    )
    return out.sequences[:, 1:], getattr(out, "sequences_scores", None)


@pytest.mark.parametrize("low", [1, 6])
def test_greedy_and_one_beam_equal_transformers(pair, memory, low):
    hf, decoder = pair
    expected, _ = theirs(hf, memory, min_new_tokens=low)
    greedy, scores = written(decoder, memory, mode="greedy", min_tokens=low, max_tokens=12)
    beam, beam_scores = written(decoder, memory, beams=1, min_tokens=low, max_tokens=12)
    assert torch.equal(greedy, expected) and torch.equal(beam, expected)
    torch.testing.assert_close(scores, beam_scores)


@pytest.mark.parametrize("penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [3, 5])
def test_beam_search_equals_transformers(pair, memory, beams, penalty):
    hf, decoder = pair
    for low, returned in ((1, 1), (5, beams)):
        options = {"length_penalty": penalty, "min_new_tokens": low, "num_return_sequences": returned}
        expected, scores = theirs(hf, memory, num_beams=beams, **options)
        options = {"length_penalty": penalty, "min_tokens": low, "max_tokens": 12, "num_return": returned}
        found, found_scores = written(decoder, memory, beams=beams, **options)
        assert torch.equal(found, expected)
        torch.testing.assert_close(found_scores, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["beam", "greedy", "sample"])
def test_finished_sentences_leave_the_batch(pair, memory, mode):
    copies = 2 if mode == "sample" else 1
    rows_of_step = []
    hook = pair[1].register_forward_pre_hook(lambda _, given: rows_of_step.append(len(given[0])))
    found, _ = written(pair[1], memory, seed=0, mode=mode, beams=3, num_return=copies, max_tokens=20)
    hook.remove()
    width = 3 if mode == "beam" else copies
    if mode != "beam":
        alive = [(found.view(7, copies, -1)[:, :, :t] != SEP).all(2) for t in range(1, found.shape[1])]
        assert rows_of_step == [7] + [int(a.any(1).sum() * a.sum(1).max()) for a in alive]
    lengths = written_tokens(found, SEP).sum(1)
    whole = 7 + 7 * width * (len(rows_of_step) - 1)
    assert sum(rows_of_step) < whole or lengths.min() == lengths.max()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (VOCAB + 1, 1.0), (0, 0.7), (8, 0.5), (0, 0.01)])
def test_filtered_logits_equal_transformers(top_k, top_p):
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits / 0.7
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_logits(logits, top_k, top_p, 0.7), expected)


def test_samples_have_the_decoders_frequencies(pair, memory):
    one = memory[0][:1], memory[1][:1]
    decoder = pair[1]
    with torch.no_grad():
        start = decoder(torch.tensor([[CLS]]), memory=decoder.project_memory(one[0]), memory_mask=one[1])
        log_probs = decoder.lm_logits(start[0, -1]).log_softmax(-1)
    log_probs[SEP] = -torch.inf
    draws, scores = written(decoder, one, seed=0, mode="sample", num_return=20000, max_tokens=1)
    frequency = torch.bincount(draws[:, 0], minlength=VOCAB) / 20000
    torch.testing.assert_close(frequency, log_probs.softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(scores, log_probs[draws[:, 0]], atol=1e-5, rtol=0)


def test_scores_are_the_models_log_probability_of_the_sentence(pair, memory):
    decoder = pair[1]
    found, scores = written(decoder, memory, mode="sample", min_tokens=0, max_tokens=9, top_k=10)
    inputs = torch.cat([torch.full((7, 1), CLS), found[:, :-1]], 1)
    with torch.no_grad():
        hidden = decoder(inputs, memory=decoder.project_memory(memory[0]), memory_mask=memory[1])
        log_probs = decoder.lm_logits(hidden).log_softmax(-1).gather(2, found[..., None])[..., 0]
    said = found != PAD
    said |= (inputs != SEP).cumprod(1).bool()  # [PAD] may be drawn before [SEP]
    torch.testing.assert_close(scores, (log_probs * said).sum(1) / said.sum(1), atol=1e-5, rtol=0)


def test_the_decoders_mode_is_put_back(pair, memory):
    decoder = pair[1].train()
    first, _ = written(decoder, memory)
    assert decoder.training and torch.equal(first, written(decoder, memory)[0])
    decoder.eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"beams": "5"}, "beams is '5'"),
        ({"num_return": 6}, "num_return 6: mode beam gives at most 5"),
        ({"mode": "greedy", "num_return": 2}, "mode greedy gives at most 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_a_senseless_option_is_an_error_that_names_it(options, words):
    with pytest.raises(UserError, match=words):
        Generation(**options)
