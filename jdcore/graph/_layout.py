from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from jdcore.linalg._combine import sent


@frozen(eq=False)
class Layout:
    """
    Where the samples are in a tensor: which entries of one of its dimensions belong to which.

    :param dim: The dimension.
    :param samples: How many samples there are, B.
    :param after: Entry i belongs to sample ``i // after % B``, if there is no index.
    :param index: The entries of each sample, shape [B, T]; -1 stands for none, where a sample has
        less than T. They are in no order, as behind a permutation or a routing.
    """

    dim: int
    samples: int
    after: int = 1
    index: Tensor | None = None

    @classmethod
    def of_owners(cls, dim: int, owners: Sequence[int], samples: int) -> Layout | None:
        """
        Find the layout of a dimension.

        :param owners: The sample of each entry, -1 for an entry that belongs to none.
        :returns: None if no sample owns an entry.
        """
        n, known = len(owners), [(i, owner) for i, owner in enumerate(owners) if owner >= 0]
        if not known:
            return None
        if n % samples == 0:
            size = n // samples
            # The usual orders first: each sample in one run of entries, then entry by entry in
            # turn.
            steps = [size, 1, *(a for a in range(2, size) if size % a == 0)]
            for after in dict.fromkeys(steps):
                if all(i // after % samples == owner for i, owner in known):
                    return cls(dim, samples, after)
        of_sample: list[list[int]] = [[] for _ in range(samples)]
        for i, owner in known:
            of_sample[owner].append(i)
        longest = max(map(len, of_sample))
        padded = [entries + [-1] * (longest - len(entries)) for entries in of_sample]
        return cls(dim, samples, 1, torch.tensor(padded, device="cpu"))

    def leads(self, length: int) -> bool:
        """
        Whether the samples come one after the other in the first dimension.

        :param length: Of the dimension.
        """
        return self.dim == 0 and self.index is None and self.after * self.samples == length

    def split(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """
        Bring the samples to the front.

        :param tensor: Laid out like this behind its first ``lead`` dimensions.
        :returns: Shape ``[*lead, B, ..., before, after, ...]``, with the dimensions before it and
            those after it in place of the dots.
        """
        dim = self.dim + lead
        if self.index is None:
            before = tensor.shape[dim] // (self.samples * self.after)
            first = before == 1 and dim == lead  # in their place already, as they mostly are
            sizes = (self.samples, before) if first else (before, self.samples)
            shape = *tensor.shape[:dim], *sizes, self.after, *tensor.shape[dim + 1 :]
            split = tensor.reshape(shape)
            return split if first else split.movedim(dim + 1, lead)
        index = sent(self.index, tensor.device)
        # A missing entry (-1) chooses any other one here, and is set to zero below.
        chosen = tensor.index_select(dim, index.clamp(min=0).flatten())
        chosen = chosen.view(*tensor.shape[:dim], *index.shape, 1, *tensor.shape[dim + 1 :])
        chosen = chosen.movedim(dim, lead)
        if bool((self.index < 0).any()):
            missing = (index < 0).view(
                *[1] * lead, self.samples, *[1] * self.dim, -1, *[1] * (tensor.ndim - dim)
            )
            chosen = chosen.masked_fill(missing, 0)
        return chosen

    def masks(self, tensor: Tensor) -> Tensor:
        """
        One for the entries of each sample, zero for those of others.

        :param tensor: Laid out like this.
        :returns: Shape [B, 1, ..., n, ..., 1], to be multiplied with the tensor.
        """
        owners = self.owners(tensor.shape[self.dim], tensor.device)
        masks = owners == torch.arange(self.samples, device=tensor.device)[:, None]
        shape = [-1 if d == self.dim else 1 for d in range(tensor.ndim)]
        return masks.view(self.samples, *shape)

    def owners(self, length: int, device: torch.device) -> Tensor:
        """
        The sample of each entry of the dimension, -1 for none.

        :param length: Of the dimension.
        """
        if self.index is None:
            return torch.arange(length, device=device) // self.after % self.samples
        index = sent(self.index, device)
        owners = index.new_full((length + 1,), -1)
        rows = torch.arange(self.samples, device=device)[:, None].expand_as(index)
        owners[index.flatten()] = rows.flatten()  # what is missing goes to the last, -1
        return owners[:-1]
