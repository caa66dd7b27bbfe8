"""The pre-training step as a whole: what sees what, who gets gradient, and every switch of the ablations."""

import pytest
import torch
from tiny import CAPTIONS, NO_DROPOUT, make_batch, make_draws, save_codebook, tiny_config, tiny_model

from models.alignment import negative_temperature

LOSSES = {"cls", "patch", "itc", "itm", "mlm", "plm"}


def step(model, batch, **options):
    """Loss and logs on pinned draws."""
    return model(model.prepare(batch, make_draws(batch)), 0.4, **options)


def test_text_never_reaches_the_clean_view_or_the_teachers_plain_pass():
    """Another caption leaves L_cls, the momentum ITC feature and the clean view's tokens bit-identical."""
    model = tiny_model(*NO_DROPOUT).eval()
    seen = []
    for captions in (CAPTIONS[:6], CAPTIONS[2:8]):
        batch = make_batch(captions=captions)
        clean = []

        def keep(_, inputs, output, clean=clean):
            clean.append((inputs[0], output))

        hook = model.backbone.vision_proj.register_forward_hook(keep)
        logs = step(model, batch)[1]
        hook.remove()
        view = teacher_view(model, batch)
        seen.append([logs["loss/cls"], *clean[0], view.image_feat, view.cls_logits, view.patch_feat, view.patch_logits])
    *same, first_patches = seen[0]
    *others, second_patches = seen[1]
    assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True))
    assert not torch.equal(first_patches, second_patches)  # the text does reach the patch targets


def test_injection_reaches_the_text_encoder_in_the_student_only():
    model = tiny_model(*NO_DROPOUT)
    batch = make_batch()
    text_embeds, _ = model.backbone.encode_text(batch["input_ids"], batch["attention_mask"])
    image_embeds, _ = model.backbone.encode_image(batch["image1"])
    losses, _ = model.mim_losses(model.prepare(batch), image_embeds, text_embeds, teacher_view(model, batch))
    losses["patch"].backward(retain_graph=True)
    weight = model.backbone.text_encoder.embeddings.word_embeddings.weight
    assert weight.grad.abs().sum() > 0  # deep involvement: the gradient through w is kept
    model.zero_grad()
    losses["cls"].backward()
    assert weight.grad is None or weight.grad.abs().sum() == 0


def teacher_view(model, batch):
    return model.teach(batch, *model.backbone.encode_text(batch["input_ids"], batch["attention_mask"]))


@pytest.mark.parametrize("target", ["encoding", "pixels", "dvae"])
def test_all_patches_are_the_masked_and_the_visible_ones(target, tmp_path):
    """`mim.predict: all` is one mean over the masked patches and those that the student sees, for every target."""
    codebook = [f"mim.codebook={save_codebook(tmp_path)}"] if target == "dvae" else []
    model, batch = tiny_model(*NO_DROPOUT, f"mim.target={target}", *codebook), make_batch()
    draws, text_embeds = make_draws(batch), model.backbone.encode_text(batch["input_ids"], batch["attention_mask"])[0]
    image_embeds, _ = model.backbone.encode_image(batch["image1"])
    view = teacher_view(model, batch)
    found = {}
    for model.mim.predict in ("masked", "all"):
        found[model.mim.predict] = model.mim_losses(model.prepare(batch, draws), image_embeds, text_embeds, view)[0]
    chosen, _ = model.choose_patches(view, draws.patches)
    mask = torch.zeros(6, 16, dtype=torch.bool).scatter(1, chosen, True)
    options = {"mask": mask, "text": text_embeds, "text_mask": batch["attention_mask"]}
    seen = model.backbone.image_encoder(batch["image2"], **options, inject_from=model.mim.inject_from)[:, 1:]
    prediction = model.head(seen)  # [B, N, K]
    if target == "encoding":
        teacher = (view.patch_logits / model.mim.teacher_temperature).softmax(-1)  # the center is zero yet
        each = -(teacher * (prediction / model.mim.student_temperature).log_softmax(-1)).sum(-1)  # [B, N]
        assert torch.equal(found["all"]["cls"], found["masked"]["cls"])
    elif target == "pixels":
        grid = batch["image2"].view(6, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(6, 16, -1)
        each = ((grid - grid.mean(-1, True)) / grid.std(-1, keepdim=True) - prediction).square().mean(-1)
    else:
        codes = model.codebook.codebook.get_codebook_indices(0.8 * batch["codebook_image"] + 0.1).flatten(1)
        each = -prediction.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    assert found["masked"]["patch"].item() == pytest.approx(each[mask].mean().item(), rel=1e-5)
    assert found["all"]["patch"].item() == pytest.approx(each.mean().item(), rel=1e-5)


@pytest.mark.parametrize("target", ["encoding", "pixels"])
def test_what_is_compared_with_the_caption_chooses_the_masks_of_every_target(target):
    masks = []
    for similarity in ("tokens", "values"):
        model, batch = tiny_model(f"mim.target={target}", f"mim.similarity={similarity}").eval(), make_batch()
        masks.append(model.choose_patches(teacher_view(model, batch), make_draws(batch).patches)[0].sort().values)
    assert not torch.equal(*masks)


def test_negatives_become_as_hard_as_itc_s_own_within_the_share_that_is_set():
    itm, own = tiny_config("itm.temperature=1.6", "itm.harden=0.5").itm, torch.tensor(0.1)
    found = [negative_temperature(itm, own, done).item() for done in (0.0, 0.125, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([1.6, 0.8, 0.4, 0.1, 0.1])
    assert negative_temperature(tiny_config().itm, own, 0.0) == own  # ALBEF's rule is the default
    learned = torch.tensor(0.1, requires_grad=True)
    assert not negative_temperature(itm, learned, 0.25).requires_grad


def test_a_step_draws_with_the_temperature_of_its_place_in_the_training():
    model = tiny_model("itm.temperature=2.0")
    for done, expected in ((0.0, 2.0), (0.9, 0.07)):
        assert step(model, make_batch(), done=done)[1]["itm/temperature"].item() == pytest.approx(expected)


def test_rows_without_a_legal_negative_are_left_out_and_counted():
    model = tiny_model()
    batch = make_batch(4, captions=[CAPTIONS[0]] * 4)
    loss, logs = step(model, batch)
    assert logs["itm/rows_left_out"] == 8 and loss.isfinite()
    loss.backward()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["mim.target=none"],
        ["mim.target=pixels"],
        ["mim.target=pixels", "mim.masking=random"],
        ["mim.masking=random"],
        ["mim.inject_from=none"],
        ["mim.inject_from=1"],
        ["mim.mask_ratio=0.9"],
        ["itc.negatives=batch"],
        ["itc.negatives=batch", "mim.target=none"],
        ["text.sep=true"],
    ],
)
def test_every_switch_trains(overrides):
    model = tiny_model(*overrides)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    first = None
    for _ in range(12):
        loss, logs = step(model, make_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        first = first or loss.item()
    assert loss.item() < first
    parts = {name[5:]: value for name, value in logs.items() if name.startswith("loss/")}
    assert set(parts) == {"none": LOSSES - {"cls", "patch"}, "pixels": LOSSES - {"cls"}}.get(model.mim.target, LOSSES)
    torch.testing.assert_close(loss.detach(), sum(parts.values()))
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_queue_is_filled_after_the_optimizer_step_with_momentum_features():
    model = tiny_model()
    batch = make_batch()
    step(model, batch)
    assert (model.queue.image_id < 0).all()
    expected = teacher_view(model, batch).image_feat
    model.after_step()
    assert torch.equal(model.queue.image_id[:6], batch["image_id"])
    assert torch.allclose(model.queue.image_feat[:6], expected, atol=1e-6)


def test_temperature_is_clamped_after_a_step():
    model = tiny_model()
    step(model, make_batch())
    with torch.no_grad():
        model.backbone.log_temperature.fill_(5.0)
    model.after_step()
    assert model.backbone.temperature().item() == pytest.approx(0.5)
