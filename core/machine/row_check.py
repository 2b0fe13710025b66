"""Whether a network is a function of each row alone, as every certificate assumes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from core.errors import ModelError

__all__ = ["FEW", "check_levels", "check_rows"]

FEW = 32
"""Rows of the check's passes, where a network takes any number of them."""

NOTHING = 1e-3
"""What moves by less than this share of its size has not moved."""

OFFSET = 0.01
"""Of the size of logits that have something in common (minus a squared distance): what they differ by is no less."""

NEAR_TIE = 0.1
"""No order of summation moves logits this far, in any precision."""

Outputs = Mapping[str, Tensor]
Ask = Callable[[Tensor, Tensor], Outputs]


def check_rows(ask: Ask, noisy: Tensor, sigma: Tensor, num: int, votes: Outputs, *, same_batch: bool) -> None:
    """Run rows again, in another order and company, and refuse networks whose answers to them move.

    The half of the rows that holds the largest values, and padding, give way to an image of the largest values of the
    others: another mean, variance and range, and (for exact noise) nothing that a network could not be given anyway.

    Args:
        ask: outputs by name, ``(B, ...)`` each: a denoiser's, then the logits of heads.
        noisy: ``(B, C, H, W)``. With one row only a repetition is compared.
        sigma: ``(B,)`` noise levels.
        num: rows that are no padding, at least one; they come first.
        votes: logits of these rows as they were counted.
        same_batch: whether those came from this very batch, not from a larger one.

    Raises:
        ModelError: names the network, and says whether it is random or mixes rows.
    """
    rows = len(noisy)
    by_size = noisy[:num].flatten(1).abs().amax(dim=1).argsort(descending=True, stable=True)
    same = by_size[num // 2 :]
    replaced = torch.cat([by_size[: num // 2], torch.arange(num, rows, device=noisy.device)])
    brightest = noisy[same].amax(dim=0).flatten()
    instead = torch.maximum(brightest, brightest.roll(1)).flip(0).view(noisy.shape[1:])
    other = noisy.index_copy(0, replaced, instead.expand(len(replaced), *instead.shape))
    order = _order(same, replaced)
    orders = (torch.arange(rows, device=noisy.device), order)

    def answers(images: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Of each row, in the order of `noisy`; copies, since a network may use the memory of its output again."""
        outputs = {name: _thinned(values) for name, values in ask(images[places], sigma[places]).items()}
        return {name: torch.empty_like(values).index_copy_(0, places, values) for name, values in outputs.items()}

    first = votes if same_batch else answers(noisy, orders[0])
    last = answers(other, order)
    if all(
        bool((_moves(first[name], last[name])[same] <= NOTHING).all()) and not _other_votes(values, first[name])
        for name, values in votes.items()
    ):
        return
    # One thing at a time: the same shape and place give the same bits of an honest network in any precision.
    one, two, moved_rows = answers(noisy, orders[0]), answers(noisy, orders[0]), answers(noisy, order)
    companies = [(one, answers(other, orders[0])), (moved_rows, last)]
    for name in one:
        if (moved := _moves(one[name], two[name]).max().item()) > NOTHING:
            raise ModelError(
                f"the {name} is not a function of its images: in two passes over one batch its output moved by "
                f"{moved:.2g} of its size; is a module inside a function in training mode (dropout)? Pass the module "
                "itself, or one without randomness"
            )
        company = max(_moves(before[name], after[name])[same].max().item() for before, after in companies)
        place = _moves(one[name], moved_rows[name]).median().item()  # of a row in two: others may be near-ties inside
        if company > NOTHING or place > NEAR_TIE:
            raise ModelError(
                f"the {name} mixes the rows of a batch: its output for an image moved by {max(company, place):.2g} of "
                "its size when the others changed or their order did (statistics of the batch, as of BatchNorm in "
                "training mode?); a vote must depend on its own noisy copy alone: use fixed statistics"
            )
    for name, values in votes.items():
        if _other_votes(values, first[name]) or _moves(first[name], one[name]).max().item() > NOTHING:
            raise ModelError(
                f"the {name} votes otherwise for the same images in another batch or at another time: a vote must "
                "depend on its own noisy copy alone, and a network must not change from pass to pass"
            )


def check_levels(ask: Ask, noisy: Tensor, sigma: Tensor) -> None:
    """Run a batch of several noise levels again as if all rows were of one, and refuse a denoiser (the first that `ask`
    asks) whose answers to the rows of that level move: it takes a row's level from another row.

    Raises:
        ModelError: names the denoiser.
    """
    several = {name: _thinned(values).clone() for name, values in ask(noisy, sigma).items()}
    for level in (sigma.min(), sigma.max()):
        alone = ask(noisy, torch.full_like(sigma, level.item()))
        for name, values in several.items():
            if _moves(values, _thinned(alone[name]))[sigma == level].max().item() > NOTHING:
                raise ModelError(
                    f"the {name} mixes the noise levels of a batch: its output for an image at {level.item():g} moved "
                    "when the levels of the others changed (is only the first level, or one for all, taken?); sigma "
                    "holds a level for each image: use each row's own"
                )


def _order(same: Tensor, replaced: Tensor) -> Tensor:
    """All rows in another order, with replaced ones first and last: there a network may look for a reference."""
    rows = len(same) + len(replaced)
    if len(replaced) < 2:
        return torch.arange(rows, device=same.device).flip(0)
    generator = torch.Generator().manual_seed(0)  # the process's own stream is the user's
    places = torch.randperm(rows - 2, generator=generator).to(same.device)
    return torch.cat([replaced[:1], torch.cat([same, replaced[2:]])[places], replaced[1:2]])


def _thinned(values: Tensor) -> Tensor:
    """Logits as they are, about a thousand values of an image: as many as it takes to see that it moved."""
    return values if values.ndim == 2 else values.flatten(1)[:, :: max(1, values[0].numel() // 1000)]


def _moves(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference in each row of ``(N, D)`` as a share of the values' size, float64 ``(N,)``; infinite where
    only one of the two is finite.

    What all values of a row have in common decides no vote and is no part of their size, but for `OFFSET` of it.
    """
    one, other = one.double(), other.double()
    finite, too = (values.isfinite().all(dim=1) for values in (one, other))
    known = one[finite]
    spread = (known - known.mean(dim=1, keepdim=True)).abs().amax(dim=1).mean()
    size = torch.maximum(spread, OFFSET * known.abs().amax(dim=1).mean())  # NaN where no row is finite
    moved = (one - other).abs().amax(dim=1)
    moved = torch.where(moved == 0, 0.0, moved / size)
    return torch.where(finite & too, moved, torch.where(finite == too, 0.0, torch.inf))


def _other_votes(one: Tensor, other: Tensor) -> bool:
    """Whether more than a tenth of the rows vote otherwise, and are no near-ties in either."""
    if one.shape[1] < 2:
        return False
    one, other = one.double(), other.double()
    margin = (
        NEAR_TIE * one[one.isfinite().all(dim=1)].abs().amax(dim=1).mean()
    )  # NaN where no row is finite: none leads

    def leads(values: Tensor) -> Tensor:
        top = values.topk(2, dim=1).values
        return values.isfinite().all(dim=1) & (top[:, 0] - top[:, 1] > margin)

    differ = leads(one) & leads(other) & (one.argmax(dim=1) != other.argmax(dim=1))
    return differ.double().mean().item() > 0.1
