"""Samples of what a run's last evaluation found, what was right and what was wrong, with the images."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import create_dataset
from engine.config import CAPTION, PRETRAIN, RETRIEVAL, VQA, load_config
from evaluation.cider import CiderD, caption_words
from evaluation.vqa import is_empty, vqa_accuracy
from tools import pages
from tools.report.tables import Run
from utils import Config, UserError

STAGES = {stage.name: stage for stage in (PRETRAIN, RETRIEVAL, CAPTION, VQA)}
EACH = 4  # queries or captions of a kind
QUESTIONS = 12  # right ones, and as many wrong ones
FIRST = 5  # ranked items of a query
SIDE = 220  # pixels of a thumbnail
STYLE = """
.card ol, .card ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .88rem; line-height: 1.35; }
.card p { margin: .35rem 0; line-height: 1.35; } .card .note { font-size: .85rem; }
table.settings { font-size: .85rem; overflow-wrap: anywhere; } table.settings td:last-child { min-width: 0; }
pre { font-size: .8rem; line-height: 1.35; } nav b { color: var(--gray); }
"""


def samples(run: Run) -> list[str]:
    """Parts of a page; empty where the run wrote no results, a line where its data are not there any more."""
    try:
        parts = OF_STAGE[run.stage](run)
    except UserError as error:
        parts = [f"<p class=note>No samples: {html.escape(str(error))}</p>"]
    return ["<h2 id=samples>Samples</h2>", *parts] if parts else []


def config_of(run: Run) -> Config:
    """The run's configuration; UserError where this version cannot read it."""
    return load_config(run.folder / "config.yaml", (), STAGES[run.stage])


def read_results(path: Path) -> list | dict:
    """A result file; empty where there is none."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def same(path: Path, queries: Sequence, expected: Sequence) -> None:
    """UserError where a result file is not about these data."""
    if list(queries) != list(expected):
        raise UserError(f"{path}: its data have changed since, or are not the run's own")


def spread(places: Sequence[int], count: int) -> list[int]:
    """`count` of the places, evenly spaced."""
    count = min(count, len(places))
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]


def card(image: str | Path, rows: Iterable[str], kind: str = "") -> str:
    """A thumbnail and what is said below it. kind: right, wrong or nothing; rows: HTML"""
    return f'<li class="card {kind}">{pages.thumbnail(image, SIDE)}{"".join(rows)}</li>'


def grid(cards: Iterable[str], kind: str = "") -> str:
    return f'<ul class="cards {kind}">{"".join(cards)}</ul>'


# ---------------------------------------------------------------------------------------------------- pre-training


def of_pretraining(run: Run) -> list[str]:
    """The images of the last epoch and, folded, of the first."""
    images = sorted((run.folder / "images").glob("*.png"))
    if not images:
        return []
    parts = [drawn(images[-1])]
    if len(images) > 1:
        parts.append(
            f"<details><summary>the same at {html.escape(images[0].stem)}</summary>{drawn(images[0])}</details>"
        )
    return parts


def drawn(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return f"<figure class=large>{pages.inline(image.convert('RGB'), path.stem)}</figure>"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


# -------------------------------------------------------------------------------------------------------- retrieval


def of_retrieval(run: Run) -> list[str]:
    """Queries whose first result is right, and queries where it is not, in both directions."""
    path = run.folder / "retrieval_result.json"
    results = read_results(path)
    if not results:
        return []
    split, found = list(results.items())[-1]
    dataset = create_dataset("retrieval_eval", config_of(run), split)
    by_text, by_image = found["image_retrieval"], found["text_retrieval"]
    same(path, (entry["query"] for entry in by_text), dataset.captions)
    same(path, (Path(entry["query"]).name for entry in by_image), (Path(image).name for image in dataset.images))
    owner = [str(dataset.images[place]) for place in dataset.image_of_caption]
    captions: dict[str, list[str]] = {str(image): [] for image in dataset.images}
    for image, caption in zip(owner, dataset.captions, strict=True):
        captions[image].append(caption)
    # A result's paths are those of the machine that ranked; the data set's own are where the images are now.
    here = {entry["query"]: str(image) for entry, image in zip(by_image, dataset.images, strict=True)}
    by_text = [{**entry, "ranked": [here.get(image, image) for image in entry["ranked"]]} for entry in by_text]
    by_image = [{**entry, "query": here[entry["query"]]} for entry in by_image]
    return [
        *of_queries(f"Images for a sentence ({split})", by_text, [{image} for image in owner], image_query),
        *of_queries(f"Sentences for an image ({split})", by_image, [set(x) for x in captions.values()], text_query),
    ]


def of_queries(title: str, entries: Sequence[dict], truth: Sequence[set[str]], draw) -> list[str]:
    """EACH queries whose first result is right, and EACH others. draw: (entry, truth) -> HTML"""
    right = [place for place, entry in enumerate(entries) if entry["ranked"] and entry["ranked"][0] in truth[place]]
    wrong = sorted(set(range(len(entries))) - set(right))
    parts = [f"<h3>{html.escape(title)}</h3>"]
    for places, kind in ((right, "right"), (wrong, "wrong")):
        parts.append(f'<p><b class="{kind}">{len(places):,} of {len(entries):,} {kind} at the first place</b></p>')
        cards = [draw(entries[place], truth[place]) for place in spread(places, EACH)]
        parts += [grid(cards, "broad") if draw is text_query else "".join(cards)]
    return parts


def image_query(entry: dict, truth: set[str]) -> str:
    """A sentence, the first images, and the right one where it is not among them."""
    shown = list(zip(entry["ranked"], entry["scores"], strict=True))
    cards = [
        card(image, [f"<p><b>{place}</b> score {score:.2f}</p>"], "right" if image in truth else "")
        for place, (image, score) in enumerate(shown[:FIRST], 1)
    ]
    for image in sorted(truth.difference(entry["ranked"][:FIRST])):
        where = entry["ranked"].index(image) + 1 if image in entry["ranked"] else 0
        words = f"the right one, at place {where}" if where else f"the right one, not among the first {len(shown)}"
        cards.append(card(image, [f"<p><b>{words}</b></p>"], "right"))
    return f"<p>“{html.escape(entry['query'])}”</p>{grid(cards)}"


def text_query(entry: dict, truth: set[str]) -> str:
    """An image, the first sentences, and one of its own where none of them is."""
    rows = [
        f"<li>{f'<b class=right>{text}</b>' if right else text}</li>"
        for text, right in ((html.escape(text), text in truth) for text in entry["ranked"][:FIRST])
    ]
    own = "" if truth.intersection(entry["ranked"][:FIRST]) else html.escape(f"its own: {min(truth, default='-')}")
    kind = "right" if entry["ranked"] and entry["ranked"][0] in truth else "wrong"
    return card(entry["query"], [f"<ol>{''.join(rows)}</ol>", f"<p class=note>{own}</p>" if own else ""], kind)


# ------------------------------------------------------------------------------------------------------- captioning


def of_captioning(run: Run) -> list[str]:
    """Captions with the highest, the middle and the lowest CIDEr of their own."""
    path, config = run.folder / "caption_result.json", config_of(run)
    results = {entry["image_id"]: entry["caption"] for entry in read_results(path)}
    if not results:
        return []
    split = config.eval.splits[-1]
    dataset = create_dataset("caption_eval", config, split)
    same(path, results, dataset.ids)
    judged = [place for place, texts in enumerate(dataset.references) if any(map(caption_words, texts))]
    if not judged:
        cards = [caption_card(dataset, place, results, None) for place in spread(range(len(dataset)), 2 * EACH)]
        return [f"<h3>Captions ({html.escape(split)}), which no references judge</h3>", grid(cards, "broad")]
    words = [[caption_words(text) for text in dataset.references[place]] for place in judged]
    written = [[caption_words(results[dataset.ids[place]])] for place in judged]
    values = 100 * np.array(CiderD(words).scores(written, words))
    order = [judged[i] for i in values.argsort(kind="stable")[::-1]]
    value = dict(zip(judged, values.tolist(), strict=True))
    middle = max(0, len(order) // 2 - EACH // 2)
    kinds = {"highest": order[:EACH], "middle": order[middle : middle + EACH], "lowest": order[-EACH:]}
    parts = []
    for name, places in kinds.items():
        kind = {"highest": "right", "lowest": "wrong"}.get(name, "")
        cards = [caption_card(dataset, place, results, value[place], kind) for place in places]
        parts += [f"<h3>Captions with the {name} CIDEr ({html.escape(split)})</h3>", grid(cards, "broad")]
    return parts


def caption_card(dataset, place: int, results: Mapping, value: float | None, kind: str = "") -> str:
    references = "".join(f"<li>{html.escape(text)}</li>" for text in dataset.references[place][:FIRST])
    rows = [f"<p><b>{html.escape(results[dataset.ids[place]])}</b></p>"]
    if value is not None:
        rows.append(f"<p class=note>CIDEr {value:.0f}; references:</p><ul>{references}</ul>")
    return card(dataset.images[place], rows, kind)


# -------------------------------------------------------------------------------------------------------- questions


def of_answering(run: Run) -> list[str]:
    """Questions that were answered right, and questions that were not, of as many types as there are."""
    files = {"test": "vqa_result.json", "val": "vqa_result_val.json"}
    split = next((split for split, name in files.items() if (run.folder / name).is_file()), None)
    if split is None:
        return []
    config, path = config_of(run), run.folder / files[split]
    answers = {entry["question_id"]: entry["answer"] for entry in read_results(path)}
    dataset = create_dataset("vqa_eval", config, split)
    same(path, answers, dataset.ids)
    if dataset.references is None:
        cards = [answer_card(dataset, place, answers, None) for place in spread(range(len(dataset)), QUESTIONS)]
        return [f"<h3>Answers ({split}), which no annotators judge</h3>", grid(cards)]
    scores = [
        vqa_accuracy(answers[key], reference, config.eval.scoring)
        for key, reference in zip(dataset.ids, dataset.references, strict=True)
    ]
    parts = [f"<h3>Answers ({split})</h3>"]
    for kind, chosen in (("right", lambda score: score >= 0.5), ("wrong", lambda score: score == 0)):
        places = [place for place, score in enumerate(scores) if chosen(score)]
        name = "right (accuracy of at least 50%)" if kind == "right" else "wrong (accuracy 0)"
        parts.append(f'<p><b class="{kind}">{len(places):,} of {len(scores):,} {name}</b></p>')
        cards = [answer_card(dataset, place, answers, kind) for place in of_all_types(places, dataset.question_types)]
        parts.append(grid(cards))
    return parts


def of_all_types(places: Sequence[int], types: Sequence[str | None]) -> list[int]:
    """QUESTIONS of the places, from as many question types as there are."""
    groups: dict[str | None, list[int]] = {}
    for place in places:
        groups.setdefault(types[place], []).append(place)
    each = -(-QUESTIONS // max(1, len(groups)))
    chosen = [spread(group, each) for group in groups.values()]
    return [group[n] for n in range(each) for group in chosen if n < len(group)][:QUESTIONS]


def answer_card(dataset, place: int, answers: Mapping, kind: str | None) -> str:
    question, answer = dataset.parts[place][0], answers[dataset.ids[place]]
    rows = [f"<p>{html.escape(question)}</p>", f"<p><b>{html.escape(answer or '(nothing)')}</b></p>"]
    if kind == "wrong":
        rows.append(f"<p class=note>people: {html.escape(people(dataset.references[place]))}</p>")
    return card(dataset.paths[place], rows, kind or "")


def people(reference: str | Sequence[str] | Mapping[str, float]) -> str:
    """The most frequent answers of a question."""
    if is_empty(reference):
        return "-"
    if isinstance(reference, str):
        return reference
    counts = reference if isinstance(reference, Mapping) else Counter(reference)
    first = sorted(counts, key=lambda answer: -counts[answer])[:3]
    return ", ".join(f"{answer} ({counts[answer]:g})" for answer in first)


OF_STAGE = {"pretrain": of_pretraining, "retrieval": of_retrieval, "caption": of_captioning, "vqa": of_answering}
