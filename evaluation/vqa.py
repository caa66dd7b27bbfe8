"""Visual question answering: the official accuracy (visualqa.org/evaluation.html), and `Answerer` of whole splits.

The accuracy is the mean over all ten sets of nine annotators of min(annotators who agree / 3, 1). Which answers agree
depends on the official program's version; `answer_scores` has both.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

import utils
from dataset import create_dataset
from dataset.advice import warn_of_cut_texts
from dataset.official import ANNOTATORS
from dataset.questions import read_answer_list
from dataset.text import Tokenizer
from dataset.vqa import EvalBatches, encode_answers, question_limits
from evaluation import Record
from evaluation.sharded import eval_loader, evaluating, run_sharded
from evaluation.written import REWRITTEN, Rewrite, rewriting, rewritten_answers
from models.generation import answer_options
from models.vqa import VQAModel

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # every mark but the period, the apostrophe and the colon
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # one that starts no decimals
PERIODS = 32  # of them the official program takes out no more: it passes a flag where the count belongs

# The words that get their apostrophes back: each is also recognized with any one apostrophe missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
APOSTROPHES = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official list has this one the wrong way round

SCORING = ("official", "official_2017")
Reference = str | Sequence[str] | Mapping[str, float]  # one answer, ten annotators' answers, or scores by answer


# ------------------------------------------------------------------------------------------------------------- Accuracy


def vqa_accuracy(prediction: str, reference: Reference, scoring: str = "official") -> float:
    """The accuracy of one answer, 0 to 1, as `scoring` says: see `answer_scores`."""
    return look_up(prediction, *answer_scores(reference, scoring))


def answer_scores(reference: Reference, scoring: str = "official") -> tuple[bool, dict[str, float]]:
    """What a reference gives to answers: (whether a prediction is normalized first, {answer: accuracy from 0 to 1}).

    reference: the answers of ten annotators, see `leave_one_out`. A single answer (a string or a list of one) is right
        or wrong, and a map {answer: score} (LXMERT's and mPLUG's minival) gives its scores, both sides normalized. A
        reference without a word gives nothing to any answer.
    scoring: how the ten annotators' answers are compared with the prediction.
        "official": as the official program does since March 2021. If all ten are the same, white space around them
        apart, the prediction must be the very same; otherwise both sides are normalized.
        "official_2017": as it did before; ALBEF's and mPLUG's code has this version, their published numbers are the
        server's. The prediction is always normalized; the annotators' answers only lose their punctuation, and only if
        they are not all the same. An annotator's "none" or "two" then matches nothing.
    """
    if isinstance(reference, Mapping):
        scores: dict[str, float] = defaultdict(float)
        for answer, score in reference.items():
            form = normalize_answer(answer)
            scores[form] = max(float(score), scores[form])
        return True, scores
    answers = [reference] if isinstance(reference, str) else list(reference)
    if is_empty(answers):
        return True, {}
    if len(answers) == 1:
        return True, {normalize_answer(answers[0]): 1.0}
    normalized = True
    if scoring == "official_2017":
        forms = answers if len(set(answers)) == 1 else [strip_punctuation(answer) for answer in answers]
    else:
        forms = [trim(answer) for answer in answers]
        normalized = len(set(forms)) > 1
        forms = [normalize_answer(form) for form in forms] if normalized else forms
    return normalized, {form: leave_one_out(count) for form, count in Counter(forms).items()}


def leave_one_out(matches: int) -> float:
    """min(annotators who agree / 3, 1), the mean over the sets of nine of the ten, `matches` of whom agree."""
    # Of the sets of nine, `matches` leave out an annotator who agrees with the prediction.
    without, within = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (ANNOTATORS - matches) * within) / ANNOTATORS


def look_up(prediction: str, normalized: bool, scores: Mapping[str, float]) -> float:
    """The accuracy of a prediction, by `answer_scores` of its reference."""
    return scores.get(normalize_answer(prediction) if normalized else trim(prediction), 0.0)


def is_empty(reference: Reference) -> bool:
    """Whether a reference holds no answer: an empty map, or nothing but white space."""
    return not any(answer.strip() for answer in ([reference] if isinstance(reference, str) else reference))


def trim(answer: str) -> str:
    """No line breaks or tabs, and no white space around the answer."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(100_000)
def normalize_answer(answer: str) -> str:
    """Lower case, no punctuation, digits for number words, no articles, apostrophes in contractions."""
    words = strip_punctuation(trim(answer)).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(100_000)
def strip_punctuation(answer: str) -> str:
    """Marks out, as the official program does it, and periods that start no decimals.

    A mark becomes a space; it vanishes if it stands beside a space somewhere in the answer, and every mark does if the
    answer has a comma between two digits (100,978 -> 100978).
    """
    in_number = COMMA_IN_NUMBER.search(answer) is not None
    stripped = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if beside_space or in_number else " ")
    return PERIOD.sub("", stripped, count=PERIODS)


def vqa_metrics(
    predictions: Sequence[str],
    references: Sequence[Reference],
    answer_types: Sequence[str | None],
    question_types: Sequence[str | None],
    scoring: str = "official",
) -> dict:
    """Accuracies of a split in percent; all arguments but `scoring` are lists with one item a question.

    -> {"questions", "empty_references", "accuracy", "by_answer_type": {type: accuracy}, "by_question_type", "constant",
    "constant_by_question_type"}: constant is what the best single answer of each question type reaches; a question
    without a type counts overall only, and as one more type for `constant`. An empty reference scores 0.
    """
    found = [answer_scores(reference, scoring) for reference in references]
    scores = [look_up(answer, *given) for answer, given in zip(predictions, found, strict=True)]
    groups: dict[str | None, list[int]] = defaultdict(list)
    for place, kind in enumerate(question_types):
        groups[kind].append(place)
    best = {
        kind: best_constant([references[i] for i in places], [found[i] for i in places])
        for kind, places in groups.items()
    }
    return {
        "questions": len(scores),
        "empty_references": sum(map(is_empty, references)),
        "accuracy": 100 * sum(scores) / len(scores),
        "by_answer_type": mean_by_type(scores, answer_types),
        "by_question_type": mean_by_type(scores, question_types),
        "constant": 100 * sum(best.values()) / len(scores),
        "constant_by_question_type": {k: 100 * best[k] / len(groups[k]) for k in sorted(best.keys() - {None})},
    }


def mean_by_type(scores: Sequence[float], types: Sequence[str | None]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for score, kind in zip(scores, types, strict=True):
        if kind is not None:
            groups[kind].append(score)
    return {kind: 100 * sum(group) / len(group) for kind, group in sorted(groups.items())}


def best_constant(references: Sequence[Reference], found: Sequence[tuple[bool, dict[str, float]]]) -> float:
    """The sum of accuracies that the best single answer reaches; `found`: `answer_scores` of the references."""
    totals: dict[bool, Counter] = {True: Counter(), False: Counter()}
    for normalized, scores in found:
        for answer, score in scores.items():
            totals[normalized][answer] += score
    # Only an answer that a reference holds can score.
    answers = {answer for one in references for answer in ([one] if isinstance(one, str) else one)}
    return max((sum(look_up(answer, kind, totals[kind]) for kind in totals) for answer in answers), default=0.0)


def vqa_table(split: str, numbers: dict) -> list[str]:
    """The accuracies of one split (of `vqa_metrics`) as the lines of a text table."""
    overall = f"{numbers['accuracy']:6.2f}  constant {numbers['constant']:6.2f}"
    types = (f"  {kind:20} {value:6.2f}" for kind, value in numbers["by_answer_type"].items())
    return [f"{split:22} {overall}  ({numbers['questions']} questions)", *types]


# --------------------------------------------------------------------------------------------------------------- Splits


class Answerer:
    """Answers and scores the splits of a configuration; `batches`: {split: EvalBatches}, made, and checked, at once."""

    def __init__(self, cfg: utils.Config, tokenizer: Tokenizer, device: torch.device, run: Record):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        datasets = {split: create_dataset("vqa_eval", cfg, split) for split in ("val", "test") if cfg.data[split]}
        warn_of_cut_texts(datasets, cfg, tokenizer)
        self.batches = {
            split: EvalBatches(dataset, tokenizer, question_limits(cfg), cfg.eval.batch_size)
            for split, dataset in datasets.items()
        }
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.rewrite: dict[str, Rewrite] = {}  # by split, see evaluation/written.py
        self.answers: list[str] | None = None  # the closed list, in rank mode
        if cfg.answer.mode == "rank":
            self.answers = read_answer_list(cfg.data.answer_list)
            parts = encode_answers(tokenizer, self.answers, cfg.text.max_answer_tokens)
            self.answer_tensors = [part.to(device) for part in parts]
        for split, dataset in datasets.items():
            run.info(f"{split}: {len(dataset)} questions; answers from: {dataset.source}")
            given = dataset.references or ()
            every = [answer for one in given for answer in ([one] if isinstance(one, str) else one)]
            self.rewrite[split] = rewriting(split, every, tokenizer, run.info, answers=True)
            if empty := sum(map(is_empty, given)):
                run.info(f"{split}: {empty} of {len(dataset)} references hold no answer; their questions score 0")

    def evaluate_all(self, model: VQAModel) -> None:
        """Answer all splits; write the answers, and metrics.json split by split: what is computed is kept."""
        numbers = {}
        for split in self.batches:
            numbers[split] = self.evaluate(model, split, final=True)
            self.run.write_metrics(numbers)

    def evaluate(self, model: VQAModel, split: str, step: int = 0, final: bool = False) -> dict:
        """Answer a split in all processes; -> its metrics (percent; without references only the number of questions).

        step, final: see `Record.log`; at the end the answers go into vqa_result.json (test) or vqa_result_val.json.
        """
        dataset = self.batches[split].dataset
        answers = self.predict(model, split)
        if final and utils.is_main():
            name = "vqa_result.json" if split == "test" else "vqa_result_val.json"
            pairs = zip(dataset.ids, answers, strict=True)
            utils.write_json(self.run.dir / name, [{"question_id": key, "answer": answer} for key, answer in pairs])
        if dataset.references is None:
            return {"questions": len(answers)}
        rewrite, types = self.rewrite[split], (dataset.answer_types, dataset.question_types)
        references = [rewritten_answers(reference, rewrite) for reference in dataset.references]
        numbers = vqa_metrics(rewrite(answers), references, *types, self.cfg.eval.scoring)
        numbers |= {} if rewrite is list else REWRITTEN
        logged = {key: numbers[key] for key in ("accuracy", "constant")}
        logged |= {f"accuracy/{key}": value for key, value in numbers["by_answer_type"].items()}
        self.run.log(step, logged, split, final)
        for line in vqa_table(split, numbers):
            self.run.info(line)
        return numbers

    def predict(self, model: VQAModel, split: str) -> list[str]:
        """The answers of all questions of a split, in the data set's order, in every process."""
        batches = self.batches[split]

        def answer(batch: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
            index = batch.pop("index")
            with utils.autocast(self.device, self.precision):
                return index, self.answer(model, utils.to_device(batch, self.device))

        loader = eval_loader(batches, None, num_workers=self.cfg.data.num_workers, device=self.device)
        with evaluating(model):
            return run_sharded(loader, answer, len(batches.dataset), label=f"answering {split}")

    def answer(self, model: VQAModel, batch: dict[str, Tensor]) -> list[str]:
        """An answer to each question of a batch of EvalBatches."""
        settings = self.cfg.answer
        if self.answers is not None:
            best, _ = model.rank(batch, *self.answer_tensors, k=settings.k_test)
            return [self.answers[place] for place in best.tolist()]
        return [self.tokenizer.decode_answer(ids) for ids in model.answer(batch, answer_options(settings))]
