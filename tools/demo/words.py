"""Recall by what a caption asks for: R@1 of `Retrieval.py --evaluate` by the number of content words (docs/study.md).

    python -m tools.demo.words output/emoji/unseen_42 output/emoji/unseen_43

Prints a line of JSON for each folder: {content words: [captions, R@1 in percent]} on test, a caption's best image and
an image's best caption together. The order is the re-ranked one; `--override rerank.k=1` leaves that of ITC.
"""

import argparse
import json
import re
from pathlib import Path

from dataset import create_dataset
from dataset.files import read_json
from engine.config import RETRIEVAL, load_config
from utils import UserError, run_main

FUNCTION_WORDS = frozenset("a an and at for in of off on or the to with emoji skin tone".split())  # the last: emoji's
MOST = 5  # captions of more content words count here


def content_words(caption: str) -> int:
    return sum(word not in FUNCTION_WORDS for word in re.findall(r"[\w’]+", caption.lower()))


def recall_by_words(result: dict[str, list[dict]], pairs: list[tuple[str, str]]) -> dict[int, list[float]]:
    """{content words: [captions, R@1]} of one split of retrieval_result.json.

    pairs: (image, caption) of the split. Raises UserError unless every image has one caption.
    """
    caption_of, true = dict(pairs), set(pairs)
    if len(caption_of) != len(pairs):
        raise UserError("data.test: has images with several captions; recall by words needs one of each")
    found = [(caption_of[row["query"]], (row["query"], row["ranked"][0])) for row in result["text_retrieval"]]
    found += [(row["query"], (row["ranked"][0], row["query"])) for row in result["image_retrieval"]]
    hits: dict[int, list[bool]] = {}
    for caption, best in found:
        hits.setdefault(min(content_words(caption), MOST), []).append(best in true)
    return {count: [len(hit) // 2, round(100 * sum(hit) / len(hit), 2)] for count, hit in sorted(hits.items())}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.demo.words", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of Retrieval.py --evaluate")
    for run in parser.parse_args(argv).runs:
        test = create_dataset("retrieval_eval", load_config(run / "config.yaml", [], RETRIEVAL), "test")
        images = (str(test.images[index]) for index in test.image_of_caption)
        pairs = list(zip(images, test.captions, strict=True))
        print(json.dumps(recall_by_words(read_json(run / "retrieval_result.json")["test"], pairs)))


if __name__ == "__main__":
    run_main(main)
