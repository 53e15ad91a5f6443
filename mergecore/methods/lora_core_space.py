"""Core Space merging: adapters as small matrices between two common bases, merged there (Panariello et al. 2025).

Checked against the authors' code (apanariello4/core-space-merging, `get_core_matrices` and `_merge_tensors`), number by
number on random adapters; the tests have its steps written anew. The drop's masks are our own. Adapters there have a
scaling of 1; ours stands in the small matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import decomposition
from mergecore.arithmetic.low_rank import dropped_at_random
from mergecore.arithmetic.pruned_adapter import PrunedAdapter
from mergecore.arithmetic.spectral import directions_of, orthonormal, side_by_side
from mergecore.arithmetic.trims import RandomDrop, Shares, agreeing, disjoint_mean, elected_sign, folded_sum, trimmed
from mergecore.checkpoints.adapters import padded, relative_error
from mergecore.plugins.adapter_method import Combined, Updates
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_expert import each


class LoraCoreSpace(PrunedAdapter):
    """Write the experts' updates as small core matrices between common bases of all their B and all their A. Merge the
    cores. The result is an adapter.
    """

    name: ClassVar[str] = "lora_core_space"
    paper: ClassVar[str] = (
        "Panariello et al. 2025, Accurate and efficient low-rank model merging in core space, arXiv:2509.17786"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' `tsv`; `scale` is their `scaling_coeffs`, `isotropic` their `isotropize`",
        "`merge: sum` their `tv`, with a `drop` their `dare`, of other random masks",
        "`merge: ties` their `ties`, where `density: 0.1` is `topK: 10`; with a `drop` their `dare-ties`",
    )

    merge: Annotated[
        Literal["tsv", "sum", "mean", "ties"],
        Field(
            description="how core matrices are merged: 'tsv' as TSV-Merge (Gargiulo et al. 2025), 'ties' as "
            "TIES-Merging, their sum or their mean; the last two are those of the updates themselves. In "
            "place of 'tsv' a module with fewer rows or columns than there are experts has the mean"
        ),
    ] = "tsv"
    scale: Annotated[
        float, Field(description="λ, the factor of the result; the authors choose it on validation data")
    ] = 1.0
    density: Annotated[
        Shares, Field(description="share of each core matrix that `merge: ties` keeps, the largest magnitudes")
    ] = 0.1
    drop: Annotated[RandomDrop | None, Field(description="random drop of the core matrices' elements (DARE)")] = None
    isotropic: Annotated[
        bool, Field(description="give all singular directions of the merged core matrix the mean strength (Iso-C)")
    ] = False
    rank: Annotated[
        int | None,
        Field(ge=1, description="rank of the result, cut by SVD; none: the experts' ranks together, nothing is lost"),
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {},
                {"merge": "ties", "density": 0.5, "rank": 3},
                {"merge": "sum", "isotropic": True, "drop": {"kind": "random", "rate": 0.4, "seed": 3}},
            ]
        )

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return all ranks together, or the rank of the cut; a matrix has no more than min(out, in)."""
        whole = min(sum(ranks), *shape)
        return whole if self.rank is None else min(self.rank, whole)

    def combined(self, module: str, updates: Updates) -> Combined:
        """Return U_B M V_Aᵀ out of M = merge(s_t U_Bᵀ B_t A_t V_A): U_B and V_A are singular vectors of all B and A."""
        present = [(place, update) for place, update in enumerate(updates) if update is not None]
        outer = decomposition(torch.cat([update.up for _, update in present], 1))[0]
        inner = decomposition(torch.cat([update.down for _, update in present]))[2]
        cores = [outer.mT @ update.up @ (update.down @ inner.mT) * update.scaling for _, update in present]
        name, shares = f"{module}.weight", each(self.density, len(updates))
        cores = [
            dropped_at_random(core, self.drop, place, update.owner, name)
            for core, (place, update) in zip(cores, present, strict=True)
        ]
        core = self._merged(cores, [shares[place] for place, _ in present])
        left, values, right = decomposition((isotropic(core) if self.isotropic else core) * self.scale)
        shape = (len(outer), inner.shape[1])
        rank = self.rank_made(module, [update.rank for _, update in present], shape)
        root, squares = values[:rank].sqrt(), values * values
        down, up = padded(root[:, None] * (right[:rank] @ inner), outer @ left[:, :rank] * root, rank)
        numbers = {"lost": float(squares[rank:].sum()), "whole": float(squares.sum())}
        return Combined(down, up, {} if self.rank is None else numbers)

    def _merged(self, cores: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        triplets = min(cores[0].shape) // len(cores)
        if self.merge == "tsv" and triplets:
            parts = [directions_of(core, float(core.norm()), "numerical")[0].strongest(triplets) for core in cores]
            joined = orthonormal(side_by_side(parts), "numerical")
            return joined.left * joined.strengths @ joined.right
        if self.merge == "ties":
            cut = [trimmed(core, least_kept(core, share)) for core, share in zip(cores, shares, strict=True)]
            return disjoint_mean(agreeing(cut, elected_sign(cut)))
        total = folded_sum(cores)
        return total if self.merge == "sum" else total / len(cores)

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the relative error of the cut, in the Frobenius norm."""
        return {} if self.rank is None else {"error": relative_error(modules)}


def least_kept(core: Tensor, density: float) -> float | None:
    """Return the k-th smallest magnitude, k = n − ⌊density · n⌋: what is not smaller stays; None where all stay."""
    if density >= 1:
        return None
    return float(core.abs().reshape(-1).kthvalue(core.numel() - int(density * core.numel()))[0])


def isotropic(core: Tensor) -> Tensor:
    """Return σ̄ U Vᵀ over the directions that are to be believed, σ̄ the mean of all singular values."""
    main, strengths = directions_of(core, float(core.norm()), "numerical")
    return main.left @ main.right * strengths.mean()
