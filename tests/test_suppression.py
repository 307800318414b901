"""What is said to have suppressed a token: by a greedy loop over the tokens of each group, in the order of scores."""

import pytest
import torch
from tiny import build
from tiny_checkpoint import build_processor, picture

from modeling_prunesid import explain


def greedy(output, tau):
    """Section 3.3 word for word: the first survivor that suppresses each token, -1 for a survivor."""
    units = torch.nn.functional.normalize(output.compared.double(), dim=-1)
    similarity, found = units @ units.T, torch.full((len(units),), -1)
    ranking = output.scores.argsort(descending=True, stable=True).tolist()
    for group in set(output.groups.tolist()):
        alive = []
        for token in (token for token in ranking if output.groups[token] == group):
            rivals = [rival for rival in alive if similarity[token, rival] >= tau]
            if rivals:
                found[token] = rivals[0]
            else:
                alive.append(token)
    return found


@pytest.mark.parametrize("method", ["paper", "release"])
@pytest.mark.parametrize("nms_lambda", ["auto", 0.5, 1.1])
def test_the_suppressor_of_each_token_is_the_first_survivor_that_is_too_similar(method, nms_lambda):
    output = explain(build(method=method, nms_lambda=nms_lambda), build_processor(), picture())
    assert output.suppressors.tolist() == greedy(output, output.tau).tolist()
    if nms_lambda != "auto":
        assert output.tau == pytest.approx(nms_lambda * output.rho, rel=1e-5)
    kept, survivors = set(output.kept.tolist()), set((output.suppressors < 0).nonzero()[:, 0].tolist())
    assert kept <= survivors or survivors <= kept  # the suppressed fill up, if too few survive
    assert nms_lambda != "auto" or len(survivors) >= len(kept)


def test_a_method_without_groups_suppresses_nothing():
    output = explain(build(method="spread"), build_processor(), picture())
    assert output.tau is None and output.suppressors is None and len(output.compared) == 49
