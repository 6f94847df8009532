"""LORAPLEX_MODEL -> a local Hugging Face folder: what the engine, the tokenizer and the manifest read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from service.default_model import ensure_default_model
from service.gguf_model import ModelError, Report, convert, exclusive, is_converted, sha256_of, silent

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "merges.txt"]
"""What is fetched of a hub repository: never pickles, never code."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def resolve_model(model: str, data_dir: Path, report: Report = silent) -> Path:
    """The folder of the base model named by `model`: empty (the embedded one), a folder, a .gguf file, or a hub id
    (`org/name` or `org/name@revision`). Raises ModelError."""
    if not model:
        return ensure_default_model(data_dir, report)
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path.absolute())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"LORAPLEX_MODEL={model}: there is no such file", "give the path of a .gguf file")
        return _converted(path.absolute(), data_dir, report)
    if _HUB_ID.fullmatch(model):
        return _checked(_downloaded(model, report))
    raise ModelError(
        f"LORAPLEX_MODEL={model}: there is no such folder, and it is not a hub id",
        "give a local Hugging Face folder, a .gguf file or a hub id like org/name; unset: the embedded model",
    )


def _checked(folder: Path) -> Path:
    """`folder`, if it holds what the service needs."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"{folder} has no readable config.json ({type(exc).__name__})", "it has to be a Hugging Face model folder"
        ) from None
    missing = []
    if not isinstance(config, dict) or not config.get("architectures"):
        missing.append('"architectures" in its config.json')
    if not (folder / "tokenizer.json").is_file():
        missing.append("a tokenizer.json")
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors weights")
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}",
            "save the model and its fast tokenizer there with save_pretrained()",
        )
    return folder


def _converted(gguf: Path, data_dir: Path, report: Report) -> Path:
    report(f"checking {gguf.name}")
    sha256 = sha256_of(gguf)
    # The digest keys the cache; the last component stays readable because it becomes the served name.
    folder = data_dir / "models" / sha256[:16] / re.sub(r"[^A-Za-z0-9._-]", "-", gguf.stem)
    if not is_converted(folder, sha256):
        with exclusive(folder.parent):
            if not is_converted(folder, sha256):
                convert(gguf, folder, sha256, report)
    return folder


def _downloaded(model: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    report(f"looking for {model} on the Hugging Face hub")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OSError, HFValidationError, HfHubHTTPError) as exc:
        status = getattr(getattr(exc, "response", None), "status_code", None)
        if status in (401, 403, 404):
            hint = "check the name and the revision; a private or gated model needs HF_TOKEN"
            raise ModelError(f"LORAPLEX_MODEL={model}: the hub answers {status}", hint) from None
        raise ModelError(
            f"LORAPLEX_MODEL={model}: neither in the local hub cache nor reachable on the hub ({type(exc).__name__})",
            "check the network (HF_ENDPOINT, proxies), or give a local folder; unset: the embedded model",
        ) from None
