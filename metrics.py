"""What the tables of the paper report: recall@k of image-text retrieval; BLEU to SPICE of captions.

The rank of a query is 0-based: the number of candidates ranked before its best positive candidate.

Captions are evaluated by pycocoevalcap; `cider.py` has the reward of training.
"""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cider import caption_words
from utils import UserError

RECALL_AT = (1, 5, 10)


def retrieval_metrics(tr_ranks: Tensor, ir_ranks: Tensor) -> dict[str, float]:
    """The columns of the retrieval table, in percent.

    Args:
        tr_ranks: [N] ranks of text retrieval (queries are images, candidates are texts).
        ir_ranks: [T] ranks of image retrieval (queries are texts, candidates are images).

    Returns:
        dict of floats: tr_r1, tr_r5, tr_r10, ir_r1, ir_r5, ir_r10, r_mean (the mean of the six).
    """
    columns = {}
    for name, ranks in (("tr", tr_ranks), ("ir", ir_ranks)):
        for k in RECALL_AT:
            columns[f"{name}_r{k}"] = recall_at_k(ranks, k)
    columns["r_mean"] = sum(columns.values()) / len(columns)
    return columns


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Percentage of queries whose best positive is among the first k candidates; ranks [Q] are 0-based."""
    if len(ranks) == 0:
        raise ValueError("recall_at_k needs at least one query")
    return 100.0 * (ranks < k).double().mean().item()


def chance_metrics(captions_per_image: Sequence[int]) -> dict[str, float]:
    """The columns that a random order reaches on average.

    Args:
        captions_per_image: [N] the number of captions of each image.

    Returns:
        dict with the keys of retrieval_metrics, in percent.
    """
    captions = torch.as_tensor(captions_per_image).double()  # [N]
    num_images, num_texts = len(captions), int(captions.sum())
    columns = {}
    for k in RECALL_AT:
        columns[f"tr_r{k}"] = 100.0 * _chance_of_hit(captions, num_texts, k).mean().item()
    for k in RECALL_AT:
        columns[f"ir_r{k}"] = 100.0 * min(1.0, k / num_images)
    columns["r_mean"] = sum(columns.values()) / len(columns)
    return columns


def _chance_of_hit(positives: Tensor, candidates: int, k: int) -> Tensor:
    """Probability that k of `candidates` drawn without replacement contain one of `positives` [N]."""
    miss = torch.ones_like(positives)
    for drawn in range(min(k, candidates)):
        miss = miss * (candidates - drawn - positives).clamp(min=0) / (candidates - drawn)
    return 1.0 - miss


def retrieval_table(split: str, numbers: dict) -> str:
    """The numbers of one split (keys STAGE_COLUMN, stages chance, itc, itm) as a small text table, a line a stage."""
    columns = list(chance_metrics([1]))
    lines = [f"{split:8}" + "".join(f"{column:>8}" for column in columns)]
    for stage in ("chance", "itc", "itm"):
        lines.append(f"{stage:8}" + "".join(f"{numbers[f'{stage}_{column}']:8.2f}" for column in columns))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- captioning

CAPTION_COLUMNS = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider", "spice")
NO_JAVA = "not computed: it needs Java; install one (Debian, Ubuntu: apt install default-jre-headless)"
NO_SPICE = (
    "not computed: SPICE's parser is absent; fetch it once (400 MB): python -m pycocoevalcap.spice.get_stanford_models"
)


def caption_metrics(
    references: Mapping[str | int, Sequence[str]], results: Mapping[str | int, str], spice: bool = True
) -> dict[str, float | str]:
    """The columns of the captioning table, in percent (CIDEr: times 100), by pycocoevalcap.

    Args:
        references: all captions of every image; results: the caption to judge of the same images.
        spice: whether to compute SPICE (minutes on COCO).

    Returns:
        CAPTION_COLUMNS, and `tokenizer`: "ptb", Stanford's as in COCO's official evaluation, or "python"
        (`caption_words`, close to it) where Java is missing. A column that cannot be computed holds a line
        that says why and what to do.
    """
    if set(references) != set(results) or not results:
        raise ValueError("caption_metrics needs one result for every image with references, and at least one")
    Bleu, Cider, Meteor, Rouge, Spice = _scorers()
    tokens = _ptb_tokens(references, results) if shutil.which("java") else None
    java = tokens is not None
    tokens = tokens or _python_tokens(references, results)
    columns: dict[str, float | str] = dict.fromkeys(CAPTION_COLUMNS, "")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints
        bleu = Bleu(4).compute_score(*tokens)[0]
        columns |= {f"bleu{n}": 100 * float(score) for n, score in enumerate(bleu, 1)}
        columns["rouge_l"] = 100 * float(Rouge().compute_score(*tokens)[0])
        columns["cider"] = 100 * float(Cider().compute_score(*tokens)[0])
        columns["meteor"] = _by_java(Meteor, tokens) if java else NO_JAVA
        columns["spice"] = NO_JAVA
        if not spice:
            columns["spice"] = "not computed: eval.spice is false"
        elif java:
            jars = Path(_spice_folder(), "lib").glob("stanford-corenlp-*-models.jar")
            columns["spice"] = _by_java(Spice, tokens) if any(jars) else NO_SPICE
    return {**columns, "tokenizer": "ptb" if java else "python"}


def _scorers() -> tuple:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise UserError(f"captions are evaluated by pycocoevalcap: pip install -r requirements.txt ({error})") from None
    return Bleu, Cider, Meteor, Rouge, Spice


def _spice_folder() -> Path:
    from pycocoevalcap.spice import get_stanford_models

    return Path(get_stanford_models.__file__).parent


def _python_tokens(references: Mapping, results: Mapping) -> tuple[dict, dict]:
    return (
        {i: [caption_words(text) for text in references[i]] for i in results},
        {i: [caption_words(results[i])] for i in results},
    )


def _ptb_tokens(references: Mapping, results: Mapping) -> tuple[dict, dict] | None:
    """Both sides through Stanford's tokenizer; None where its Java program does not run."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(texts: dict) -> dict:
        # one line a caption, and none empty: the tokenizer tells captions apart by lines
        lines = {i: [{"caption": " ".join(text.split()) or "."} for text in group] for i, group in texts.items()}
        return PTBTokenizer().tokenize(lines)

    try:
        found = tokenize({i: references[i] for i in results}), tokenize({i: [results[i]] for i in results})
    except OSError:  # its temporary file lies in pycocoevalcap's own folder, which may be read-only
        return None
    complete = all(len(found[0].get(i, ())) == len(references[i]) and i in found[1] for i in results)
    return found if complete else None


def _by_java(scorer, tokens: tuple[dict, dict]) -> float | str:
    """A scorer that runs a Java program: its score in percent, or why there is none."""
    try:
        return 100 * float(scorer().compute_score(*tokens)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:100]
        return f"not computed: its Java program failed ({reason}); it was written for Java 8"


def caption_table(split: str, numbers: Mapping, domains: Sequence[str] = ()) -> list[str]:
    """caption_metrics' columns as lines, a row for `numbers` and for each of its `domains`, then what is missing."""
    rows = {split: numbers, **{f"  {name}": numbers[name] for name in domains}}
    lines = [f"{'':8}" + "".join(f"{column:>9}" for column in CAPTION_COLUMNS) + f"   ({numbers['tokenizer']} tokens)"]
    for name, row in rows.items():
        cells = (row[column] for column in CAPTION_COLUMNS)
        lines.append(f"{name:8}" + "".join(f"{x:9.2f}" if isinstance(x, float) else f"{'-':>9}" for x in cells))
    return lines + [f"{column}: {numbers[column]}" for column in CAPTION_COLUMNS if isinstance(numbers[column], str)]
