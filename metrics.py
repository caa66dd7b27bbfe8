"""What the tables of the paper report, as pure functions of tensors: recall@k of image-text retrieval.

The rank of a query is 0-based: the number of candidates ranked before its best positive candidate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
