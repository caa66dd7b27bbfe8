"""Two-stage retrieval against slow, obvious references: a pair, a query at a time, sorted in Python."""

import pytest
import torch
from conftest import in_ranks, refused
from test_evaluation_retrieval import validation_numbers
from tiny import NO_DROPOUT, tiny_model
from torch import nn

from evaluation import ranking, retrieval
from evaluation.sharded import eval_batches

CPU = torch.device("cpu")


def test_a_query_without_an_answer_keeps_its_other_rank():
    hits = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    assert ranking.first_hit(hits, torch.tensor([0, 7, 2])).tolist() == [1, 7, 0]
    assert retrieval.retrieval_metrics(*[ranking.first_hit(hits, ranking.MISS)] * 2)["tr_r10"] == pytest.approx(200 / 3)


# --------------------------------------------------------------------------------------- Both stages, with known scores


class Pairing:
    """A fusion encoder that says which image and text it was given."""

    def project_memory(self, image_embeds):
        return [(image_embeds, image_embeds)]

    def __call__(self, text_embeds, text_mask, image_memory, keep=None):
        images = image_memory[0][0].repeat_interleave(len(text_embeds) // len(image_memory[0][0]), 0)  # [R, 1, 1]
        texts = (text_embeds * text_mask[..., None]).amax(1, keepdim=True)  # [R, 1, 1]
        return torch.cat([images, texts], dim=-1)


class TableBackbone(nn.Module):
    """A backbone whose answers are known: features and matching scores are looked up by the item's index.

    An image's pixels hold its index, a text's tokens hold its index; `pairs` notes every pair that is fused.
    """

    def __init__(self, image_feats, text_feats, itm):
        super().__init__()
        self.image_feats, self.text_feats, self.itm = image_feats, text_feats, itm
        self.fusion_encoder = Pairing()
        self.pairs = []

    def encode_image(self, images):
        index = images[:, 0, 0, 0].long()
        return index.float()[:, None, None], self.image_feats[index]  # [n, 1, 1], [n, E]

    def encode_text(self, input_ids, attention_mask):
        return input_ids.float()[..., None], self.text_feats[input_ids[:, 0]]  # [b, L, 1], [b, E]

    def itm_logits(self, fused):
        image, text = fused[:, 0].long().unbind(1)
        self.pairs += list(zip(image.tolist(), text.tolist(), strict=True))
        return torch.stack([torch.zeros(len(fused)), self.itm[image, text]], 1)


def table_case(seed, levels=10**6):
    """Random features and scores of 13 images with 1 to 4 captions each, in mixed order, of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.arange(13).repeat_interleave(torch.randint(1, 5, (13,), generator=generator))
    texts = len(image_of_text)
    image_of_text = image_of_text[torch.randperm(texts, generator=generator)]
    # entries of -1, 0, 1: many equal similarities, computed exactly
    feats = [torch.randint(-1, 2, (count, 4), generator=generator).float() for count in (13, texts)]
    itm = torch.randint(0, levels, (13, texts), generator=generator).float()
    attention_mask = (torch.arange(6) < torch.randint(1, 7, (texts, 1), generator=generator)).long()
    return TableBackbone(*feats, itm), torch.arange(texts)[:, None] * attention_mask, attention_mask, image_of_text


def run_table(backbone, input_ids, attention_mask, image_of_text, **options):
    rows = map(torch.tensor, eval_batches(13, 4))
    batches = [(some.float()[:, None, None, None].expand(-1, 3, 1, 1), some) for some in rows]
    features = ranking.extract_features(backbone, batches, 13, input_ids, attention_mask, 5, device=CPU)
    return ranking.two_stage(backbone, *features, image_of_text, **{"batch_size": 16, **options})


def reference(itc, itm, k, asking, asked):
    """(orders, ranks) by query: the first k candidates by (itc, index), sorted by (itm, place), then the others."""
    orders = []
    for first_scores, second_scores in zip(itc.tolist(), itm.tolist(), strict=True):
        first = sorted(range(len(first_scores)), key=lambda c: (-first_scores[c], c))
        orders.append(sorted(first[:k], key=lambda c: -second_scores[c]) + first[k:])
    return orders, [asked[order].tolist().index(query) for order, query in zip(orders, asking.tolist(), strict=True)]


@pytest.mark.parametrize("k", [1, 3, 8, 1000])
def test_both_stages_equal_a_query_by_query_reference(k, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", 7)
    for seed, levels in ((0, 10**6), (1, 3), (2, 1)):
        backbone, *texts = table_case(seed, levels)
        ranks, rankings = run_table(backbone, *texts, k=k)
        itc, itm, ids = backbone.image_feats @ backbone.text_feats.T, backbone.itm, (torch.arange(13), texts[-1])
        for key, tables, asking in (("tr", (itc, itm), ids), ("ir", (itc.T, itm.T), ids[::-1])):
            assert ranks["itc"][key].tolist() == reference(*tables, 0, *asking)[1]
            orders, places = reference(*tables, k, *asking)
            assert ranks["itm"][key].tolist() == places
            assert rankings[key][0].tolist() == [order[:k] for order in orders]


def test_a_pair_that_both_directions_ask_for_is_fused_once():
    backbone, *texts = table_case(5)
    _, rankings = run_table(backbone, *texts, k=4, batch_size=10**6)
    wanted = {(image, text) for image, row in enumerate(rankings["tr"][0].tolist()) for text in row}
    wanted |= {(image, text) for text, row in enumerate(rankings["ir"][0].tolist()) for image in row}
    assert set(backbone.pairs) == wanted
    # Only the rows that fill up a shorter list of a rectangle come twice.
    assert len(wanted) <= len(backbone.pairs) < 1.5 * len(wanted)


@pytest.mark.parametrize("score, weight", [("itm", 0), ("itm+itc", 1), ("itm+itc/t", 4)])
def test_the_cosine_is_added_with_the_weight_of_the_score_to_the_logit_or_the_log_odds(score, weight):
    backbone, *texts = table_case(6)
    backbone.temperature = lambda: torch.tensor(0.25)
    logits, backbone.itm_logits = backbone.itm_logits, lambda fused: logits(fused) + torch.tensor([1.0, 0.0])
    expected = backbone.itm - int(score == "itm+itc/t") + weight * backbone.image_feats @ backbone.text_feats.T
    _, rankings = run_table(backbone, *texts, k=1000, score=score)
    for key, scores in (("tr", expected), ("ir", expected.T)):
        ids, values = rankings[key]
        assert torch.equal(values, scores.gather(1, ids)) and torch.equal(values, values.sort(1, descending=True)[0])


def test_numbers_that_are_not_finite_are_one_line():
    backbone, *texts = table_case(0)
    backbone.itm[:] = torch.inf
    refused(lambda: run_table(backbone, *texts), "re-ranking scores")
    backbone.text_feats[3, 1] = torch.nan
    refused(lambda: run_table(backbone, *texts), "text features")


# ------------------------------------------------------------------------------------------------- The real model, tiny


def tiny_backbone():
    """Random weights, large enough that scores differ; the same in every process."""
    backbone = tiny_model(*NO_DROPOUT).backbone.eval()
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return backbone


def tiny_case():
    """11 images of noise, 27 texts of 2 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(11, 3, 32, 32, generator=generator)
    image_of_text = torch.arange(27) % 11
    attention_mask = (torch.arange(7) < torch.randint(2, 8, (27, 1), generator=generator)).long()
    input_ids = torch.randint(1, 50, (27, 7), generator=generator) * attention_mask
    return images, input_ids, attention_mask, image_of_text


def run_tiny(backbone, precision="fp32"):
    images, *texts, image_of_text = tiny_case()
    batches = [(images[rows], torch.tensor(rows)) for rows in eval_batches(11, 6)]
    features = ranking.extract_features(backbone, batches, 11, *texts, 4, device=CPU, precision=precision)
    return ranking.two_stage(backbone, *features, image_of_text, k=5, batch_size=16, precision=precision)


def test_scores_equal_one_forward_a_pair():
    backbone = tiny_backbone()
    images, input_ids, attention_mask, _ = tiny_case()
    _, rankings = run_tiny(backbone)
    ids, scores = rankings["ir"]
    with torch.no_grad():
        for text in range(27):
            length = int(attention_mask[text].sum())
            text_embeds, _ = backbone.encode_text(input_ids[text : text + 1, :length], None)
            for image, score in zip(ids[text], scores[text], strict=True):
                image_embeds, _ = backbone.encode_image(images[image][None])
                memory = backbone.fusion_encoder.project_memory(image_embeds)
                logits = backbone.itm_logits(backbone.fusion_encoder(text_embeds, None, memory))
                torch.testing.assert_close(score, logits[0, 1], atol=1e-4, rtol=0)
    assert scores.std() > 0.05  # the scores say something


def in_rank(rank, path):
    torch.save([run_tiny(tiny_backbone(), precision) for precision in ("fp32", "bf16")], f"{path}/{rank}.pt")
    (path / f"val{rank}").mkdir()
    torch.save(validation_numbers(path / f"val{rank}"), f"{path}/val{rank}.pt")


def test_three_processes_give_the_results_of_one(tmp_path):
    """11 images are 2 batches: one process has no image; 27 texts are 7 batches."""
    in_ranks(3, in_rank, tmp_path)
    expected = [run_tiny(tiny_backbone(), precision) for precision in ("fp32", "bf16")]
    (_, full), (_, half) = expected
    assert (full["tr"][1][:, 0] - half["tr"][1][:, 0]).abs().max() < 0.2
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=0, rtol=0)
        assert torch.load(tmp_path / f"val{rank}.pt") == validation_numbers(tmp_path)


def test_a_fold_is_ranked_as_a_data_set_of_its_own():
    backbone = tiny_backbone()
    images, input_ids, attention_mask, image_of_text = tiny_case()
    batches = [(images[rows], torch.tensor(rows)) for rows in eval_batches(11, 4)]  # a border cuts one
    features = ranking.extract_features(backbone, batches, 11, input_ids, attention_mask, 4, device=CPU)
    found, _ = ranking.two_stage(backbone, *ranking.fold(*features, image_of_text, 5, 10), k=3, batch_size=16)

    rows = ((image_of_text >= 5) & (image_of_text < 10)).nonzero()[:, 0]
    alone = ranking.extract_features(
        backbone, [(images[5:10], torch.arange(5))], 5, input_ids[rows], attention_mask[rows], 4, device=CPU
    )
    expected, _ = ranking.two_stage(backbone, *alone, image_of_text[rows] - 5, k=3, batch_size=16)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
