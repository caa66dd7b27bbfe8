"""SemMIM's pre-training: one step of all six losses (the paper, Section 3), read from top to bottom in `forward`.

Shapes: B pairs of a micro-batch on this rank, N patches, M of them masked, L tokens of a caption, D the width of the
encoders, E that of the ITC space, K patterns.
"""

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from models import mim
from models.alignment import Features, contrast, hard_negatives, match, matching_rows, negative_temperature
from models.bert import SpecialTokens
from models.losses import global_count, mask_tokens, split_prefix, token_mean
from models.momentum import FeatureQueue, MomentumTeacher
from models.semmim import ADVICE, POSITIONS, SemMIM, backbone_state, build_backbone, project
from models.tensors import fp32, interleave, take, text_mask
from models.weights import load_exactly
from utils import IGNORE, Config, UserError


@dataclass
class Draws:
    """All random numbers of one step, one row per pair, uniform in [0, 1): pin them and the step is deterministic."""

    patches: Tensor  # [B, N] for the Gumbel noise of the masking
    itm_image: Tensor  # [B] which negative image each text gets
    itm_text: Tensor  # [B] which negative text each image gets
    mlm_select: Tensor  # [B, L] which tokens are masked
    mlm_replace: Tensor  # [B, L] by what: [MASK], a random token, itself
    mlm_token: Tensor  # [B, L] which random token
    plm_split: Tensor  # [B] at which place the caption is cut

    @classmethod
    def sample(cls, batch: int, patches: int, length: int, generator: torch.Generator | None = None) -> "Draws":
        """Fresh draws on the CPU, by default from its global generator."""
        shapes = [(batch, patches), *[(batch,)] * 2, *[(batch, length)] * 3, (batch,)]
        return cls(*(torch.rand(shape, generator=generator) for shape in shapes))


@dataclass
class TeacherView:
    """What the momentum teacher says of a batch: of its captions, and of view 2."""

    text_feat: Tensor  # [B, E] ITC feature of the caption; the student's, without gradient, if there is no queue
    image_feat: Tensor | None = None  # [B, E] ITC feature of the image, from the pass without text
    patch_feat: Tensor | None = None  # [B, N, E] the patches in the ITC space, from the pass without text
    cls_logits: Tensor | None = None  # [B, K] of [CLS], from the pass without text
    patch_logits: Tensor | None = None  # [B, N, K] of the patches, from the pass with the text injected


class PretrainModel(nn.Module):
    """Backbone, encoding head, momentum teacher, queue and centers; `forward` gives the loss of one micro-batch.

    cfg: the resolved configuration (`itc`, `itm`, `mlm`, `mim`, `momentum`).
    """

    one_graph = True  # for `train.compile`: nothing in `forward` depends on a tensor's values

    def __init__(self, backbone: SemMIM, cfg: Config, tokens: SpecialTokens):
        super().__init__()
        if tokens.vocab_size != backbone.description["bert"]["vocab_size"]:
            raise UserError(
                f"text.vocab: {tokens.vocab_size} word pieces, but the text model has embeddings for "
                f"{backbone.description['bert']['vocab_size']}; set model.bert.args.vocab_size: {tokens.vocab_size}"
            )
        backbone.description = {**backbone.description, "vocab": tokens.digest}
        self.itm, self.mlm, self.mim, self.momentum = cfg.itm, cfg.mlm, cfg.mim, cfg.momentum
        self.tokens, self.backbone, encoder = tokens, backbone, backbone.image_encoder
        target, head = cfg.mim.target, cfg.mim.head
        self.uses_queue = cfg.itc.negatives == "queue"  # momentum features (ALBEF), else the batch's own (CLIP)
        self.second_view = target != "none"  # whether there is a second augmented view: all targets need one
        self.guided = self.second_view and cfg.mim.masking == "text_guided"  # the caption chooses the masked patches
        self.teacher_sees = self.uses_queue or target == "encoding" or self.guided  # its image encoder is needed
        self.codebook = mim.CodebookTarget(cfg.mim.codebook) if target == "dvae" else None
        if target == "none":
            self.head = None
            encoder.mask_token.requires_grad_(False)
        elif target == "encoding":
            self.head = mim.EncodingHead(encoder.width, head.hidden, head.patterns, head.normalize)
            self.cls_center = mim.TeacherCenter(head.patterns, cfg.mim.center_momentum)
            self.patch_center = mim.TeacherCenter(head.patterns, cfg.mim.center_momentum)
        else:
            out = self.codebook.vocab_size if target == "dvae" else 3 * encoder.patch_size**2
            self.head = mim.EncodingHead(encoder.width, head.hidden, out, normalize=False)

        self.queue = FeatureQueue(cfg.itc.queue_size if self.uses_queue else 0, backbone.description["embed_dim"])
        self.teacher = MomentumTeacher(self.students())

    def students(self) -> dict[str, nn.Module]:
        """The modules that the momentum teacher copies under this configuration."""
        backbone, students = self.backbone, {}
        if self.teacher_sees:
            students |= {"image_encoder": backbone.image_encoder, "vision_proj": backbone.vision_proj}
        if self.uses_queue:
            students |= {"text_encoder": backbone.text_encoder, "text_proj": backbone.text_proj}
        if self.mim.target == "encoding":
            students |= {"head": self.head}
        return students

    def prepare(self, batch: dict, draws: Draws | None = None) -> dict:
        """A batch of the collate function, on the CPU, with all that a step draws -> the batch of `forward`.

        How many tokens MLM and PLM have is known here, before the batch travels, so that a step never waits for a GPU
        and is one graph (`train.compile`). batch: input_ids, attention_mask [B, L], caption_cut [B] if it is known.
        Adds mlm_ids [B, L], the captions with masked tokens, and prefix_mask, decoder_ids [B, L] (see `split_prefix`);
        mlm_places, plm_places: the R places of [B * L] that get scores, and mlm_target, plm_target: what stands there
        [R]; patch_draws [B, N] and itm_draws [2, B].
        """
        ids, mask, tokens = batch["input_ids"], batch["attention_mask"], self.tokens
        if draws is None:
            draws = Draws.sample(len(ids), self.backbone.image_encoder.num_patches, ids.shape[1])
        pieces = mask.bool() & (ids != tokens.cls_id) & (ids != tokens.sep_id)  # [B, L] the word pieces of the captions
        random_ids = (draws.mlm_token * tokens.vocab_size).long()
        noise = draws.mlm_select, draws.mlm_replace, random_ids
        mlm_ids, chosen = mask_tokens(ids, pieces, self.mlm.probability, *noise, tokens.mask_id)
        mlm_places = chosen.flatten().nonzero()[:, 0]
        special, cut = (tokens.cls_id, tokens.sep_id), batch.get("caption_cut")
        prefix_mask, decoder_ids, target = split_prefix(ids, mask, pieces.sum(1), draws.plm_split, *special, cut)
        plm_places = (target.flatten() != IGNORE).nonzero()[:, 0]
        return {
            **batch,
            **{"mlm_ids": mlm_ids, "mlm_places": mlm_places, "mlm_target": ids.flatten()[mlm_places]},
            **{"prefix_mask": prefix_mask, "decoder_ids": decoder_ids},
            **{"plm_places": plm_places, "plm_target": target.flatten()[plm_places]},
            **{"patch_draws": draws.patches, "itm_draws": torch.stack([draws.itm_image, draws.itm_text])},
        }

    def forward(self, batch: dict, alpha: float, done: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 4: L = L_cls + L_patch + L_itc + L_itm + L_mlm + L_plm of a micro-batch -> (L, values to log).

        batch: what `prepare` gives; image1, image2 (the paper's I_1, I_2) [B, 3, S, S], input_ids, attention_mask
        [B, L], image_id, caption_id [B], and padded: whether that mask has a 0 (dataset.pretrain.PretrainCollate).
        alpha: weight of ITC's soft targets now; done: share of the training that is over, see `negative_temperature`.
        """
        net, ids, mask = self.backbone, batch["input_ids"], batch["attention_mask"]
        padding, prefix_mask = text_mask(batch), batch["prefix_mask"]  # [B, L] or None, [B, L]
        size = ids.shape[0]

        # How many rows and tokens all ranks have, of which ITM's, MLM's and PLM's losses are means: one all-reduce.
        rows = matching_rows(batch["image_id"], batch["caption_id"])
        tokens = (rows.new_full((), len(batch[name])) for name in ("mlm_target", "plm_target"))
        itm_rows, mlm_tokens, plm_tokens = global_count(torch.stack([rows, *tokens])).unbind()

        # Text, all three uses in one pass: the caption, the caption with masked tokens (MLM), its prefix (PLM).
        all_masks = torch.cat([mask, mask, prefix_mask])  # [3B, L]
        all_embeds = net.text_encoder(torch.cat([ids, batch["mlm_ids"], ids]), all_masks)  # [3B, L, D]
        text_embeds, mlm_embeds, prefix_embeds = all_embeds.split(size)
        text_feat = project(net.text_proj, text_embeds[:, 0])  # [B, E]

        # The clean view, which never sees text: the image of ITC, ITM, MLM, PLM and L_cls.
        image_embeds, image_feat = net.encode_image(batch["image1"])  # [B, 1+N, D], [B, E]

        # The momentum teacher on view 2 (on the clean view if there is no second one).
        teacher = self.teach(batch, text_embeds, text_feat)

        # Masked image modeling of view 2, and L_cls between the clean view and the teacher's.
        losses, logs = {}, {}
        if self.second_view:
            losses, logs = self.mim_losses(batch, image_embeds, text_embeds, teacher)

        # Image-text contrast.
        image_feat_m = teacher.image_feat if self.uses_queue else image_feat.detach()
        features = Features(
            image_feat, text_feat, image_feat_m, teacher.text_feat, batch["image_id"], batch["caption_id"]
        )
        queue = self.queue if self.uses_queue else None
        losses["itc"] = contrast(features, net.temperature(), queue, alpha, remember=self.training)

        # Matching. All fusion rows of the step share the keys and values of their B images, which are projected once.
        image_memory = net.fusion_encoder.project_memory(image_embeds)
        temperature = negative_temperature(self.itm, net.temperature(), done)
        negatives = hard_negatives(features, temperature, *batch["itm_draws"])
        losses["itm"], logs["itm/accuracy"] = match(net, text_embeds, padding, image_memory, negatives, itm_rows)

        # Masked language modeling, and the fused prefix for the decoder, in one pass.
        fused = net.fusion_encoder(interleave(mlm_embeds, prefix_embeds), interleave(mask, prefix_mask), image_memory)
        fused_mlm, fused_prefix = fused[0::2], fused[1::2]  # [B, L, D]
        mlm_logits = net.mlm_logits(fused_mlm.flatten(0, 1)[batch["mlm_places"]])
        losses["mlm"] = token_mean(mlm_logits, batch["mlm_target"], mlm_tokens)

        # Prefix language modeling: the decoder reads the image and the fused prefix, and writes the suffix.
        memory, memory_mask = net.decoder_memory(image_embeds, fused_prefix, prefix_mask)
        memory = net.decoder.project_memory(memory)
        hidden = net.decoder(batch["decoder_ids"], memory=memory, memory_mask=memory_mask)  # [B, L, D]
        plm_logits = net.decoder.lm_logits(hidden.flatten(0, 1)[batch["plm_places"]])
        losses["plm"] = token_mean(plm_logits, batch["plm_target"], plm_tokens)

        logs |= {f"loss/{name}": value.detach() for name, value in losses.items()}
        logs |= {"temperature": net.temperature().detach(), "itm/temperature": temperature}
        logs["itm/rows_left_out"] = (~negatives.valid).sum()
        return sum(losses.values()), logs

    # ----------------------------------------------------------------------------------------- the parts of a step

    @torch.no_grad()
    def teach(self, batch: dict, text_embeds: Tensor, text_feat: Tensor) -> TeacherView:
        """The teacher on the caption, and twice on view 2: without text for [CLS] and S, with text for the patches.

        text_embeds [B, L, D], text_feat [B, E]: the student's, which stand in if there is no queue, hence no text
        teacher. Without a second view the teacher looks at the first.
        """
        teacher, mask = self.teacher, text_mask(batch)
        if self.uses_queue:
            text_embeds = teacher.text_encoder(batch["input_ids"], mask)
            text_feat = project(teacher.text_proj, text_embeds[:, 0])
        view = TeacherView(text_feat.detach())
        if not self.teacher_sees:
            return view
        images = batch["image2" if self.second_view else "image1"]
        inject_from = self.mim.inject_from if self.mim.target == "encoding" else None
        encoder = teacher.image_encoder
        plain, injected, below = encoder.forward_twice(images, text_embeds, mask, inject_from)
        if self.mim.target == "encoding":
            view.cls_logits, view.patch_logits = teacher.head(plain[:, 0]), teacher.head(injected[:, 1:])
        if self.uses_queue:
            view.image_feat = project(teacher.vision_proj, plain[:, 0])
        if self.guided:
            view.patch_feat = teacher.vision_proj(self.compared_patches(encoder, plain, below))
        return view

    def compared_patches(self, encoder: nn.Module, plain: Tensor, below: Tensor) -> Tensor:
        """What `mim.similarity` compares with the caption, from `encoder.forward_twice` -> [B, N, D]"""
        return (plain if self.mim.similarity == "tokens" else encoder.last_values(below))[:, 1:]

    def choose_patches(self, teacher: TeacherView, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """(indices [B, M] of the masked patches, similarity [B, N] of all patches to the text, None if not guided)"""
        if not self.guided:
            return mim.random_mask(self.mim.mask_ratio, uniform), None
        settings = self.mim.mask_ratio, self.mim.mask_temperature
        return mim.text_guided_mask(teacher.patch_feat, teacher.text_feat, *settings, uniform)

    def mim_losses(
        self, batch: dict, image_embeds: Tensor, text_embeds: Tensor, teacher: TeacherView
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """L_patch at the masked patches of view 2, L_cls if the target is the encoding -> (losses, values to log)

        With `mim.predict: all` L_patch is a mean over all patches, those that the student sees included, whatever the
        target is.
        """
        encoder, logs = self.backbone.image_encoder, {}
        masked, similarity = self.choose_patches(teacher, batch["patch_draws"])  # [B, M], [B, N]
        if self.guided:
            by_chance = max(1, encoder.num_patches // 4) / encoder.num_patches
            logs["mim/masked_on_relevant_quarter"] = mim.relevant_share(similarity, masked)
            logs["mim/masked_on_relevant_quarter_if_random"] = similarity.new_full((), by_chance)
        masked_embeds = encoder(
            batch["image2"],
            mask=mim.as_mask(masked, encoder.num_patches),
            text=text_embeds,
            text_mask=text_mask(batch),
            inject_from=self.mim.inject_from,
        )  # [B, 1+N, D]
        places = masked  # [B, P] of the predicted patches, P = M or N
        if self.mim.predict == "all":
            places = torch.arange(encoder.num_patches, device=masked.device).expand(len(masked), -1)
        prediction = self.head(take(masked_embeds[:, 1:], places))  # [B, P, K]
        if self.mim.target == "pixels":
            return {"patch": mim.pixel_loss(prediction, batch["image2"], encoder.patch_size, places)}, logs
        if self.mim.target == "dvae":
            return {"patch": mim.code_loss(prediction, self.codebook(batch["codebook_image"]), places)}, logs

        if self.training:
            self.cls_center.add(teacher.cls_logits)
            self.patch_center.add(teacher.patch_logits)
        temperatures = self.mim.student_temperature, self.mim.teacher_temperature
        student_cls = self.head(image_embeds[:, 0])  # [B, K]
        cls, cls_probs = mim.cls_loss(student_cls, teacher.cls_logits, self.cls_center.value, *temperatures)
        patch, patch_probs = mim.patch_loss(
            prediction, teacher.patch_logits, places, self.patch_center.value, *temperatures
        )
        logs |= mim.collapse_monitors("cls", cls_probs, cls) | mim.collapse_monitors("patch", patch_probs, patch)
        logs["teacher/patterns_in_use"] = mim.patterns_in_use(teacher.patch_logits, self.patch_center.value)
        return {"cls": cls, "patch": patch}, logs

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer step: clamp the temperature, move the teacher, fill the queue, move the centers."""
        self.backbone.clamp_temperature()
        self.teacher.update(self.students(), self.momentum)
        self.queue.flush()
        if self.mim.target == "encoding":
            self.cls_center.update()
            self.patch_center.update()

    @torch.no_grad()
    def inspect(self, batch: dict) -> dict[str, Tensor | None]:
        """What an image of the masking shows: mask [B, N], similarity [B, N], pattern of each patch [B, N]."""
        ids, patches = batch["input_ids"], self.backbone.image_encoder.num_patches
        draws = Draws.sample(ids.shape[0], patches, ids.shape[1])
        text_embeds, text_feat = self.backbone.encode_text(ids, batch["attention_mask"])
        teacher = self.teach(batch, text_embeds, text_feat)
        masked, similarity = self.choose_patches(teacher, draws.patches.to(ids.device))
        patterns = None
        if self.mim.target == "encoding":
            patterns = (fp32(teacher.patch_logits) - self.patch_center.value).argmax(-1)
        return {"mask": mim.as_mask(masked, patches), "similarity": similarity, "patterns": patterns}


def build_pretrain_model(
    cfg: Config, tokens: SpecialTokens, initial_weights: bool = True
) -> tuple[PretrainModel, list[str]]:
    """The model of a pre-training config and log lines; initial_weights: see `build_backbone`."""
    backbone, lines = build_backbone(cfg, initial_weights=initial_weights)
    depth, first = backbone.image_encoder.depth, cfg.mim.inject_from
    if first is not None and not (isinstance(first, int) and 1 <= first <= depth):
        raise UserError(f"mim.inject_from: {first!r} is neither none nor a layer of the image encoder (1..{depth})")
    return PretrainModel(backbone, cfg, tokens), lines


def start_from(model: PretrainModel, checkpoint: dict, path: str | PathLike) -> list[str]:
    """Begin a new run with the weights of an earlier one's checkpoint; returns log lines.

    Takes the backbone (positions resized if the resolution differs), and head and centers if they fit. The queue
    starts empty, since its image ids belong to the other run's data, and the teacher starts as a copy of the students.
    """
    state, backbone = checkpoint["model"], backbone_state(checkpoint, path)
    backbone, lines = model.backbone.image_encoder.resize_positions(backbone, POSITIONS, path)
    load_exactly(model.backbone, backbone, path, ADVICE, extra=True)
    own, taken = model.state_dict(), ["backbone"]
    for part in ("head", "cls_center", "patch_center"):
        shapes = {key: value.shape for key, value in own.items() if key.startswith(part + ".")}
        if shapes and all(key in state and state[key].shape == shape for key, shape in shapes.items()):
            model.load_state_dict({key: state[key] for key in shapes}, strict=False)
            taken.append(part)
    model.teacher.update(model.students(), momentum=0.0)
    return [f"{path}: starting from its {', '.join(taken)}; queue empty, teacher copied from the students", *lines]


def operations(model: PretrainModel, pairs: int, tokens: int, scored: float | None = None) -> float:
    """Floating-point operations of the matrix products of a forward and backward pass, for the log's MFU.

    Of `pairs` captions of `tokens` tokens, padding included; scored: how many tokens of a caption get scores over the
    vocabulary, MLM's and PLM's (None: as many as are expected). A multiplication and an addition are two operations; a
    backward pass takes twice the forward pass's, and what checkpointing recomputes counts for nothing.
    """
    net, encoder, settings = model.backbone, model.backbone.image_encoder, model.mim
    bert, embed = net.description["bert"], net.description["embed_dim"]
    width, patches = encoder.width, encoder.num_patches
    texts, fusions, decoders = (net.description[f"{name}_layers"] for name in ("text", "fusion", "decoder"))
    image, both = 1 + patches, 1 + patches + tokens  # tokens of an image, and with its text
    below = encoder.depth if settings.inject_from is None else settings.inject_from - 1  # layers before the text joins
    encoding = settings.target == "encoding"

    def layer(length: int, inner: int = bert["intermediate_size"], keep: int | None = None, seen: int = 0) -> int:
        """A row of `length` tokens, `keep` of which are needed, that attend to `seen` others if there are any."""
        keep = length if keep is None else keep
        itself = 4 * width * (width * (length + keep) + keep * length + keep * inner)
        return itself + (4 * width * keep * (width + seen) if seen else 0)

    def images(count: int, length: int) -> int:
        return count * layer(length, encoder.vit.blocks[0].mlp.fc1.out_features)

    def memory(length: int) -> int:
        return 4 * length * width**2  # its keys and values, for one layer

    pixels = 2 * patches * 3 * encoder.patch_size**2 * width
    head = 2 * sum(weight.numel() for weight in model.head.parameters() if weight.ndim == 2) if model.head else 0
    if scored is None:
        scored = max(1.0, model.mlm.probability * (tokens - 1)) + tokens / 2 + 1

    student = 3 * texts * layer(tokens) + pixels + images(encoder.depth, image)  # a caption, masked, and its prefix
    if model.second_view:
        rows = patches if settings.predict == "all" else mim.masked_count(patches, settings.mask_ratio)
        student += pixels + images(below, image) + images(encoder.depth - below, both) + (rows + encoding) * head
    matching = 3 * (fusions - 1) * layer(tokens, seen=image) + 3 * layer(tokens, keep=1, seen=image)
    student += fusions * (memory(image) + 2 * layer(tokens, seen=image)) + matching
    student += decoders * (memory(both) + layer(tokens, seen=both)) + scored * 2 * width * (width + bert["vocab_size"])
    student += 4 * width * embed + 12 * width

    teacher = 0
    if model.uses_queue:  # the last: two directions of logits, soft targets and the gradient of the query
        teacher += texts * layer(tokens) + (1 + model.teacher_sees) * 2 * width * embed + 12 * model.queue.size * embed
    if model.teacher_sees:
        teacher += pixels + images(encoder.depth, image)
    if encoding:
        teacher += images(encoder.depth - below, both) + image * head
    if model.guided:
        teacher += 2 * patches * width * embed + (8 * image * width**2 if settings.similarity == "values" else 0)
    return pairs * (3 * student + teacher - (1 + model.second_view) * pixels)  # no gradient is needed of the pixels
