"""The rank of each layer, fixed or allocated from one budget (CorDA++, Alg. 2)."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..algebra.compactness import allocate, allocation_scores, log_compactness
from ..config import CordaConfig
from ..models.targets import budget_of
from ..models.weights import weight_shape


class Ranks:
    """The ranks of the layers seen so far. For each layer not yet seen, the least it will take is set aside.

    A layer seen later can only make these ranks smaller. So they also bound how many components of a layer can still be
    chosen, and no more need to be kept.

    Attributes:
        budget: parameters Σ (d_in + d_out)·r to share out.
    """

    def __init__(self, targets: Mapping[str, nn.Module], config: CordaConfig, model: nn.Module):
        self.config = config
        self.shapes = {name: weight_shape(module) for name, module in targets.items()}
        self.budget = budget_of(targets, config, model)
        self.scores: dict[str, Tensor] = {}

    def see(self, name: str, log_pi: float | None, sigma: Tensor) -> None:
        """Add a layer, with the singular values of its oriented weight: all, (R,), where ranks are to be allocated.
        log π is None where it got no covariance."""
        log_pi = log_compactness(self.shapes[name][0], 1, 1) if log_pi is None else log_pi
        # On the CPU, where a sum is the same each time: a run that goes on from stored spectra finds the same ranks.
        self.scores[name] = allocation_scores(log_pi, sigma.cpu()).to(sigma.device)

    def of_seen(self) -> dict[str, int]:
        """The ranks of the layers seen so far, in the order in which they were seen."""
        if not self.config.allocates:
            return dict.fromkeys(self.scores, self.config.r)
        least = self.config.min_rank
        aside = sum(min(least, m, n) * (m + n) for name, (m, n) in self.shapes.items() if name not in self.scores)
        costs = [sum(self.shapes[name]) for name in self.scores]
        ranks = allocate(
            list(self.scores.values()), costs, self.budget - aside, self.config.mode, least, self.config.max_rank
        )
        return dict(zip(self.scores, ranks))
