"""The Hugging Face hub: the files of one dictionary of a repository, and only these."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from sae_fast.activations.errors import listed, one_line
from sae_fast.interop.errors import DictionaryError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
_SETTINGS = (".json", ".yaml")
# Names of weights of which a folder may have other files beside; any other name must be alone.
_KNOWN = ("sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz", "params.safetensors")
_PROOF = "expected_codes"  # rows with the codes that a dictionary must give, of sae_fast
_DEEP = "checkpoints/final.safetensors"  # of Llama Scope


def download(name: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """Return the directory or file of a dictionary, downloaded unless the cache has it.

    Where the hub cannot be reached, or HF_HUB_OFFLINE=1 forbids it, the cache alone is used.

    Args:
        name: of the repository, owner/name.
        subfolder: of the dictionary, a folder or a file; None: the repository itself.
        revision: a branch, tag or commit; None: the newest.

    Raises DictionaryError where the repository cannot be reached, has no dictionary there, or has
    several.
    """
    hub = _library()
    try:
        files = hub.HfApi().list_repo_files(name, revision=revision)
    except Exception as error:  # of the network, of the name, of the rights
        cached = _cached(hub, name, subfolder, revision)
        if cached is not None:
            return cached
        place = "/".join(filter(None, (name, subfolder)))
        raise DictionaryError(
            f"{place}: no such directory, and the Hugging Face hub answers: {one_line(error)}"
        ) from None
    wanted = files_of(name, files, subfolder)
    try:
        root = Path(hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise DictionaryError(f"{name}: cannot be downloaded: {one_line(error)}") from None
    return root if subfolder is None else root / subfolder


def _cached(hub: Any, name: str, subfolder: str | None, revision: str | None) -> Path | None:
    """Return the directory or file of a dictionary that was downloaded before, or None."""
    wanted = revision or "main"
    try:
        repositories = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        return None
    for repository in repositories:
        for kept in repository.revisions if repository.repo_id == name else ():
            if wanted not in (kept.commit_hash, *kept.refs):
                continue
            root = Path(kept.snapshot_path)
            there = [path.relative_to(root).as_posix() for path in root.rglob("*")]
            try:
                files_of(name, there, subfolder)
            except DictionaryError:  # the cache has other dictionaries of the repository
                continue
            return root if subfolder is None else root / subfolder
    return None


def upload(directory: Path, name: str, subfolder: str | None, private: bool | None) -> str:
    """Upload the files of a directory into a repository, made if need be; return its address.

    Args:
        directory: of the files.
        name: of the repository, owner/name.
        subfolder: of the repository, where the files go; None: its root.
        private: whether a new repository is private; None: the default of the account.

    Raises DictionaryError where the hub does not take them.
    """
    hub = _library()
    try:
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=directory,
            path_in_repo=subfolder,
            commit_message="Upload a dictionary",
        )
    except Exception as error:  # of the network, of the name, of the rights
        raise DictionaryError(f"{name}: cannot be uploaded: {one_line(error)}") from None
    return str(done.commit_url)


def files_of(name: str, files: list[str], subfolder: str | None) -> list[str]:
    """Return the files of one dictionary, or raise DictionaryError naming what there is."""
    proofs = [file for file in files if PurePosixPath(file).name.startswith(_PROOF)]
    files = [file for file in files if file not in proofs]
    if subfolder in files:
        beside = PurePosixPath(str(subfolder)).parent
        # Of a checkpoint the settings are one folder above.
        near = [file for file in files if _is_in(file, beside) or _is_in(file, beside.parent)]
        settings = [file for file in near if file.endswith(_SETTINGS)]
        proof = str(beside / f"{_PROOF}_{PurePosixPath(str(subfolder)).stem}.safetensors")
        return [str(subfolder), *settings, *([proof] if proof in proofs else [])]
    folder = PurePosixPath(subfolder or ".")
    inside = [file for file in files if _is_in(file, folder)]
    weights = [file for file in inside if file.endswith(_WEIGHTS)]
    known = [file for file in weights if PurePosixPath(file).name in _KNOWN]
    deep = str(folder / _DEEP)
    if deep in files:
        known, inside = [deep], [*inside, deep]
    if len(weights) == 1 or known:
        chosen = known or weights
        own_proofs = [file for file in proofs if _is_in(file, folder)]
        return [*chosen, *(file for file in inside if file.endswith(_SETTINGS)), *own_proofs]
    below = [file for file in files if file.endswith(_WEIGHTS)]
    if not below:
        raise DictionaryError(f"{name}: the repository has no dictionary")
    places = [file if len(weights) > 1 else str(PurePosixPath(file).parent) for file in below]
    there = listed(sorted(dict.fromkeys(places)), 4)
    where = f" in {subfolder}" if subfolder else ""
    raise DictionaryError(
        f"{name}: has {'several dictionaries' if len(weights) > 1 else 'no dictionary'}{where}: "
        f"name one as subfolder, as {there}"
    )


def _is_in(file: str, folder: PurePosixPath) -> bool:
    return PurePosixPath(file).parent == folder


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise DictionaryError(
            "the Hugging Face hub needs huggingface_hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub
