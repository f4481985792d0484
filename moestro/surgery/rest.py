"""The tensors that a plan with donors does not name: kept, averaged, or taken from one donor."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moestro.core.errors import PlanError
from moestro.core.plan import ExpertPlan
from moestro.surgery.assembled import SiteWork
from moestro.surgery.check import Work
from moestro.surgery.opened import OpenModel


class Rest:
    """What ``plan.rest`` makes of all tensors that are not made anew.

    Attributes:
        names: the target's tensors that it changes; none under ``keep``.

    Raises:
        PlanError: a rule that names no donor, ``mean`` without donors, or a tensor that a donor lacks or has in another
            shape.
    """

    def __init__(self, plan: ExpertPlan, donors: Mapping[str, OpenModel], works: Iterable[Work | SiteWork]) -> None:
        self.rule = plan.rest
        self.names: tuple[str, ...] = ()
        if plan.rest == "keep":
            return
        others = [name for name in donors if name != "self"]
        givers = others if plan.rest == "mean" else [plan.rest]
        if not givers or any(name not in others for name in givers):
            raise PlanError(f"rest={plan.rest!r}, but the donors are {', '.join(others) or 'none'}; use keep or mean")
        self._donors = donors
        self._tensors = {name: _floats(opened) for name, opened in donors.items()}
        replaced = {id(parameter) for work in works for parameter in _replaced(work)}
        self.names = tuple(name for name, tensor in self._tensors["self"].items() if id(tensor) not in replaced)
        for giver in givers:
            self._check(giver)

    def _check(self, giver: str) -> None:
        theirs = self._tensors[giver]
        for name in self.names:
            mine = list(self._tensors["self"][name].shape)
            shape = list(theirs[name].shape) if name in theirs else None
            if shape != mine:
                has = "no such tensor" if shape is None else f"it with shape {shape}"
                raise PlanError(
                    f"rest={self.rule!r}: {name} has shape {mine}, donor {giver!r} has {has}; "
                    "donors must descend from the same model"
                )

    def tensor(self, name: str) -> Tensor:
        """What one of these tensors becomes; sums are taken in float32 at least, in the order of the donors."""
        if self.rule != "mean":
            return self._read(self.rule, name)
        total: Tensor | None = None
        for donor in self._donors:
            value = self._read(donor, name)
            value = value if value.dtype == torch.float64 else value.float()
            total = value if total is None else total + value.to(total.device)
        assert total is not None
        return total / len(self._donors)

    @torch.no_grad()
    def write(self) -> None:
        """Write them into the target, which is open."""
        for name in self.names:
            self._tensors["self"][name].detach().copy_(self.tensor(name))

    def _read(self, donor: str, name: str) -> Tensor:
        return self._donors[donor].read(self._tensors[donor][name])


def _floats(opened: OpenModel) -> dict[str, Tensor]:
    """Floating parameters and saved buffers by name; of tied ones the one the others follow."""
    tied = getattr(opened.model, "all_tied_weights_keys", {})
    return {
        name: tensor
        for name, tensor in opened.model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in tied
    }


def _replaced(work: Work | SiteWork) -> list[Tensor]:
    """The tensors of a site that the plan makes anew."""
    if isinstance(work, SiteWork):
        return list(work.replaced)
    place = work.place
    if place.dense is not None:
        return [place.slot(None, name)[0] for name in place.shape.names]
    mixture = place.mixture
    router = mixture.router.state_dict(keep_vars=True).values()
    return [*mixture.bank.parameters(), *(tensor for tensor in router if isinstance(tensor, Tensor))]
