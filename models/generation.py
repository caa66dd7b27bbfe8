"""Sentences from the text decoder: greedy, beam search, and top-k or nucleus sampling.

One call decodes a batch of images together. The memory's cross-attention keys and values are projected once per image;
the beams or samples of an image are consecutive rows that attend to them together, so nothing is copied per row. Images
whose sentences are finished leave the batch and cost no more work.

Lengths count generated tokens, the final [SEP] included and the start token not (transformers' `max_new_tokens`). Beam
search finds what transformers' `generate` finds with `early_stopping=False`: the same candidates, length penalty and
stopping rule.

Shapes: A images at work, g rows (beams or samples) of each, R = A * g rows, t tokens so far, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bert import KVCache, SpecialTokens, TextDecoder
from models.tensors import take
from models.weights import check_value
from utils import Config, UserError, shown

MODES = ("beam", "greedy", "sample")
UNLIKELY = -1e30  # below every score; finite, so that sums stay numbers
SHRINK_AT = 7 / 8  # finished images leave the batch together, as soon as at most this share of it is still at work


@dataclass(frozen=True)
class Generation:
    """How sentences are written; a value out of its range is a UserError.

    mode: "beam" (the `num_return` best of `beams`), "greedy", or "sample" (`num_return` draws per image).
    min_tokens: before so many tokens are written [SEP] is not allowed; max_tokens: the most of them, [SEP] included.
    length_penalty: p in score = log-probability / length^p; a greater p prefers longer sentences.
    top_k, top_p, temperature: of sampling, see `filter_logits`.
    """

    mode: str = "beam"
    beams: int = 5
    min_tokens: int = 1
    max_tokens: int = 25
    length_penalty: float = 1.0
    num_return: int = 1
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode of generation: {shown(self.mode)} is none of {', '.join(MODES)}")
        for name, kind, low, high in (
            ("beams", int, 1, 1000),
            ("min_tokens", int, 0, 512),
            ("max_tokens", int, 1, 512),
            ("length_penalty", float, -8, 8),  # beyond it scores of 512 tokens fall below UNLIKELY
            ("num_return", int, 1, 100_000),
            ("top_k", int, 0, 10**9),
            ("top_p", float, 1e-9, 1),
            ("temperature", float, 1e-6, 1e30),  # logits divided by much less are infinite
        ):
            check_value(name, getattr(self, name), kind, low, high)
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; lower it")
        most = {"beam": self.beams, "greedy": 1, "sample": self.num_return}[self.mode]
        if self.num_return > most:
            raise UserError(f"num_return {self.num_return}: mode {self.mode} gives at most {most} sentences an image")


def answer_options(settings: Config) -> Generation:
    """How a configuration's `answer` says that answers are written; UserError if a value is out of its range."""
    return Generation(**{key: settings[key] for key in ("beams", "min_tokens", "max_tokens", "length_penalty")})


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    memory: Tensor,
    memory_mask: Tensor | None,
    tokens: SpecialTokens,
    options: Generation,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sentences for B images; the decoder runs in eval mode and is put back.

    memory: [B, S, D], what the decoder attends to; memory_mask: [B, S], 1 = attend, None: everything; tokens: cls_id is
    the start token, sep_id ends a sentence, pad_id follows it; generator: the randomness of sampling, on the memory's
    device, None: the global one.
    -> (sequences [B * num_return, T] int64 without the start token, padded after [SEP], T the longest, the sentences of
    an image side by side, best first in beam search; scores [B * num_return] float32, by the model's own distribution
    whatever the sampling options). Raises UserError if a score is not finite.
    """
    training = decoder.training
    decoder.eval()
    try:
        rows = Rows(decoder, memory, memory_mask, tokens.cls_id)
        if options.mode == "beam":
            sequences, scores = beam_search(rows, tokens, options)
        else:
            sequences, scores = write_rows(rows, tokens, options, generator)
    finally:
        decoder.train(training)
    if not scores.isfinite().all():
        raise UserError("what is written has no finite probability: training has diverged, or the weights are damaged")
    return sequences, scores


class Rows:
    """The sentences at work: `tokens` [R, t] with the start token, their keys and values, and the images' memory."""

    def __init__(self, decoder: TextDecoder, memory: Tensor, memory_mask: Tensor | None, start_id: int):
        self.decoder = decoder
        self.memory, self.memory_mask = decoder.project_memory(memory), memory_mask
        self.cache = KVCache()
        self.tokens = torch.full((memory.shape[0], 1), start_id, dtype=torch.int64, device=memory.device)

    def log_probs(self) -> Tensor:
        """Log-probabilities of the next token, [R, V] float32."""
        new = self.tokens[:, self.cache.length :]
        hidden = self.decoder(new, memory=self.memory, memory_mask=self.memory_mask, cache=self.cache)
        return self.decoder.lm_logits(hidden[:, -1]).float().log_softmax(-1)

    def append(self, token: Tensor) -> None:
        """token: [R]"""
        self.tokens = torch.cat([self.tokens, token[:, None]], 1)

    def take(self, rows: Tensor) -> None:
        """Keep the given rows [R'], in that order; the images stay."""
        self.tokens = self.tokens[rows]
        self.cache.reorder(rows)

    def take_images(self, images: Tensor) -> None:
        """Keep the memory of the given images [A'] only; the caller takes their rows."""
        self.memory = [(k[images], v[images]) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[images]


# ------------------------------------------------------------------------------------------------ greedy and sampling


def write_rows(
    rows: Rows, tokens: SpecialTokens, options: Generation, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """`num_return` independent sentences per image, greedy or drawn."""
    device, copies, max_tokens = rows.tokens.device, options.num_return, options.max_tokens
    total = len(rows.tokens) * copies
    sequences = torch.full((total, max_tokens), tokens.pad_id, dtype=torch.int64, device=device)
    sums, lengths = torch.zeros(total, device=device), torch.zeros(total, device=device)
    owner = torch.arange(total, device=device)  # [R] the place of each row in the result
    alive = torch.ones(total, dtype=torch.bool, device=device)  # [R]
    for step in range(1, max_tokens + 1):
        log_probs = rows.log_probs()  # [R, V]
        if step == 1 and copies > 1:  # the start is the same for all copies
            repeated = torch.arange(len(log_probs), device=device).repeat_interleave(copies)
            rows.take(repeated)
            log_probs = log_probs[repeated]
        if step <= options.min_tokens:
            log_probs[:, tokens.sep_id] = -torch.inf
        if options.mode == "greedy":
            token = log_probs.argmax(-1)  # [R]
        else:
            token = draw(filter_logits(log_probs, options.top_k, options.top_p, options.temperature), generator)
        sums[owner] += log_probs.gather(1, token[:, None])[:, 0].masked_fill(~alive, 0.0)
        lengths[owner] += alive
        sequences[owner, step - 1] = token.masked_fill(~alive, tokens.pad_id)
        alive = alive & (token != tokens.sep_id)
        if step == max_tokens or not alive.any():
            break
        rows.append(token)
        images = rows.memory[0][0].shape[0]
        kept = unfinished_rows(alive.view(images, -1))
        if kept is not None:
            images, index = kept
            rows.take_images(images)
            rows.take(index)
            owner, alive = owner[index], alive[index]
    return sequences[:, : int(lengths.max())], sums / lengths**options.length_penalty


def unfinished_rows(alive: Tensor) -> tuple[Tensor, Tensor] | None:
    """alive [A, g], which rows of each image are at work -> (images [A'], rows [A' * g']) to keep, None for all.

    All images keep equally many rows, the most that one of them needs, finished ones filling up.
    """
    group = int(alive.sum(1).max())
    images = alive.any(1).nonzero()[:, 0]
    if len(images) * group > SHRINK_AT * alive.numel():
        return None
    first = (~alive).long().argsort(dim=1, stable=True)[images, :group]  # [A', g'], those at work first
    return images, (images[:, None] * alive.shape[1] + first).flatten()


def filter_logits(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """Logits [R, V] divided by `temperature`, -inf outside the `top_k` greatest and the nucleus of `top_p`.

    A top_k of 0, or of the vocabulary's size or more, keeps all. The nucleus is the fewest most probable tokens whose
    probabilities sum up to at least `top_p`.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the first token always stays
        logits = logits.masked_fill(outside.gather(1, order.argsort(dim=-1)), -torch.inf)
    return logits


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per row with the probabilities softmax(logits), [R, V] -> [R].

    By one uniform number per row and the cumulated probabilities; torch.multinomial takes one for every entry, which on
    a CPU was half the time of self-critical training (320 rows, 30,522 tokens).
    """
    cumulated = logits.softmax(-1).cumsum(-1)  # [R, V]
    total = cumulated[:, -1:]
    uniform = torch.rand(total.shape, device=logits.device, generator=generator) * total
    # below the total whatever rounding does: the first entry above is then a token of positive probability
    uniform = torch.minimum(uniform, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, uniform, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)  # beyond it: NaN


# -------------------------------------------------------------------------------------------------------- beam search


def beam_search(rows: Rows, tokens: SpecialTokens, options: Generation) -> tuple[Tensor, Tensor]:
    """The `num_return` best finished sentences per image, see `generate`.

    At every step the 2 * beams best continuations of an image's beams are candidates: those that end among the first
    `beams` are finished sentences, and compete there by score = log-probability / length^p; the best that go on are the
    next beams. An image is done if its best beam, scored at its present length, is no better than the worst of its
    `beams` finished sentences.
    """
    beams, max_tokens, num_return = options.beams, options.max_tokens, options.num_return
    batch, device = rows.tokens.shape[0], rows.tokens.device
    result = torch.full((batch, num_return, max_tokens), tokens.pad_id, dtype=torch.int64, device=device)
    result_scores = torch.zeros(batch, num_return, device=device)
    images = torch.arange(batch, device=device)  # [A] those still in the batch
    running = torch.zeros(batch, 1, device=device)  # [A, beams] log-probabilities; one beam before the first step
    found = torch.full((batch, beams, max_tokens), tokens.pad_id, dtype=torch.int64, device=device)
    found_scores = torch.full((batch, beams), UNLIKELY, device=device)  # of finished sentences, best first
    done = torch.zeros(batch, dtype=torch.bool, device=device)  # [A]

    for step in range(1, max_tokens + 1):
        log_probs = rows.log_probs()
        width = running.shape[1]  # rows per image in this step
        if step <= options.min_tokens:
            log_probs[:, tokens.sep_id] = -torch.inf
        scores, beam, token = best_continuations(log_probs, running, 2 * beams)  # [A, 2 * beams] each
        ends = (token == tokens.sep_id) | (step == max_tokens)

        written = rows.tokens[:, 1:].view(len(images), width, step - 1)  # [A, beams, step - 1]
        written = torch.cat([take(written, beam), token[..., None]], 2)  # [A, 2 * beams, step]
        ended = ends.clone()
        ended[:, beams:] = False
        ended &= ~done[:, None]
        new_scores = (scores / step**options.length_penalty).masked_fill(~ended, UNLIKELY)
        new = F.pad(written, (0, max_tokens - step), value=tokens.pad_id)
        found_scores, best = torch.cat([found_scores, new_scores], 1).topk(beams)
        found = take(torch.cat([found, new], 1), best)

        running, best = (scores + ends * UNLIKELY).topk(beams)
        beam, token = beam.gather(1, best), token.gather(1, best)
        done = done | (running[:, 0] / step**options.length_penalty <= found_scores[:, -1])
        if step == max_tokens or bool(done.all()):
            break
        kept = torch.arange(len(images), device=device)
        if int((~done).sum()) <= SHRINK_AT * len(done):
            result[images], result_scores[images] = found[:, :num_return], found_scores[:, :num_return]
            kept = (~done).nonzero()[:, 0]
            images, running, found, found_scores, done = (x[kept] for x in (images, running, found, found_scores, done))
            rows.take_images(kept)
            beam, token = beam[kept], token[kept]
        rows.take((kept[:, None] * width + beam).flatten())
        rows.append(token.flatten())

    result[images], result_scores[images] = found[:, :num_return], found_scores[:, :num_return]
    result = result.flatten(0, 1)
    return result[:, : int(written_tokens(result, tokens.sep_id).sum(1).max())], result_scores.flatten()


def best_continuations(log_probs: Tensor, running: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best next tokens over all beams of an image.

    log_probs: [A * beams, V]; running: [A, beams]. -> scores, beams, tokens: [A, count], best first.
    """
    images, beams = running.shape
    each = min(count, log_probs.shape[-1])  # an image's best are among the best of each of its beams
    scores, tokens = log_probs.topk(each, dim=-1)  # [A * beams, each]
    scores, best = (scores.view(images, beams, each) + running[..., None]).flatten(1).topk(count)
    return scores, best // each, tokens.view(images, -1).gather(1, best)


def written_tokens(sequences: Tensor, sep_id: int) -> Tensor:
    """[R, T] padded after [SEP] -> [R, T] bool, True up to [SEP], everywhere if there is none"""
    ends = sequences == sep_id
    return ends.cumsum(1) - ends.long() == 0
