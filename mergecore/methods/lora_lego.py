"""LoRA-LEGO: rank-one units of all adapters, clustered, one unit for each cluster (Zhao et al. 2024, arXiv
2409.16167)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import ROUNDING
from mergecore.checkpoints.adapters import LowRank, padded
from mergecore.errors import SpecError
from mergecore.identity.keys import canonical
from mergecore.plugins.adapter_method import AdapterMethod, Combined
from mergecore.plugins.examples import Examples

SWEEPS = 100
"""At most so often all signs are looked at; each change raises a bounded sum, so it ends by itself."""


class LoraLego(AdapterMethod):
    """Cut all adapters into rank-one units, cluster the units, and make an adapter of the clusters' centres."""

    name: ClassVar[str] = "lora_lego"
    paper: ClassVar[str] = (
        "Zhao et al. 2024, Merging LoRAs like playing LEGO: pushing the modularity of LoRA to extremes through "
        "rank-wise clustering, arXiv:2409.16167"
    )

    rank: Annotated[
        int | None,
        Field(
            ge=1, description=("k, the number of clusters in each module; none: the largest rank of the experts there")
        ),
    ] = None
    gauge: Annotated[
        Literal["as_given", "canonical"],
        Field(
            description=(
                "how units are compared: 'as_given' takes the factors as they are (the paper); "
                "'canonical' first balances their norms and aligns their signs, because (c·b, a/c) and "
                "(−b, −a) are the same unit as (b, a)"
            )
        ),
    ] = "as_given"
    reweight: Annotated[
        Literal["l2", "max", "none"],
        Field(
            description=(
                "how a centre is scaled: 'l2', to the mean l2 norm of its units (the paper); 'max', to "
                "the mean of their largest magnitudes (the only published code, which is not the "
                "authors'); 'none', not at all"
            )
        ),
    ] = "l2"
    output: Annotated[
        Literal["rank", "none"],
        Field(
            description=(
                "how the update is scaled: 'rank', by √(r/k), where r is the mean rank of the experts "
                "(the paper); 'none', not at all"
            )
        ),
    ] = "rank"
    restarts: Annotated[
        int, Field(ge=1, description=("number of starts of k-means; the tightest clustering is taken"))
    ] = 10
    seed: Annotated[int, Field(ge=0, description="seed of k-means, together with the module's name")] = 0

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{"rank": 4}, {"gauge": "canonical", "reweight": "max", "output": "none"}])

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return k. Raises SpecError where the module has fewer units than clusters are asked for."""
        if self.rank is not None and self.rank > sum(ranks):
            raise SpecError(
                f"lora_lego: rank {self.rank} is more than the {sum(ranks)} units that the experts have for '{module}' "
                f"together; choose a rank of at most {sum(ranks)}, or leave the module out with `select`"
            )
        return self.rank or max(ranks)

    def combined(self, module: str, updates: Sequence[LowRank | None]) -> Combined:
        """Return one unit per cluster: the centroid with its cluster's norm, times √(r/k)."""
        present = [update for update in updates if update is not None]
        clusters = self.rank_made(module, [update.rank for update in present], (0, 0))
        down, up = balanced_scaling(present)
        if self.gauge == "canonical":
            down, up = canonical_units(down, up)
        units = torch.cat([down, up.mT], 1)
        sizes = down.norm(dim=1) * up.norm(dim=0)
        # A unit one half of which is zero changes nothing, but its other half would bend the centroids.
        units = units[sizes > ROUNDING * sizes.max()]
        labels = self.labels(module, units, clusters)
        centroids = [self._centroid(units[labels == label]) for label in range(len(set(labels.tolist())))]
        merged = torch.stack(centroids) if centroids else units.new_zeros(0, units.shape[1])
        factor = 1.0 if self.output == "none" else sum(update.rank for update in present) / len(present) / clusters
        # √(r/k) of the product is the fourth root on each side, so that norms stay balanced.
        merged = merged * factor**0.25
        columns = down.shape[1]
        narrow, tall = padded(merged[:, :columns], merged[:, columns:].mT, clusters)
        return Combined(narrow, tall, {"units": float(len(units)), "clusters": float(len(centroids))})

    def labels(self, module: str, units: Tensor, clusters: int) -> Tensor:
        """Return the cluster of every unit, int64, numbered by first member.

        Every unit has a cluster of its own where there are no more units than clusters.
        """
        if len(units) <= clusters:
            return torch.arange(len(units))
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        state = int.from_bytes(sha256(canonical([self.seed, module])).digest()[:4], "big")
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct units than clusters: the empty ones become zeros
            means = KMeans(clusters, n_init=self.restarts, max_iter=300, random_state=state)
            numbers = [int(label) for label in means.fit(units.numpy()).labels_]
        order = {label: number for number, label in enumerate(dict.fromkeys(numbers))}
        return torch.tensor([order[label] for label in numbers])

    def _centroid(self, members: Tensor) -> Tensor:
        centroid = members.mean(0)
        order = 2.0 if self.reweight == "l2" else float("inf")
        norm = float(torch.linalg.vector_norm(centroid, order))
        if self.reweight == "none" or norm == 0:
            return centroid
        return centroid * (float(torch.linalg.vector_norm(members, order, dim=1).mean()) / norm)


def balanced_scaling(updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Return all units under each other, (P × in) and (out × P), √|s| of each adapter's scaling on either side."""
    roots = [abs(update.scaling) ** 0.5 for update in updates]
    down = torch.cat([update.down * root for update, root in zip(updates, roots, strict=True)])
    signed = [root if update.scaling >= 0 else -root for update, root in zip(updates, roots, strict=True)]
    return down, torch.cat([update.up * root for update, root in zip(updates, signed, strict=True)], 1)


def canonical_units(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same rank-one updates with ‖a‖ = ‖b‖, and with signs such that similar units point the same way.

    First each unit is aligned with the leading direction of all of them, which does not depend on signs. A unit at
    right angles to it could go either way. So each unit that agrees better with all others when turned is turned, until
    none is.
    """
    narrow, tall = down.norm(dim=1), up.norm(dim=0)
    ratio = torch.where((narrow > 0) & (tall > 0), (tall / narrow).sqrt(), torch.ones_like(narrow))
    units = torch.cat([down * ratio[:, None], (up / ratio).mT], 1)
    direction = torch.linalg.svd(units, full_matrices=False)[2][0]
    direction = direction * torch.sign(direction[direction.abs().argmax()])
    first = units.gather(1, (units != 0).to(torch.int8).argmax(1, keepdim=True))[:, 0]
    # Sums of products row by row, not a matrix product: u and −u must give x and −x to the last bit.
    along = (units * direction).sum(1)
    signs = torch.sign(torch.where(along != 0, along, first))
    units = units * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None]
    similar = units @ units.mT
    similar.fill_diagonal_(0)
    signs = torch.ones(len(units), dtype=units.dtype)
    for _ in range(SWEEPS):
        before = signs.clone()
        for number in range(len(units)):
            if float((similar[number] * signs).sum() * signs[number]) < 0:
                signs[number] = -signs[number]
        if torch.equal(before, signs):
            break
    units = units * signs[:, None]
    return units[:, : down.shape[1]], units[:, down.shape[1] :].mT
