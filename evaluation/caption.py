"""Captioning: BLEU, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap, and `Captioner`, which captions splits."""

import contextlib
import inspect
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from torch import Tensor

import utils
from dataset import create_dataset
from dataset.advice import warn_of_cut_texts
from dataset.annotations import DOMAINS
from dataset.caption import CaptionEvalDataset
from dataset.text import Tokenizer
from evaluation import Record
from evaluation.cider import apart, caption_words, cider
from evaluation.sharded import eval_loader, evaluating, run_sharded
from evaluation.written import REWRITTEN, rewriting
from models.caption import CaptionModel
from models.generation import Generation

CAPTION_COLUMNS = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider", "spice")
SPICE_PARSER = Path(inspect.getfile(Spice)).parent / "lib"
NO_JAVA = "not computed: it needs Java; install one (Debian, Ubuntu: apt install default-jre-headless)"
NO_SPICE = (
    "not computed: SPICE's parser is absent; fetch it once (400 MB): python -m pycocoevalcap.spice.get_stanford_models"
)


class Captioner:
    """Captions the splits of a configuration and judges them; `datasets` are read, and checked, at once."""

    def __init__(self, cfg: utils.Config, tokenizer: Tokenizer, device: torch.device, run: Record):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        splits = dict.fromkeys([*cfg.eval.splits, "val"] if cfg.data.val else cfg.eval.splits)
        self.datasets = {split: create_dataset("caption_eval", cfg, split) for split in splits}
        warn_of_cut_texts(self.datasets, cfg, tokenizer)
        self.notes: dict[str, dict] = {}  # by split, for metrics.json
        for split, dataset in self.datasets.items():
            rewrite = rewriting(split, list(chain.from_iterable(dataset.references)), tokenizer, run.info)
            self.notes[split] = {} if rewrite is list else REWRITTEN
            dataset.references = [list(filter(caption_words, rewrite(captions))) for captions in dataset.references]
            if 0 < (missing := dataset.references.count([])) < len(dataset):
                of = f"{missing} of {len(dataset)} images"
                run.info(f"{split}: {of} have no reference with a word and are not judged")
        self.precision = utils.resolve_precision(cfg.train.precision, device)

    def caption(self, model: CaptionModel, split: str) -> list[str]:
        """The captions of a split's images, in the data set's order, in every process."""
        cfg, dataset = self.cfg, self.datasets[split]

        def write(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, list[str]]:
            images, indices = batch
            prompts = [dataset.prompts[i] for i in indices.tolist()]
            ids, mask = self.tokenizer.encode(prompts, cfg.text.max_prompt_tokens)
            batch = {"images": images, "prompt_ids": ids, "prompt_mask": self.tokenizer.padding(mask)}
            batch, options = utils.to_device(batch, self.device), Generation(**cfg.generation)
            with utils.autocast(self.device, self.precision):
                sequences, _ = model.generate(**batch, options=options)
            return indices, [self.tokenizer.decode_caption(row) for row in sequences.tolist()]

        loader = eval_loader(dataset, cfg.eval.batch_size, num_workers=cfg.data.num_workers, device=self.device)
        with evaluating(model):
            return run_sharded(loader, write, len(dataset), label=f"captioning {split}")

    def validate(self, model: CaptionModel) -> float:
        """CIDEr (times 100) on the validation split with the Python tokenizer, the same in every process."""
        return cider(*judged(self.datasets["val"], self.caption(model, "val")))

    def evaluate_all(self, model: CaptionModel) -> None:
        """Caption `eval.splits`, write the result files, and leave the process group; the main process then judges.

        Called in all processes as the last thing they do together: METEOR and SPICE can take longer than a collective
        waits.
        """
        captions: dict[str, list[str]] = {}
        numbers: dict[str, dict] = {}
        for split in self.cfg.eval.splits:
            start = time.perf_counter()
            captions[split] = found = self.caption(model, split)
            speed = round(len(found) / (time.perf_counter() - start), 2)
            numbers[split] = {"images": len(found), "captions_per_second": speed, **self.notes[split]}
            numbers[split]["words"] = sum(len(apart(caption).split()) for caption in found) / len(found)
            numbers[split]["judged"] = sum(map(bool, self.datasets[split].references))
            if utils.is_main():
                name = "caption_result.json" if split == self.cfg.eval.splits[-1] else f"caption_result_{split}.json"
                # COCO's submission format, which is NoCaps' too, each image once
                pairs = zip(self.datasets[split].ids, found, strict=True)
                utils.write_json(self.run.dir / name, [{"image_id": key, "caption": text} for key, text in pairs])
                self.run.write_metrics(numbers)
        if utils.leave_group():
            for split in captions:
                self.judge(split, captions[split], numbers)

    def judge(self, split: str, captions: list[str], numbers: dict[str, dict]) -> None:
        """Add `caption_metrics` to the numbers of a split and, by its name, of each of its domains; write and log."""
        dataset, own, spice = self.datasets[split], numbers[split], self.cfg.eval.spice
        if own["judged"]:
            self.run.info(f"{split}: judging {own['judged']} captions")
            own |= caption_metrics(*judged(dataset, captions), spice)
            for domain in DOMAINS:
                references, results = judged(dataset, captions, domain)
                if results:
                    own[domain] = {"images": len(results)} | caption_metrics(references, results, spice)
            self.run.write_metrics(numbers)
            self.run.log(0, {key: x for key, x in own.items() if isinstance(x, int | float)}, split, final=True)
            for line in caption_table(split, own):
                self.run.info(line)
        for path, caption in list(zip(dataset.images, captions, strict=True))[:3]:
            self.run.info(f"{split} {path}: {caption}")


def judged(
    dataset: CaptionEvalDataset, captions: list[str], domain: str | None = None
) -> tuple[dict[str | int, list[str]], dict[str | int, str]]:
    """(references, results) by image id, of the images that have references and, if given, are of `domain`."""
    rows = zip(dataset.ids, dataset.references, captions, dataset.domains, strict=True)
    chosen = [row for row in rows if row[1] and domain in (None, row[3])]
    return {key: texts for key, texts, *_ in chosen}, {key: caption for key, _, caption, _ in chosen}


# -------------------------------------------------------------------------------------------------------------- Metrics


def caption_metrics(
    references: Mapping[str | int, Sequence[str]], results: Mapping[str | int, str], spice: bool = True
) -> dict[str, float | str]:
    """The columns of the captioning table, in percent (CIDEr: times 100), by pycocoevalcap.

    references: all captions of every image; results: the caption to judge of the same images, at least one; spice:
    whether to compute SPICE (minutes on COCO).
    -> CAPTION_COLUMNS, and `tokenizer`: "ptb", Stanford's as in COCO's official evaluation, or "python"
    (`caption_words`, close to it) if Java is missing. A column that cannot be computed holds a line that says why and
    what to do, and costs no other one.
    """
    lists = {i: references[i] for i in results}, {i: [results[i]] for i in results}
    tokens = tuple(map(ptb_tokens, lists)) if shutil.which("java") else (None,)
    java = None not in tokens
    tokens = tokens if java else tuple(map(python_tokens, lists))
    columns: dict[str, float | str] = {"tokenizer": "ptb" if java else "python"}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints
        columns |= dict(zip(("bleu1", "bleu2", "bleu3", "bleu4"), score(Bleu, tokens, 4), strict=True))
        (columns["rouge_l"],) = score(Rouge, tokens)
        (columns["cider"],) = score(Cider, tokens)
        (columns["meteor"],) = score(Meteor, tokens) if java else [NO_JAVA]
        if not spice:
            columns["spice"] = "not computed: eval.spice is false"
        elif java and any(SPICE_PARSER.glob("stanford-corenlp-*-models.jar")):
            (columns["spice"],) = score(Spice, tokens)
        else:
            columns["spice"] = NO_SPICE if java else NO_JAVA
    return columns


def python_tokens(texts: Mapping[str | int, Sequence[str]]) -> dict[str | int, list[str]]:
    """The words of captions, by image."""
    return {i: [caption_words(text) for text in group] for i, group in texts.items()}


def ptb_tokens(texts: Mapping[str | int, Sequence[str]]) -> dict[str | int, list[str]] | None:
    """The same by Stanford's tokenizer, which tells captions apart by lines: one line a caption, and none empty. None
    if it does not run: its Java may be a stub, and its files lie in pycocoevalcap's folder, which may be read-only."""
    lines = {i: [{"caption": " ".join(apart(text).split()) or "."} for text in group] for i, group in texts.items()}
    try:
        found = PTBTokenizer().tokenize(lines)
    except (OSError, ValueError):
        return None
    return found if all(len(found.get(i, ())) == len(group) for i, group in texts.items()) else None


def score(scorer: type, tokens: tuple[dict, dict], count: int = 1) -> list[float | str]:
    """The `count` scores of one of pycocoevalcap's classes in percent, or as often why there are none."""
    program = None
    try:
        program = scorer()
        found = program.compute_score(*tokens)[0]
        return [100 * float(value) for value in (found if count > 1 else [found])]
    except Exception as error:  # whatever is wrong in there, it must not cost the other columns
        if (lock := getattr(program, "lock", None)) is not None and lock.locked():
            lock.release()  # METEOR keeps it after an error, and its destructor would wait for ever
        remedy = "; it needs Java 8 or newer and a path without spaces" if scorer in (Meteor, Spice) else ""
        why = utils.one_line(f"{type(error).__name__}: {error}", 100)
        return [f"not computed: pycocoevalcap failed ({why}){remedy}"] * count


def caption_table(split: str, numbers: Mapping) -> list[str]:
    """`Captioner.judge`'s numbers as lines: a row for the split, one for each domain, then what is missing."""
    rows = {split: numbers, **{f"  {name}": numbers[name] for name in DOMAINS if name in numbers}}
    lines = [f"{'':8}" + "".join(f"{column:>9}" for column in CAPTION_COLUMNS) + f"   ({numbers['tokenizer']} tokens)"]
    missing = {}
    for name, row in rows.items():
        cells = {column: row[column] for column in CAPTION_COLUMNS}
        missing |= {f"{column}: {why}": None for column, why in cells.items() if isinstance(why, str)}
        shown = (f"{x:9.2f}" if isinstance(x, float) else f"{'-':>9}" for x in cells.values())
        lines.append(f"{name:8}" + "".join(shown))
    return [*lines, *missing]
