"""The image encoder: its numbers against transformers' CLIP, injection, masking, and other people's weight
files.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import save_file
from tiny import tiny_config
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from models.semmim import build_backbone
from models.vit import ImageEncoder, to_timm

NAME = "vit_base_patch16_clip_quickgelu_224"
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny(image_size=64, **options):
    torch.manual_seed(0)
    return ImageEncoder(NAME, image_size, TINY, **options).eval()


def inputs(batch=2, size=64, length=6, width=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    text = torch.randn(batch, length, width, generator=generator)
    text_mask = torch.ones(batch, length, dtype=torch.int64)
    text_mask[0, -2:] = 0
    return images, text, text_mask


def clip_config(size=64, width=32, depth=3, heads=2):
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads,
        image_size=size, patch_size=16, hidden_act="quick_gelu",
    )  # fmt: skip


def random_clip(config):
    """A CLIPVisionModel whose biases and norms are not at their special initial values."""
    torch.manual_seed(3)
    model = CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def clip_tokens(model, images):
    """All of CLIP's tokens after its final norm, which transformers applies to [CLS] alone."""
    tower = getattr(model, "vision_model", model)
    return tower.post_layernorm(model(pixel_values=images).last_hidden_state)


# ------------------------------------------------------------------------------- numbers against transformers


def test_vit_b16_equals_transformers_clip_at_224(monkeypatch):
    clip = random_clip(clip_config(224, 768, 12, 12))
    encoder = ImageEncoder(NAME, 224).eval()
    encoder.vit.load_state_dict(to_timm(clip.state_dict()))
    images = torch.randn(1, 3, 224, 224)
    expected = clip_tokens(clip, images)
    for fused in (True, False):  # both ways to compute attention, whatever the device would choose
        monkeypatch.setattr("models.bert.fused_attention_pays", lambda x, fused=fused: fused)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=0)


def test_equals_transformers_clip_at_384_with_the_same_resized_positions(tmp_path):
    small, large = random_clip(clip_config(224)), random_clip(clip_config(384))
    torch.save(small.state_dict(), tmp_path / "clip.pt")
    encoder = ImageEncoder(NAME, 384, TINY, weights=str(tmp_path / "clip.pt")).eval()
    weights = {k: v for k, v in small.state_dict().items() if "position" not in k}
    positions = next(k for k in large.state_dict() if k.endswith("position_embedding.weight"))
    weights[positions] = encoder.vit.pos_embed.data[0]
    assert not large.load_state_dict(weights, strict=False).missing_keys
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), clip_tokens(large, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_hugging_face_clip_model_loads_whole(tmp_path, prefix):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=clip_config().to_dict()))
    weights = {k: v for k, v in clip.state_dict().items() if prefix or k.startswith("vision_model.")}
    weights = {k if prefix else k.removeprefix("vision_model."): v.contiguous().clone() for k, v in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    encoder = tiny(weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(encoder.vit.patch_embed.proj.weight, weights[f"{prefix}embeddings.patch_embedding.weight"])


def as_openai(clip):
    """The weights of a CLIPVisionModel under the names of OpenAI's file, beside some of its text tower."""
    own = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items()}
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    for kind in ("weight", "bias"):
        names |= {f"ln_pre.{kind}": f"pre_layrnorm.{kind}", f"ln_post.{kind}": f"post_layernorm.{kind}"}
        for i in range(clip.config.num_hidden_layers):
            parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
            for mine, theirs in (parts | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                names[f"transformer.resblocks.{i}.{mine}.{kind}"] = f"encoder.layers.{i}.{theirs}.{kind}"
    weights = {f"visual.{mine}": own[theirs] for mine, theirs in names.items()}
    for i in range(clip.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [own[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    text = {"positional_embedding": torch.ones(7, 16), "transformer.resblocks.0.ln_1.weight": torch.ones(16)}
    return {**weights, **text, "visual.proj": torch.ones(32, 16), "logit_scale": torch.ones(())}


def test_weights_in_openais_names_give_the_tokens_of_transformers_clip(tmp_path):
    clip, path = random_clip(clip_config()), tmp_path / "open_clip_pytorch_model.bin"
    torch.save(as_openai(clip), path)
    encoder, images = tiny(weights=str(path)), inputs()[0]
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), clip_tokens(clip, images), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------- injection and masking


@torch.no_grad()
def test_text_joins_exactly_from_the_given_layer_on():
    encoder, (images, text, text_mask) = tiny(), inputs()
    x = encoder.vit.forward_features(images)  # the plain pass, by timm alone
    torch.testing.assert_close(encoder(images), x)
    x = encoder.embed(images)
    x = encoder.vit.blocks[0](x)
    full = torch.cat((x, text), dim=1)
    allowed = torch.cat((torch.ones(2, 17, dtype=torch.int64), text_mask), dim=1).bool()
    for block in encoder.vit.blocks[1:]:
        full = block(full, attn_mask=allowed[:, None, None, :])
    expected = encoder.vit.norm(full)[:, :17]
    result = encoder(images, text=text, text_mask=text_mask, inject_from=2)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, encoder(images), atol=1e-3)


@torch.no_grad()
def test_forward_twice_equals_the_two_separate_passes():
    encoder, (images, text, text_mask) = tiny(), inputs()
    for start in (1, 2, 3):
        plain, injected, below = encoder.forward_twice(images, text, text_mask, start)
        assert torch.equal(plain, encoder(images))
        assert torch.equal(injected, encoder(images, text=text, text_mask=text_mask, inject_from=start))
    plain, injected, below = encoder.forward_twice(images, text, text_mask, None)
    assert plain is injected and torch.equal(plain, encoder(images))
    assert torch.equal(plain, encoder.vit.norm(encoder.layers(below, encoder.depth, encoder.depth)))


@torch.no_grad()
def test_last_values_are_what_attention_of_each_token_to_itself_alone_gives():
    encoder, (images, _, _) = tiny(), inputs()
    _, _, below = encoder.forward_twice(images, None, None, None)
    tokens = below.shape[1]
    itself = torch.zeros(tokens, tokens).masked_fill(~torch.eye(tokens, dtype=torch.bool), float("-inf"))
    block = encoder.vit.blocks[-1]
    expected = encoder.vit.norm(block.attn(block.norm1(below), attn_mask=itself))
    torch.testing.assert_close(encoder.last_values(below), expected)


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_padding_of_the_injected_text_does_not_matter(bf16):
    encoder, (images, text, text_mask) = tiny(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before = encoder(images, text=text, text_mask=text_mask, inject_from=3)
        text[0, -2:] = 50.0
        changed = encoder(images, text=text, text_mask=text_mask, inject_from=3)
        text, text_mask = F.pad(text, (0, 0, 0, 5), value=9.0), F.pad(text_mask, (0, 5))
        longer = encoder(images, text=text, text_mask=text_mask, inject_from=3)
    assert torch.equal(before, changed)
    torch.testing.assert_close(before, longer, atol=0.05 if bf16 else 1e-5, rtol=0)


@torch.no_grad()
def test_masked_patches_become_the_mask_token_before_positions_and_no_other_changes():
    encoder, (images, _, _) = tiny(), inputs()
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(5)) < 0.3
    seen = []
    hook = encoder.vit.norm_pre.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    encoder.embed(images)
    encoder.embed(images, mask)
    hook.remove()
    plain, masked = (x[:, 1:] - encoder.vit.pos_embed[:, 1:] for x in seen)
    torch.testing.assert_close(masked[mask], encoder.mask_token.expand(int(mask.sum()), -1))
    torch.testing.assert_close(masked[~mask], plain[~mask], rtol=0, atol=0)
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])


@pytest.mark.parametrize("training", [True, False])  # the engine's rehearsal of a step is in eval mode
def test_checkpointing_recomputes_every_layer_in_the_backward_pass_and_changes_no_gradient(training):
    gradients, calls = [], []
    for checkpointing in (False, True):
        encoder, (images, text, text_mask) = tiny().train(training), inputs()
        encoder.checkpointing = checkpointing
        for number, block in enumerate(encoder.vit.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        calls.clear()
        loss = encoder(images, text=text, text_mask=text_mask, inject_from=2).square().sum()
        forward = list(calls)
        loss.backward()
        gradients.append({k: p.grad for k, p in encoder.named_parameters() if p.grad is not None})
        assert sorted(calls) == sorted((1 + checkpointing) * forward) and forward == list(range(encoder.depth))
    torch.testing.assert_close(gradients[1], gradients[0])


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image_size": 60}, "60 is not divisible by the patch size 16"),
        ({"name": "vit_base_patch16_reg4_gap_256"}, "one [CLS] token"),
        ({"args": {"patch_drop_rate": 0.1}}, "patch_drop_rate"),
    ],
)
def test_a_wrong_setting_is_a_one_line_error(options, words):
    settings = {"name": NAME, "image_size": 64, "args": TINY, **options}
    refused(lambda: ImageEncoder(**settings), words)


def test_random_positions_begin_as_asked_for():
    encoders = {}
    for start in ("normal", "sincos"):
        torch.manual_seed(0)
        encoders[start] = build_backbone(tiny_config(f"model.image_encoder.positions={start}"))[0].image_encoder
    normal, sincos = encoders["normal"], encoders["sincos"]
    assert normal.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    torch.testing.assert_close(sincos.vit.pos_embed[:, 0], normal.vit.pos_embed[:, 0])  # [CLS] has no place
    # MAE's formula, written out: a quarter of the width each for sin of y, sin of x, cos of y, cos of x (timm's order)
    quarter = sincos.width // 4
    y, x = np.divmod(np.arange(sincos.num_patches), sincos.grid)
    omega = 10000.0 ** -(np.arange(quarter) / quarter)
    expected = np.concatenate([f(np.outer(place, omega)) for f in (np.sin, np.cos) for place in (y, x)], axis=1)
    np.testing.assert_allclose(sincos.vit.pos_embed[0, 1:].detach().numpy(), expected, atol=1e-6)
    assert sincos.vit.pos_embed.requires_grad
