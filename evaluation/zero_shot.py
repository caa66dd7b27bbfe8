"""Zero-shot classification as CLIP does it: a class is the mean feature of sentences that name it."""

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = (1, 5)


def class_features(sentences: Tensor) -> Tensor:
    """[C, P, E] normalized features of P sentences a class -> [C, E], their means, normalized again."""
    return F.normalize(sentences.mean(1), dim=-1)


def class_probabilities(images: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """[N, E], [C, E] normalized features -> [N, C], softmax of cosine / temperature"""
    return (images @ classes.T / temperature).softmax(-1)


def accuracies(probabilities: Tensor, labels: Tensor) -> dict:
    """How often the true class is among the most probable ones, in percent.

    probabilities: [N, C]; labels: [N] the classes' numbers; N and every probability row nonempty.

    Returns {"images", "classes", "top1", "top5" (where there are more than 5 classes), "mean_per_class" (the mean over
    the classes of their own top-1 accuracies), "chance" (of top-1), "per_class": [C], None for a class of no image}.
    Equal probabilities count against the model: the rank is the number of classes that are as probable or more.
    """
    if len(labels) == 0:
        raise ValueError("accuracies needs at least one image")
    count = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None])  # [N, 1]
    rank = (probabilities >= own).sum(1) - 1  # [N]
    found: dict = {"images": len(labels), "classes": count}
    found |= {f"top{k}": 100 * (rank < k).double().mean().item() for k in TOP if k == 1 or k < count}
    right = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, (rank < 1).double())
    images = labels.bincount(minlength=count)
    per_class = [100 * float(hit) / int(n) if n else None for hit, n in zip(right, images, strict=True)]
    known = [value for value in per_class if value is not None]
    return found | {"mean_per_class": sum(known) / len(known), "chance": 100 / count, "per_class": per_class}
