"""Finding and checking a checkpoint: a folder or Hub id in, config and safetensors files that are whole out.

Owns: Hub download, config.json, the list of shards, their headers. Reads no tensor data and knows no architecture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from mlxmoe.errors import UserError
from mlxmoe.plan import is_converted
from mlxmoe.store import TensorInfo, read_header

DEMO = Path(__file__).with_name("demo")
# What a model folder needs besides config.json and weights.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_DOWNLOAD = [*SIDE_FILES, "*.safetensors"]
REPACK_FILE = "repack.json"  # what makes a folder a repacked one
_NOT_COPIED = {"config.json", "plan.json", REPACK_FILE, "model.safetensors.index.json"}


class Checkpoint(NamedTuple):
    """A folder whose files are whole. `kind`: converted (has a plan), repacked, mlx (stock, quantized) or huggingface."""

    folder: Path
    name: str  # as the user wrote it
    kind: str
    config: dict[str, Any]
    shards: tuple[Path, ...]  # the trunk's for a converted or repacked folder, all weights otherwise
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder."""
        return folder_nbytes(self.folder)


def folder_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def open_checkpoint(source: str | Path | None) -> Checkpoint:
    """Resolves and checks a source: None for the demo model, a folder, or a Hub id (downloaded with progress bars).

    Raises UserError for a source that is not there, has no config or no weights, lacks a shard, or has a file that is
    truncated or damaged.
    """
    folder = _resolve(source)
    name = "demo" if source is None else str(source)
    config = read_config(folder)
    if is_converted(folder):
        kind = "converted"
    elif (folder / REPACK_FILE).is_file():
        kind = "repacked"
    else:
        kind = "mlx" if "quantization" in config else "huggingface"
    shards = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors.update(read_header(shard))
    return Checkpoint(folder, name, kind, config, shards, tensors)


def _resolve(source: str | Path | None) -> Path:
    if source is None:
        if not (DEMO / "config.json").is_file():
            raise UserError("this installation has no demo model", "name a model folder or a Hub id")
        return DEMO
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file, not a model folder", "name the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise UserError(
            f"there is no folder {str(source)!r}", "name a model folder, or a Hub id such as Qwen/Qwen3-30B-A3B"
        )
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=_DOWNLOAD))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"the Hub has no model {str(source)!r}, and there is no such folder",
            "check the spelling; private models need `hf auth login`",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot download {str(source)!r} from the Hub ({type(error).__name__}), and there is no such folder",
            "check the network connection, or name a model folder on this machine",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises UserError when it is missing or is no JSON object with a model_type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} has no config.json", "name a folder with a model in Hugging Face or MLX format"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})", "copy or download it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} names no model_type", "name a folder with a model in Hugging Face or MLX format")
    return config


def _shards(folder: Path) -> tuple[Path, ...]:
    """The model*.safetensors files; all of those that an index names must be there."""
    found = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is damaged", "copy or download it again") from None
        missing = sorted(wanted - {path.name for path in found})
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(wanted)} weight files, the first is {missing[0]}",
                "the download or copy is incomplete: get the missing files",
            )
    if not found:
        other = next((p.suffix for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".gguf")), None)
        raise UserError(
            f"{folder} has no model*.safetensors" + (f", only {other} files" if other else ""),
            "mlxmoe reads safetensors in Hugging Face or MLX format",
        )
    return tuple(found)


def side_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer, templates, generation config and licence, for a converted folder to take along.

    JSON is written without white space: a tokenizer.json is often indented to twice its size.
    """
    found = {path.name: path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    wanted = [name for name in found if name not in _NOT_COPIED and not name.endswith(".index.json")]
    return {name: _without_spaces(found[name]) for name in sorted(wanted)}


def _without_spaces(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".json":
        return data
    try:
        return json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=False).encode()
    except ValueError:  # not JSON after all, or text that UTF-8 cannot say: unchanged
        return data
