"""The operations of a step, counted from its shapes, against those that torch counts while it runs."""

import pytest
from tiny import NO_DROPOUT, make_batch, make_draws, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.pretrain import operations


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mim.inject_from=1",),
        ("mim.inject_from=none",),
        ("mim.target=pixels",),
        ("mim.target=pixels", "mim.predict=all"),
        ("mim.target=none",),
        ("mim.masking=random", "itc.queue_size=1000"),
        ("mim.similarity=values",),
        ("mim.predict=all", "mim.head={hidden: 128, patterns: 256, normalize: true}"),
        ("model.bert.fusion_layers=3", "model.bert.decoder_layers=2", "model.bert.text_layers=2"),
        ("model.image_encoder.args={embed_dim: 32, depth: 6, num_heads: 2, patch_size: 4}",),
    ],
)
def test_operations_are_those_that_torch_counts(overrides):
    model, batch = tiny_model(*NO_DROPOUT, *overrides), make_batch()
    draws = make_draws(batch, patches=model.backbone.image_encoder.num_patches)
    ids, mask, pairs = batch["input_ids"], batch["attention_mask"], len(batch["input_ids"])
    pieces = model.word_pieces(ids, mask)
    targets = model.prepare_mlm(ids, pieces, draws)[-1], model.prepare_plm(ids, mask, pieces, draws)[-1]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(batch, 0.4, draws=draws)[0].backward()
    scored = sum(map(len, targets)) / pairs
    ours = operations(model, pairs, ids.shape[1], scored)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_expected_tokens_are_those_of_many_draws():
    model, batch = tiny_model(), make_batch(captions=["a red circle left of a blue square in a box"] * 6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pieces = model.word_pieces(ids, mask)
    many = [make_draws(batch, seed) for seed in range(300)]
    counts = [
        len(model.prepare_mlm(ids, pieces, draws)[-1]) + len(model.prepare_plm(ids, mask, pieces, draws)[-1])
        for draws in many
    ]
    measured = operations(model, 6, ids.shape[1], sum(counts) / 6 / len(many))
    assert operations(model, 6, ids.shape[1]) == pytest.approx(measured, rel=0.02)
