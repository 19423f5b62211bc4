"""Recycling (SparseVLM, arXiv 2410.04417): the best of what is dropped comes back, a few tokens for many.

Our reading: the description that we have names clusters of dropped tokens and no numbers. Clusters are found
by density peaks, with five neighbours and a cluster for about ten tokens, and become their mean.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["density_clusters", "recycled"]

NEIGHBOURS = 5
MEMBERS = 10  # tokens of a cluster, about


def density_clusters(
    states: Float[Tensor, "tokens width"], count: int
) -> tuple[Int[Tensor, "count"], Int[Tensor, "tokens"]]:
    """Clusters by density peaks: centres lie dense, and far from whatever lies denser.

    Density is ``exp(-mean squared distance)`` of the five nearest neighbours. A centre is worth its density
    times its distance from the nearest token of higher density; the densest one has the largest distance
    there is. Every other token goes to the nearest centre; of equals the first one wins.

    Args:
        states: at least one token.
        count: centres, at most as many as there are tokens.

    Returns:
        The centres, and for each token the number of its centre among them.
    """
    number = len(states)
    apart = torch.cdist(states, states) / states.shape[1] ** 0.5
    near = apart.sort(dim=1).values[:, 1 : NEIGHBOURS + 1]  # the nearest of all is the token itself
    density = (-near.square().mean(1)).exp() if number > 1 else torch.ones_like(apart[0])
    place = torch.arange(number, device=states.device)
    # rows: a token; columns: those that lie denser, or as dense and before it
    denser = (density > density[:, None]) | (density == density[:, None]) & (place < place[:, None])
    far = apart.masked_fill(~denser, torch.inf).amin(1)
    worth = density * torch.where(denser.any(1), far, apart.max())
    centres = worth.argsort(descending=True, stable=True)[:count]
    to_centre = apart[:, centres]
    nearest = (to_centre == to_centre.amin(1, keepdim=True)).to(torch.uint8).argmax(1)
    nearest[centres] = torch.arange(len(centres), device=states.device)
    return centres, nearest


def recycled(
    states: Float[Tensor, "dropped width"], scores: Float[Tensor, "dropped"], share: float
) -> tuple[Int[Tensor, "back"], Float[Tensor, "back width"]]:
    """The dropped tokens of one row that come back, and what they become: the mean of their cluster.

    Args:
        states: hidden states of the dropped tokens.
        scores: by which they were ranked.
        share: of them that is clustered, the best; one token comes back for about ten of these.
    """
    best = scores.argsort(descending=True, stable=True)[: int(share * len(states))].sort().values
    if not len(best):
        return best, states[:0]
    members = states[best].float()
    centres, cluster = density_clusters(members, len(best) // MEMBERS + 1)
    total = torch.zeros(len(centres), states.shape[1], device=states.device).index_add_(0, cluster, members)
    size = torch.bincount(cluster, minlength=len(centres))
    return best[centres], (total / size[:, None]).to(states)
