"""What makes a step faster or smaller changes none of its numbers."""

import pytest
import torch
from timm.layers.activations import QuickGELU as PlainQuickGELU
from tiny import NO_DROPOUT, make_batch, make_draws, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import transforms
from dataset.transforms import normalized
from models import bert
from models.tensors import Linear, QuickGELU, linear

CLIP = "model.image_encoder.name=vit_base_patch16_clip_quickgelu_224"


def step(model, batch, draws=None):
    """-> (losses, gradients by name) of one step in evaluation mode"""
    model.zero_grad()
    loss, logs = model(model.prepare(batch, make_draws(batch) if draws is None else draws), 0.4)
    loss.backward()
    losses = torch.stack([value for name, value in sorted(logs.items()) if name.startswith("loss/")])
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(one, other, atol=1e-5):
    torch.testing.assert_close(one[0], other[0], atol=atol, rtol=0)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=atol, rtol=0, msg=name)


WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "unique")  # what a GPU answers to the host


class Waits(TorchDispatchMode):
    """Notes every operation for which the host waits, copies between host and device included."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        devices = {x.device.type for x in (*arguments, result) if isinstance(x, torch.Tensor)}
        name, self.count = function.name().removeprefix("aten::").split(".")[0], self.count + 1
        if name in WAITS or ("copy" in name and len(devices) > 1):
            self.found.append(name)
        return result


@pytest.mark.parametrize("overrides", [(), ("itc.negatives=batch",), ("mim.target=pixels",), ("mim.masking=random",)])
def test_from_the_copied_batch_on_a_step_never_waits_for_the_gpu(overrides, monkeypatch):
    """On a GPU of fake tensors; its backward pass needs a real one, so the CPU's stands for it."""
    model = tiny_model(CLIP, "itm.temperature=1.0", *overrides)
    batch, waits = model.prepare(make_batch()), Waits()
    for image in ("image1", "image2"):
        batch[image] = torch.randint(0, 256, batch[image].shape, dtype=torch.uint8)
    with waits:
        model(normalized(batch), 0.4, done=0.1)[0].backward()
        model.after_step()
    assert waits.found == [] and waits.count > 2000

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def on_gpu(x):
            return fake.from_tensor(x.detach()).to("cuda") if isinstance(x, torch.Tensor) else x

        constants = tuple(map(on_gpu, transforms._constants(torch.device("cpu"))))
        monkeypatch.setattr(transforms, "_constants", lambda device: constants)
        monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        model._apply(on_gpu)
        waits, batch = Waits(), {key: on_gpu(value) for key, value in batch.items()}
        with waits:
            loss, _ = model(normalized(batch), 0.4, done=0.1)
            model.after_step()
    assert loss.is_cuda and waits.found == [] and waits.count > 1000


def test_quickgelu_has_the_values_and_gradients_of_timm_and_keeps_one_tensor_for_the_backward_pass():
    x = torch.cat([torch.randn(1000) * 4, torch.tensor([0.0, -100.0, 100.0])])
    ours, theirs, kept = x.clone().requires_grad_(), x.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = QuickGELU()(ours)
    expected = PlainQuickGELU()(theirs)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    upstream = torch.randn(len(x))
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert len(kept) == 1


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr("models.tensors.onednn_is_faster", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_multiplies_as_torch_does_in_value_and_gradients(onednn, bias):
    layer = Linear(96, 80, bias=bias)
    x = torch.randn(50, 7, 192)[..., ::2].requires_grad_()  # not contiguous
    upstream = torch.randn(50, 80, 7).transpose(1, 2)
    exact = [part.detach().double().requires_grad_() for part in (x, *layer.parameters())]
    expected = torch.nn.functional.linear(*exact)
    result = layer(x)
    assert result.grad_fn.name() == "OneDNNLinearBackward"
    result.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip((x, *layer.parameters()), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-5)
    layer.weight.requires_grad_(False)
    x.grad = None
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad.double(), exact[0].grad, atol=1e-4, rtol=1e-5)


def test_onednn_is_left_out_where_torch_can_more_or_is_faster(onednn):
    layer, x = Linear(96, 80), torch.randn(400, 96)
    assert layer(x).grad_fn.name() == "OneDNNLinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for other in (x[:0], x[:5], x[0], torch.randn(0, 400, 96)):
        assert layer(other).shape == (*other.shape[:-1], 80)
        assert layer(other).grad_fn.name() != "OneDNNLinearBackward"
    spread = torch.randn(160)[::2]  # whose stride oneDNN would pass over
    assert linear(x, layer.weight, spread).equal(torch.nn.functional.linear(x, layer.weight, spread))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(400, 95))
    assert layer.double()(x.double()).dtype == torch.float64


def test_all_large_products_of_a_model_are_onednns(onednn, monkeypatch):
    monkeypatch.setattr("models.tensors.ONEDNN_PRODUCTS", 1)
    model, found = tiny_model(), []
    monkeypatch.setattr("models.tensors.F.linear", lambda *args: found.append(args))
    step(model, make_batch())
    assert not found


def test_a_step_without_masks_where_nothing_is_padded_is_that_with_them():
    model, batch = tiny_model(*NO_DROPOUT), make_batch(captions=["a red dog", "a blue cat", "the tall man"] * 2)
    assert batch["attention_mask"].all()
    same_step(*(step(model, {**batch, "padded": padded}) for padded in (False, True)))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "matrix products"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_causal_attention_equals_the_masked_one_in_value_and_gradient(monkeypatch, fused, drop):
    monkeypatch.setattr(bert, "fused_attention_pays", lambda x: fused)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).requires_grad_() for _ in range(3))
    results = []
    for mask, causal in ((None, True), (torch.full((7, 7), -1e30).triu(1), False)):
        torch.manual_seed(1)
        out = bert.attention(q, k, v, mask, drop, causal)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, masked in zip(*results, strict=True):
        torch.testing.assert_close(ours, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [(), NO_DROPOUT], ids=["dropout", "no dropout"])
def test_checkpointing_of_the_text_stacks_changes_no_gradient(dropout):
    results, calls = [], []
    for switch in ("false", "true"):
        model, batch = tiny_model(*dropout, f"model.bert.checkpointing={switch}"), make_batch()
        counted = []
        for stack in ("text_encoder", "fusion_encoder", "decoder"):
            layer = getattr(model.backbone, stack).encoder.layer[0]
            layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        model.train()
        torch.manual_seed(3)
        results.append(step(model, batch))
        calls.append(len(counted))
    same_step(*results, atol=1e-6)
    assert calls[1] == 2 * calls[0]  # every layer runs again in the backward pass
