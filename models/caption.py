"""Captioning: the backbone with its decoder, cross-entropy, and self-critical optimization of a reward.

The decoder's memory is that of pre-training's prefix language modeling, [image tokens ; fused prompt], so a pre-trained
checkpoint captions without fine-tuning; an empty prompt is [CLS] alone.

Self-critical training (Rennie et al. 2017; the paper, Section 4.3): sentences of the model's own are rewarded, here by
CIDEr-D, and their log-probability is raised if they beat a baseline.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import SpecialTokens
from models.generation import Generation, generate, written_tokens
from models.losses import global_count, token_mean
from models.semmim import SemMIM
from models.tensors import sum_written
from utils import IGNORE, UserError

BASELINES = ("mean", "greedy")


class CaptionModel(nn.Module):
    """A backbone with its decoder; `forward` gives the loss of an objective, `generate` writes captions."""

    def __init__(self, backbone: SemMIM, tokens: SpecialTokens):
        super().__init__()
        self.backbone, self.tokens = backbone, tokens
        backbone.freeze_alignment()

    @torch.no_grad()
    def generate(
        self, images: Tensor, prompt_ids: Tensor, prompt_mask: Tensor | None, options: Generation
    ) -> tuple[Tensor, Tensor]:
        """Captions as token ids [B * num_return, T] and their scores, see `generation.generate`."""
        image_embeds = self.backbone.image_encoder(images)
        memory, memory_mask = self.backbone.encode_memory(image_embeds, prompt_ids, prompt_mask)
        return generate(self.backbone.decoder, memory, memory_mask, self.tokens, options)

    def forward(self, batch: dict, objective: Callable) -> tuple[Tensor, dict]:
        """Loss of a micro-batch and the values to log; objective: a CrossEntropy or a SelfCritical.

        batch: image [B, 3, S, S]; prompt_ids, prompt_mask [B, P] (None: no padding); input_ids, target [B, T];
        references (`dataset.caption.CaptionCollate`).
        """
        image_embeds = self.backbone.image_encoder(batch["image"])
        memory, memory_mask = self.backbone.encode_memory(image_embeds, batch["prompt_ids"], batch["prompt_mask"])
        return objective(self, batch, memory, memory_mask)


def count_tokens(batch: dict) -> Tensor:
    """How many tokens the captions of a batch have, to weigh an optimizer step's micro-batches by."""
    return (batch["target"] != IGNORE).sum()


class CrossEntropy:
    """Mean over the tokens of all ranks and of all micro-batches of the optimizer step.

    label_smoothing: the share of probability spread over all tokens. batch["share"]: if there are several
    micro-batches, `count_tokens` of this one over the mean of the step's.
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(
        self, model: CaptionModel, batch: dict, memory: Tensor, memory_mask: Tensor | None
    ) -> tuple[Tensor, dict]:
        decoder, written = model.backbone.decoder, batch["target"] != IGNORE  # [B, T]
        target = batch["target"][written]  # [N]
        projected = decoder.project_memory(memory)
        logits = decoder.written_logits(batch["input_ids"], written, projected, memory_mask)  # [N, V]
        everywhere = global_count(target.new_full((), len(target)))
        loss = token_mean(logits, target, everywhere, self.label_smoothing)
        accuracy = (logits.argmax(-1) == target).float().mean()
        return loss * batch["share"] if "share" in batch else loss, {"token_accuracy": accuracy}


class SelfCritical:
    """Self-critical training with any reward of sentences.

    reward: (token ids [R, T] padded after [SEP], references of B images) -> [R] rewards on the CPU, the R / B sentences
        of an image side by side.
    mode: "sample" draws `samples` sentences per image, "beam" takes the best of as many beams.
    baseline: "mean" of the image's other sentences (as self-critical.pytorch), or the reward of its "greedy" sentence.
    log_prob: of a sentence, the "sum" over its tokens, whose gradient is the expected reward's (Rennie et al. 2017), or
        their "mean" (as OSCAR), which weighs a token of a long sentence less.
    min_tokens, max_tokens: as in `generation.Generation`.
    """

    def __init__(
        self,
        reward: Callable[[Tensor, Sequence], Tensor],
        *,
        mode: str = "beam",
        samples: int = 5,
        baseline: str = "mean",
        log_prob: str = "sum",
        min_tokens: int = 1,
        max_tokens: int = 25,
    ):
        if baseline not in BASELINES:
            raise UserError(f"scst.baseline: {baseline!r} is none of {', '.join(BASELINES)}")
        if baseline == "mean" and samples < 2:
            raise UserError("scst.samples: the mean of an image's other sentences needs 2 or more")
        lengths = {"min_tokens": min_tokens, "max_tokens": max_tokens}
        self.options = Generation(mode, beams=samples, num_return=samples, **lengths)
        self.greedy = Generation("greedy", **lengths) if baseline == "greedy" else None
        self.reward, self.log_prob = reward, log_prob

    def __call__(
        self, model: CaptionModel, batch: dict, memory: Tensor, memory_mask: Tensor | None
    ) -> tuple[Tensor, dict]:
        given, greedy = (model.backbone.decoder, memory.detach(), memory_mask, model.tokens), None
        with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for every length
            sequences, _ = generate(*given, self.options)  # [B * n, T]
            if self.greedy is not None:
                greedy, _ = generate(*given, self.greedy)  # [B, T']
        # Autocast keeps weights that it cast while no gradient was recorded; the loss needs casts of its own.
        torch.clear_autocast_cache()
        start = time.perf_counter()
        rewards, baseline = self.rewards(sequences, greedy, batch["references"])
        spent = time.perf_counter() - start
        rewards, baseline = rewards.to(memory.device), baseline.to(memory.device)  # [B, n] each

        decoder, sep_id = model.backbone.decoder, model.tokens.sep_id
        inputs = torch.cat([sequences.new_full((len(sequences), 1), model.tokens.cls_id), sequences[:, :-1]], 1)
        written = written_tokens(sequences, sep_id)  # [B * n, T]
        logits = decoder.written_logits(inputs, written, decoder.project_memory(memory), memory_mask)  # [N, V]
        log_probs = sentence_log_probs(logits, sequences, written, sep_id, self.options.min_tokens)
        if self.log_prob == "mean":
            log_probs = log_probs / written.sum(1)
        loss = self_critical_loss(log_probs.view_as(rewards), rewards, baseline)
        spread = rewards.std(dim=1, unbiased=False).mean()
        values = {"reward": rewards.mean(), "reward_spread": spread, "tokens": written.sum(1).float().mean()}
        return loss, {**values, "time/reward_seconds": spent}

    def rewards(self, sequences: Tensor, greedy: Tensor | None, references: Sequence) -> tuple[Tensor, Tensor]:
        """(rewards, baseline), [B, n] float32 each"""
        rewards = self.reward(sequences, references).float().view(len(references), self.options.num_return)
        if greedy is not None:
            baseline = self.reward(greedy, references).float()[:, None].expand_as(rewards)
        else:
            baseline = mean_of_others(rewards)
        return rewards, baseline


def mean_of_others(rewards: Tensor) -> Tensor:
    """[B, n] -> [B, n], the mean of the n - 1 other entries of the row"""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def self_critical_loss(log_probs: Tensor, rewards: Tensor, baseline: Tensor) -> Tensor:
    """- mean over sentences of (reward - baseline) * log p(sentence). All [B, n], the last two without gradient."""
    return -((rewards - baseline) * log_probs).mean()


def sentence_log_probs(logits: Tensor, sequences: Tensor, written: Tensor, sep_id: int, min_tokens: int = 0) -> Tensor:
    """Log-probability of whole sentences under the policy that drew them, [SEP] included.

    logits: [N, V] float32 at the N True entries of written [R, T]; sequences: [R, T]; min_tokens: the tokens before
    which [SEP] could not be drawn, so that its probability belongs to the others. -> [R]
    """
    token = sequences[written]  # [N]
    log_p = -F.cross_entropy(logits, token, reduction="none")
    early = written.nonzero()[:, 1] < min_tokens  # [N]
    normalizer = logits.gather(1, token[:, None])[:, 0] - log_p
    sep = (logits[:, sep_id] - normalizer).clamp(max=-1e-6).exp()  # its probability
    log_p = log_p - torch.where(early, torch.log1p(-sep), 0.0)
    return sum_written(log_p, written)
