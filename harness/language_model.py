"""A Hugging Face model in the forms that training and evaluation need: itself, and the bridge."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import GET_ACCESS, ExperimentError, first_line, shortened
from harness.identity import changed, remember
from harness.model_checks import ROUNDING, blocks_of, check_blocks, check_weights, decoder
from harness.packaged_model import smollm2_folder
from harness.start import HERE
from harness.steering import Steering, steered
from harness.text import corpus_errors
from harness.tokenizer import prepare_tokenizer, special_token_ids


def hook_name(hook: str, layer: int) -> str:
    """What TransformerLens, SAELens and SAE-Bench call what an SAE reads: "blocks.3.hook_…"."""
    return f"blocks.{layer}.hook_{hook}"


class LanguageModel:
    """A causal language model, read at a hook point of its blocks.

    Passes are its own modules', and may run side by side in several threads.

    Args:
        hf: from AutoModelForCausalLM. tokenizer: see `prepare_tokenizer`. name: as in settings.
        hook: what is read of a block, by TransformerLens' name. "resid_post" is its output; others
            are read by way of the bridge, one pass at a time.
    Raises:
        ExperimentError: it has no residual stream by block, or is not causal.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any, name: str, hook: str = "resid_post") -> None:
        self.hf, self.tokenizer, self.name, self.hook = hf, tokenizer, name, hook
        self.special_token_ids = special_token_ids(tokenizer)
        self.d_model = hf.config.hidden_size
        self.blocks = blocks_of(hf, name)
        for layer, block in enumerate(self.blocks):
            if not hasattr(block, "layer_of_steering"):
                block.layer_of_steering = layer
                block.__class__ = steered(type(block))
        self.starts_late = check_blocks(hf, self.blocks, name)
        self.bridged = None if hook == "resid_post" else self.bridge()

    @torch.no_grad()
    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """What is read of the given blocks, from one forward pass that stops at the last.

        Args:
            tokens_BL: (B, L) token ids.
        Returns:
            a tensor (B, L, D) per layer, as TransformerLens' blocks.L.hook_….
        """
        if self.bridged is not None:
            hooks = {hook_name(self.hook, layer): layer for layer in layers}
            return list(acts_at(self.bridged, hooks, tokens_BL).values())
        with Steering(layers, stops=True) as steering:
            decoder(self.hf)(input_ids=tokens_BL.to(self.hf.device), use_cache=False)
        return [steering.found[layer] for layer in layers]

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, L, V) of a whole pass, and its residual streams after the given blocks."""
        with Steering(layers) as steering:
            out = self.hf(input_ids=tokens_BL.to(self.hf.device), use_cache=False)
        return out.logits, [steering.found[layer] for layer in layers]

    @torch.no_grad()
    def logits_from(self, tokens_BL: Tensor, layer: int, stream_BLD: Tensor) -> Tensor:
        """Logits of a pass in which the residual stream after a block is `stream_BLD`.

        Bit for bit; the blocks up to that one don't run, where the model can do without.
        """
        with Steering(at=layer, stream_BLD=stream_BLD, late=self.starts_late):
            return self.hf(input_ids=tokens_BL.to(self.hf.device), use_cache=False).logits

    def cast(self, dtype: str) -> LanguageModel:
        """The same model in another precision; itself where it has that precision."""
        if self.hf.dtype == getattr(torch, dtype):
            return self
        hf = copy.deepcopy(self.hf)
        for parameter in hf.parameters():  # not the buffers: RoPE's angles need float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return LanguageModel(hf, self.tokenizer, self.name, self.hook)

    def bridge(self) -> Any:
        """TransformerLens' bridge to the same model, as SAE-Bench calls it, on the same weights.

        Its `plain` makes the same passes in less time, without hooks: see `acts_at`.

        Raises:
            ExperimentError: TransformerLens has none, or one that computes something else.
        """
        from transformer_lens.model_bridge import TransformerBridge

        hf = on_same_weights(self.hf)  # its modules are wrapped where they stand
        hf.config.architectures = [type(hf).__name__]
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.init_kwargs["add_bos_token"] = True  # or another is loaded, by name
        try:
            bridge = TransformerBridge.boot_transformers(
                self.name, hf_model=hf, tokenizer=tokenizer, device=self.hf.device,
                dtype=self.hf.dtype,
            )  # fmt: skip
        except Exception as error:
            raise ExperimentError(
                f"the language model {self.name!r} must be one that TransformerLens' "
                f"TransformerBridge wraps, since SAE-Bench calls that, but of "
                f"{type(self.hf).__name__} it says: {shortened(first_line(error), 150)}: choose "
                "another model"
            ) from error
        bridge.__class__ = bridge_class()
        # Its own again: another thread may be at the first one, and the bridge adds tokens to it.
        bridge._tokenizer = copy.deepcopy(self.tokenizer)
        bridge.cfg.tokenizer_prepends_bos = self.tokenizer.bos_token_id is not None
        bridge.cfg.tokenizer_appends_eos = False
        twin = LanguageModel(on_same_weights(self.hf), self.tokenizer, self.name)
        bridge.__dict__["plain"] = twin if self.hook == "resid_post" else None
        self.check_same(bridge, twin)
        return remember(bridge, bridge)

    @torch.no_grad()
    def check_same(self, bridge: Any, twin: LanguageModel) -> None:
        """Holds the bridge's streams and logits against the model's.

        Raises:
            ExperimentError: they differ by more than rounding, or are no numbers; or the bridge
                has no such hook.
        """
        layers = range(len(self.blocks))
        wanted = hook_name(self.hook, layers[-1])
        if wanted not in bridge.hook_dict:
            raise ExperimentError(
                f"hook must be one that {self.name!r} has in TransformerLens, but it has no "
                f"{wanted}: set hook to 'resid_post'"
            )
        tokens_BL = 3 + torch.arange(6)[None] % (self.hf.config.vocab_size - 3)
        tokens_BL = tokens_BL.to(self.hf.device)
        hooks = [hook_name("resid_post", layer) for layer in layers]
        logits, cache = bridge.run_with_cache(tokens_BL, names_filter=hooks)
        ours, streams = twin.logits(tokens_BL, layers)
        for what, x, y in zip(
            [*hooks, "what follows the last block"], [*streams, ours],
            [*(cache.cache_dict.get(hook) for hook in hooks), logits],
        ):  # fmt: skip
            off, to_do = "gives nothing", "choose another"
            if y is not None:
                error = float((x - y).float().norm() / x.float().norm().clamp(min=1e-9))
                rounding = ROUNDING[self.hf.dtype]
                if error <= rounding:
                    continue
                off = f"is off by {error:.2g} of its length, more than rounding's {rounding:g}"
                if not math.isfinite(error):
                    off, to_do = "gives NaN or infinity", "look at its weights, or choose another"
            raise ExperimentError(
                f"the language model {self.name!r} must be the same in transformers and in "
                f"TransformerLens' bridge, which SAE-Bench calls, but there {what} {off}: {to_do}"
            )


BRIDGE = threading.Lock()  # hooks of a pass lie in the bridge's modules


@torch.no_grad()
def acts_at(
    bridge: Any, hooks: dict[str, int], tokens_BL: Tensor, plain: LanguageModel | None = None
) -> dict[str, Tensor]:
    """What is read at hooks, (B, L, D) each, from one pass that stops at the last of them.

    Args:
        hooks: their layers. plain: see `plain_of`; None: the bridge makes the pass.
    """
    layers = tuple(hooks.values())
    if plain is not None:
        return dict(zip(hooks, plain.activations(tokens_BL, layers)))
    with BRIDGE:
        _, cache = bridge.run_with_cache(
            tokens_BL, names_filter=list(hooks), stop_at_layer=max(layers) + 1
        )
    return {hook: cache[hook] for hook in hooks}


@functools.cache
def bridge_class() -> type:
    """TransformerBridge, and a HookedTransformer to who asks: SAE-Bench's type hints do, and check.

    What both have is the bridge's.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    bases, of = (TransformerBridge, HookedTransformer), TransformerBridge.__module__
    return type(TransformerBridge.__name__, bases, {"__module__": of})


def plain_of(bridge: Any) -> LanguageModel | None:
    """What makes the bridge's passes in less time; None where it isn't as it was made.

    Weights that were changed, or hooks, are the bridge's; or it is read at another hook point.
    """
    return None if changed(bridge) else bridge.plain


def on_same_weights(hf: nn.Module) -> nn.Module:
    """A copy of the modules; the weights are the same tensors."""
    return copy.deepcopy(hf, {id(t): t for t in (*hf.parameters(), *hf.buffers())})


# ---- Loading


def model_path(name: str) -> str:
    """What transformers loads: the hub's name, or a folder; of a built-in model its own."""
    if name == "smollm2":
        return str(smollm2_folder())
    return str(HERE / "tinylm") if name == "tinylm" else name


def source_of(name: str) -> tuple[str, dict[str, str]]:
    """What transformers loads a model from, and its further options: `gguf_file`, of a GGUF file.

    Raises:
        ExperimentError: a folder has several such files, or what reads them isn't installed.
    """
    path = Path(model_path(name))
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not files or path.is_dir() and any(path.glob("*.safetensors")):
        return str(model_path(name)), {}
    if len(files) > 1:
        raise ExperimentError(
            f"the folder {name!r} must hold one model, but has {len(files)} GGUF files: set model "
            f"to one of them, such as {str(files[0])!r}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ExperimentError(
            f"the language model {name!r} is a GGUF file, which takes the package gguf, but it is "
            "not installed: `pip install gguf`"
        )
    return str(files[0].parent), {"gguf_file": files[0].name}


@contextlib.contextmanager
def access_errors(name: str) -> Iterator[None]:
    """Makes what transformers raises for a model that can't be loaded an ExperimentError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ExperimentError(
            f"the language model {name!r} can't be loaded ({first_line(error)}); for a gated one, "
            f"such as google/gemma-2-2b, {GET_ACCESS}"
        ) from error


def language_model_config(name: str) -> Any:
    """A model's configuration, as transformers reads it; of one that also sees, its text model's.

    Raises:
        ExperimentError: it is not there, or no causal language model's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path, options = source_of(name)
    with access_errors(name):
        # False, not None, which asks on the terminal whether a model's own code may run.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder" if config.is_encoder_decoder else "none that transformers has"
        raise ExperimentError(
            f"model {name!r} must be a causal language model, but {config.model_type!r} is {what}: "
            "set Settings.model to one that predicts the next token"
        )
    return text


def load_language_model(
    name: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    hook: str = "resid_post",
) -> LanguageModel:
    """Loads a causal language model by its Hugging Face name, or from a folder or GGUF file.

    Args:
        name: the hub's name, a folder or a file; "tinylm": the built-in model, its files verified
            first.
        dtype: "float32" or "bfloat16". hook: see `LanguageModel`.

    Raises:
        ExperimentError: it is not there, not readable, not allowed, not a causal language model,
            or its weights are not those that its config.json describes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "tinylm":
        from tinylm import corpus

        with corpus_errors():
            corpus.verify_files()
            corpus.check_packages()
    text, (path, gguf) = language_model_config(name), source_of(name)
    # Or transformers takes what a bot has made of the pickle in a pull request.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    form = gguf or {"use_safetensors": True}
    with access_errors(name):
        try:
            # Eager, as the bridge computes: so its figures are those of the passes here.
            hf, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation="eager",
                output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
                **form,
            )  # fmt: skip
        except OSError as error:
            if " file named model.safetensors" not in str(error):
                raise
            raise ExperimentError(
                f"the language model {name!r} must have its weights as safetensors, but has no "
                "model.safetensors; a pickle such as pytorch_model.bin is not read, since it can "
                "run code: choose a model with safetensors, or convert the weights"
            ) from error
        check_weights(name, report, hf)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **gguf)
    if type(hf.config) is not type(text):
        hf = text_model(hf, text)
    prepare_tokenizer(tokenizer, name, hf.get_input_embeddings().num_embeddings)
    hf.requires_grad_(False)
    return LanguageModel(hf.eval().to(device), tokenizer, name, hook)


def text_model(hf: nn.Module, text: Any) -> nn.Module:
    """The language model within one that also sees or hears, on the same weights.

    Args:
        text: its configuration.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(text, attn_implementation="eager")
    setattr(alone, alone.base_model_prefix, hf.get_decoder())
    alone.set_output_embeddings(hf.get_output_embeddings())
    return alone
