"""What the tables of the paper report: recall of retrieval, BLEU to SPICE of captions, accuracy of answers.

    sharded.py                 how all three share an evaluation among processes: every item once, checked
    ranking.py, retrieval.py   two-stage ranking; recall@k, its chance level, and `Ranker`, which ranks splits
    validation.py              the same by ITC alone on a sample, while pre-training
    cider.py, caption.py       CIDEr-D, as a metric and as a reward; pycocoevalcap's metrics, and `Captioner`
    vqa.py                     the official accuracy, and `Answerer`
    encodings.py, clusters.py  what a pre-training checkpoint sees in patches, and how its patterns agree with labels

Nothing here imports the scripts or their engine: where lines, numbers and files go is handed over as a `Record`.
"""

from pathlib import Path
from typing import Protocol


class Record(Protocol):
    """Where an evaluation leaves what it finds; only the main process writes."""

    dir: Path  # folder for result files

    def info(self, message: str) -> None:
        """A line for the console."""

    def log(self, step: int, values: dict[str, float], split: str, final: bool = False) -> None:
        """Numbers of a split after `step` optimizer steps; final: of the evaluation that ends a script."""

    def write_metrics(self, metrics: dict) -> None:
        """All splits' numbers, for metrics.json."""
