"""What a GPU changes: the same step in bf16 with fused kernels, close to the CPU's fp32. Skipped without a GPU."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny import NO_DROPOUT, make_batch, make_draws, tiny_config, tiny_model

from dataset.transforms import normalized
from engine.distributed import Transfer, compile_model
from models.retrieval import RetrievalModel
from optim import create_optimizer
from utils import autocast, to_device

pytestmark = pytest.mark.gpu
SWITCHES = [(), ("mim.target=pixels",), ("mim.target=none",), ("itc.negatives=batch",), ("mim.inject_from=none",)]


@pytest.mark.parametrize("overrides", SWITCHES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_losses_on_the_gpu_equal_those_on_the_cpu(overrides, precision, tolerance):
    model, batch = tiny_model(*NO_DROPOUT, *overrides), make_batch()
    batch = model.prepare(batch, make_draws(batch))
    _, expected = model(batch, 0.4)
    model = copy.deepcopy(model).cuda()
    with autocast(torch.device("cuda"), precision):
        _, logs = model(to_device(batch, torch.device("cuda")), 0.4)
    for name in expected:
        if name.startswith("loss/"):
            assert logs[name].item() == pytest.approx(expected[name].item(), rel=tolerance, abs=tolerance), name


def test_attention_without_padding_may_take_the_flash_kernel():
    """What reaches scaled_dot_product_attention is what that kernel accepts; masks are where a text is cut."""
    refused, masked, real = [], 0, F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        nonlocal masked
        masked += attn_mask is not None
        params = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, dropout_p, is_causal, False)
        if attn_mask is None and not torch.backends.cuda.can_use_flash_attention(params, debug=True):
            refused.append(q.shape)
        return real(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)

    model = tiny_model(*NO_DROPOUT).cuda()
    batch = make_batch(captions=["a red dog", "a blue cat", "the tall man"] * 2) | {"padded": False}
    with mock.patch.object(F, "scaled_dot_product_attention", watched), autocast(torch.device("cuda"), "bf16"):
        model(to_device(model.prepare(batch), torch.device("cuda")), 0.4)
    assert not refused and masked == 3


def test_a_compiled_step_gives_the_losses_of_a_plain_one():
    model = tiny_model(*NO_DROPOUT).cuda()
    batch = to_device(model.prepare(make_batch(), make_draws(make_batch())), torch.device("cuda"))
    expected = model(batch, 0.4)[0]
    compile_model(model)
    loss = model(batch, 0.4)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_never_waits_for_the_gpu():
    model = tiny_model().cuda()
    batch = to_device(model.prepare(make_batch()), torch.device("cuda"))
    optimizer = create_optimizer(model, lr=1e-3, lr_vit=1e-3, weight_decay=0.02)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # what is made once may be copied
        try:
            loss, _ = model(batch, 0.4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("negatives", ["queue", "batch"])
def test_retrieval_losses_on_the_gpu_equal_those_on_the_cpu(negatives):
    backbone, batch = tiny_model(*NO_DROPOUT).backbone, make_batch()
    backbone.decoder = backbone.mlm_head = None
    model = RetrievalModel(backbone, tiny_config(f"itc.negatives={negatives}"))
    batch["image"], draws = batch["image1"], torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    expected, _ = model(batch, 0.4, draws)
    model = copy.deepcopy(model).cuda()
    loss, _ = model(to_device(batch, torch.device("cuda")), 0.4, draws.cuda())
    loss.backward()
    model.after_step()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_on_a_gpu_every_batch_arrives_whole_however_busy_its_stream_is():
    def batch(seed):
        pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return {"image1": pixels, "input_ids": torch.arange(8).view(4, 2) + seed, "padded": False, "paths": ["a"] * 4}

    transfer, busy = Transfer(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    sums = []
    for seed in range(20):
        pinned = {key: x.pin_memory() if isinstance(x, torch.Tensor) else x for key, x in batch(seed).items()}
        moved = transfer(pinned)
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(moved["image1"].double().sum() + moved["input_ids"].sum())
        del moved
    expected = [normalized(batch(seed))["image1"].double().sum() + batch(seed)["input_ids"].sum() for seed in range(20)]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected))
