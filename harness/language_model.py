"""A Hugging Face model in the two forms that training and evaluation need."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from harness.errors import GET_ACCESS, ExperimentError, first_line
from harness.start import HERE
from harness.text import corpus_errors, special_token_ids

# How far a block of a model's two forms may be apart, as a part of the residual stream's length.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}


# Of a model whose `run_with_cache` several threads call: modules that never run, and those free.
SPARE: weakref.WeakKeyDictionary[Any, tuple[Any, list[Any]]] = weakref.WeakKeyDictionary()


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer that is wanted."""


class LanguageModel:
    """A Hugging Face Gemma-2 model in the two forms that training and evaluation need."""

    def __init__(self, hf: nn.Module, tokenizer: Any, name: str) -> None:
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.special_token_ids = special_token_ids(tokenizer)
        self._pass = threading.local()  # passes run side by side, each with its own results
        for layer, block in enumerate(hf.model.layers):
            block.register_forward_hook(lambda _m, _i, out, at=layer: self._keep(at, out))

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Residual streams after the given blocks, from one forward pass that stops at the last.

        Args:
            tokens_BL: (B, L) token ids.
        Returns:
            a tensor (B, L, D) per layer, as TransformerLens' blocks.L.hook_resid_post.
        """
        self._pass.found, self._pass.layers = {}, layers
        try:
            with torch.no_grad():
                self.hf.model(input_ids=tokens_BL.to(self.hf.device), use_cache=False)
        except _LastLayerReached:
            pass
        finally:
            found, self._pass.found, self._pass.layers = self._pass.found, {}, ()
        return [found[layer] for layer in layers]

    def _keep(self, layer: int, output: Any) -> None:
        """Called after each block: keeps its output if this thread's pass is to have it."""
        layers = getattr(self._pass, "layers", ())
        if layer in layers:
            # transformers 4 returns a tuple here, transformers 5 the tensor.
            self._pass.found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise _LastLayerReached

    def cast(self, dtype: str) -> LanguageModel:
        """The same model in another precision; itself where it has that precision."""
        if self.hf.dtype == getattr(torch, dtype):
            return self
        hf = copy.deepcopy(self.hf)
        for parameter in hf.parameters():  # not the buffers: RoPE's angles need float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return LanguageModel(hf, self.tokenizer, self.name)

    def hooked(self, context: int = 128) -> Any:
        """The same model as TransformerLens' HookedTransformer, unprocessed, for SAE-Bench.

        Args:
            context: tokens of the context that the two forms are compared on.
        Raises:
            ExperimentError: they differ by more than rounding.
        """
        from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

        cfg = hooked_config(self.hf.config, self.hf.dtype, self.hf.device, self.name)
        # A tokenizer of its own: a call sets the padding of those that another thread makes.
        model = hooked_class()(cfg, copy.deepcopy(self.tokenizer), move_to_device=False)
        # Both forms share their matrices, but for W_E, which holds the embedding's scale.
        # load_and_process_state_dict (TransformerLens 3.9.0) would copy all of them by way of
        # float32, into a layout that the layers turn back before each product.
        weights = convert_gemma_weights(self.hf, cfg)
        weights = {name: weight.to(cfg.dtype) for name, weight in weights.items()}
        model.load_state_dict(dict(model.named_buffers()) | weights, assign=True)
        model.move_model_modules_to_device()
        model.requires_grad_(False)
        model.eval()
        self.check_same(model, context)
        return model

    @torch.no_grad()
    def check_same(self, hooked: Any, context: int) -> None:
        """Holds each block of TransformerLens' form, and its logits, against this one.

        A block gets the residual stream that this form's block gets, so that rounding doesn't add
        up. TransformerLens has no attention bias and no scaling of RoPE in Gemma-2, for example.

        Raises:
            ExperimentError: they differ by more than rounding, or are no numbers.
        """
        n_layers, draw = self.hf.config.num_hidden_layers, torch.Generator().manual_seed(0)
        tokens_BL = torch.randint(self.hf.config.vocab_size, (1, context), generator=draw)
        tokens_BL[:, 0] = self.tokenizer.bos_token_id
        tokens_BL = tokens_BL.to(self.hf.device)
        expected = self.activations(tokens_BL, tuple(range(n_layers)))
        expected.append(self.hf(input_ids=tokens_BL, use_cache=False).logits)
        for layer, ours in enumerate(expected):
            at = {"stop_at_layer": layer + 1 if layer < n_layers else None}
            if layer:
                at |= {"start_at_layer": layer, "tokens": tokens_BL}
            theirs = hooked(expected[layer - 1] if layer else tokens_BL, **at)
            # Not of BOS, whose residual stream may be hundreds of times as long as any other.
            error = float((theirs - ours)[:, 1:].float().norm() / ours[:, 1:].float().norm())
            if not error <= ROUNDING[self.hf.dtype]:
                what = f"block {layer}" if layer < n_layers else "what follows the last block"
                raise ExperimentError(
                    f"the language model {self.name!r} must be the same in transformers and in "
                    f"TransformerLens, which SAE-Bench runs, but {what} gives what is off by "
                    f"{error:.2g} of its length: its config.json asks for what TransformerLens "
                    "lacks (attention_bias, rope_scaling), or its weights hold NaN; choose another"
                )


@functools.cache
def hooked_class() -> type:
    """HookedTransformer, with a `run_with_cache` that several threads may call at once.

    Its hooks lie in the modules (TransformerLens 3.9.0): a call that finds those of the model in
    use gets modules of its own, on the same weights. They are copies of modules that never run,
    since a copy made during a pass would have that pass's hooks for ever.
    """
    from transformer_lens import HookedTransformer

    class Hooked(HookedTransformer):
        """See `hooked_class`."""

        turn = threading.Lock()

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            with self.turn:
                if self not in SPARE:
                    SPARE[self] = self.on_same_weights(), [self]
                unused, free = SPARE[self]
                lens = free.pop() if free else unused.on_same_weights()
            try:
                return super(Hooked, lens).run_with_cache(*args, **kwargs)
            finally:
                free.append(lens)

        def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
            """Takes the tokenizer as it is, where TransformerLens would load another one."""
            self.tokenizer, self.cfg.tokenizer_prepends_bos = tokenizer, True

        def on_same_weights(self) -> Hooked:
            """A copy of the modules."""
            shared = (*self.parameters(), *self.buffers(), self.tokenizer, self.cfg)
            return copy.deepcopy(self, {id(thing): thing for thing in shared})

    return Hooked


def hooked_config(hf_config: Any, dtype: torch.dtype, device: Any, name: str) -> Any:
    """TransformerLens' configuration of a Gemma-2 model, from the model's own config.json."""
    from transformer_lens import HookedTransformerConfig

    rope = getattr(hf_config, "rope_parameters", None) or {}
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return HookedTransformerConfig(
        model_name=name.split("/")[-1],
        tokenizer_name=name,
        original_architecture="Gemma2ForCausalLM",
        n_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        d_head=hf_config.head_dim,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_key_value_heads,
        d_mlp=hf_config.intermediate_size,
        d_vocab=hf_config.vocab_size,
        n_ctx=hf_config.max_position_embeddings,
        eps=hf_config.rms_norm_eps,
        act_fn=hf_config.hidden_activation,
        initializer_range=hf_config.initializer_range,
        attn_scale=math.sqrt(hf_config.query_pre_attn_scalar),
        use_attn_scale=True,
        attn_scores_soft_cap=hf_config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=hf_config.final_logit_softcapping or -1.0,
        use_local_attn=True,
        window_size=hf_config.sliding_window,
        attn_types=[kinds[kind] for kind in hf_config.layer_types],
        positional_embedding_type="rotary",
        rotary_base=rope.get("rope_theta", getattr(hf_config, "rope_theta", 10000.0)),
        rotary_dim=hf_config.head_dim,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        gated_mlp=True,
        init_weights=False,
        default_prepend_bos=True,
        dtype=dtype,
        device=str(device),
    )


def model_path(name: str) -> str:
    """What transformers loads: the hub's name, or a folder; "tinylm": the built-in model's."""
    return str(HERE / "tinylm") if name == "tinylm" else name


@contextlib.contextmanager
def access_errors(name: str) -> Iterator[None]:
    """Makes what transformers raises for a model that can't be loaded an ExperimentError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ExperimentError(
            f"the language model {name!r} can't be loaded ({first_line(error)}); for the gated "
            f"google/gemma-2-2b, {GET_ACCESS}"
        ) from error


def language_model_config(name: str) -> Any:
    """A model's config.json, as transformers reads it."""
    from transformers import AutoConfig

    with access_errors(name):
        # False, not None, which asks on the terminal whether a model's own code may run.
        return AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)


def load_language_model(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> LanguageModel:
    """Loads a Gemma-2 model by its Hugging Face name, or from a folder in that form.

    Args:
        name: the hub's name or a folder; "tinylm": the built-in model, its files verified first.
        dtype: "float32" or "bfloat16".

    Raises:
        ExperimentError: it is not there, not readable, not allowed, not a Gemma-2 model, or its
            weights are not those that its config.json describes.
    """
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    if name == "tinylm":
        from tinylm import corpus

        with corpus_errors():
            corpus.verify_files()
            corpus.check_packages()
    config, path = language_model_config(name), model_path(name)
    if config.model_type != "gemma2":
        raise ExperimentError(
            f"model {name!r} must be of the Gemma-2 architecture, but its config.json says "
            f"{config.model_type!r}: set Settings.model to a Gemma-2 model"
        )
    # Or transformers takes what a bot has made of the pickle in a pull request.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with access_errors(name):
        try:
            hf, report = Gemma2ForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except OSError as error:
            if " file named model.safetensors" not in str(error):
                raise
            raise ExperimentError(
                f"the language model {name!r} must have its weights as safetensors, but has no "
                "model.safetensors; a pickle such as pytorch_model.bin is not read, since it can "
                "run code: choose a model with safetensors, or convert the weights"
            ) from error
        check_weights(name, report)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    prepare_tokenizer(tokenizer, name, hf.get_input_embeddings().num_embeddings)
    hf.requires_grad_(False)
    return LanguageModel(hf.eval().to(device), tokenizer, name)


def check_weights(name: str, report: dict[str, Any]) -> None:
    """ExperimentError where the weights' file isn't what config.json describes.

    transformers gives what it doesn't find random values, and leaves out what it doesn't know.

    Args:
        report: `from_pretrained`'s, with output_loading_info.
    """
    found = {
        "lacks": report["missing_keys"],
        "has in another shape": {key for key, *_ in report["mismatched_keys"]},
        "also has": report["unexpected_keys"],
    }
    if not any(found.values()):
        return
    parts = [
        f"{what} {min(keys)}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for what, keys in found.items() if keys
    ]  # fmt: skip
    raise ExperimentError(
        f"the weights of the language model {name!r} must be those that its config.json describes, "
        f"but the file {', '.join(parts)}: fetch the model again, or correct its config.json"
    )


def prepare_tokenizer(tokenizer: Any, name: str, n_embeddings: int) -> None:
    """Has a tokenizer give BOS and the text, nothing else, and a token to pad with.

    So training, core evaluation and probing read a text alike, whatever the tokenizer adds.

    Raises:
        ExperimentError: it can't, or the model has no embedding for some of its tokens.
    """
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    largest = max(tokenizer.get_vocab().values())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    wrong = {
        "must know words, but knows none: its tokenizer.json is missing or damaged; fetch the "
        "model again": not plain or tokenizer.unk_token_id in plain,
        f"must have ids below {n_embeddings}, the rows of the embedding, but has {largest}: take "
        "the tokenizer that belongs to the model": largest >= n_embeddings,
        "must have a BOS token, which begins each context, but has none: name one as bos_token in "
        "its tokenizer_config.json": tokenizer.bos_token_id is None,
        "must be a fast one, with a tokenizer.json, but is none: convert it": backend is None,
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ExperimentError(f"the tokenizer of the language model {name!r} {sentence}")
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if tokenizer("text")["input_ids"] != [bos_id, *plain]:
        named = {"id": "bos", "ids": [bos_id], "tokens": [bos]}
        backend.post_processor = TemplateProcessing(single="bos $A", special_tokens=[named])
    if tokenizer.pad_token_id is None:  # it is left out wherever it stands, as these are
        tokenizer.pad_token = tokenizer.eos_token or bos
