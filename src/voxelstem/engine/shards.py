"""How torch lays a checkpoint out in files, with its two doubtful habits taken away.

Its index is a pickle: it is read with only those names let in that an index is made of. And the index holds the path
of the folder, which can hold a person's name: it is left out.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from voxelstem.errors import CheckpointError

INDEX = ".metadata"
_LARGEST = 1 << 30
_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What lies in a checkpoint."""

    metadata: Metadata
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and kind of every tensor."""


class Writer(FileSystemWriter):
    """Torch's writer, one file for each process, every one synced."""

    def storage_meta(self) -> StorageMeta:
        """Say nothing of the folder."""
        return StorageMeta(save_id=self.save_id)


class Reader(FileSystemReader):
    """Torch's reader with an index that was opened by our rules."""

    def __init__(self, path: Path) -> None:
        """Open the index of the checkpoint in the folder `path`.

        Raises:
            CheckpointError: it holds something else than places of tensors inside this folder.
        """
        super().__init__(path)
        self.contents: Index = read_index(path / INDEX)

    def read_metadata(self, *args: Any, rank: int | None = None) -> Metadata:  # noqa: ARG002 - torch's signature
        """Give torch what was opened already."""
        return self.contents.metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError("a name that no index needs")
        return super().find_class(module, name)


def read_index(path: Path) -> Index:
    """Open the index of a checkpoint whose digest has been compared.

    Raises:
        CheckpointError: it holds something else than places of tensors inside this folder.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("no index is that large")
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        tensors = {name: _kind(entry) for name, entry in metadata.state_dict_metadata.items()}
        if any(Path(place.relative_path).name != place.relative_path for place in metadata.storage_data.values()):
            raise ValueError("a file outside the checkpoint")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, IndexError, KeyError, ImportError) as error:
        raise _refused(path) from error
    except (pickle.UnpicklingError, MemoryError, RecursionError, OverflowError) as error:
        raise _refused(path) from error
    return Index(metadata=metadata, tensors=tensors)


def _kind(entry: Any) -> tuple[tuple[int, ...], torch.dtype]:
    # Anything but a tensor would be unpickled without a guard.
    if not isinstance(entry, TensorStorageMetadata):
        raise TypeError("not a tensor")
    return tuple(entry.size), entry.properties.dtype


def _refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the index of {path.parent.name} is not one that a training of ours wrote",
        hint="delete this folder to resume from the one before",
    )
