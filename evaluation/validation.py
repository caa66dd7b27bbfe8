"""Validation while pre-training: how often ITC's features find an image's caption, and a caption's image, in a sample.

As in `evaluation.retrieval`, but by the first stage alone and without keeping any tokens.
"""

import copy
import time

import torch
from torch import Tensor, nn

import utils
from dataset.retrieval import RetrievalEvalDataset
from dataset.text import Tokenizer
from evaluation import Record
from evaluation.ranking import topk_candidates
from evaluation.retrieval import retrieval_table, stage_columns
from evaluation.sharded import eval_batches, eval_loader, evaluating, run_sharded

SCORE = "itc_r_mean"  # what the best epoch is chosen by


class Validation:
    """Ranks at most `cfg.eval.images` images of a split; called in all processes, which share the work.

    The numbers are the same for any number of processes.
    """

    def __init__(
        self, dataset: RetrievalEvalDataset, tokenizer: Tokenizer, cfg: utils.Config, device: torch.device, run: Record
    ):
        self.dataset = thinned(dataset, cfg.eval.images)
        self.ids, self.mask = tokenizer.encode(self.dataset.captions, cfg.text.max_tokens)  # [T, L]
        self.cfg, self.device, self.run = cfg, device, run
        run.info(f"val: {len(self.dataset.images)} of {len(dataset.images)} images, {len(self.ids)} captions")

    def __call__(self, backbone: nn.Module, step: int, precision: str) -> dict[str, float]:
        """The recalls (percent) of the backbone after `step` steps, which keeps its mode; logged as those of `val`.

        Returns {"itc_tr_r1": ..., "itc_r_mean": the mean of the six, "chance_...", "images", "texts", "seconds"}.
        Raises UserError where a feature is not finite, Stopped where a process was asked to stop.
        """
        start = time.perf_counter()
        with evaluating(backbone), torch.no_grad(), utils.autocast(self.device, precision):
            images, texts = self.image_features(backbone), self.text_features(backbone)
        if broken := int((~torch.cat([images, texts]).isfinite()).any(1).sum()):
            raise utils.UserError(
                f"val: {broken} features are NaN or infinite: training has diverged; lower train.lr and --resume"
            )
        image_of_text, image_ids = torch.tensor(self.dataset.image_of_caption), torch.arange(len(images))
        ranks = {
            "tr": topk_candidates(images, texts, image_ids, image_of_text, k=1).ranks,
            "ir": topk_candidates(texts, images, image_of_text, image_ids, k=1).ranks,
        }
        numbers = {**stage_columns({"itc": ranks}, image_of_text), "images": len(images), "texts": len(texts)}
        numbers["seconds"] = round(time.perf_counter() - start, 1)
        self.run.log(step, numbers, "val")
        self.run.info(retrieval_table("val", numbers))
        return numbers

    def image_features(self, backbone: nn.Module) -> Tensor:
        """[N, E] float32, L2-normalised, in every process."""

        def encode(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, places = batch
            return places, backbone.encode_image(images.to(self.device))[1].float()

        loader = eval_loader(
            self.dataset, self.cfg.eval.batch_size, num_workers=self.cfg.data.num_workers, device=self.device
        )
        shown = {"label": "val: encoding images", "unit": "images", "log": None}
        return run_sharded(loader, encode, len(self.dataset.images), device=self.device, **shown)

    def text_features(self, backbone: nn.Module) -> Tensor:
        """[T, E] float32, L2-normalised, in every process."""
        lengths = self.mask.sum(1)

        def encode(batch: list[int]) -> tuple[Tensor, Tensor]:
            rows = torch.tensor(batch)
            width = int(lengths[rows].max())
            ids, mask = (part[rows, :width].to(self.device) for part in (self.ids, self.mask))
            return rows, backbone.encode_text(ids, mask)[1].float()

        batches = eval_batches(len(lengths), self.cfg.eval.text_batch_size, lengths.argsort(stable=True).tolist())
        shown = {"label": "val: encoding texts", "unit": "texts", "log": None}
        return run_sharded(batches, encode, len(lengths), device=self.device, **shown)


def thinned(dataset: RetrievalEvalDataset, most: int) -> RetrievalEvalDataset:
    """The data set with at most `most` of its images, evenly spread over it, and their captions."""
    count = len(dataset.images)
    if count <= most:
        return dataset
    kept = [index * count // most for index in range(most)]
    place = {index: number for number, index in enumerate(kept)}
    pairs = zip(dataset.image_of_caption, dataset.captions, strict=True)
    pairs = [(place[image], caption) for image, caption in pairs if image in place]
    some = copy.copy(dataset)
    some.images = [dataset.images[index] for index in kept]
    some.image_of_caption, some.captions = [image for image, _ in pairs], [caption for _, caption in pairs]
    return some
