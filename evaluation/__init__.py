"""What the tables of the paper report: recall of retrieval, BLEU to SPICE of captions, accuracy of answers.

    sharded.py                 how all three share an evaluation among processes: every item once, checked
    ranking.py, retrieval.py   the two stages of ranking; recall@k, `Ranker` of splits, `Validation` while pre-training
    cider.py, caption.py       CIDEr-D, as a metric and as a reward; pycocoevalcap's metrics, and `Captioner`
    written.py                 in other languages: what the vocabulary can write of the references
    vqa.py                     the official accuracy, and `Answerer`

Nothing here imports the scripts or their engine: a `Record` takes the lines, numbers and files.
"""

from pathlib import Path
from typing import Protocol


class Record(Protocol):
    """The run that an evaluation reports to; only the main process writes."""

    dir: Path  # folder for result files

    def info(self, message: str) -> None:
        """A line for the console."""

    def log(self, step: int, values: dict[str, float], split: str, final: bool = False) -> None:
        """Numbers of a split after `step` optimizer steps; final: of the evaluation that ends a script."""

    def write_metrics(self, metrics: dict) -> None:
        """All splits' numbers, for metrics.json."""
