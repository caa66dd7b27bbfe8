"""What the tables of the paper report: recall@k of image-text retrieval, BLEU to SPICE of captions, VQA accuracy.

The rank of a query is 0-based: the number of candidates ranked before its best positive candidate.

Captions are evaluated by pycocoevalcap; `dataset/cider.py` has the reward of training.
"""

import contextlib
import io
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset.cider import caption_words
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

DOMAINS = ("in", "near", "out")  # of NoCaps: how far a picture's objects are from MSCOCO's
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
    program = None
    try:
        program = scorer()
        return 100 * float(program.compute_score(*tokens)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lock = getattr(program, "lock", None)
        if lock is not None and lock.locked():
            lock.release()  # pycocoevalcap's METEOR keeps it after an error, and its destructor would wait for ever
        with contextlib.suppress(AttributeError, OSError):
            program.meteor_p.stdin.close()  # what the dead program did not read; the destructor would print a traceback
        reason = " ".join(str(error).split())[:100]
        return f"not computed: its Java program failed ({reason}); it needs Java 8 or newer and a path without spaces"


def caption_table(split: str, numbers: Mapping, domains: Sequence[str] = ()) -> list[str]:
    """caption_metrics' columns as lines, a row for `numbers` and for each of its `domains`, then what is missing."""
    rows = {split: numbers, **{f"  {name}": numbers[name] for name in domains}}
    lines = [f"{'':8}" + "".join(f"{column:>9}" for column in CAPTION_COLUMNS) + f"   ({numbers['tokenizer']} tokens)"]
    for name, row in rows.items():
        cells = (row[column] for column in CAPTION_COLUMNS)
        lines.append(f"{name:8}" + "".join(f"{x:9.2f}" if isinstance(x, float) else f"{'-':>9}" for x in cells))
    return lines + [f"{column}: {numbers[column]}" for column in CAPTION_COLUMNS if isinstance(numbers[column], str)]


# ------------------------------------------------------------------------------------------------------------
# Visual question answering: the official accuracy and answer normalisation (visualqa.org/evaluation.html)
# ------------------------------------------------------------------------------------------------------------

ANNOTATORS = 10
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
