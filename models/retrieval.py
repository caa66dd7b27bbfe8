"""Image-text retrieval fine-tuning (the paper, Section 4.3 and Table 1): ITC and ITM on pairs, as ALBEF does."""

import torch
from torch import Tensor, nn

from models.alignment import Features, contrast, hard_negatives, match, matching_rows, negative_temperature
from models.losses import global_count
from models.momentum import FeatureQueue, MomentumTeacher
from models.semmim import SemMIM, project
from models.tensors import text_mask
from utils import Config


class RetrievalModel(nn.Module):
    """A backbone without decoder, with a momentum teacher and a queue; `forward` gives the loss of one micro-batch.

    cfg: the configuration's `itc`, `itm` and `momentum`. `evaluation.ranking` evaluates the backbone.
    """

    def __init__(self, backbone: SemMIM, cfg: Config):
        super().__init__()
        self.backbone, self.itm, self.momentum = backbone, cfg.itm, cfg.momentum
        backbone.image_encoder.mask_token.requires_grad_(False)  # nothing is masked here
        self.queue = self.teacher = None
        if cfg.itc.negatives == "queue":
            self.queue = FeatureQueue(cfg.itc.queue_size, backbone.description["embed_dim"])
            self.teacher = MomentumTeacher(self.students())

    def students(self) -> dict[str, nn.Module]:
        """The modules that the momentum teacher copies."""
        names = ("image_encoder", "vision_proj", "text_encoder", "text_proj")
        return {name: getattr(self.backbone, name) for name in names}

    def forward(
        self, batch: dict, alpha: float, draws: Tensor | None = None, done: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and the values to log.

        batch: image [B, 3, S, S], input_ids, attention_mask [B, L], image_id, caption_id [B] (PretrainCollate).
        alpha: weight of ITC's soft targets now; draws: [2, B] uniform, for the negative images and texts; done: share
        of the training that is over, see `negative_temperature`.
        """
        net, ids, mask = self.backbone, batch["input_ids"], text_mask(batch)
        if draws is None:
            draws = torch.rand(2, ids.shape[0], device=ids.device)
        text_embeds, text_feat = net.encode_text(ids, mask)  # [B, L, D], [B, E]
        image_embeds, image_feat = net.encode_image(batch["image"])  # [B, S, D], [B, E]
        image_feat_m, text_feat_m = self.teach(batch, image_feat, text_feat)
        features = Features(image_feat, text_feat, image_feat_m, text_feat_m, batch["image_id"], batch["caption_id"])
        itc = contrast(features, net.temperature(), self.queue, alpha, remember=self.training)
        temperature = negative_temperature(self.itm, net.temperature(), done)
        negatives = hard_negatives(features, temperature, *draws)
        image_memory = net.fusion_encoder.project_memory(image_embeds)
        rows = global_count(matching_rows(batch["image_id"], batch["caption_id"]))
        itm, accuracy = match(net, text_embeds, mask, image_memory, negatives, rows)
        logs = {"loss/itc": itc.detach(), "loss/itm": itm.detach(), "itm/accuracy": accuracy}
        logs |= {"temperature": net.temperature().detach(), "itm/temperature": temperature}
        logs["itm/rows_left_out"] = (~negatives.valid).sum()
        return itc + itm, logs

    @torch.no_grad()
    def teach(self, batch: dict, image_feat: Tensor, text_feat: Tensor) -> tuple[Tensor, Tensor]:
        """(image, text) features [B, E] of the teacher; the student's own if there is no queue."""
        if self.teacher is None:
            return image_feat.detach(), text_feat.detach()
        teacher = self.teacher
        text_embeds = teacher.text_encoder(batch["input_ids"], text_mask(batch))
        image_embeds = teacher.image_encoder(batch["image"])
        return project(teacher.vision_proj, image_embeds[:, 0]), project(teacher.text_proj, text_embeds[:, 0])

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer step: clamp the temperature, move the teacher, fill the queue."""
        self.backbone.clamp_temperature()
        if self.teacher is not None:
            self.teacher.update(self.students(), self.momentum)
            self.queue.flush()
