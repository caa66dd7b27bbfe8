"""SemMIM's pre-training: one step of all six losses (the paper, Section 3), read from top to bottom in `forward`."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from models.losses import (
    IGNORE,
    distillation_loss,
    fp32,
    global_mean,
    itc_loss,
    itm_loss,
    mask_tokens,
    sample_hard_negatives,
    split_prefix,
    teacher_distribution,
    token_loss,
)
from models.mim import (
    CodebookTarget,
    EncodingHead,
    TeacherCentre,
    as_mask,
    collapse_monitors,
    masked_count,
    normalised_patch_pixels,
    patch_similarity,
    patterns_in_use,
    relevant_share,
    sample_patches,
)
from models.momentum import FeatureQueue, MomentumTwin
from models.semmim import SemMIM, build_backbone, project
from utils import UserError, all_gather, all_gather_with_grad

CHOICES = {
    "mim.target": ("encoding", "pixels", "dvae", "none"),
    "mim.masking": ("text_guided", "random"),
    "itc.negatives": ("queue", "batch"),
}


@dataclass
class Draws:
    """All random numbers of one step, one row a pair, uniform in [0, 1): pin them and the step is deterministic."""

    patches: Tensor  # [B, N] Gumbel noise of the masking
    itm_image: Tensor  # [B] which negative image each text gets
    itm_text: Tensor  # [B] which negative text each image gets
    mlm_select: Tensor  # [B, L] which tokens are masked
    mlm_replace: Tensor  # [B, L] by what: [MASK], a random token, itself
    mlm_token: Tensor  # [B, L] which random token
    plm_split: Tensor  # [B] where the caption is cut

    @classmethod
    def sample(cls, batch: int, patches: int, length: int, device, generator: torch.Generator | None = None):
        """Fresh draws, by default from the device's global generator."""
        shapes = [
            (batch, patches),
            (batch,),
            (batch,),
            (batch, length),
            (batch, length),
            (batch, length),
            (batch,),
        ]
        return cls(*(torch.rand(shape, device=device, generator=generator) for shape in shapes))

    def part(self, rows: slice, length: int):
        """The draws of some rows, cut to `length` tokens."""
        cut = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return Draws(**{name: x[:, :length] if name.startswith("mlm") else x for name, x in cut.items()})


@dataclass
class TeacherView:
    """What the momentum teacher says of view 2."""

    image_feat: Tensor  # [B, E] momentum ITC feature, from the pass without text
    similarity: Tensor | None  # [B, N] S_i: how close each patch is to the caption
    cls_logits: Tensor | None  # [B, K] of [CLS], from the pass without text
    patch_logits: Tensor | None  # [B, N, K] of the patches, from the pass with the text injected


class PretrainModel(nn.Module):
    """Backbone, encoding head, momentum twins, queue and centres; `forward` gives the loss of one micro-batch.

    cfg: the resolved configuration (`itc`, `mlm`, `mim`, `momentum`); tokens: ids of [CLS], [SEP], [MASK] and the
    vocabulary's size, as attributes cls_id, sep_id, mask_id, vocab_size (dataset.text.Tokenizer has them).
    """

    def __init__(self, backbone: SemMIM, cfg, tokens):
        super().__init__()
        check_choices(cfg, backbone)
        self.itc, self.mlm, self.mim, self.momentum = cfg.itc, cfg.mlm, cfg.mim, cfg.momentum
        self.tokens = tokens
        self.backbone = backbone
        encoder = backbone.image_encoder
        self.masked_count = masked_count(encoder.num_patches, cfg.mim.mask_ratio)

        target, head = cfg.mim.target, cfg.mim.head
        self.codebook = CodebookTarget(cfg.mim.codebook) if target == "dvae" else None
        if target == "none":
            self.head = None
            encoder.mask_token.requires_grad_(False)
        elif target == "encoding":
            self.head = EncodingHead(encoder.width, head.hidden, head.patterns, head.normalize)
            self.cls_centre = TeacherCentre(head.patterns, cfg.mim.centre_momentum)
            self.patch_centre = TeacherCentre(head.patterns, cfg.mim.centre_momentum)
        else:
            out = self.codebook.vocab_size if target == "dvae" else 3 * encoder.patch_size**2
            self.head = EncodingHead(encoder.width, head.hidden, out, normalize=False)

        self.queue = FeatureQueue(cfg.itc.queue_size if self.uses_queue else 0, backbone.description["embed_dim"])
        self.teacher = MomentumTwin(self.students())
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # for the queue, until the optimizer has stepped

    @property
    def uses_queue(self) -> bool:
        """Whether ITC compares with momentum features and a queue (ALBEF), or with the batch's own features (CLIP)."""
        return self.itc.negatives == "queue"

    @property
    def second_view(self) -> bool:
        """Whether the step looks at a second augmented view (all MIM targets do)."""
        return self.mim.target != "none"

    def students(self) -> dict[str, nn.Module]:
        """The modules that need a momentum twin under this configuration."""
        backbone, twins = self.backbone, {}
        if self.uses_queue or self.mim.target == "encoding" or self.guided:
            twins |= {"image_encoder": backbone.image_encoder, "vision_proj": backbone.vision_proj}
        if self.uses_queue:
            twins |= {"text_encoder": backbone.text_encoder, "text_proj": backbone.text_proj}
        if self.mim.target == "encoding":
            twins |= {"head": self.head}
        return twins

    @property
    def guided(self) -> bool:
        """Whether the caption chooses the masked patches."""
        return self.second_view and self.mim.masking == "text_guided"

    def forward(
        self, batch: dict, alpha: float, draws: Draws | None = None, itm_groups: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and the values to log.

        batch: image1, image2 [B, 3, S, S], input_ids, attention_mask [B, L], image_id, caption_id [B]
        (dataset.pretrain). alpha: weight of ITC's soft targets now. itm_groups: ITM negatives are drawn within this
        many equal groups of consecutive rows, as they would be on that many ranks.
        """
        net, ids, mask = self.backbone, batch["input_ids"], batch["attention_mask"]
        size = ids.shape[0]
        if draws is None:
            draws = Draws.sample(size, net.image_encoder.num_patches, ids.shape[1], ids.device)
        logs: dict[str, Tensor] = {}

        # 1. Text, all three uses in one pass: the caption, the caption with masked tokens (MLM), its prefix (PLM).
        special = (ids == self.tokens.cls_id) | (ids == self.tokens.sep_id)
        maskable = mask.bool() & ~special  # [B, L]
        random_ids = (draws.mlm_token * self.tokens.vocab_size).long()
        mlm_ids, chosen = mask_tokens(
            ids,
            maskable,
            self.mlm.probability,
            draws.mlm_select,
            draws.mlm_replace,
            random_ids,
            self.tokens.mask_id,
        )
        prefix_mask, decoder_ids, plm_target = split_prefix(
            ids, mask, maskable.sum(1), draws.plm_split, self.tokens.cls_id, self.tokens.sep_id
        )
        all_masks = torch.cat([mask, mask, prefix_mask])  # [3B, L]
        all_embeds = net.text_encoder(torch.cat([ids, mlm_ids, ids]), all_masks)  # [3B, L, D]
        text_embeds, mlm_embeds, prefix_embeds = all_embeds.split(size)
        text_feat = project(net.text_proj, text_embeds[:, 0])  # [B, E]

        # 2. The clean view, which never sees text: the image of ITC, ITM, MLM, PLM and L_cls.
        image_embeds, image_feat = net.encode_image(batch["image1"])  # [B, 1+N, D], [B, E]

        # 3. The momentum teacher on view 2 (on the clean view where there is no second one).
        teacher_text, text_feat_m = self.teach_text(ids, mask, text_embeds, text_feat)
        view = self.teach_image(batch["image2" if self.second_view else "image1"], teacher_text, mask, text_feat_m)

        # 4. and 5. Masked image modeling of view 2, and L_cls between the clean view and the teacher's.
        losses = {}
        if self.second_view:
            losses |= self.mim_losses(batch, image_embeds, text_embeds, view, draws, logs)

        # 6. Image-text contrast.
        losses["itc"] = self.itc_loss(batch, image_feat, text_feat, view, text_feat_m, alpha)

        # 7. One fusion pass for matching, masked and prefix language modelling; the image's keys and values once.
        negative_image, negative_text, valid = self.hard_negatives(
            batch, image_feat, text_feat, view, text_feat_m, draws, itm_groups
        )
        own = torch.arange(size, device=ids.device)
        texts = torch.cat([text_embeds, text_embeds, text_embeds[negative_text], mlm_embeds, prefix_embeds])
        masks = torch.cat([mask, mask, mask[negative_text], mask, prefix_mask])  # [5B, L]
        rows = torch.cat([own, negative_image, own, own, own])  # [5B] which image each text row attends to
        fused = net.fuse(texts, masks, net.fusion_encoder.project_memory(image_embeds), rows)  # [5B, L, D]

        match = (torch.arange(3 * size, device=ids.device) < size).long()  # own pair, then two kinds of negatives
        itm_logits = net.itm_logits(fused[: 3 * size])
        losses["itm"] = global_mean(itm_loss(itm_logits, match, valid), valid.sum())

        mlm_logits = net.mlm_logits(fused[3 * size : 4 * size][chosen])  # [masked tokens, V]
        losses["mlm"] = global_mean(token_loss(mlm_logits, ids[chosen]), chosen.sum())

        # 8. Prefix language modelling: the decoder reads the image and the fused prefix, and writes the suffix.
        memory = torch.cat([image_embeds, fused[4 * size :]], 1)  # [B, 1+N+L, D]
        memory_mask = torch.cat([mask.new_ones(size, image_embeds.shape[1]), prefix_mask], 1)
        memory = net.decoder.project_memory(memory)
        hidden = net.decoder(decoder_ids, memory=memory, memory_mask=memory_mask)  # [B, L, D]
        written = plm_target != IGNORE
        plm_logits = net.decoder.lm_logits(hidden[written])  # [suffix tokens, V]
        losses["plm"] = global_mean(token_loss(plm_logits, plm_target[written]), written.sum())

        with torch.no_grad():
            logs |= {f"loss/{name}": value.detach() for name, value in losses.items()}
            logs["temperature"] = net.temperature().detach()
            logs["itm/accuracy"] = ((itm_logits.argmax(1) == match) & valid).sum() / valid.sum().clamp(min=1)
            logs["itm/rows_left_out"] = (~valid).sum()
        return sum(losses.values()), logs

    # -----------------------------------------------------------------------------------------------------------
    # The parts of a step
    # -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teach_text(self, ids: Tensor, mask: Tensor, text_embeds: Tensor, text_feat: Tensor) -> tuple[Tensor, Tensor]:
        """(w^ [B, L, D], t^ [B, E]) of the text twin; the student's own where there is no queue."""
        if not self.uses_queue:
            return text_embeds.detach(), text_feat.detach()
        embeds = self.teacher.text_encoder(ids, mask)
        return embeds, project(self.teacher.text_proj, embeds[:, 0])

    @torch.no_grad()
    def teach_image(self, images: Tensor, text_embeds: Tensor, mask: Tensor, text_feat: Tensor) -> TeacherView | None:
        """The teacher's two passes over its last layers: without text for [CLS] and S_i, with text for the patches."""
        teacher = self.teacher
        if not hasattr(teacher, "image_encoder"):
            return None
        if self.mim.target == "encoding":
            plain, injected = teacher.image_encoder.forward_twice(images, text_embeds, mask, self.inject_from)
        else:
            plain, injected = teacher.image_encoder(images), None
        similarity = cls_logits = patch_logits = None
        if self.guided:
            similarity = patch_similarity(teacher.vision_proj(plain[:, 1:]), text_feat)
        if injected is not None:
            cls_logits, patch_logits = teacher.head(plain[:, 0]), teacher.head(injected[:, 1:])
        return TeacherView(project(teacher.vision_proj, plain[:, 0]), similarity, cls_logits, patch_logits)

    @property
    def inject_from(self) -> int | None:
        """First layer that sees the text, None for no injection (YAML: `none`)."""
        return None if self.mim.inject_from in (None, "none") else self.mim.inject_from

    def choose_patches(self, view: TeacherView | None, draws: Draws) -> Tensor:
        """Indices [B, M] of the masked patches: text-guided, or random (equal similarities)."""
        similarity = view.similarity if self.guided else torch.zeros_like(draws.patches)
        return sample_patches(similarity, self.masked_count, self.mim.mask_temperature, draws.patches)

    def mim_losses(
        self,
        batch: dict,
        image_embeds: Tensor,
        text_embeds: Tensor,
        view: TeacherView | None,
        draws: Draws,
        logs: dict,
    ) -> dict[str, Tensor]:
        """L_patch at the masked patches of view 2, and L_cls where the target is the teacher's encoding."""
        encoder = self.backbone.image_encoder
        indices = self.choose_patches(view, draws)  # [B, M]
        if self.guided:
            logs["mim/masked_on_relevant_quarter"] = relevant_share(view.similarity, indices)
            logs["mim/masked_on_relevant_quarter_if_random"] = torch.tensor(
                max(1, encoder.num_patches // 4) / encoder.num_patches
            )
        masked_embeds = encoder(
            batch["image2"],
            mask=as_mask(indices, encoder.num_patches),
            text=text_embeds,
            text_mask=batch["attention_mask"],
            inject_from=self.inject_from,
        )  # [B, 1+N, D]
        prediction = self.head(take(masked_embeds[:, 1:], indices))  # [B, M, K]

        if self.mim.target == "pixels":
            target = take(normalised_patch_pixels(batch["image2"], encoder.patch_size), indices)
            return {"patch": (fp32(prediction) - target).square().mean()}
        if self.mim.target == "dvae":
            codes = self.codebook(batch["codebook_image"]).gather(1, indices).flatten()
            return {"patch": token_loss(prediction.flatten(0, 1), codes) / codes.numel()}

        if self.training:
            self.cls_centre.add(view.cls_logits)
            self.patch_centre.add(view.patch_logits)
        temperature = self.mim.teacher_temperature
        cls_probs = teacher_distribution(view.cls_logits, self.cls_centre.value, temperature)  # [B, K]
        patch_probs = teacher_distribution(take(view.patch_logits, indices), self.patch_centre.value, temperature)
        student_cls = self.head(image_embeds[:, 0])  # d1_cls [B, K]
        losses = {
            "cls": distillation_loss(student_cls, cls_probs, self.mim.student_temperature).mean(),
            "patch": distillation_loss(prediction, patch_probs, self.mim.student_temperature).mean(),
        }
        logs |= collapse_monitors("cls", cls_probs, losses["cls"])
        logs |= collapse_monitors("patch", patch_probs, losses["patch"])
        logs["teacher/patterns_in_use"] = patterns_in_use(view.patch_logits, self.patch_centre.value)
        return losses

    def itc_loss(
        self,
        batch: dict,
        image_feat: Tensor,
        text_feat: Tensor,
        view: TeacherView | None,
        text_feat_m: Tensor,
        alpha: float,
    ) -> Tensor:
        """ITC against the momentum features of all ranks and the queue, or against the batch of all ranks."""
        temperature, image_id = self.backbone.temperature(), batch["image_id"]
        all_id = all_gather(image_id)
        if not self.uses_queue:
            images, texts = all_gather_with_grad(image_feat), all_gather_with_grad(text_feat)
            return itc_loss(image_feat, text_feat, images, texts, image_id, all_id, temperature)
        images, texts = all_gather(view.image_feat), all_gather(text_feat_m)
        if self.training:
            self._waiting.append((images, texts, all_id))
        return itc_loss(
            image_feat,
            text_feat,
            torch.cat([images, self.queue.image_feat]),
            torch.cat([texts, self.queue.text_feat]),
            image_id,
            torch.cat([all_id, self.queue.image_id]),
            temperature,
            alpha,
            view.image_feat,
            text_feat_m,
        )

    def hard_negatives(
        self,
        batch: dict,
        image_feat: Tensor,
        text_feat: Tensor,
        view,
        text_feat_m: Tensor,
        draws: Draws,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(negative image of each text [B], negative text of each image [B], valid [3B]) for ITM.

        A negative never shares the image or the caption with the pair it replaces.
        """
        size = image_feat.shape[0]
        image_id, caption_id = batch["image_id"], batch["caption_id"]
        group = torch.arange(size, device=image_id.device) * groups // size
        legal = (image_id[:, None] != image_id) & (caption_id[:, None] != caption_id) & (group[:, None] == group)
        image_feat_m = view.image_feat if self.uses_queue else image_feat
        with torch.no_grad(), torch.autocast(image_feat.device.type, enabled=False):
            temperature = self.backbone.temperature()
            t2i = text_feat @ image_feat_m.T / temperature  # [B, B]
            i2t = image_feat @ text_feat_m.T / temperature
        negative_image, valid_image = sample_hard_negatives(t2i, legal, draws.itm_image)
        negative_text, valid_text = sample_hard_negatives(i2t, legal, draws.itm_text)
        return (
            negative_image,
            negative_text,
            torch.cat([torch.ones_like(valid_image), valid_image, valid_text]),
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer step: clamp the temperature, move the twins (Eq. 1), fill the queue, move the centres."""
        self.backbone.clamp_temperature()
        self.teacher.update(self.students(), self.momentum)
        for features in self._waiting:
            self.queue.enqueue(*features)
        self._waiting.clear()
        if self.mim.target == "encoding":
            self.cls_centre.update()
            self.patch_centre.update()

    @torch.no_grad()
    def inspect(self, batch: dict) -> dict[str, Tensor | None]:
        """What a picture of the masking shows: mask [B, N], similarity [B, N], pattern of each patch [B, N]."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        draws = Draws.sample(ids.shape[0], self.backbone.image_encoder.num_patches, ids.shape[1], ids.device)
        text_embeds, text_feat = self.backbone.encode_text(ids, mask)
        teacher_text, text_feat_m = self.teach_text(ids, mask, text_embeds, text_feat)
        view = self.teach_image(batch["image2"], teacher_text, mask, text_feat_m)
        patterns = None
        if self.mim.target == "encoding":
            patterns = (fp32(view.patch_logits) - self.patch_centre.value).argmax(-1)
        return {
            "mask": as_mask(self.choose_patches(view, draws), self.backbone.image_encoder.num_patches),
            "similarity": view.similarity if self.guided else None,
            "patterns": patterns,
        }


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows of a sequence: [B, N, D], [B, M] -> [B, M, D]"""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def check_choices(cfg, backbone: SemMIM) -> None:
    """Raise UserError for a switch that has no meaning, naming its key."""
    for key, known in CHOICES.items():
        section, name = key.split(".")
        if cfg[section][name] not in known:
            raise UserError(f"{key}: {cfg[section][name]!r} is none of {', '.join(known)}")
    depth, first = backbone.image_encoder.depth, cfg.mim.inject_from
    if first not in (None, "none") and not (isinstance(first, int) and 1 <= first <= depth):
        raise UserError(f"mim.inject_from: {first!r} is neither none nor a layer of the image encoder (1..{depth})")
    if not 0 < cfg.mim.mask_ratio <= 1:
        raise UserError(f"mim.mask_ratio: {cfg.mim.mask_ratio} is not in (0, 1]")


def build_pretrain_model(cfg, tokens) -> tuple[PretrainModel, list[str]]:
    """The model of a pre-training config with its initial weights, and log lines that say where they came from."""
    if cfg.train.batch_size < 2:
        raise UserError(
            f"train.batch_size: {cfg.train.batch_size} image on a rank leaves image-text matching no negative; "
            "use 2 or more"
        )
    backbone, lines = build_backbone(cfg)
    return PretrainModel(backbone, cfg, tokens), lines
