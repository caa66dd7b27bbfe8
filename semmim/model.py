"""`SemMIM`: images and sentences to features, matches, captions and answers, by the model of any stage's checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn

import utils
from dataset.annotations import check_question
from dataset.caption import prompt_text
from dataset.reading import AnyImage, read_batches
from dataset.text import clean_caption
from dataset.transforms import test_transform
from dataset.vqa import encode_answers, encode_questions, question_limits, question_parts
from evaluation.zero_shot import class_features, class_probabilities
from models.caption import CaptionModel
from models.vqa import VQAModel
from semmim import files
from semmim.card import card, what_is_new

TEMPLATES = ("{}", "a {}", "an image of a {}", "a photo of a {}")  # of zero-shot classification
ANSWERING = ("beams", "min_tokens", "max_tokens", "length_penalty")


class SemMIM(nn.Module, PyTorchModelHubMixin, library_name="semmim"):
    """A trained model for use, not for training: no weight asks for a gradient. Made by `from_pretrained`.

    Everywhere `images` are paths, PIL images, arrays [H, W, 3] of bytes or what `preprocess` returns, or one of them
    alone; `texts` are strings or one string. Images are preprocessed, texts are cleaned and cut as the checkpoint's own
    stage does it when it evaluates. Work is done in batches of `batch_size` on the device where the model is
    (`model.to("cuda")`), results are on the CPU. A file that cannot be read, or an empty text, is a utils.UserError.

    (models.semmim.SemMIM is the backbone inside, on tensors: `model.backbone`.)
    """

    def __init__(self, content: files.Content, precision: str = "fp32", batch_size: int = 64):
        super().__init__()
        self.content = content
        self.backbone, self.tokenizer = content.backbone, content.tokenizer
        self.settings, self.stage = content.settings, content.stage
        self.precision, self.batch_size = precision, batch_size
        self._resolved: dict[str, str] = {}  # device type -> what `precision` means there
        self.preprocess: Callable[[Image.Image], Tensor] = test_transform(self.backbone.image_encoder.image_size)
        self.requires_grad_(False)
        self.eval()

    # --------------------------------------------------------------------------------------------- from and to disk

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        batch_size: int = 64,
        image_size: int | None = None,
        **hub,
    ) -> "SemMIM":
        """Load a model; no pickle is run.

        Args:
            source: a checkpoint of any stage (.pth), a run's folder, a folder that `save_pretrained` wrote, or the name
                of a hub repository that `push_to_hub` filled.
            device: "cpu", "cuda", "cuda:1" or "auto" (a GPU where there is one); any device later by `to`.
            precision: "fp32", "bf16", or "auto": bf16 where the device has it in hardware.
            batch_size: images of one forward.
            image_size: another resolution than the model's, in pixels; positions are interpolated.
            hub: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            utils.UserError: nothing of that name, or files that are damaged or of something else.
        """
        if batch_size < 1:
            raise utils.UserError(f"batch_size: {batch_size} must be at least 1")
        where = torch.device(utils.choose_device(device))
        utils.resolve_precision(precision, where)  # a wrong word is known before anything is loaded
        return cls(files.read(source, image_size, **hub), precision, batch_size).to(where)

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` of the mixin write: see semmim/files.py."""
        files.write(self.content, save_directory)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """See semmim/card.py."""
        return ModelCard(card(self.content))

    @property
    def device(self) -> torch.device:
        return self.backbone.log_temperature.device

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # ------------------------------------------------------------------------------------------- features, matching

    @torch.no_grad()
    def encode_image(self, images: AnyImage | Sequence[AnyImage]) -> Tensor:
        """[N, E] float32, L2-normalized: a product with `encode_text`'s is the cosine that ITC was trained on."""
        found = [self._encode_images(batch)[1].float().cpu() for batch, _ in self._batches(images)]
        return torch.cat(found) if found else self._nothing()

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """[N, E] float32, L2-normalized; see `encode_image`."""
        found = [feat.float().cpu() for _, _, feat in self._encode_texts(texts)]
        return torch.cat(found) if found else self._nothing()

    @torch.no_grad()
    def match(self, images: AnyImage | Sequence[AnyImage], texts: str | Sequence[str]) -> Tensor:
        """[N, T] float32: the probability that the fusion encoder gives to image n and text t being a pair.

        Every pair is fused: for many candidates take the best by cosine first (tools/predict.py retrieve does).
        """
        columns = list(self._encode_texts(texts))
        rows = []
        for batch, _ in self._batches(images):
            image_embeds, _ = self._encode_images(batch)
            with self._autocast():
                memory = self.backbone.fusion_encoder.project_memory(image_embeds)
            rows.append(torch.cat([self._match(memory, len(batch), *column[:2]) for column in columns], 1))
        return torch.cat(rows) if rows else torch.zeros(0, sum(len(mask) for _, mask, _ in columns))

    def _match(self, memory: list, images: int, text_embeds: Tensor, mask: Tensor) -> Tensor:
        """[B, T] of B images' keys and values and T texts; as many pairs at once as keep a forward small."""
        found, width = [], max(1, 16 * self.batch_size // images)
        with self._autocast():
            for embeds, some in zip(text_embeds.split(width), mask.split(width), strict=True):
                # the texts of an image are neighbors: no row of keys and values is copied
                fused = self.backbone.fuse(embeds.repeat(images, 1, 1), some.repeat(images, 1), memory, keep=1)
                found.append(self.backbone.itm_logits(fused).float().softmax(-1)[:, 1].view(images, -1).cpu())
        return torch.cat(found, 1)

    @torch.no_grad()
    def class_features(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """[C, E]: a class's feature is the mean of its sentences', normalized again; {} in a template is its name."""
        if wrong := [template for template in templates if "{}" not in template]:
            raise utils.UserError(f"template {wrong[0]!r}: write {{}} where the name of the class belongs")
        if not classes or not templates:
            raise utils.UserError("no class or no template is given")
        sentences = [template.replace("{}", name) for name in classes for template in templates]
        return class_features(self.encode_text(sentences).view(len(classes), len(templates), -1))

    def classify(
        self,
        images: AnyImage | Sequence[AnyImage],
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> Tensor:
        """[N, C] probabilities of the classes, zero-shot: softmax of the cosines over the learned temperature."""
        features = self.class_features(classes, templates)
        return class_probabilities(self.encode_image(images), features, self.temperature)

    @property
    def temperature(self) -> float:
        """That of ITC's softmax."""
        return float(self.backbone.temperature())

    # -------------------------------------------------------------------------------------------------------- text

    def unlearned(self, task: str) -> str | None:
        """A line where the model was never trained for `task` ("caption", "vqa"); UserError where it has no decoder."""
        return what_is_new(self.content, task)

    @torch.no_grad()
    def caption(
        self,
        images: AnyImage | Sequence[AnyImage],
        *,
        prompt: str | None = None,
        labels: Sequence[str] = (),
        **options,
    ) -> list[str]:
        """A caption of each image.

        prompt: what the text encoder reads before (None: the checkpoint's own); labels: names of objects, for models
        that were trained with them; options: those of models.generation.generate (mode, beams, min_tokens, ...), the
        checkpoint's own where they are not given.
        """
        self.unlearned("caption")
        settings = self.settings.caption
        text = prompt_text(settings.text.prompt if prompt is None else prompt, labels)
        ids, _ = self.tokenizer.encode([text], settings.text.max_prompt_tokens)  # one for all: nothing is padded
        model, found = CaptionModel(self.backbone, self.tokenizer), []
        for batch, _ in self._batches(images):
            prompts = ids.expand(len(batch), -1).to(self.device)
            with self._autocast():
                sequences, _ = model.generate(batch, prompts, None, **{**settings.generation, **options})
            found += [self.tokenizer.decode_caption(row) for row in sequences.tolist()]
        return found

    @torch.no_grad()
    def answer(
        self,
        images: AnyImage | Sequence[AnyImage],
        questions: str | Sequence[str],
        *,
        labels: str = "",
        ocr: str = "",
        answers: Sequence[str] | None = None,
        **options,
    ) -> list[str]:
        """An answer to each question about the image in the same place; one image, or one question, stands for all.

        labels: names of objects, such as "dog&&frisbee"; ocr: words written in the image; answers: a closed list to
        choose from, None: the answer is written; options: beams, min_tokens, max_tokens, length_penalty of writing.
        """
        self.unlearned("vqa")
        images, questions = list(_several(images)), list(_several(questions))
        if len(questions) == 1:
            questions *= len(images)
        if len(images) not in (1, len(questions)):
            raise utils.UserError(
                f"{len(images)} images and {len(questions)} questions: give as many, or one of either"
            )
        if len(images) == 1:  # read once for all of its questions
            groups = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
            batches = ((batch, group) for batch, _ in self._batches(images) for group in groups)
        else:
            batches = ((batch, [questions[i] for i in places]) for batch, places in self._batches(images))
        return [text for batch, group in batches for text in self._answer(batch, group, labels, ocr, answers, options)]

    def _answer(self, images: Tensor, questions: list[str], labels: str, ocr: str, answers, options: dict) -> list[str]:
        """images [B, 3, S, S], or [1, 3, S, S] that all B questions are about."""
        settings, entries = self.settings.vqa, []
        for question in questions:
            entry = {"question": question, "object_label": labels, "ocr": [[[], word] for word in ocr.split()]}
            if problem := check_question(entry):
                raise utils.UserError(problem)
            entries.append(question_parts(entry, True, True, settings.text.max_ocr_words))
        ids, mask = encode_questions(self.tokenizer, entries, question_limits(settings))
        batch = {"image": images, "input_ids": ids, "attention_mask": self.tokenizer.padding(mask)}
        if len(images) != len(questions):
            batch["image_rows"] = torch.zeros(len(questions), dtype=torch.int64)
        batch, model = utils.to_device(batch, self.device), VQAModel(self.backbone, self.tokenizer)
        with self._autocast():
            if answers is None:
                own = {key: settings.answer[key] for key in ANSWERING}
                return [self.tokenizer.decode_answer(row) for row in model.answer(batch, **{**own, **options})]
            encoded = encode_answers(self.tokenizer, answers, settings.text.max_answer_tokens)
            best, _ = model.rank(batch, *(x.to(self.device) for x in encoded), k=settings.answer.k_test)
        return [answers[place] for place in best.tolist()]

    # ----------------------------------------------------------------------------------------------------- batches

    def clean(self, texts: str | Sequence[str]) -> list[str]:
        """The texts as the encoder reads them; UserError where nothing is left of one."""
        texts = _several(texts)
        cleaned = [clean_caption(text, self.settings.retrieval.data.max_words) for text in texts]
        if empty := [text for text, left in zip(texts, cleaned, strict=True) if not left]:
            raise utils.UserError(f"text {empty[0]!r}: nothing is left of it after cleaning; use words")
        return cleaned

    def _batches(self, images: AnyImage | Sequence[AnyImage]) -> Iterator[tuple[Tensor, list[int]]]:
        """(images [B, 3, S, S] on the device, their places)"""
        size = self.backbone.image_encoder.image_size
        for batch, places in read_batches(_several(images), self.preprocess, self.batch_size):
            if batch.shape[1:] != (3, size, size):
                raise utils.UserError(
                    f"an image tensor is {list(batch.shape[1:])}, the model takes [3, {size}, {size}]"
                )
            yield batch.to(self.device), places

    def _encode_images(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self.backbone.encode_image(batch)

    def _encode_texts(self, texts: str | Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(text_embeds [B, L, D], mask [B, L], text_feat [B, E]) on the device, in batches"""
        cleaned, size = self.clean(texts), 4 * self.batch_size
        for start in range(0, len(cleaned), size):
            encoded = self.tokenizer.encode(cleaned[start : start + size], self.settings.retrieval.text.max_tokens)
            ids, mask = (x.to(self.device) for x in encoded)
            with self._autocast():
                embeds, feat = self.backbone.encode_text(ids, mask)
            yield embeds, mask, feat

    def _nothing(self) -> Tensor:
        return torch.zeros(0, self.backbone.description["embed_dim"])

    def _autocast(self):
        kind = self.device.type
        if kind not in self._resolved:  # asked once a device, not every batch
            self._resolved[kind] = utils.resolve_precision(self.precision, self.device)
        return utils.autocast(self.device, self._resolved[kind])


def _several(items) -> Sequence:
    """A list of one where one image or text is given alone; a tensor [N, 3, S, S] is N images."""
    if isinstance(items, Tensor):
        return [items] if items.ndim == 3 else list(items)
    return items if isinstance(items, list | tuple) else [items]
