"""A second network on the same noisy copies: the reference, which certificates are for (docs/guarantees.md)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from core.machine.network import Forward, Head, Lane, Network
from core.records import Draws, is_paired, paired

__all__ = ["WithReference"]


@dataclass(frozen=True, slots=True)
class _Paired:
    """The lane of draws that the reference sees too."""

    plain: Lane


class WithReference(Network):
    """A network, some of whose draws are put to a reference: the same weights, computed in another way.

    For each head NAME there is another one, `paired(NAME)`, one class wider, that votes for class c where NAME votes
    for c and the reference does not, and for the last class where nothing is lost. It is asked together with NAME.

    Args:
        network: what votes.
        forward: how the reference is computed; in the memory order of `network`, whose modules it shares.
        batch_size: rows of its passes, whatever the batch; None takes those of the batch.
    """

    may_split = False  # one function throughout a row: see `Network.may_split`

    def __init__(self, network: Network, forward: Forward, batch_size: int | None = None) -> None:
        super().__init__(network.heads, network.denoiser, network.device, network.forward)
        self.reference = Network(network.heads, network.denoiser, network.device, forward)
        self.reference.rows = self.rows
        self.batch_size = batch_size
        self._looked_at: set[Lane] = set()
        self.heads |= {
            paired(name): Head(head.module, head.num_outputs + 1, head.denoise) for name, head in network.heads.items()
        }

    def look(self) -> None:
        """See `Network.look`."""
        super().look()
        if hasattr(self, "reference"):  # not yet while `Network` is made
            self.reference.look()

    def lane(self, draws: Draws) -> Hashable:
        """See `Network.lane`; all heads are paired, or none."""
        plain = super().lane(replace(draws, heads=tuple(name for name in draws.heads if not is_paired(name))))
        assert isinstance(plain, Lane)
        return plain if plain.heads == draws.heads else _Paired(plain)

    def __call__(self, lane: Hashable, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """See `Network.__call__`; "logits" of paired heads are 1 for what they vote for, 0 elsewhere."""
        if not isinstance(lane, _Paired):
            return super().__call__(lane, noisy, sigma)
        outputs = super().__call__(lane.plain, noisy, sigma)
        others = self._by_reference(lane.plain, noisy, sigma)
        return outputs | {paired(name): _lost(values, others[name]) for name, values in outputs.items()}

    def check(
        self, lane: Hashable, noisy: Tensor, sigma: Tensor, logits: Mapping[str, Tensor], num: int, shape: int
    ) -> None:
        """See `Network.check`; the reference is looked at too."""
        plain = lane.plain if isinstance(lane, _Paired) else lane
        assert isinstance(plain, Lane)
        super().check(plain, noisy, sigma, {name: logits[name] for name in plain.heads}, num, shape)
        if lane is not plain and plain not in self._looked_at:
            self._looked_at.add(plain)
            others = self._by_reference(plain, noisy, sigma.to(noisy.device))
            self.reference.check(plain, noisy, sigma, others, num, self.batch_size or shape)

    def any_batch(self, lane: Hashable) -> bool:
        """See `Network.any_batch`."""
        return super().any_batch(lane.plain if isinstance(lane, _Paired) else lane)

    def _by_reference(self, lane: Lane, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Its logits, in passes of one shape; what is missing in the last one is filled with rows of the first."""
        rows, size = len(noisy), self.batch_size or len(noisy)
        places = torch.arange(-(-rows // size) * size, device=noisy.device) % rows
        passes = [self.reference(lane, noisy[part], sigma[part]) for part in torch.split(places, size)]
        return {name: torch.cat([each[name] for each in passes])[:rows] for name in lane.heads}


def _lost(values: Tensor, others: Tensor) -> Tensor:
    """One-hot ``(B, K + 1)``: the class that the network votes for and the reference does not; K where none is."""
    none = values.shape[1]
    own, other = (
        torch.where(each.abs().amax(dim=1) < torch.inf, each.argmax(dim=1), none) for each in (values, others)
    )
    return one_hot(torch.where(own != other, own, none), none + 1).float()
