"""Captions and answers in any language: what the vocabulary can write of the references, and how both are compared.

A model answers with its vocabulary's pieces: of a vocabulary without accents `ete`, never `été`. If such references are
more than FEW, both sides are compared as the vocabulary writes them (`Tokenizer.rewritten`), so that a model without
mistakes reaches what the references allow; otherwise the references stay as they are, and the numbers are those of the
official programs to the digit.
"""

from collections.abc import Callable, Mapping, Sequence

from dataset.text import Tokenizer

FEW = 0.01
REWRITTEN = {"references": "compared as the vocabulary writes them"}  # in metrics.json, where that was done
Rewrite = Callable[[Sequence[str]], list[str]]


def rewriting(
    name: str, references: Sequence[str], tokenizer: Tokenizer, info: Callable[[str], None], answers: bool = False
) -> Rewrite:
    """How texts are compared with these references: as they are (`list`), or rewritten; `info` gets the share's line.

    name: of the split, for the line; answers: whether they are answers rather than captions.
    """
    if not references:
        return list
    share, example = tokenizer.unwritable(references)
    if answers and tokenizer.lower:  # which the official program compares as they are if all ten are the same
        capitals = [text for text in references if text != text.lower()]
        share, example = max(share, len(capitals) / len(references)), next(iter(capitals), example)
    line = f"{name}: {share:.1%} of the references have letters that this vocabulary cannot write"
    if share <= FEW:
        info(line)
        return list
    info(f"{line}, such as {example!r}: references and what is written are compared as it writes them")
    return lambda texts: tokenizer.rewritten(texts, answers)


def rewritten_answers(
    reference: str | Sequence[str] | Mapping[str, float], rewrite: Rewrite
) -> str | list[str] | dict[str, float]:
    """One answer, ten annotators' answers, or scores by answer, each answer rewritten."""
    if isinstance(reference, str):
        return rewrite([reference])[0]
    if not isinstance(reference, Mapping):
        return rewrite(reference)
    scores: dict[str, float] = {}
    for answer, score in zip(rewrite(list(reference)), reference.values(), strict=True):
        scores[answer] = max(score, scores.get(answer, score))
    return scores
