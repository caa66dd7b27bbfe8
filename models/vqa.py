"""Visual question answering as open-ended generation (the paper, Section 4.3 and Table 3).

The text encoder reads [question ; OCR tokens ; object labels], the fusion encoder adds the image, and the decoder
writes the answer, attending to [image tokens ; fused question] as it does in pre-training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import Memory, SpecialTokens, TextDecoder
from models.generation import Generation, generate
from models.semmim import SemMIM
from models.tensors import fp32, sum_written

ROWS_AT_ONCE = 1024  # answers of one decoder pass in ranking: their scores over the whole vocabulary are large


class VQAModel(nn.Module):
    """A backbone with its decoder; `forward` gives the loss, `answer` writes answers, `rank` chooses from a list."""

    def __init__(self, backbone: SemMIM, tokens: SpecialTokens):
        super().__init__()
        self.backbone, self.tokens = backbone, tokens
        backbone.freeze_alignment()

    def remember(self, batch: dict) -> tuple[Tensor, Tensor | None]:
        """What the decoder attends to: (memory [B, S+L, D], memory_mask [B, S+L], None if nothing is padded).

        batch: image [U, 3, S, S] or, encoded already, image_embeds [U, 1+N, D]; input_ids, attention_mask [B, L]; and
        image_rows [B], the image of each question, if U is not B.
        """
        image_embeds, rows = batch.get("image_embeds"), batch.get("image_rows")
        if image_embeds is None:
            image_embeds = self.backbone.image_encoder(batch["image"])
        return self.backbone.encode_memory(image_embeds, batch["input_ids"], batch["attention_mask"], rows)

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the questions of their answers' weighted negative log-likelihoods (ALBEF), and values to log.

        batch: as for `remember`, and of all A answers answer_ids, answer_target, answer_mask [A, T], answer_rows [A],
        answer_weights [A] (dataset.vqa.VQACollate).
        """
        memory, memory_mask = self.remember(batch)
        answers = (batch[f"answer_{name}"] for name in ("ids", "target", "mask", "rows"))
        decoder = self.backbone.decoder
        log_probs = answer_log_probs(decoder, decoder.project_memory(memory), memory_mask, *answers)
        loss = answer_loss(log_probs, batch["answer_weights"], len(memory))
        with torch.no_grad():
            tokens = batch["answer_mask"].sum()
            answers_a_question = tokens.new_tensor(len(log_probs)) / len(memory)
        return loss, {"nll_token": -log_probs.detach().sum() / tokens, "answers_a_question": answers_a_question}

    @torch.no_grad()
    def answer(self, batch: dict, options: Generation) -> Tensor:
        """Unconstrained answers: token ids [B, T], padded after [SEP]."""
        return generate(self.backbone.decoder, *self.remember(batch), self.tokens, options)[0]

    @torch.no_grad()
    def rank(self, batch: dict, ids: Tensor, target: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The most probable answer of a closed list, in two stages as ALBEF does.

        The k answers whose first token is most probable are scored whole (log-probability of all their tokens, [SEP]
        included); k of the list's length or more scores every answer. Equal ones: the first in the list. ALBEF adds the
        first token's log-probability once more, which favors answers that begin with a common word.

        ids, target, mask: [A, T], the list by dataset.vqa.encode_answers. -> (places in the list [B], scores [B]).
        """
        decoder, (memory, memory_mask) = self.backbone.decoder, self.remember(batch)
        memory, size = decoder.project_memory(memory), len(memory)
        start = ids[:1, :1].expand(size, 1)
        first = fp32(decoder.lm_logits(decoder(start, memory=memory, memory_mask=memory_mask)[:, 0])).log_softmax(-1)
        order = first[:, target[:, 0]].sort(dim=1, descending=True, stable=True).indices
        candidates = order[:, :k].sort(dim=1).values  # [B, k], in the list's order, so that argmax takes the first
        scores = []
        for part in candidates.split(max(1, ROWS_AT_ONCE // size), dim=1):  # the answers of a question are neighbors
            chosen = part.flatten()
            log_probs = answer_log_probs(decoder, memory, memory_mask, ids[chosen], target[chosen], mask[chosen])
            scores.append(log_probs.view(size, -1))
        best = torch.cat(scores, 1).max(dim=1)
        return candidates.gather(1, best.indices[:, None])[:, 0], best.values


def answer_log_probs(
    decoder: TextDecoder,
    memory: Memory,
    memory_mask: Tensor | None,
    ids: Tensor,
    target: Tensor,
    mask: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """log p(answer) [A] in fp32: the sum over the tokens where mask is 1.

    memory: `decoder.project_memory` of B questions; ids, target, mask: [A, T]; rows: [A] the question of each answer,
    None: those of a question are neighbors, equally many each.
    """
    written = mask.bool()
    logits = decoder.written_logits(ids, written, memory, memory_mask, rows)  # [tokens, V]
    return sum_written(-F.cross_entropy(logits, target[written], reduction="none"), written)


def answer_loss(log_probs: Tensor, weights: Tensor, questions: int) -> Tensor:
    """-sum of weight * log p(answer) over all answers [A], divided by the number of questions (ALBEF)."""
    return -(fp32(weights) * fp32(log_probs)).sum() / questions
