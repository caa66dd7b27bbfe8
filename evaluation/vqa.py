"""Visual question answering: the official accuracy (visualqa.org/evaluation.html), and `Answerer` of whole splits.

The accuracy is the mean over all ten sets of nine annotators of min(annotators who agree / 3, 1), after both sides'
answers were normalised.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import utils
from dataset import create_dataset
from dataset.annotations import ANNOTATORS, read_answer_list
from dataset.text import Tokenizer
from dataset.vqa import EvalBatches, encode_answers, question_limits
from evaluation import Record
from evaluation.sharded import eval_loader, evaluating, run_sharded
from models.vqa import VQAModel

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # every mark but the period, the apostrophe and the colon
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # one that starts no decimals

# The words that get their apostrophes back: each is also recognised with any one apostrophe missing.
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

FEW_TYPES = 12  # question types that a table shows; VQA v2 has 65
SCORING = ("rules", "program")
Reference = str | Sequence[str] | Mapping[str, float]  # one answer, ten annotators' answers, or scores by answer


class Answerer:
    """Answers and scores the splits of a configuration; `batches`: {split: EvalBatches}, made, and checked, at once."""

    def __init__(self, cfg: utils.Config, tokenizer: Tokenizer, device: torch.device, run: Record):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        datasets = {split: create_dataset("vqa_eval", cfg, split) for split in ("val", "test") if cfg.data[split]}
        self.batches = {
            split: EvalBatches(dataset, tokenizer, question_limits(cfg), cfg.eval.batch_size)
            for split, dataset in datasets.items()
        }
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.answers: list[str] | None = None  # the closed list, in rank mode
        if cfg.answer.mode == "rank":
            self.answers = read_answer_list(cfg.data.answer_list)
            parts = encode_answers(tokenizer, self.answers, cfg.text.max_answer_tokens)
            self.answer_tensors = [part.to(device) for part in parts]
        for split, dataset in datasets.items():
            run.info(f"{split}: {len(dataset)} questions; answers from: {dataset.source}")

    def evaluate(self, model: VQAModel, split: str, step: int = 0, final: bool = False) -> dict:
        """Answer a split in all processes; -> its metrics (percent; without references only the number of questions).

        step: optimizer steps done, for the log; final: at the end of the script (see `Record.log`), when the answers go
        into vqa_result.json (test) or vqa_result_val.json.
        """
        dataset = self.batches[split].dataset
        answers = self.predict(model, split)
        if final and utils.is_main():
            name = "vqa_result.json" if split == "test" else "vqa_result_val.json"
            write_result(dataset.ids, answers, self.run.dir / name)
        if dataset.references is None:
            return {"questions": len(answers)}
        numbers = vqa_metrics(
            answers, dataset.references, dataset.answer_types, dataset.question_types, self.cfg.eval.scoring
        )
        types = {f"accuracy/{key}": value for key, value in numbers["by_answer_type"].items()}
        self.run.log(step, {key: numbers[key] for key in ("accuracy", "constant")} | types, split, final)
        self.run.info(vqa_table(split, numbers))
        return numbers

    def predict(self, model: VQAModel, split: str) -> list[str]:
        """The answers of all questions of a split, in the data set's order, in every process."""
        batches = self.batches[split]

        def answer(batch: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
            index = batch.pop("index")
            with utils.autocast(self.device, self.precision):
                return index, self.answer(model, utils.to_device(batch, self.device))

        loader = eval_loader(batches, None, num_workers=self.cfg.data.num_workers, device=self.device)
        shown = {"label": f"answering {split}", "unit": "questions", "log": self.run.info}
        with evaluating(model):
            return run_sharded(loader, answer, len(batches.dataset), **shown)

    def answer(self, model: VQAModel, batch: dict[str, Tensor]) -> list[str]:
        """An answer to each question of a batch of EvalBatches."""
        settings = self.cfg.answer
        if self.answers is not None:
            best, _ = model.rank(batch, *self.answer_tensors, k=settings.k_test)
            return [self.answers[place] for place in best.tolist()]
        options = {key: settings[key] for key in ("beams", "min_tokens", "max_tokens", "length_penalty")}
        return [self.tokenizer.decode_answer(ids) for ids in model.answer(batch, **options)]


def write_result(ids: Sequence[int | str], answers: Sequence[str], path: Path) -> None:
    """Write [{"question_id", "answer"}] after checking that every question is answered exactly once, with a string."""
    entries = [{"question_id": key, "answer": answer} for key, answer in zip(ids, answers, strict=True)]
    if len({entry["question_id"] for entry in entries}) != len(ids) or not all(isinstance(a, str) for a in answers):
        raise utils.UserError(f"{path}: not written: a question has no answer or more than one")
    utils.write_json(path, entries)


# ------------------------------------------------------------------------------------------------------------
# Accuracy


def vqa_accuracy(prediction: str, reference: Reference, scoring: str = "rules") -> float:
    """The official accuracy of one answer, 0 to 1: min(matching annotators / 3, 1), averaged over all ten sets of nine.

    Args:
        prediction: the answer given.
        reference: what the ten annotators said; a single answer (a string or a list of one) is compared exactly, and
            in a map {answer: score} (LXMERT's and mPLUG's minival) the normalised prediction is looked up.
        scoring: "rules": as the evaluation page says, prediction and annotators' answers are normalised alike.
            "program": as the published program does, to the letter: the prediction is normalised; the annotators'
            answers (which the official files hold nearly normalised) lose their punctuation, and only where they are
            not all the same. An annotator's "none" or "two" then matches nothing.
    """
    if isinstance(reference, Mapping):
        prediction = normalise_answer(prediction)
        return max(
            (score for answer, score in reference.items() if normalise_answer(answer) == prediction), default=0.0
        )
    answers = [reference] if isinstance(reference, str) else list(reference)
    if scoring not in SCORING or len(answers) not in (1, ANNOTATORS):
        raise ValueError(f"scoring {scoring!r} with {len(answers)} answers: {' or '.join(SCORING)}, 1 or {ANNOTATORS}")
    prediction = normalise_answer(prediction)
    if scoring == "rules":
        answers = [normalise_answer(answer) for answer in answers]
    elif len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    matches = sum(answer == prediction for answer in answers)
    if len(answers) == 1:
        return float(matches)
    # Of the sets of nine, `matches` leave out an annotator who agrees with the prediction.
    without, within = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (ANNOTATORS - matches) * within) / ANNOTATORS


def normalise_answer(answer: str) -> str:
    """Lower case, no punctuation, digits for number words, no articles, apostrophes in contractions."""
    words = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(answer: str) -> str:
    """Marks out, as the official program does it, and periods that start no decimals.

    A mark becomes a space; it vanishes where it stands beside a space somewhere in the answer, and every mark does
    where the answer has a comma between two digits (100,978 -> 100978).
    """
    in_number = COMMA_IN_NUMBER.search(answer) is not None
    stripped = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if beside_space or in_number else " ")
    return PERIOD.sub("", stripped)


def vqa_metrics(
    predictions: Sequence[str],
    references: Sequence[Reference],
    answer_types: Sequence[str | None],
    question_types: Sequence[str | None],
    scoring: str = "rules",
) -> dict:
    """Accuracies of a split in percent; all arguments but `scoring` are lists with one item a question.

    Returns:
        {"questions", "accuracy", "by_answer_type": {type: accuracy}, "by_question_type", "constant",
        "constant_by_question_type"}: constant is what the best single answer of each question type reaches; a question
        without a type counts overall only, and as one more type for `constant`.
    """
    if not predictions:
        raise ValueError("vqa_metrics needs at least one question")
    scores = [vqa_accuracy(*pair, scoring) for pair in zip(predictions, references, strict=True)]
    constants: dict[str | None, dict[str, float]] = {}
    counts: dict[str | None, int] = {}
    for reference, kind in zip(references, question_types, strict=True):
        totals = constants.setdefault(kind, {})
        counts[kind] = counts.get(kind, 0) + 1
        # Only what somebody said can score; a prediction is normalised first, so two spellings are one answer.
        for answer in {normalise_answer(said) for said in ([reference] if isinstance(reference, str) else reference)}:
            totals[answer] = totals.get(answer, 0.0) + vqa_accuracy(answer, reference, scoring)
    best = {kind: max(totals.values()) for kind, totals in constants.items()}
    return {
        "questions": len(scores),
        "accuracy": 100 * sum(scores) / len(scores),
        "by_answer_type": _mean_by_type(scores, answer_types),
        "by_question_type": _mean_by_type(scores, question_types),
        "constant": 100 * sum(best.values()) / len(scores),
        "constant_by_question_type": {k: 100 * best[k] / counts[k] for k in sorted(filter(None, best))},
    }


def vqa_table(split: str, numbers: dict) -> str:
    """The accuracies of one split (of `vqa_metrics`) beside those of constant answers, as a small text table."""
    overall = f"{numbers['accuracy']:6.2f}  constant {numbers['constant']:6.2f}"
    lines = [f"{split:22} {overall}  ({numbers['questions']} questions)"]
    constants = numbers["constant_by_question_type"]
    if len(constants) > FEW_TYPES:
        lines += [f"  {kind:20} {value:6.2f}" for kind, value in numbers["by_answer_type"].items()]
    else:
        types = numbers["by_question_type"].items()
        lines += [f"  {kind:20} {value:6.2f}  constant {constants[kind]:6.2f}" for kind, value in types]
    return "\n".join(lines)


def _mean_by_type(scores: Sequence[float], types: Sequence[str | None]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for score, kind in zip(scores, types, strict=True):
        if kind is not None:
            groups.setdefault(kind, []).append(score)
    return {kind: 100 * sum(group) / len(group) for kind, group in sorted(groups.items())}
