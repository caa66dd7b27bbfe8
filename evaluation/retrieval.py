"""Image-text retrieval: recall@k, what a random order reaches, and `Ranker`, which ranks the splits of a configuration.

The rank of a query is 0-based: the number of candidates ranked before its best positive candidate.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import utils
from dataset import create_dataset
from dataset.retrieval import RetrievalEvalDataset
from dataset.text import Tokenizer
from evaluation import Record, ranking
from evaluation.sharded import eval_loader, evaluating

RECALL_AT = (1, 5, 10)


class Ranker:
    """Ranks the splits of a configuration; `datasets`, those of `eval.splits`, are read, and checked, at once."""

    def __init__(self, cfg: utils.Config, tokenizer: Tokenizer, device: torch.device, run: Record):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.datasets = {split: create_dataset("retrieval_eval", cfg, split) for split in cfg.eval.splits}
        for split, dataset in self.datasets.items():
            run.info(f"{split}: {len(dataset.images)} images, {len(dataset.captions)} captions")
            if cfg.rerank.k >= len(dataset.images):
                what = f"rerank.k {cfg.rerank.k} of {len(dataset.images)} images in {split}"
                run.info(f"warning: {what}: the first stage chooses nothing; take a k of a few percent of the images")
        folds = cfg.eval.folds if "test" in self.datasets else 0
        if folds and len(self.datasets["test"].images) % folds:
            images = len(self.datasets["test"].images)
            raise utils.UserError(f"eval.folds: {images} images cannot be cut into {folds} equal parts; 0 is for none")

    def dataset(self, split: str) -> RetrievalEvalDataset:
        """A split's data set; one that `eval.splits` does not name is read now."""
        return self.datasets.get(split) or create_dataset("retrieval_eval", self.cfg, split)

    def evaluate_all(self, backbone: nn.Module) -> None:
        """Rank all splits; write metrics.json and retrieval_result.json."""
        numbers, results = {}, {}
        for split, dataset in self.datasets.items():
            folds = self.cfg.eval.folds if split == "test" else 0
            numbers[split], found = self.evaluate(backbone, dataset, split, folds=folds, final=True)
            if folds:
                numbers["test_folds"] = found["folds"]
            results[split] = result_entries(dataset, found["rankings"], self.cfg.eval.save_top)
            self.run.write_metrics(numbers)  # split by split: what is computed is kept
            if utils.is_main():
                utils.write_json(self.run.dir / "retrieval_result.json", results)

    def evaluate(
        self,
        backbone: nn.Module,
        dataset: RetrievalEvalDataset,
        split: str,
        step: int = 0,
        folds: int = 0,
        final: bool = False,
    ) -> tuple[dict[str, float], dict]:
        """Rank one split in all processes; the backbone keeps its mode.

        step: optimizer steps done, for the log; final: see `Record.log`.

        Returns ({"itc_tr_r1": ..., "itm_...", "chance_...", "images", "texts", "seconds"}, {"rankings": see
        ranking.two_stage, "folds": the mean of the columns over `folds` equal parts}). Raises UserError where a
        feature or score is not finite.
        """
        start, image_of_text = time.perf_counter(), torch.tensor(dataset.image_of_caption)
        with evaluating(backbone):
            images, texts = self.features(backbone, dataset)
            ranks, rankings = self.rank(backbone, images, texts, image_of_text)
            found = {"rankings": rankings}
            if folds:
                found["folds"] = self.evaluate_folds(backbone, images, texts, image_of_text, folds)
        numbers = {**stage_columns(ranks, image_of_text), "images": len(images.feats), "texts": len(texts.feats)}
        numbers["seconds"] = round(time.perf_counter() - start, 1)
        self.run.log(step, numbers, split, final)
        self.run.info(retrieval_table(split, numbers))
        if split == "val" and (warning := not_worth_it(numbers, self.cfg.rerank.score)):
            self.run.info(warning)
        if folds:
            self.run.info(retrieval_table(f"{folds} folds", found["folds"]))
        return numbers, found

    def features(
        self, backbone: nn.Module, dataset: RetrievalEvalDataset
    ) -> tuple[ranking.ImageFeatures, ranking.TextFeatures]:
        """`ranking.extract_features` of a split with the configuration's settings."""
        cfg = self.cfg
        return ranking.extract_features(
            backbone,
            eval_loader(dataset, cfg.eval.batch_size, num_workers=cfg.data.num_workers, device=self.device),
            len(dataset.images),
            *self.tokenizer.encode(dataset.captions, cfg.text.max_tokens),
            cfg.eval.text_batch_size,
            device=self.device,
            precision=self.precision,
            log=self.run.info,
        )

    def rank(
        self,
        backbone: nn.Module,
        images: ranking.ImageFeatures,
        texts: ranking.TextFeatures,
        image_of_text: Tensor,
    ) -> tuple[ranking.Ranks, ranking.Rankings]:
        """`ranking.two_stage` with the configuration's settings."""
        rerank = self.cfg.rerank
        return ranking.two_stage(
            backbone,
            images,
            texts,
            image_of_text,
            k=rerank.k,
            score=rerank.score,
            batch_size=rerank.batch_size,
            precision=self.precision,
            log=self.run.info,
        )

    def evaluate_folds(
        self,
        backbone: nn.Module,
        images: ranking.ImageFeatures,
        texts: ranking.TextFeatures,
        image_of_text: Tensor,
        folds: int,
    ) -> dict[str, float]:
        """The columns' mean over equal runs of consecutive images, each with its texts (MSCOCO 1K: five of 1,000)."""
        size, every = len(images.feats) // folds, []
        for number in range(folds):
            self.run.info(f"fold {number + 1} of {folds}")
            part = ranking.fold(images, texts, image_of_text, number * size, (number + 1) * size)
            ranks, _ = self.rank(backbone, *part)
            every.append(stage_columns(ranks, part[2]))
        return {key: sum(columns[key] for columns in every) / folds for key in every[0]}


def better_order(numbers: dict[str, float], score: str) -> tuple[str, float]:
    """(`itc` or the re-ranking score's name, its mean recall): the better of the two orders; re-ranked if equal."""
    by = {score: numbers["itm_r_mean"], "itc": numbers["itc_r_mean"]}
    order = max(by, key=by.get)
    return order, by[order]


def not_worth_it(numbers: dict[str, float], score: str) -> str | None:
    """A line of warning where re-ranking lowers the mean recall on val, with the remedy."""
    order, value = better_order(numbers, score)
    if order != "itc":
        return None
    other = "" if score == "itm+itc/t" else ", or try rerank.score=itm+itc/t"
    return (
        f"warning: re-ranking by {score} is not worth its cost here, it lowers the mean recall on val from "
        f"{value:.2f} to {numbers['itm_r_mean']:.2f}: take the order by ITC (itc_*){other}"
    )


def stage_columns(ranks: ranking.Ranks, image_of_text: Tensor) -> dict[str, float]:
    """{"itc_tr_r1": percent, ...} of both stages, and of a random order (`chance_`)."""
    columns = {stage: retrieval_metrics(found["tr"], found["ir"]) for stage, found in ranks.items()}
    columns["chance"] = chance_metrics(image_of_text.bincount(minlength=len(ranks["itc"]["tr"])))
    return {f"{stage}_{key}": value for stage, row in columns.items() for key, value in row.items()}


def result_entries(dataset: RetrievalEvalDataset, rankings: ranking.Rankings, top: int) -> dict[str, list[dict]]:
    """The first `top` items of every query, as lists of {query, ranked, scores}; images by their paths."""
    images, captions = [str(path) for path in dataset.images], dataset.captions
    entries = {}
    for key, name, queries, items in (
        ("tr", "text_retrieval", images, captions),
        ("ir", "image_retrieval", captions, images),
    ):
        ids, scores = (part[:, :top].tolist() for part in rankings[key])
        entries[name] = [
            {
                "query": query,
                "ranked": [items[i] for i in row],
                "scores": [round(value, 4) for value in values],
            }
            for query, row, values in zip(queries, ids, scores, strict=True)
        ]
    return entries


# ------------------------------------------------------------------------------------------------------------
# Recall


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


def retrieval_table(split: str, numbers: dict[str, float]) -> str:
    """The numbers of one split (keys STAGE_COLUMN, stages chance, itc, itm) as a small text table, a line for each."""
    columns = list(chance_metrics([1]))
    lines = [f"{split:8}" + "".join(f"{column:>8}" for column in columns)]
    for stage in (stage for stage in ("chance", "itc", "itm") if f"{stage}_r_mean" in numbers):
        lines.append(f"{stage:8}" + "".join(f"{numbers[f'{stage}_{column}']:8.2f}" for column in columns))
    return "\n".join(lines)
