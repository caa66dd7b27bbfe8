"""evaluation/clusters.py against scikit-learn and by hand."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from evaluation import clusters


def draw(seed: int, labels: int, groups: int, size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(labels, (size,), generator=generator)
    found = (truth + torch.randint(3, (size,), generator=generator)) % groups
    return 7 * truth - 3, found * found  # neither consecutive nor from 0


@pytest.mark.parametrize("labels, groups", [(4, 4), (2, 30), (30, 2), (1, 5), (5, 1)])
def test_contingency_mutual_information_and_purity_agree_with_scikit_learn(labels, groups):
    truth, found = draw(labels + groups, labels, groups)
    table = contingency_matrix(truth.numpy(), found.numpy())
    assert clusters.contingency(truth, found).tolist() == table.tolist()
    expected = normalized_mutual_info_score(truth.numpy(), found.numpy())
    assert clusters.normalized_mutual_information(truth, found) == pytest.approx(expected, abs=1e-9)
    assert clusters.purity(truth, found) == pytest.approx(table.max(0).sum() / len(truth))


def test_equal_partitions_reach_one_and_shuffled_ones_almost_nothing():
    truth, _ = draw(0, 6, 6, 6000)
    assert clusters.normalized_mutual_information(truth, -truth) == pytest.approx(1)
    assert clusters.purity(truth, -truth) == 1
    random = clusters.shuffled(truth, torch.Generator().manual_seed(0))
    assert torch.equal(random.sort().values, truth.sort().values)
    assert clusters.normalized_mutual_information(truth, random) < 0.01


def test_one_label_and_one_cluster_count_as_agreement():
    ones = torch.ones(5, dtype=torch.long)
    assert clusters.normalized_mutual_information(ones, ones) == normalized_mutual_info_score([1] * 5, [1] * 5) == 1


def test_each_clusters_purity_names_its_label():
    labels, found = torch.tensor([5, 5, 9, 9, 9, 5]), torch.tensor([1, 1, 1, 4, 4, 4])
    assert clusters.cluster_purity(labels, found) == {1: (5, pytest.approx(2 / 3), 3), 4: (9, pytest.approx(2 / 3), 3)}


def test_lloyd_ends_where_scikit_learns_k_means_ends_from_the_same_centers():
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points[:200] += 2
    start = clusters.spread_centers(points, 7, torch.Generator().manual_seed(2))
    found, centers = clusters.lloyd(points, start, 300)
    oracle = KMeans(7, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(points.numpy())
    assert found.tolist() == oracle.labels_.tolist()
    assert torch.allclose(centers, torch.from_numpy(oracle.cluster_centers_))


def test_k_means_is_as_tight_as_scikit_learns():
    points = torch.randn(600, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, centers = clusters.kmeans(points, 8, torch.Generator().manual_seed(0))
    inertia = float(clusters.nearest_center(points, centers)[0].sum())
    assert inertia < 1.1 * KMeans(8, n_init=5, random_state=0).fit(points.numpy()).inertia_


def test_k_means_fills_every_cluster_and_refuses_more_clusters_than_points():
    points = torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    found, centers = clusters.lloyd(points, torch.tensor([[0.0], [-5.0]]), 10)
    assert sorted(centers.flatten().tolist()) == [0.0, 9.0] and len(found.unique()) == 2
    with pytest.raises(ValueError, match="5 clusters of 4 points"):
        clusters.kmeans(points, 5, torch.Generator())


def test_chunks_change_nothing():
    points = torch.randn(100, 4, generator=torch.Generator().manual_seed(4))
    whole, parts = clusters.nearest_center(points, points[:9]), clusters.nearest_center(points, points[:9], chunk=7)
    assert torch.equal(whole[1], parts[1]) and torch.allclose(whole[0], parts[0], atol=1e-5)


def test_shares_of_masked_patches():
    masks = torch.tensor([[True, True, False], [False, True, True]])
    kinds = torch.tensor([[0, 1, 2], [1, 1, 2]])
    assert clusters.named_share(masks, kinds) == {"background": 0.25, "named": 0.5, "unnamed": 0.25}
