"""`SemMIM`: images and sentences to features, matches, captions and answers, by the model of any stage's checkpoint."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from dataset.caption import prompt_text
from dataset.text import clean_caption, clean_question, has_word
from dataset.vqa import Parts, encode_answers, encode_questions, question_limits, question_parts
from evaluation import ranking
from models.caption import CaptionModel
from models.generation import Generation, answer_options
from models.vqa import VQAModel
from models.weights import check_value
from semmim import files, inputs
from semmim.card import card
from semmim.inputs import Images, LeftOut, Preprocessed, Texts
from utils import UserError

TEMPLATES = ("{}", "a {}", "an image of a {}", "a photo of a {}")  # of zero-shot classification
K = 64  # candidates that `search` re-ranks
TAKE = {"match": "Pretrain.py or Retrieval.py", "caption": "Caption.py or Pretrain.py", "answer": "VQA.py"}
# What a stage's training teaches and keeps: captioning and question answering move the encoders and leave the
# projections and the matching head behind, so that features and matches of their checkpoints are wrong.
LEARNED = {
    "pretrain": ("match", "caption"),
    "retrieval": ("match",),
    "caption": ("caption",),
    "vqa": ("answer",),
    files.CONVERTED: ("match",),
}


@dataclass(frozen=True)
class Hit:
    """What was found for a query: the place of an image (or text) among those given, and its scores.

    score: what the order is by, None below the first k; cosine: of the two encoders' features.
    """

    number: int
    score: float | None
    cosine: float


def inference(method: Callable) -> Callable:
    """Run a method of the model without gradients and in its precision."""

    @wraps(method)
    def run(self, *args, **kwargs):
        with torch.no_grad(), utils.autocast(self.device, self.precision):
            return method(self, *args, **kwargs)

    return run


class SemMIM(nn.Module):
    """A trained model for use, not for training: it stays in eval mode. Made by `from_pretrained`.

    images: paths, PIL images, or what `preprocess` returned; one, several, or an iterator. texts: strings, alike.
    Images are preprocessed, and texts are cleaned and cut (a line says how many), as in the stage's evaluation. Work is
    done in batches of `batch_size` on the model's device (`model.to("cuda")`); results are on the CPU. Anything that
    cannot be used raises utils.UserError. (models.semmim.SemMIM is the backbone inside, on tensors: `model.backbone`.)
    """

    def __init__(self, content: files.Content, precision: str = "fp32", batch_size: int = 64):
        super().__init__()
        self.content = content
        self.backbone, self.tokenizer = content.backbone, content.tokenizer
        self.settings, self.stage = content.settings, content.stage
        check_value("batch_size", batch_size, int)
        self.precision, self.batch_size = precision, batch_size
        self.preprocess = partial(inputs.read_image, size=self.backbone.image_encoder.image_size)
        self._warned: set[str] = set()
        self.requires_grad_(False)
        self.eval()

    # --------------------------------------------------------------------------------------------- from and to disk

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device = "cpu", precision: str = "fp32", batch_size: int = 64
    ) -> "SemMIM":
        """Load a model; no pickle is run. UserError: nothing of that name, or files that are damaged.

        source: a checkpoint of any stage (.pth), a run's folder, a folder that `save_pretrained` wrote, or the name of
            a hub repository that holds such a folder.
        device: "cpu", "cuda", "cuda:1" or "auto" (a GPU if there is one); any device later by `to`.
        precision: "fp32", "bf16", or "auto": bf16 if the device has it in hardware. Weights stay in fp32.
        batch_size: images of one forward.
        """
        where = torch.device(utils.choose_device(str(device)))
        return cls(files.read(source), utils.resolve_precision(precision, where), batch_size).to(where)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write safetensors, config.json, vocab.txt and a model card into a new folder, or one of an earlier export."""
        return files.write(self.content, folder, card(self.content, LEARNED[self.stage]))

    @property
    def device(self) -> torch.device:
        return self.backbone.log_temperature.device

    def train(self, mode: bool = True) -> "SemMIM":
        """Stays in eval mode, whatever the module does that holds this one: dropout would change every result."""
        return super().train(False)

    def _apply(self, function: Callable, recurse: bool = True) -> "SemMIM":
        """What `to`, `cuda`, `half`, ... do to every tensor."""
        if function(torch.zeros(1)).dtype != torch.float32:
            raise UserError('the weights stay in fp32; for speed load the model with precision="bf16"')
        return super()._apply(function, recurse)

    # ------------------------------------------------------------------------------- features, matching, retrieval

    @inference
    def encode_image(self, images: Images) -> Tensor:
        """[N, E] float32, L2-normalized: a product with `encode_text`'s is the cosine that ITC was trained on."""
        self.needs("match")
        found = [self.backbone.encode_image(batch)[1].float().cpu() for batch, _ in self._read(images)]
        return ranking.finite(torch.cat(found), "image features")

    @inference
    def encode_text(self, texts: Texts) -> Tensor:
        """[N, E] float32, L2-normalized; see `encode_image`."""
        self.needs("match")
        cleaned, size, found = self.clean(texts), 4 * self.batch_size, []
        for start in range(0, len(cleaned), size):
            rows = self.tokenizer.encode(cleaned[start : start + size], self.settings.retrieval.text.max_tokens)
            found.append(self.backbone.encode_text(*(x.to(self.device) for x in rows))[1].float().cpu())
        return ranking.finite(torch.cat(found), "text features")

    def match(self, images: Images, texts: Texts) -> Tensor:
        """[N, T] float32: the probability that the fusion encoder gives to image n and text t being a pair.

        Every pair is fused: for many candidates use `search`.
        """
        self.needs("match")
        texts = self.clean(texts)
        rows = self._search(images, texts, True, len(texts), "itm+itc/t")
        odds = torch.zeros(len(rows), len(texts))  # log-odds: what the cosine adds to the score is taken away
        for row, hits in zip(odds, rows, strict=True):
            for hit in hits:
                row[hit.number] = hit.score - hit.cosine / self.temperature
        return odds.sigmoid()

    def search(
        self,
        images: Images,
        texts: Texts,
        *,
        images_ask: bool = False,
        k: int | None = None,
        left_out: LeftOut | None = None,
    ) -> list[list[Hit]]:
        """The images for each text, best first, in two stages: by cosine, then the first k by the fusion encoder.

        images_ask: the texts for each image instead; k: 0 for the cosine alone, None: see `order`; left_out: see
        `batches`.
        """
        self.needs("match")
        score, most = self.order()
        k = most if k is None else k
        check_value("k", k, int, low=0)
        return self._search(images, self.clean(texts), images_ask, k, score, left_out)

    def _search(
        self, images: Images, texts: list[str], images_ask: bool, k: int, score: str, left_out: LeftOut | None = None
    ) -> list[list[Hit]]:
        """The items of every query, best first, in the two stages of evaluation/ranking.py.

        texts: cleaned; k: candidates to re-rank, 0: none; score: of evaluation.ranking.SCORES.
        """
        places: list[int] = []  # of the images that can be read

        def numbered() -> Iterator[tuple[Tensor, Tensor]]:  # without gaps
            for batch, some in self._read(images, left_out):
                places.extend(some)
                yield batch, torch.arange(len(places) - len(some), len(places))

        rows = self.tokenizer.encode(texts, self.settings.retrieval.text.max_tokens)
        options = {"device": self.device, "precision": self.precision, "tokens": k > 0}
        encoded = ranking.extract_features(self.backbone, numbered(), None, *rows, **options)
        of_images, of_texts = (part.feats for part in encoded)
        asking, asked = (of_images, of_texts) if images_ask else (of_texts, of_images)
        cosines, ids = (asking @ asked.T).cpu().sort(dim=1, descending=True, stable=True)  # [Q, C]
        scores = cosines[:, :0]
        if k:  # of one direction
            some = ranking.Candidates(ids[:, :k], cosines[:, :k], ids[:, 0])
            none = ranking.Candidates(ids.new_zeros(len(asked), 0), torch.zeros(len(asked), 0), ids[:0, 0])
            both = (some, none) if images_ask else (none, some)
            found = ranking.rerank(self.backbone, *encoded, *both, score=score, precision=self.precision)
            scores = found[not images_ask]
        numbers, hits = list(range(len(texts))) if images_ask else places, []
        for row, cosine, scored in zip(ids.tolist(), cosines.tolist(), scores.tolist(), strict=True):
            best = [Hit(numbers[i], s, c) for i, c, s in zip(row[:k], cosine[:k], scored, strict=True)]
            rest = [Hit(numbers[i], None, c) for i, c in zip(row[k:], cosine[k:], strict=True)]
            hits.append(sorted(best, key=lambda hit: -hit.score) + rest)  # stable: equal scores by cosine
        return hits

    def order(self) -> tuple[str, int]:
        """(the score that re-ranks, the candidates that it re-ranks; 0: the cosine orders alone), as the checkpoint
        says was better on its validation images; otherwise the configuration's score and K candidates."""
        best, own = self.content.best.get("order"), self.settings.retrieval.rerank.score
        return (own if best in (None, "itc") else best), (0 if best == "itc" else K)

    # --------------------------------------------------------------------------------------------- classification

    def class_features(self, classes: Texts, templates: Texts = TEMPLATES) -> Tensor:
        """[C, E]: a class's feature is the mean of its sentences', normalized again; {} in a template is its name."""
        classes, templates = inputs.choices(classes, "classes"), inputs.several_texts(templates, "template")
        if not templates or not all("{}" in template for template in templates):
            raise UserError(f"templates {utils.shown(templates)}: write {{}} where the name of the class belongs")
        read: dict[tuple, str] = {}
        for name, pieces in zip(classes, self.tokenizer.word_pieces(self.clean(classes)), strict=True):
            if (other := read.setdefault(tuple(pieces), name)) != name:
                raise UserError(f"classes: {other!r} and {name!r} read the same with this vocabulary; use other words")
        sentences = [template.replace("{}", name) for name in classes for template in templates]
        return F.normalize(self.encode_text(sentences).view(len(classes), len(templates), -1).mean(1), dim=-1)

    def classify(self, images: Images, classes: Texts | Tensor, templates: Texts = TEMPLATES) -> Tensor:
        """[N, C] probabilities of the classes, zero-shot: softmax of the cosines over the learned temperature.

        classes: their names, two or more, or what `class_features` made of them.
        """
        features = classes if isinstance(classes, Tensor) else self.class_features(classes, templates)
        return (self.encode_image(images) @ features.T / self.temperature).softmax(-1)

    @property
    def temperature(self) -> float:
        """That of ITC's softmax."""
        return float(self.backbone.temperature())

    # -------------------------------------------------------------------------------------------------------- text

    @inference
    def caption(
        self, images: Images, *, prompt: str | None = None, labels: Texts = (), **options
    ) -> list[str] | list[list[str]]:
        """A caption of each image; with num_return above 1 a list of captions, best first, of each.

        prompt: what the text encoder reads before (None: the checkpoint's own); labels: names of objects, for models
        that were trained with them: a list, or "dog&&frisbee"; options: mode, beams, min_tokens, max_tokens,
        length_penalty, top_k, top_p, temperature and num_return of models.generation.Generation, by default the
        checkpoint's own.
        """
        self.needs("caption")
        settings = self.settings.caption
        written = Generation(**{**settings.generation, "num_return": 1, **options})
        prompt = settings.text.prompt if prompt is None else "".join(inputs.several_texts(prompt, "prompt"))
        text = prompt_text(prompt, inputs.object_labels(labels), self.tokenizer.lower)
        self._note_cut("prompts", [text], self.tokenizer.room(settings.text.max_prompt_tokens))
        ids, _ = self.tokenizer.encode([text], settings.text.max_prompt_tokens)  # one for all: nothing is padded
        model, found, count = CaptionModel(self.backbone, self.tokenizer), [], written.num_return
        for batch, _ in self._read(images):
            sequences, _ = model.generate(batch, ids.expand(len(batch), -1).to(self.device), None, written)
            found += [self.tokenizer.decode_caption(row) for row in sequences.tolist()]
        return found if count == 1 else [found[i : i + count] for i in range(0, len(found), count)]

    @inference
    def answer(
        self,
        images: Images,
        questions: Texts,
        *,
        labels: Texts = (),
        ocr: Texts = (),
        answers: Texts | None = None,
        **options,
    ) -> list[str] | list[list[str]]:
        """An answer to the question about each image; to several questions, a list of their answers for each image.

        labels: names of objects, a list or "dog&&frisbee"; ocr: words written in the image; answers: two or more to
        choose from, None: the answer is written; options: of writing it, as `caption` has them.
        """
        self.needs("answer")
        settings, model, found = self.settings.vqa, VQAModel(self.backbone, self.tokenizer), []
        written = replace(answer_options(settings.answer), **options)
        if answers is not None:
            answers = inputs.choices(answers, "answers")
            self._note_cut("answers", answers, settings.text.max_answer_tokens - 1)
            listed = encode_answers(self.tokenizer, answers, settings.text.max_answer_tokens)
            listed = [part.to(self.device) for part in listed]
        parts = self._questions(
            inputs.several_texts(questions, "question"), labels, " ".join(inputs.several_texts(ocr, "ocr"))
        )
        rows = [encode_questions(self.tokenizer, [part], question_limits(settings))[0] for part in parts]  # [1, L] each
        for batch, _ in self._read(images):
            image_embeds, table = self.backbone.image_encoder(batch), []  # one row a question
            for ids in rows:  # one for all images: nothing is padded
                ids = ids.expand(len(batch), -1).to(self.device)
                asked = {"image_embeds": image_embeds, "input_ids": ids, "attention_mask": None}
                if answers is None:
                    table.append([self.tokenizer.decode_answer(row) for row in model.answer(asked, written)])
                else:
                    best, _ = model.rank(asked, *listed, k=settings.answer.k_test)
                    table.append([answers[place] for place in best.tolist()])
            found += map(list, zip(*table, strict=True))
        return [texts[0] for texts in found] if isinstance(questions, str) else found

    def _questions(self, questions: list[str], labels: Texts, ocr: str) -> list[Parts]:
        """What the encoder reads of each question."""
        settings, lower = self.settings.vqa, self.tokenizer.lower
        if blank := [question for question in questions if not has_word(clean_question(question))]:
            raise UserError(f"the question {utils.shown(blank[0])} has no word")
        entry = {"object_label": "&&".join(inputs.object_labels(labels)), "ocr": [[[], word] for word in ocr.split()]}
        words, limits = settings.text.max_ocr_words, question_limits(settings)
        entries = ({**entry, "question": question} for question in questions)
        parts = [question_parts(entry, max_ocr_words=words, lower=lower) for entry in entries]
        self._note_cut("questions", [question for question, _, _ in parts], limits[0])
        self._note_cut("OCR texts", [clean_question(ocr, None, lower)], limits[1], words)
        self._note_cut("labels", [names for _, _, names in parts[:1]], limits[2])
        return parts

    # ----------------------------------------------------------------------------------------------------- batches

    def batches(self, images: Images, left_out: LeftOut | None = None) -> Iterator[tuple[Preprocessed, list[int]]]:
        """(preprocessed images [n, 3, S, S], which every other call takes, their places), read while they are used.

        left_out: called with the error of each image that cannot be read; None: a UserError instead.
        """
        size = self.backbone.image_encoder.image_size
        return inputs.read_batches(inputs.several_images(images), size, self.batch_size, left_out)

    def _read(self, images: Images, left_out: LeftOut | None = None) -> Iterator[tuple[Tensor, list[int]]]:
        """The batches as plain tensors on the device."""
        for batch, places in self.batches(images, left_out):
            yield batch.as_subclass(Tensor).to(self.device), places

    def clean(self, texts: Texts) -> list[str]:
        """The texts as the encoder reads them; UserError if nothing is left of one."""
        texts, settings = inputs.several_texts(texts), self.settings.retrieval
        if not texts:
            raise UserError("no text is given")
        cleaned = [clean_caption(text, None, self.tokenizer.lower) for text in texts]
        if "" in cleaned:
            empty = texts[cleaned.index("")]
            raise UserError(f"text {utils.shown(empty)}: nothing is left of it after cleaning; use words")
        self._note_cut("texts", cleaned, self.tokenizer.room(settings.text.max_tokens), settings.data.max_words)
        return [clean_caption(text, settings.data.max_words, self.tokenizer.lower) for text in texts]

    def _note_cut(self, what: str, texts: Sequence[str], room: int, max_words: int = sys.maxsize) -> None:
        """A line of warning if texts are longer than the model reads: `room` word pieces and `max_words` words."""
        pieces = self.tokenizer.word_pieces(texts)
        too_long = [len(ids) > room or len(text.split()) > max_words for ids, text in zip(pieces, texts, strict=True)]
        if any(too_long):
            first = utils.shown(texts[too_long.index(True)])
            self._warn(f"{sum(too_long)} of {len(texts)} {what} are longer than the model reads and cut, first {first}")

    def _warn(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            utils.logger.warning("%s", line)

    def needs(self, task: str) -> None:
        """UserError, naming the checkpoint to take, if the training of this one lost what `task` ("match", "caption",
        "answer") needs; one line of warning if the model can do it and was never trained for it."""
        who, learned = f"{self.content.name} (stage: {self.stage})", task in LEARNED[self.stage]
        if not (learned if task == "match" else self.backbone.decoder):
            raise UserError(f"{who}: its training did not keep what {task} needs; take a checkpoint of {TAKE[task]}")
        if not learned:
            self._warn(f"{who}: never trained to {task}; do not expect much")
