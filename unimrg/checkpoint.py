"""Checkpoints: a training state as one atomic unit in object storage, written while training goes on.

A checkpoint is a folder:

    part-<rank>.safetensors   that rank's pieces of weights and moments (`pieces`), and its random states
    state.json                step, position, ranks, config
    COMPLETE                  size and digest of every file, written last

It exists only when COMPLETE lies in it. The digest of a part is its header's, and the header holds the
digest of every tensor behind it: so a reader checks whatever few tensors it needs. Pieces say what they are,
not who held them: a checkpoint loads into any engine and any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimrg.engine import Engine, gather, world
from unimrg.errors import CheckpointError, StorageError
from unimrg.pieces import AVERAGE, WEIGHT, Piece, share
from unimrg.storage import Store

COMPLETE = "COMPLETE"
STATE = "state.json"
PART = "part-{:05d}.safetensors"
READ_BYTES = 64 << 20
DTYPES = {"F32": torch.float32, "U8": torch.uint8}

ORDER = (
    "seed",
    *(f"data.{k}" for k in ("manifest", "manifests", "shares", "held_out_count", "shard_rows", "window")),
)
"""What the order of samples depends on (`data.order`), so that a position means the same."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. step: optimiser steps done. position: the next sample of the epochs' order.

    ranks: how many processes wrote it. config: the resolved configuration, without secrets. loss: mean of the
    steps since the checkpoint before, if it is known. updates: steps that changed the weights. balance: state
    of what moves the tasks' weights (`balance.Balancer.state`).
    """

    step: int
    position: int
    ranks: int
    config: dict[str, Any]
    loss: float | None = None
    updates: int = 0
    balance: dict[str, Any] = field(default_factory=dict)


# -- names ---------------------------------------------------------------------------------------------------


def step_name(step: int, ranks: int) -> str:
    """Folder of a checkpoint; names sort by step, and worlds never mix in one folder."""
    return f"step-{step:08d}-w{ranks}"


def step_of(name: str) -> int:
    """The inverse of `step_name`."""
    return int(name.split("-")[1])


def checkpoints_in(store: Store) -> list[str]:
    """Names of all checkpoints in a folder, complete or not, oldest first."""
    return sorted(e.path for e in store.list() if e.is_folder and e.path.startswith("step-"))


def latest_checkpoint(store: Store) -> str:
    """Name of the newest complete checkpoint in a folder, or ""."""
    return next((name for name in reversed(checkpoints_in(store)) if is_complete(store, name)), "")


# -- writing -------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints of a group of processes into a folder, in the background.

    `begin` copies this rank's state to the host's memory and returns; a thread writes it. `finish` agrees
    with the other ranks that all have written, and then makes the checkpoint exist. All ranks call both.

    before: called by rank 0 for every checkpoint, in the thread that writes, before it can exist.
    """

    def __init__(self, store: Store, before: Callable[[], None] = lambda: None) -> None:
        self.store = store
        self._before = before
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._progress: Progress | None = None

    def begin(self, engine: Engine, progress: Progress) -> None:
        """Start to write what the engine holds now. Raises as `finish` does, for the checkpoint before."""
        self.finish(wait=True)
        rank, ranks = world()
        pieces = engine.pieces()
        mine = share(pieces, rank, ranks) if engine.replicated else pieces
        tensors = self._copy(dict(_tensors(mine)) | _rng_tensors())  # floats first: they stay aligned
        name = step_name(progress.step, ranks)
        if rank == 0:
            self.store.delete(f"{name}/{COMPLETE}")  # of the same step, before the run went back behind it
        gather([0.0])
        self._progress, self._error = progress, None
        self._thread = threading.Thread(
            target=self._write, args=(name, rank, tensors, progress), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self, wait: bool = False) -> Progress | None:
        """The checkpoint that exists since this call, or None: there is none to wait for, or not yet.

        wait: until all ranks have written. Raises StorageError, on all ranks, when one of them could not.
        """
        if self._thread is None or self._progress is None:
            return None
        if wait:
            self._thread.join()
        written = not self._thread.is_alive()
        flags = gather([float(written), float(written and self._error is not None)])
        if not all(there for there, _ in flags):
            return None
        self._thread.join()
        self._thread = None
        if any(failed for _, failed in flags):
            raise self._error or StorageError("another worker couldn't save a checkpoint; its log says why")
        name = step_name(self._progress.step, world()[1])
        if world()[0] == 0:
            mark_complete(self.store, name)
        gather([0.0])  # nobody goes on before it exists
        return self._progress

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory; page-locked and used again, where they come from a GPU."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        for key, tensor in tensors.items():
            if key not in self._buffers or self._buffers[key].shape != tensor.shape:
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._buffers[key].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return {key: self._buffers[key] for key in tensors}

    def _write(self, name: str, rank: int, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        try:
            write_part(self.store, f"{name}/{PART.format(rank)}", tensors)
            if rank == 0:
                self._before()
                self.store.write_bytes(f"{name}/{STATE}", json.dumps(asdict(progress), indent=1).encode())
        except Exception as error:  # told by `finish`, in the thread that trains
            self._error = error


def _tensors(pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces:
        for kind, value in piece.values.items():
            yield f"{kind}/{piece.start}/{piece.name}", value


def write_part(store: Store, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 or uint8 tensors [n] in the host's memory as a safetensors file with their digests."""
    data = [_bytes(tensor) for tensor in tensors.values()]
    names = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    at = 0
    for (key, tensor), view in zip(tensors.items(), data, strict=True):
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[key] = entry | {"data_offsets": [at, at + len(view)]}
        at += len(view)
    digests = {key: digest(view) for key, view in zip(tensors, data, strict=True)}
    header["__metadata__"] = {"digests": json.dumps(digests)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    store.write_pieces(path, lambda: (head, *data), len(head) + at)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host."""
    array: Any = tensor.numpy()  # numpy's stubs don't call it a buffer before Python 3.12
    return memoryview(array).cast("B")


def mark_complete(store: Store, name: str) -> None:
    """Make a checkpoint exist, all of whose files are written: list them with sizes and digests.

    Raises CheckpointError when a part is missing.
    """
    entries = {e.path: e.size for e in store.list(name, recursive=True) if not e.is_folder}
    ranks = json.loads(store.read_bytes(f"{name}/{STATE}"))["ranks"]
    wanted = [f"{name}/{file}" for file in (STATE, *(PART.format(rank) for rank in range(ranks)))]
    missing = [path for path in wanted if path not in entries]
    if missing:
        raise CheckpointError(f"{store.url}/{missing[0]} is missing right after it was written")
    files = {path: {"size": entries[path], "digest": _file_digest(store, path)} for path in wanted}
    store.write_bytes(f"{name}/{COMPLETE}", json.dumps(files, indent=1).encode())


def _file_digest(store: Store, path: str) -> str:
    return digest(_read_head(store, path) if path.endswith(".safetensors") else store.read_bytes(path))


def digest(data: bytes | memoryview | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def retire(store: Store, last: int, best: int) -> None:
    """Delete checkpoints but the `last` newest and the `best` of least loss, and what was never finished.

    Raises StorageError; one that stays costs space, not the run.
    """
    names = checkpoints_in(store)
    complete = [name for name in names if is_complete(store, name)]
    if not complete:
        return
    losses = {name: read_progress(store, name).loss for name in complete} if best else {}
    known = sorted((loss, name) for name, loss in losses.items() if loss is not None)
    keep = {*complete[-last:], *(name for _, name in known[:best])}
    for name in names:
        if name not in keep and name <= complete[-1]:
            store.delete(f"{name}/{COMPLETE}")  # first, so that half of it is never taken for a whole
            store.delete(name)


# -- reading -------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One tensor of a part: where its bytes lie, and what they must digest to."""

    path: str
    offset: int
    length: int
    dtype: torch.dtype
    digest: str


def is_complete(store: Store, name: str) -> bool:
    """Whether a stored checkpoint has its list and every file on it, in full size."""
    try:
        listed = _manifest(store, name)
    except CheckpointError:
        return False
    there = {entry.path: entry.size for entry in store.list(name, recursive=True)}
    return bool(listed) and all(there.get(path) == file["size"] for path, file in listed.items())


def _manifest(store: Store, name: str) -> dict[str, dict[str, Any]]:
    try:
        listed = json.loads(store.read_bytes(f"{name}/{COMPLETE}"))
        return {path: {"size": int(file["size"]), "digest": file["digest"]} for path, file in listed.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{store.url}/{name} is not a complete checkpoint; take another one") from error


def read_progress(store: Store, name: str) -> Progress:
    """`state.json` of a checkpoint. Raises CheckpointError, StorageError."""
    try:
        return Progress(**json.loads(store.read_bytes(f"{name}/{STATE}")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{store.url}/{name} holds no readable {STATE} ({error}); remove it and continue"
        ) from error


def restore(store: Store, name: str, engine: Engine) -> Progress:
    """Bring an engine, on every rank, to where a checkpoint was; what it was written by doesn't matter.

    Random states come back only with the number of ranks that wrote it. Every rank reads what it needs and
    checks its digests. Raises CheckpointError when something is missing, damaged or of another model.
    """
    rank, ranks = world()
    manifest = _manifest(store, name)
    index = _index(store, name, manifest)
    pieces = engine.pieces()
    _fill(store, pieces, index)
    progress = read_progress(store, name)
    engine.resume(progress.step, progress.updates)
    if progress.ranks == ranks:
        path = f"{name}/{PART.format(rank)}"
        mine = {key: stored for key, stored in index.items() if stored.path == path and key[0] == "rng"}
        _restore_rng({key[2]: tensor for key, tensor in _read_tensors(store, mine)})
    return progress


Key = tuple[str, int, str]
"""Kind of value, start in the flattened parameter (for random states: the rank), name."""


def _index(store: Store, name: str, manifest: Mapping[str, dict[str, Any]]) -> dict[Key, Stored]:
    """Every tensor of a checkpoint."""
    index: dict[Key, Stored] = {}
    for path, file in manifest.items():
        where = f"{store.url}/{path}"
        if not path.endswith(".safetensors"):
            if digest(store.read_bytes(path)) != file["digest"]:
                raise CheckpointError(f"{where} is damaged; remove {name} to continue from the one before")
            continue
        head = _read_head(store, path)
        if digest(head) != file["digest"]:
            raise CheckpointError(f"{where} is damaged; remove {name} to continue from the one before")
        header = json.loads(head[8:])
        digests = json.loads(header.pop("__metadata__")["digests"])
        rank = int(path.rsplit("-", 1)[1].split(".")[0])
        for key, entry in header.items():
            kind, start, parameter = key.split("/", 2)
            first, last = entry["data_offsets"]
            stored = Stored(path, len(head) + first, last - first, DTYPES[entry["dtype"]], digests[key])
            index[kind, rank if kind == "rng" else int(start), parameter] = stored
    return index


def _read_head(store: Store, path: str) -> bytes:
    """Length and text of a safetensors header. Raises CheckpointError when there is none."""
    try:
        length = int.from_bytes(store.read_range(path, 0, 8), "little")
        if length > READ_BYTES:
            raise ValueError(f"a header of {length} bytes")
        return store.read_range(path, 0, 8 + length)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{store.url}/{path} can't be read ({error}); take another one") from error


def _fill(store: Store, pieces: Sequence[Piece], index: Mapping[Key, Stored]) -> None:
    """Write stored values into the pieces. Raises CheckpointError unless exactly they are stored."""
    kinds = {kind for kind, _, _ in index}
    names = {name for kind, _, name in index if kind == WEIGHT}
    # By what they are stored as: the pieces, and the tensors in them to be filled.
    wanted: dict[tuple[str, str], list[tuple[Piece, Tensor]]] = defaultdict(list)
    for piece in pieces:
        if piece.name not in names:
            raise CheckpointError(
                f"{piece.name} is trained now but is not in the checkpoint; set family.freeze, family.lora "
                "and weights back, or start a new run under another name"
            )
        for kind, value in piece.values.items():
            # A moving average that begins now begins with the weights.
            stored_as = WEIGHT if kind == AVERAGE and AVERAGE not in kinds else kind
            wanted[stored_as, piece.name].append((piece, value))
    needed = {
        (kind, start, name): stored
        for (kind, start, name), stored in index.items()
        if any(_overlap(piece, start, stored) for piece, _ in wanted.get((kind, name), ()))
    }
    missing = {id(value): piece.length for pairs in wanted.values() for piece, value in pairs}
    for (kind, start, name), tensor in _read_tensors(store, needed):
        for piece, value in wanted[kind, name]:
            low, high = max(start, piece.start), min(start + len(tensor), piece.start + piece.length)
            if low < high:
                value[low - piece.start : high - piece.start].copy_(tensor[low - start : high - start])
                missing[id(value)] -= high - low
    for (kind, name), pairs in wanted.items():
        if any(missing[id(value)] for _, value in pairs):
            raise CheckpointError(f"the checkpoint lacks a part of {kind} of {name}; take another")


def _overlap(piece: Piece, start: int, stored: Stored) -> bool:
    return start < piece.start + piece.length and piece.start < start + stored.length // stored.dtype.itemsize


def _read_tensors(store: Store, wanted: Mapping[Key, Stored]) -> Iterator[tuple[Key, Tensor]]:
    """Read tensors and check their digests; neighbours in a file come with one request."""
    for run in _runs(wanted):
        first, last = run[0][1], run[-1][1]
        data = store.read_range(first.path, first.offset, last.offset + last.length - first.offset)
        view = memoryview(bytearray(data))
        for key, stored in run:
            at = stored.offset - first.offset
            part = view[at : at + stored.length]
            if len(part) != stored.length or digest(part) != stored.digest:
                raise CheckpointError(
                    f"{store.url}/{stored.path} is damaged at {key[2]}; remove its folder to continue from "
                    "the checkpoint before"
                )
            yield key, torch.frombuffer(part, dtype=stored.dtype) if stored.length else torch.empty(0)


def _runs(wanted: Mapping[Key, Stored]) -> Iterator[list[tuple[Key, Stored]]]:
    """Tensors that follow each other in a file, up to some size."""
    run: list[tuple[Key, Stored]] = []
    for key, stored in sorted(wanted.items(), key=lambda item: item[1][:2]):
        if run:
            first, last = run[0][1], run[-1][1]
            together = stored.offset + stored.length - first.offset <= READ_BYTES
            if stored.path != last.path or stored.offset != last.offset + last.length or not together:
                yield run
                run = []
        run.append((key, stored))
    if run:
        yield run


def check_same_order(progress: Progress, config: dict[str, Any]) -> None:
    """Raises CheckpointError when a position means another sample under `config` (plain) than it did."""
    for key in ORDER:
        there, here = (_lookup(values, key) for values in (progress.config, config))
        if there != here:
            raise CheckpointError(
                f"this run's checkpoints were made with {key}={there}, now it is {here}: samples would come "
                f"in another order; set it back, or start a new run under another name"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, {})
    return values


# -- random states -------------------------------------------------------------------------------------------


def _rng_tensors() -> dict[str, Tensor]:
    """All random states of this process as uint8 [n]."""
    states = {"rng/0/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng/0/cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy = [kind, [int(k) for k in keys], *(float(r) if isinstance(r, float) else int(r) for r in rest)]
    text = json.dumps({"python": [version, list(internal), gauss], "numpy": numpy})
    return states | {"rng/0/python": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def _restore_rng(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"].clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
    plain = json.loads(bytes(states["python"].numpy()))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
