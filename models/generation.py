"""Sentences from the text decoder: greedy, beam search, and top-k or nucleus sampling.

One call decodes a batch of images together. The memory's cross-attention keys and values are projected once
per image; the beams or samples of an image are consecutive rows that attend to them together, so nothing is
copied per row. Images whose sentences are finished leave the batch and cost no more work.

Lengths count generated tokens, the final [SEP] included and the start token not (transformers'
`max_new_tokens`). Beam search finds what transformers' `generate` finds with `early_stopping=False`: the same
candidates, length penalty and stopping rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.bert import KVCache, TextDecoder
from models.tensors import take
from utils import UserError

MODES = ("beam", "greedy", "sample")
UNLIKELY = -1e30  # below every score; finite, so that sums stay numbers
MAX_PENALTY = 8.0  # length penalties up to this, of either sign, keep the scores of 512 tokens above UNLIKELY
MIN_TEMPERATURE = 1e-6  # logits divided by much less are infinite
SHRINK_AT = 7 / 8  # rows are taken out of the batch together, when at most this share of them is still at work


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    memory: Tensor,
    memory_mask: Tensor | None,
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    mode: str = "beam",
    beams: int = 5,
    min_tokens: int = 1,
    max_tokens: int = 25,
    length_penalty: float = 1.0,
    num_return: int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sentences for B images; the decoder runs in eval mode and is put back.

    Args:
        memory: [B, S, D], what the decoder attends to; memory_mask: [B, S], 1 = attend, None: everything.
        cls_id, sep_id, pad_id: the start token, the token that ends a sentence, and what follows it.
        mode: "beam" (the `num_return` best of `beams`), "greedy", or "sample" (`num_return` draws per image).
        min_tokens: before so many tokens are written [SEP] is not allowed. max_tokens: the most of them, [SEP]
            included.
        length_penalty: p in score = log-probability / length^p, greater p prefer longer sentences.
        top_k, top_p, temperature: for sampling: only the k most probable tokens (0: all), only the fewest
            whose probabilities reach top_p, logits divided by temperature before both.
        generator: the randomness of sampling, on the memory's device; None: the global one.
        use_cache: keep the keys and values of written tokens; False computes them again at every step.

    Returns:
        sequences: [B * num_return, T] int64 without the start token, padded after [SEP], T the longest; the
            sentences of an image are neighbours, best first in beam search.
        scores: [B * num_return] float32, by the model's own distribution whatever the sampling options.
    Raises:
        UserError: an option out of its range.
    """
    check_options(mode, beams, min_tokens, max_tokens, num_return, top_k, top_p, temperature, length_penalty)
    check_vocabulary(mode, beams, decoder.embeddings.word_embeddings.num_embeddings)
    if memory.shape[0] == 0:
        return torch.empty(0, 0, dtype=torch.int64, device=memory.device), torch.empty(0, device=memory.device)
    training = decoder.training
    decoder.eval()
    try:
        rows = Rows(decoder, memory, memory_mask, cls_id, use_cache)
        if mode == "beam":
            return beam_search(rows, beams, sep_id, pad_id, min_tokens, max_tokens, length_penalty, num_return)

        def choose(log_probs: Tensor) -> Tensor:  # [R, V] -> [R]
            if mode == "greedy":
                return log_probs.argmax(-1)
            return draw(filter_logits(log_probs, top_k, top_p, temperature), generator)

        return write_rows(rows, choose, sep_id, pad_id, min_tokens, max_tokens, length_penalty, num_return)
    finally:
        decoder.train(training)


def check_options(
    mode: str,
    beams: int,
    min_tokens: int,
    max_tokens: int,
    num_return: int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
) -> None:
    """Raise UserError for options of `generate` that have no meaning, by name."""
    if mode not in MODES:
        raise UserError(f"mode of generation: {mode!r} is none of {', '.join(MODES)}")
    if max_tokens < 1 or not 0 <= min_tokens <= max_tokens:
        raise UserError(
            f"min_tokens {min_tokens}, max_tokens {max_tokens}: 0 <= min_tokens <= max_tokens, 1 <= max_tokens needed"
        )
    if mode == "beam" and not 1 <= num_return <= beams:
        raise UserError(f"num_return {num_return}, beams {beams}: 1 <= num_return <= beams needed")
    if num_return < 1 or (mode == "greedy" and num_return > 1):
        raise UserError(f"num_return {num_return}: greedy decoding gives one sentence, sampling one or more")
    if top_k < 0 or not 0 < top_p <= 1 or not MIN_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"top_k {top_k}, top_p {top_p}, temperature {temperature}: top_k >= 0, 0 < top_p <= 1 and a finite "
            f"temperature >= {MIN_TEMPERATURE:g} needed"
        )
    if not -MAX_PENALTY <= length_penalty <= MAX_PENALTY:
        raise UserError(f"length_penalty {length_penalty}: from {-MAX_PENALTY:g} to {MAX_PENALTY:g} needed")


def check_vocabulary(mode: str, beams: int, vocab_size: int, beams_key: str = "beams") -> None:
    """Raise UserError for more beams than beam search has tokens to begin with; beams_key: what the user calls them."""
    if mode == "beam" and 2 * beams > vocab_size:
        raise UserError(
            f"{beams_key}: {beams} beams compare {2 * beams} first tokens, the vocabulary has {vocab_size}; use "
            f"{vocab_size // 2} or fewer"
        )


class Rows:
    """The sentences at work: `tokens` [R, t] with the start token, R a multiple of the images in `memory`."""

    def __init__(
        self, decoder: TextDecoder, memory: Tensor, memory_mask: Tensor | None, start_id: int, use_cache: bool
    ):
        self.decoder = decoder
        self.memory = decoder.project_memory(memory)
        self.memory_mask = memory_mask
        self.cache = KVCache() if use_cache else None
        self.tokens = torch.full((memory.shape[0], 1), start_id, dtype=torch.int64, device=memory.device)

    def log_probs(self) -> Tensor:
        """Log-probabilities of the next token, [R, V] float32."""
        new = self.tokens if self.cache is None else self.tokens[:, self.cache.length :]
        hidden = self.decoder(new, memory=self.memory, memory_mask=self.memory_mask, cache=self.cache)
        return self.decoder.lm_logits(hidden[:, -1]).float().log_softmax(-1)

    @property
    def images(self) -> int:
        """How many images are still at work."""
        return self.memory[0][0].shape[0]

    def append(self, token: Tensor) -> None:
        """token: [R]"""
        self.tokens = torch.cat([self.tokens, token[:, None]], 1)

    def take(self, rows: Tensor) -> None:
        """Go on with the given rows [R'], in that order; the images stay."""
        self.tokens = self.tokens[rows]
        if self.cache is not None:
            self.cache.reorder(rows)

    def take_images(self, images: Tensor) -> None:
        """Go on with the given images [A] only (their rows are for the caller to take)."""
        self.memory = [(k[images], v[images]) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[images]


# ------------------------------------------------------------------------------------------------ one row at a time


def write_rows(
    rows: Rows,
    choose: Callable[[Tensor], Tensor],
    sep_id: int,
    pad_id: int,
    min_tokens: int,
    max_tokens: int,
    length_penalty: float,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """`copies` independent sentences per image; `choose` gives a token [R] for log-probabilities [R, V]."""
    device, total = rows.tokens.device, len(rows.tokens) * copies
    sequences = torch.full((total, max_tokens), pad_id, dtype=torch.int64, device=device)
    sums, lengths = torch.zeros(total, device=device), torch.zeros(total, device=device)
    owner = torch.arange(total, device=device)  # [R] the place of each row in the result
    alive = torch.ones(total, dtype=torch.bool, device=device)  # [R]
    for step in range(1, max_tokens + 1):
        log_probs = rows.log_probs()  # [R, V]
        if step == 1 and copies > 1:  # the start is the same for all copies
            repeated = torch.arange(len(log_probs), device=device).repeat_interleave(copies)
            rows.take(repeated)
            log_probs = log_probs[repeated]
        if step <= min_tokens:
            log_probs[:, sep_id] = -torch.inf
        token = choose(log_probs)
        sums[owner] += log_probs.gather(1, token[:, None])[:, 0].masked_fill(~alive, 0.0)
        lengths[owner] += alive
        sequences[owner, step - 1] = token.masked_fill(~alive, pad_id)
        alive = alive & (token != sep_id)
        if step == max_tokens or not alive.any():
            break
        rows.append(token)
        kept = unfinished_rows(alive.view(rows.images, -1))
        if kept is not None:
            images, index = kept
            rows.take_images(images)
            rows.take(index)
            owner, alive = owner[index], alive[index]
    return sequences[:, : int(lengths.max())], sums / lengths**length_penalty


def unfinished_rows(alive: Tensor) -> tuple[Tensor, Tensor] | None:
    """alive [A, g], which of each image's rows are at work -> (images [A'], rows [A' * g']) to go on with.

    All images keep equally many rows, the most that one of them needs, finished ones filling up. None where
    leaving rows out would not pay.
    """
    group = int(alive.sum(1).max())
    images = alive.any(1).nonzero()[:, 0]
    if len(images) * group > SHRINK_AT * alive.numel():
        return None
    first = (~alive).long().argsort(dim=1, stable=True)[images, :group]  # [A', g'], those at work first
    return images, (images[:, None] * alive.shape[1] + first).flatten()


# ------------------------------------------------------------------------------------------------------ beam search


def beam_search(
    rows: Rows,
    beams: int,
    sep_id: int,
    pad_id: int,
    min_tokens: int,
    max_tokens: int,
    length_penalty: float,
    num_return: int,
) -> tuple[Tensor, Tensor]:
    """The `num_return` best finished sentences per image, see `generate`.

    At every step the 2 * beams best continuations of an image's beams are candidates: those that end among
    the first `beams` are finished sentences, and compete there by score = log-probability / length^p; the best
    that go on are the next beams. An image is done when its best beam, scored at its present length, is no
    better than the worst of its `beams` finished sentences.
    """
    batch, device = rows.tokens.shape[0], rows.tokens.device
    result = torch.full((batch, num_return, max_tokens), pad_id, dtype=torch.int64, device=device)
    result_scores = torch.zeros(batch, num_return, device=device)
    images = torch.arange(batch, device=device)  # [A] those still in the batch
    running = torch.zeros(batch, 1, device=device)  # [A, beams] log-probabilities; one beam before the first step
    found = torch.full((batch, beams, max_tokens), pad_id, dtype=torch.int64, device=device)
    found_scores = torch.full((batch, beams), UNLIKELY, device=device)  # of finished sentences, best first
    done = torch.zeros(batch, dtype=torch.bool, device=device)  # [A]

    for step in range(1, max_tokens + 1):
        log_probs = rows.log_probs()
        width = running.shape[1]  # rows per image in this step
        if step <= min_tokens:
            log_probs[:, sep_id] = -torch.inf
        scores, beam, token = best_continuations(log_probs, running, 2 * beams)  # [A, 2 * beams] each
        ends = (token == sep_id) | (step == max_tokens)

        written = rows.tokens[:, 1:].view(len(images), width, step - 1)  # [A, beams, step - 1]
        written = torch.cat([take(written, beam), token[..., None]], 2)  # [A, 2 * beams, step]
        ended = ends.clone()
        ended[:, beams:] = False
        ended &= ~done[:, None]
        new_scores = (scores / step**length_penalty).masked_fill(~ended, UNLIKELY)
        new = torch.nn.functional.pad(written, (0, max_tokens - step), value=pad_id)
        found_scores, best = torch.cat([found_scores, new_scores], 1).topk(beams)
        found = take(torch.cat([found, new], 1), best)

        running, best = (scores + ends * UNLIKELY).topk(beams)
        beam, token = beam.gather(1, best), token.gather(1, best)
        done = done | (running[:, 0] / step**length_penalty <= found_scores[:, -1])
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
    return result[:, : int(written_tokens(result, sep_id).sum(1).max())], result_scores.flatten()


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
    """[R, T] padded after [SEP] -> [R, T] bool, True up to [SEP], everywhere where there is none"""
    ends = sequences == sep_id
    return ends.cumsum(1) - ends.long() == 0


# -------------------------------------------------------------------------------------------------------- sampling


def filter_logits(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """Logits [R, V] divided by `temperature`, -inf outside the `top_k` greatest and the nucleus of `top_p`.

    top_k of the vocabulary's size or more is all of it. The nucleus is the fewest most probable tokens whose
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

    By one uniform number per row and the cumulated probabilities; torch.multinomial takes one for every entry, which
    on a CPU was half the time of self-critical training (320 rows, 30,522 tokens).
    """
    cumulated = logits.softmax(-1).cumsum(-1)  # [R, V]
    total = cumulated[:, -1:]
    uniform = torch.rand(total.shape, device=logits.device, generator=generator) * total
    # below the total whatever rounding does: the first entry above is then a token of positive probability
    uniform = torch.minimum(uniform, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, uniform, right=True)[:, 0]
