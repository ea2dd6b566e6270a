"""Checkpoints of the Hugging Face hub, or of a mirror of it: what a pipeline needs is fetched once, and found again
without network.

huggingface_hub does the work: it resumes what was cut off, checks sizes, and keeps the files in its own cache.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .contents import model_index, weight_files
from .soundness import HOW_TO_CONVERT, check_safetensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TEXTS = (".json", ".txt", ".model")
NOT_NEEDED = ("safety_checker",)
"""No pipeline of ours has one, and it is as large as the text encoder."""


def is_hub_id(source: str) -> bool:
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists()


def snapshot(hub_id: str) -> Path:
    """The folder of a checkpoint that was pulled; pulls it where it was not.  raises CheckpointError"""
    folder = cached(hub_id)
    return folder if folder is not None and is_complete(folder) else pull(hub_id)


def is_complete(folder: Path) -> bool:
    """Whether every part that a pipeline's index names is there; a pull may have been cut off."""
    try:
        index = model_index(folder)
        for name, entry in index.items():
            if name in NOT_NEEDED or not isinstance(entry, list) or entry[:1] == [None]:
                continue
            if (folder / name / "config.json").is_file():
                weight_files(folder / name)
            elif not (folder / name).is_dir():
                return False
    except CheckpointError:
        return False
    return True


def cached(hub_id: str) -> Path | None:
    """Where the files of a hub id lie on this machine, if there are any."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    ref = home / "refs" / "main"
    folder = home / "snapshots" / ref.read_text().strip() if ref.is_file() else None
    return folder if folder is not None and folder.is_dir() else None


def pull(hub_id: str, *, variant: str | None = None, file: str | None = None, pickles: bool = False) -> Path:
    """Download what a pipeline needs of a hub repository: configurations, tokenizer, one set of safetensors.

    Started again, it goes on where it was cut off.  `HF_ENDPOINT` names a mirror, `HF_TOKEN` an account's token.

    variant   "fp16", …: of each part the weights of this variant, where there are some
    file      one file alone, such as a checkpoint in the original layout
    pickles   also parts that exist as .bin alone; they are not read, `allaprima models convert` makes safetensors
    returns   the folder, or the one file
    raises    CheckpointError
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    cache = Path(constants.HF_HUB_CACHE)
    try:
        info = HfApi(endpoint=endpoint).model_info(hub_id, files_metadata=True)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        names = _one(hub_id, file, sizes) if file else choose(hub_id, sizes, variant, pickles)
        _check_space(cache, sum(sizes[name] for name in names))
        folder = Path(snapshot_download(hub_id, allow_patterns=names, endpoint=endpoint, cache_dir=cache))
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001  its errors are those of three libraries
        raise _explained(hub_id, endpoint, error) from error
    for name in names:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)
    return folder / file if file else folder


def choose(hub_id: str, sizes: Iterable[str], variant: str | None = None, pickles: bool = False) -> list[str]:
    """Which of a repository's files a pipeline needs.  raises CheckpointError"""
    names = sorted(sizes)
    if "model_index.json" not in names:
        singles = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        known = f"; its checkpoints are {', '.join(singles)}: pull one with --file" if singles else ""
        raise CheckpointError(f"{hub_id} is no diffusers folder: it has no model_index.json{known}.")
    parts: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if len(path.parts) == 2 and path.parts[0] not in NOT_NEEDED:
            parts.setdefault(path.parts[0], []).append(name)
    chosen = ["model_index.json"]
    for part, own in parts.items():
        chosen += [name for name in own if name.endswith(TEXTS) and ".index." not in name]
        chosen += _weights(hub_id, part, own, variant, pickles)
    return chosen


def _weights(hub_id: str, part: str, names: list[str], variant: str | None, pickles: bool) -> list[str]:
    """Of one part: the variant, else the plain ones, else whatever variant there is."""
    for suffix in (".safetensors", ".bin"):
        sets: dict[str, list[str]] = {}
        for name in names:
            if re.search(rf"(^|/)(diffusion_pytorch_model|pytorch_model|model)[^/]*\{suffix}(\.index\S*)?", name):
                sets.setdefault(variant_of(name), []).append(name)
        if not sets:
            continue
        if suffix == ".bin" and not pickles:
            raise CheckpointError(
                f"{hub_id} holds its {part} as a pickle alone, which can run any code when it is read. Pull it with "
                f"--pickles, then {HOW_TO_CONVERT.format('FOLDER').lower()}."
            )
        return sets.get(variant or "") or sets.get("") or next(iter(sets.values()))
    return []


def variant_of(name: str) -> str:
    """ "unet/diffusion_pytorch_model.fp16.safetensors" -> "fp16"; shards' numbers and indexes are no variants"""
    stem = PurePosixPath(name).name.partition(".")[2]
    words = [word for word in re.sub(r"-\d+-of-\d+", "", stem).split(".") if word]
    return next((word for word in words if word not in ("safetensors", "bin", "index", "json")), "")


def _one(hub_id: str, file: str, sizes: Mapping[str, int]) -> list[str]:
    if file not in sizes:
        near = ", ".join(name for name in sizes if name.endswith((".safetensors", ".ckpt"))) or "no checkpoint"
        raise CheckpointError(f"{hub_id} has no file {file!r}; it has {near}.")
    return [file]


def _check_space(cache: Path, needed_bytes: int) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{needed_bytes / 1e9:.1f} GB do not fit on the disk of {place}: {free / 1e9:.1f} GB are free. Make room, "
            "or let HF_HOME name another disk."
        )


def _explained(hub_id: str, endpoint: str, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        what = "its authors ask you to accept their terms on its page, and to give a token of your account as HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        what = "there is no such repository, or it is private and needs a token as HF_TOKEN"
    elif isinstance(error, HfHubHTTPError) or not isinstance(error, LocalEntryNotFoundError | OSError):
        what = f"{_first_line(error)}. Start it again: it goes on where it was cut off. HF_ENDPOINT names a mirror"
    else:
        what = _first_line(error)
    return CheckpointError(f"{hub_id} cannot be pulled from {endpoint}: {what}.")


def _first_line(error: BaseException) -> str:
    cause: Any = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:200]}"
