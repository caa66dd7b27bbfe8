"""Image-text retrieval: recall@k and its chance level; `Ranker` evaluates splits, `Validation` while pre-training.

The rank of a query is 0-based: the number of candidates ranked before its best positive candidate.
"""

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import utils
from dataset import create_dataset
from dataset.advice import warn_of_cut_texts
from dataset.retrieval import RetrievalEvalDataset
from dataset.text import Tokenizer
from evaluation import Record, ranking
from evaluation.sharded import eval_loader, evaluating

RECALL_AT = (1, 5, 10)
SCORE = "itc_r_mean"  # what `Validation` chooses the best epoch by
SAVED = 10  # candidates of a query in retrieval_result.json


# --------------------------------------------------------------------------------------------------------------- Recall


def retrieval_metrics(tr_ranks: Tensor, ir_ranks: Tensor) -> dict[str, float]:
    """Recall@k, the share of queries whose rank is below k, in percent.

    tr_ranks: [N] of text retrieval (images ask for texts); ir_ranks: [T] of image retrieval (texts ask for images).
    -> {tr_r1, tr_r5, tr_r10, ir_r1, ir_r5, ir_r10, r_mean: the mean of the six}
    """
    return _columns(lambda k: tr_ranks < k, lambda k: ir_ranks < k)


def chance_metrics(captions_per_image: Sequence[int] | Tensor) -> dict[str, float]:
    """What a random order reaches on average, with the keys of `retrieval_metrics`; captions_per_image: [N]."""
    captions = torch.as_tensor(captions_per_image).double()  # [N]
    texts = int(captions.sum())

    def hit(k: int) -> Tensor:
        """[N] the probability that k texts, drawn without replacement, contain one of the image's."""
        miss = torch.ones_like(captions)
        for drawn in range(min(k, texts)):
            miss = miss * (texts - drawn - captions).clamp(min=0) / (texts - drawn)
        return 1.0 - miss

    return _columns(hit, lambda k: torch.tensor([min(1.0, k / len(captions))], dtype=torch.float64))


def _columns(tr, ir) -> dict[str, float]:
    """tr, ir: k -> [queries] the hit, or its probability, of each query."""
    hits = {f"{name}_r{k}": hit(k) for name, hit in (("tr", tr), ("ir", ir)) for k in RECALL_AT}
    columns = {key: 100.0 * hit.double().mean().item() for key, hit in hits.items()}
    return columns | {"r_mean": sum(columns.values()) / len(columns)}


def stage_columns(ranks: ranking.Ranks, image_of_text: Tensor) -> dict[str, float]:
    """{"itc_tr_r1": percent, ...} of each stage, and of a random order (`chance_`)."""
    columns = {stage: retrieval_metrics(found["tr"], found["ir"]) for stage, found in ranks.items()}
    columns["chance"] = chance_metrics(image_of_text.bincount(minlength=len(ranks["itc"]["tr"])))
    return {f"{stage}_{key}": value for stage, row in columns.items() for key, value in row.items()}


def retrieval_table(split: str, numbers: dict[str, float]) -> list[str]:
    """The numbers of one split (keys STAGE_COLUMN, stages chance, itc, itm) as the lines of a text table."""
    columns = list(chance_metrics([1]))
    lines = [f"{split:8}" + "".join(f"{column:>8}" for column in columns)]
    for stage in (stage for stage in ("chance", "itc", "itm") if f"{stage}_r_mean" in numbers):
        lines.append(f"{stage:8}" + "".join(f"{numbers[f'{stage}_{column}']:8.2f}" for column in columns))
    return lines


# ------------------------------------------------------------------------------------------------ Both stages on splits


class Ranker:
    """Ranks the splits of a configuration; `datasets`, those of `eval.splits`, are read, and checked, at once."""

    def __init__(self, cfg: utils.Config, tokenizer: Tokenizer, device: torch.device, run: Record):
        self.cfg, self.tokenizer, self.device, self.run = cfg, tokenizer, device, run
        self.precision = utils.resolve_precision(cfg.train.precision, device)
        self.datasets = {split: create_dataset("retrieval_eval", cfg, split) for split in cfg.eval.splits}
        for split, dataset in self.datasets.items():
            run.info(introduction(split, dataset, tokenizer, len(dataset.images)))
        warn_of_cut_texts(self.datasets, cfg, tokenizer)
        folds = cfg.eval.folds if "test" in self.datasets else 0
        if folds and (images := len(self.datasets["test"].images)) % folds:
            raise utils.UserError(f"eval.folds: {images} images cannot be cut into {folds} equal parts; 0 is for none")

    def dataset(self, split: str) -> RetrievalEvalDataset:
        """A split's data set; one that `eval.splits` does not name is read at its first use."""
        if split not in self.datasets:
            self.datasets[split] = create_dataset("retrieval_eval", self.cfg, split)
        return self.datasets[split]

    def evaluate_all(self, backbone: nn.Module) -> None:
        """Rank all splits; write metrics.json and retrieval_result.json, split by split: what is computed is kept."""
        numbers, results = {}, {}
        for split in self.cfg.eval.splits:
            numbers[split], rankings, folds = self.evaluate(backbone, split, final=True)
            if folds:
                numbers["test_folds"] = folds
            results[split] = result_entries(self.dataset(split), rankings)
            self.run.write_metrics(numbers)
            if utils.is_main():
                utils.write_json(self.run.dir / "retrieval_result.json", results)

    def evaluate(
        self, backbone: nn.Module, split: str, step: int = 0, final: bool = False
    ) -> tuple[dict[str, float], ranking.Rankings, dict[str, float]]:
        """Rank one split in all processes; the backbone keeps its mode.

        step, final: see `Record.log`. -> ({"itc_tr_r1": ..., "itm_...", "chance_...", "images", "texts", "seconds"},
        the rankings, at the end on test the columns' mean over `eval.folds` equal runs of consecutive images, each with
        its texts: MSCOCO 1K is five of 1,000).
        """
        dataset, start = self.dataset(split), time.perf_counter()
        image_of_text = torch.tensor(dataset.image_of_caption)
        folds = self.cfg.eval.folds if final and split == "test" else 0
        settings = dict(self.cfg.rerank) | {"precision": self.precision}
        with evaluating(backbone):
            features = extract(backbone, dataset, self.tokenizer, self.cfg, self.device, self.precision)
            ranks, rankings = ranking.two_stage(backbone, *features, image_of_text, **settings)
            every, size = [], len(dataset.images) // max(folds, 1)
            for number in range(folds):
                self.run.info(f"fold {number + 1} of {folds}")
                part = ranking.fold(*features, image_of_text, number * size, (number + 1) * size)
                every.append(stage_columns(ranking.two_stage(backbone, *part, **settings)[0], part[2]))
        numbers = report(self.run, split, ranks, image_of_text, start, step, final)
        score = self.cfg.rerank.score
        if split == "val" and better_order(numbers, score)[0] == "itc":
            other = "" if score == "itm+itc/t" else ", or try rerank.score=itm+itc/t"
            self.run.info(f"warning: re-ranking by {score} is worse than ITC: take the order by ITC{other}")
        mean = {key: sum(columns[key] for columns in every) / folds for key in every[0]} if folds else {}
        for line in retrieval_table(f"{folds} folds", mean) if folds else ():
            self.run.info(line)
        return numbers, rankings, mean


def report(
    run: Record, split: str, ranks: ranking.Ranks, image_of_text: Tensor, start: float, step: int, final: bool = False
) -> dict[str, float]:
    """The columns of every stage with sizes and the seconds since `start`, logged and shown."""
    numbers = stage_columns(ranks, image_of_text)
    numbers |= {"images": len(ranks["itc"]["tr"]), "texts": len(image_of_text)}
    numbers["seconds"] = round(time.perf_counter() - start, 1)
    run.log(step, numbers, split, final)
    for line in retrieval_table(split, numbers):
        run.info(line)
    return numbers


def introduction(split: str, dataset: RetrievalEvalDataset, tokenizer: Tokenizer, whole: int) -> str:
    """A line of what is evaluated of a split of `whole` images, and how much the vocabulary cannot write."""
    share, _ = tokenizer.unwritable(dataset.captions)
    size = f"{len(dataset.images)} of {whole} images, {len(dataset.captions)} captions"
    return f"{split}: {size}, {share:.1%} with letters that this vocabulary cannot write"


def extract(
    backbone: nn.Module,
    dataset: RetrievalEvalDataset,
    tokenizer: Tokenizer,
    cfg: utils.Config,
    device: torch.device,
    precision: str,
    tokens: bool = True,
) -> tuple[ranking.ImageFeatures, ranking.TextFeatures]:
    """`ranking.extract_features` of a split with the configuration's settings."""
    loader = eval_loader(dataset, cfg.eval.batch_size, num_workers=cfg.data.num_workers, device=device)
    texts = tokenizer.encode(dataset.captions, cfg.text.max_tokens)  # ids and mask, [T, L] each
    options = {"device": device, "precision": precision, "tokens": tokens}
    return ranking.extract_features(backbone, loader, len(dataset.images), *texts, cfg.eval.text_batch_size, **options)


def better_order(numbers: dict[str, float], score: str) -> tuple[str, float]:
    """(`itc` or the re-ranking score's name, its mean recall): the better of the two orders; re-ranked if equal."""
    by = {score: numbers["itm_r_mean"], "itc": numbers["itc_r_mean"]}
    order = max(by, key=by.get)
    return order, by[order]


def result_entries(dataset: RetrievalEvalDataset, rankings: ranking.Rankings) -> dict[str, list[dict]]:
    """The first `SAVED` items of every query, as lists of {query, ranked, scores}; images by their paths."""

    def listed(key: str, queries: list[str], items: list[str]) -> list[dict]:
        ids, scores = (part[:, :SAVED].tolist() for part in rankings[key])
        return [
            {"query": query, "ranked": [items[i] for i in row], "scores": [round(value, 4) for value in values]}
            for query, row, values in zip(queries, ids, scores, strict=True)
        ]

    images, captions = [str(path) for path in dataset.images], dataset.captions
    return {"text_retrieval": listed("tr", images, captions), "image_retrieval": listed("ir", captions, images)}


# --------------------------------------------------------------------------------------------------- While pre-training


class Validation:
    """Ranks at most `cfg.eval.images` images of a split by the first stage alone, ITC's; called in all processes."""

    def __init__(
        self, dataset: RetrievalEvalDataset, tokenizer: Tokenizer, cfg: utils.Config, device: torch.device, run: Record
    ):
        self.dataset, self.tokenizer = thinned(dataset, cfg.eval.images), tokenizer
        self.cfg, self.device, self.run = cfg, device, run
        run.info(introduction("val", self.dataset, tokenizer, len(dataset.images)))
        warn_of_cut_texts({"val": dataset}, cfg, tokenizer)

    def __call__(self, backbone: nn.Module, step: int, precision: str) -> dict[str, float]:
        """The recalls (percent) of the backbone after `step` steps, which keeps its mode; logged as those of `val`.

        -> {"itc_tr_r1": ..., "itc_r_mean": the mean of the six, "chance_...", "images", "texts", "seconds"}
        """
        start, image_of_text = time.perf_counter(), torch.tensor(self.dataset.image_of_caption)
        with evaluating(backbone):
            features = extract(backbone, self.dataset, self.tokenizer, self.cfg, self.device, precision, tokens=False)
        images, texts = (part.feats for part in features)
        image_ids = torch.arange(len(images))
        ranks = {
            "tr": ranking.topk_candidates(images, texts, image_ids, image_of_text, k=1).ranks,
            "ir": ranking.topk_candidates(texts, images, image_of_text, image_ids, k=1).ranks,
        }
        return report(self.run, "val", {"itc": ranks}, image_of_text, start, step)


def thinned(dataset: RetrievalEvalDataset, most: int) -> RetrievalEvalDataset:
    """The data set with at most `most` of its images, evenly spread over it, and their captions."""
    count = len(dataset.images)
    kept = [index * count // most for index in range(most)] if most < count else range(count)
    place = {index: number for number, index in enumerate(kept)}
    pairs = zip(dataset.image_of_caption, dataset.captions, strict=True)
    pairs = [(place[image], caption) for image, caption in pairs if image in place]
    some = copy.copy(dataset)
    some.images = [dataset.images[index] for index in kept]
    some.image_of_caption, some.captions = [image for image, _ in pairs], [caption for _, caption in pairs]
    return some
