"""SemMIM's pre-training: one step of all six losses (the paper, Section 3), read from top to bottom in `forward`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.alignment import (
    Features,
    check_itm,
    contrast,
    hard_negatives,
    interleave,
    match,
    negative_temperature,
)
from models.losses import (
    IGNORE,
    distillation_loss,
    fp32,
    global_mean,
    mask_tokens,
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
from models.semmim import PREFIX, SemMIM, build_backbone, load_weights, project
from models.vit import resize_positions
from utils import UserError, check_choices, lookup

CHOICES = {
    "mim.target": ("encoding", "pixels", "dvae", "none"),
    "mim.masking": ("text_guided", "random"),
    "itc.negatives": ("queue", "batch"),
}
TINY, HUGE = 1e-6, 10**9
RANGES = {  # key: (type, lowest, highest)
    "text.max_tokens": (int, 3, 512),
    "itc.temperature": ((int, float), 0.001, 0.5),
    "itc.queue_size": (int, 0, HUGE),
    "itc.alpha": ((int, float), 0, 1),
    "mlm.probability": ((int, float), 0, 1),
    "mim.mask_ratio": ((int, float), TINY, 1),
    "mim.mask_temperature": ((int, float), TINY, HUGE),
    "mim.student_temperature": ((int, float), TINY, HUGE),
    "mim.teacher_temperature": ((int, float), TINY, HUGE),
    "mim.centre_momentum": ((int, float), 0, 1),
    "momentum": ((int, float), 0, 1),
    "train.epochs": (int, 1, HUGE),
    "train.batch_size": (int, 1, HUGE),
    "train.accumulation": (int, 1, HUGE),
    "train.log_every": (int, 1, HUGE),
    "train.checkpoint_every": (int, 0, HUGE),
    "train.warmup_steps": (int, 0, HUGE),
}


@dataclass
class Draws:
    """All random numbers of one step, one row a pair, uniform in [0, 1): pin them and the step is deterministic."""

    patches: Tensor  # [B, N] for the Gumbel noise of the masking
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
        if tokens.vocab_size != backbone.description["bert"]["vocab_size"]:
            raise UserError(
                f"text.vocab: {tokens.vocab_size} word pieces, but the text model has embeddings for "
                f"{backbone.description['bert']['vocab_size']}; set model.bert.args.vocab_size"
            )
        self.itc, self.itm, self.mlm, self.mim, self.momentum = cfg.itc, cfg.itm, cfg.mlm, cfg.mim, cfg.momentum
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
        self, batch: dict, alpha: float, draws: Draws | None = None, itm_groups: int = 1, done: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and the values to log.

        batch: image1, image2 [B, 3, S, S], input_ids, attention_mask [B, L], image_id, caption_id [B]
        (dataset.pretrain). alpha: weight of ITC's soft targets now. itm_groups: ITM negatives are drawn within this
        many equal groups of consecutive rows, as they would be on that many ranks. done: share of the training that
        is over, see `negative_temperature`.
        """
        net, ids, mask = self.backbone, batch["input_ids"], batch["attention_mask"]
        size = ids.shape[0]
        if draws is None:
            draws = Draws.sample(size, net.image_encoder.num_patches, ids.shape[1], ids.device)
        logs: dict[str, Tensor] = {}

        # Text, all three uses in one pass: the caption, the caption with masked tokens (MLM), its prefix (PLM).
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

        # The clean view, which never sees text: the image of ITC, ITM, MLM, PLM and L_cls.
        image_embeds, image_feat = net.encode_image(batch["image1"])  # [B, 1+N, D], [B, E]

        # The momentum teacher on view 2 (on the clean view where there is no second one).
        teacher_text, text_feat_m = self.teach_text(ids, mask, text_embeds, text_feat)
        view = self.teach_image(batch["image2" if self.second_view else "image1"], teacher_text, mask, text_feat_m)

        # Masked image modeling of view 2, and L_cls between the clean view and the teacher's.
        losses = {}
        if self.second_view:
            losses |= self.mim_losses(batch, image_embeds, text_embeds, view, draws, logs)

        # Image-text contrast.
        image_feat_m = view.image_feat if self.uses_queue else image_feat.detach()
        features = Features(image_feat, text_feat, image_feat_m, text_feat_m, batch["image_id"], batch["caption_id"])
        queue = self.queue if self.uses_queue else None
        losses["itc"] = contrast(features, net.temperature(), queue, alpha, remember=self.training)

        # Matching. All fusion rows of the step share the keys and values of their B images, which are projected once.
        image_memory = net.fusion_encoder.project_memory(image_embeds)
        temperature = negative_temperature(self.itm, net.temperature(), done)
        negatives = hard_negatives(features, temperature, draws.itm_image, draws.itm_text, itm_groups)
        losses["itm"], logs["itm/accuracy"] = match(net, text_embeds, mask, image_memory, negatives)

        # Masked language modelling, and the fused prefix for the decoder, in one pass.
        fused = net.fuse(interleave(mlm_embeds, prefix_embeds), interleave(mask, prefix_mask), image_memory)
        fused_mlm, fused_prefix = fused[0::2], fused[1::2]  # [B, L, D]
        masked_at = chosen.flatten().nonzero()[:, 0]  # the number of rows is needed here: the GPU is waited for
        mlm_logits = net.mlm_logits(fused_mlm.flatten(0, 1)[masked_at])  # [masked tokens, V]
        losses["mlm"] = global_mean(token_loss(mlm_logits, ids.flatten()[masked_at]), chosen.sum())

        # Prefix language modelling: the decoder reads the image and the fused prefix, and writes the suffix.
        memory = torch.cat([image_embeds, fused_prefix], 1)  # [B, 1+N+L, D]
        memory_mask = torch.cat([mask.new_ones(size, image_embeds.shape[1]), prefix_mask], 1)
        memory = net.decoder.project_memory(memory)
        hidden = net.decoder(decoder_ids, memory=memory, memory_mask=memory_mask)  # [B, L, D]
        written = (plm_target != IGNORE).flatten()
        written_at = written.nonzero()[:, 0]
        plm_logits = net.decoder.lm_logits(hidden.flatten(0, 1)[written_at])  # [suffix tokens, V]
        losses["plm"] = global_mean(token_loss(plm_logits, plm_target.flatten()[written_at]), written.sum())

        with torch.no_grad():
            logs |= {f"loss/{name}": value.detach() for name, value in losses.items()}
            logs["temperature"] = net.temperature().detach()
            logs["itm/temperature"] = temperature
            logs["itm/rows_left_out"] = (~negatives[2]).sum()
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
        """First layer that sees the text, None for no injection."""
        return self.mim.inject_from

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
            by_chance = max(1, encoder.num_patches // 4) / encoder.num_patches
            logs["mim/masked_on_relevant_quarter_if_random"] = draws.patches.new_full((), by_chance)
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

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer step: clamp the temperature, move the twins (Eq. 1), fill the queue, move the centres."""
        self.backbone.clamp_temperature()
        self.teacher.update(self.students(), self.momentum)
        self.queue.flush()
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


def check_values(cfg) -> None:
    """Raise UserError for a switch or number that has no meaning, naming its key."""
    check_choices(cfg, CHOICES)
    for key, (kind, low, high) in RANGES.items():
        value = lookup(cfg, key)
        if not (isinstance(value, kind) and low <= value <= high):
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{key}: {value!r} is not {what} from {low} to {high}")
    check_itm(cfg.itm)
    if cfg.train.batch_size < 2:
        raise UserError(
            f"train.batch_size: {cfg.train.batch_size} image on a rank leaves image-text matching no negative; "
            "use 2 or more"
        )


def build_pretrain_model(cfg, tokens, initial_weights: bool = True) -> tuple[PretrainModel, list[str]]:
    """The model of a pre-training config with its initial weights, and log lines that say where they came from.

    initial_weights: False where a checkpoint will replace them (see `build_backbone`).
    """
    check_values(cfg)
    backbone, lines = build_backbone(cfg, initial_weights=initial_weights)
    depth, first = backbone.image_encoder.depth, cfg.mim.inject_from
    if first is not None and not (isinstance(first, int) and 1 <= first <= depth):
        raise UserError(f"mim.inject_from: {first!r} is neither none nor a layer of the image encoder (1..{depth})")
    return PretrainModel(backbone, cfg, tokens), lines


def start_from(model: PretrainModel, state: dict[str, Tensor], path) -> list[str]:
    """Begin a new run with the weights of an earlier one; returns log lines.

    Takes the backbone (positions resized where the resolution differs), and head and centres where they fit. The queue
    starts empty, since its image ids belong to the other run's data, and the twins start as copies of the students.
    """
    backbone = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    load_weights(model.backbone, resize_positions(backbone, "image_encoder.", model.backbone.image_encoder), path)
    own, taken = model.state_dict(), ["backbone"]
    for part in ("head", "cls_centre", "patch_centre"):
        shapes = {key: value.shape for key, value in own.items() if key.startswith(part + ".")}
        if shapes and all(key in state and state[key].shape == shape for key, shape in shapes.items()):
            model.load_state_dict({key: state[key] for key in shapes}, strict=False)
            taken.append(part)
    model.teacher.update(model.students(), momentum=0.0)
    return [f"{path}: starting from its {', '.join(taken)}; queue empty, twins copied from the students"]
