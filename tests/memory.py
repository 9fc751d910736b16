"""How much memory tensors take while something runs, counted and not measured: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tally(TorchDispatchMode):
    """Counts the bytes of storages made inside it. now: of those still there; peak: of the most at one time.

    largest: elements of the largest tensor made, views aside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._bound = 0  # at least what is there
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    @property
    def now(self) -> int:
        self._seen = {key: item for key, item in self._seen.items() if not item[0].expired()}
        self._bound = sum(size for _, size in self._seen.values())
        return self._bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._seen:
                self._given[reference.cdata] = reference
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            known = self._given.get(reference.cdata)
            if known is None or known.expired():
                self._given.pop(reference.cdata, None)
                self._seen[reference.cdata] = (reference, storage.nbytes())
                self._bound += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        if self._bound > self.peak:
            self.peak = max(self.peak, self.now)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def held(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass leaves behind for its backward pass, which is then run."""
    with Tally() as tally:
        loss = run()
        left = tally.now
    loss.backward()
    return left
