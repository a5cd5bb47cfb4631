"""Where a model's folder is: the embedded one, a path, or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path

from cortexstream.errors import ModelLoadError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def tiny_folder() -> Path:
    """The embedded model: a small Llama that does arithmetic, copying, sorting and the like, in standard files."""
    return Path(__file__).parent / "tiny"


def resolve_model(model: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a model; a Hugging Face id is downloaded unless the cache has it.

    Raises ModelLoadError, with what was looked for, when there is no such folder or the download fails.
    """
    if model is None:
        return tiny_folder()
    if not isinstance(model, (str, Path)):
        raise ModelLoadError(f"model: is {model!r}; give a folder or a Hugging Face id")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"model: {model} is a file; give the folder that holds config.json and the weights")
    if not HUB_ID.fullmatch(str(model)):
        raise ModelLoadError(f"model: {model} is neither a folder nor a Hugging Face id of the form 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"model: there is no folder {model}, and it could not be downloaded from Hugging Face: {reason}"
        ) from error
