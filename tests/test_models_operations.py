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
def test_operations_are_those_that_torch_counts(overrides, monkeypatch):
    monkeypatch.setattr("models.tensors.onednn_is_faster", lambda: False)  # whose products torch does not count
    model, batch = tiny_model(*NO_DROPOUT, *overrides), make_batch()
    draws = make_draws(batch, patches=model.backbone.image_encoder.num_patches)
    pairs, length = batch["input_ids"].shape
    batch = model.prepare(batch, draws)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(batch, 0.4)[0].backward()
    ours = operations(model, pairs, length, scored_tokens(batch) / pairs)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def scored_tokens(batch):
    return len(batch["mlm_target"]) + len(batch["plm_target"])


def test_expected_tokens_are_those_of_many_draws():
    model, batch = tiny_model(), make_batch(captions=["a red circle left of a blue square in a box"] * 6)
    counts = [scored_tokens(model.prepare(batch, make_draws(batch, seed))) for seed in range(300)]
    length = batch["input_ids"].shape[1]
    measured = operations(model, 6, length, sum(counts) / 6 / len(counts))
    assert operations(model, 6, length) == pytest.approx(measured, rel=0.02)
