"""Trains tinylm: a Gemma-2-architecture language model of 7 M parameters on Python source.

    python tinylm/train.py                          everything, from the installed packages
    python tinylm/train.py --tokens 30000000        the same command, longer: goes on, see below
    python tinylm/train.py --evaluate               held-out loss of the stored model, no training
    python tinylm/train.py --sample                 three continuations by the stored model

It needs g++ for torch.compile (or --no_compile, at a fourth of the speed on a CPU) and leaves in
tinylm/: config.json, generation_config.json, model.safetensors, tokenizer.json,
tokenizer_config.json, train_log.jsonl, heldout.json and SHA256SUMS.

A run that was stopped goes on from its last checkpoint in --work_dir when the command is given
again. The learning rate is warmed up, constant, and falls linearly to 0 over the last part
(warmup-stable-decay); the state before that fall is kept as before_decay.pt, and a finished run
that is given more --tokens or --minutes goes on from there.

The hidden matrices are trained by Muon (Jordan et al. 2024, torch.optim.Muon), embedding and norms
by AdamW. The forward pass is written out below, in one function that torch.compile takes whole; a
test holds it against Hugging Face's.
"""

import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinylm import corpus  # noqa: E402

VOCABULARY = 4096
PAD, EOS, BOS = 0, 1, 2
CONTEXT = 256  # tokens in a training context, BOS included
WARMUP, DECAY = 0.02, 0.3  # parts of the training
# Words keep one leading space, dot, underscore, bracket or equals sign; digits stand alone; a line
# break goes with the punctuation before it and the indentation after it. 3.4 bytes per token, where
# GPT-2-like splitting gives 3.1.
SPLIT = (r"\d|[ _.(=]?\p{L}+| ?[^\s\p{L}\d]*\s*[\r\n]+[ \t]*| ?[^\s\p{L}\d]+|\s+")


# ---- tokenizer and data --------------------------------------------------------------------------


def train_tokenizer(texts, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <pad> 0, <eos> 1, <bos> 2; BOS is put first by the tokenizer itself.

    Args:
        texts: an iterable of str.
        vocabulary: the number of tokens, special ones included.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        padding_side="right", model_max_length=1024, clean_up_tokenization_spaces=False)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, in the form that transformers 4 reads as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 has a name of its own
    path.write_text(json.dumps(settings, indent=2) + "\n")


def token_bytes(tokenizer) -> np.ndarray:
    """The number of bytes that each token of the vocabulary stands for, (V,); 0 for specials."""
    # The byte-level alphabet writes every byte as one character.
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    return np.array([0 if p in special else len(p) for p in pieces])


def token_stream(tokenizer, split: str) -> np.ndarray:
    """All documents of a split, each closed by <eos>, as one array of uint16."""
    parts, batch = [], []
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # which a call with padding=True leaves switched on
    backend.no_truncation()

    def flush():
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            parts.append(np.array(encoding.ids + [EOS], dtype=np.uint16))
        batch.clear()

    for text in corpus.documents(split):
        batch.append(text)
        if len(batch) == 100:
            flush()
    flush()
    return np.concatenate(parts)


def cached_stream(tokenizer, split: str, work_dir: Path) -> np.ndarray:
    """token_stream, kept in work_dir under a name that the corpus and the tokenizer decide."""
    key = hashlib.sha256((corpus.manifest_sha256() + tokenizer.backend_tokenizer.to_str()).encode())
    path = work_dir / f"{split}_{key.hexdigest()[:16]}.npy"
    if not path.is_file():
        stream = token_stream(tokenizer, split)
        with open(path.with_suffix(".tmp"), "wb") as f:
            np.save(f, stream)
        os.replace(path.with_suffix(".tmp"), path)
    return np.load(path)


def context_batch(stream: np.ndarray, index: np.ndarray, context: int) -> torch.Tensor:
    """BOS and the context - 1 tokens of each of the given blocks of the stream: (B, context)."""
    out = np.full((len(index), context), BOS, dtype=np.int64)
    for row, i in enumerate(index):
        out[row, 1:] = stream[i * (context - 1):(i + 1) * (context - 1)]
    return torch.from_numpy(out)


def training_batch(stream, step: int, batch: int, context: int, seed: int) -> torch.Tensor:
    """The contexts of a step, (batch, context): every block once, shuffled, before any comes again.

    Each pass over the stream has its own order and its own offset, so the same token stands
    elsewhere in its context the next time.
    """
    n = (len(stream) - context) // (context - 1)
    steps = n // batch
    epoch, place = divmod(step, steps)
    rng = np.random.default_rng([seed, epoch])
    offset = int(rng.integers(context - 1)) if epoch else 0
    order = rng.permutation(n)
    return context_batch(stream[offset:], order[place * batch:(place + 1) * batch], context)


# ---- the model -----------------------------------------------------------------------------------


def model_config(vocabulary: int = VOCABULARY, **changes) -> Gemma2Config:
    """The architecture of tinylm: that of Gemma 2, small."""
    settings = dict(
        vocab_size=vocabulary, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, intermediate_size=1024,
        sliding_window=128, max_position_embeddings=1024, rope_theta=10000.0,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, attention_dropout=0.0,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    return Gemma2Config(**(settings | changes))


def new_model(config: Gemma2Config, seed: int) -> Gemma2ForCausalLM:
    """A model with fresh weights, float32."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            # Each sublayer writes 0.3 root mean square, the size of the embeddings (0.02 * 16):
            # the twelve of them together keep the residual stream near 1.
            layer.post_attention_layernorm.weight.fill_(-0.7)
            layer.post_feedforward_layernorm.weight.fill_(-0.7)
    return model


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def token_losses(model: Gemma2ForCausalLM, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Next-token losses of Gemma 2 in nats, (B, L - 1), by a Hugging Face model's weights."""
    c = model.config
    B, L = tokens_BL.shape
    L -= 1
    H, G, D, eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
    embedding = model.model.embed_tokens.weight
    place = torch.arange(L, device=tokens_BL.device)
    angle = place[:, None] * 10000.0 ** (
        -torch.arange(0, D, 2, device=tokens_BL.device).float() / D)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    distance = place[:, None] - place[None, :]
    x = F.embedding(tokens_BL[:, :-1], embedding) * math.sqrt(c.hidden_size)
    for number, layer in enumerate(model.model.layers):
        a, m = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm.weight, eps)
        q = F.linear(h, a.q_proj.weight).view(B, L, H, D).transpose(1, 2)
        k = F.linear(h, a.k_proj.weight).view(B, L, G, D).transpose(1, 2)
        v = F.linear(h, a.v_proj.weight).view(B, L, G, D).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() * c.query_pre_attn_scalar ** -0.5
        scores = c.attn_logit_softcapping * torch.tanh(scores / c.attn_logit_softcapping)
        window = c.sliding_window if number % 2 == 0 else L  # even layers attend locally
        scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        z = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(B, L, H * D)
        x = x + _norm(F.linear(z, a.o_proj.weight), layer.post_attention_layernorm.weight, eps)
        h = _norm(x, layer.pre_feedforward_layernorm.weight, eps)
        h = F.gelu(F.linear(h, m.gate_proj.weight), approximate="tanh") * F.linear(
            h, m.up_proj.weight)
        x = x + _norm(F.linear(h, m.down_proj.weight), layer.post_feedforward_layernorm.weight, eps)
    logits = F.linear(_norm(x, model.model.norm.weight, eps), embedding).float()
    logits = c.final_logit_softcapping * torch.tanh(logits / c.final_logit_softcapping)
    targets = tokens_BL[:, 1:]
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]


# ---- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def stream_loss(losses, stream: np.ndarray, context: int, device, max_tokens: int | None = None):
    """Next-token loss over contexts of BOS and context - 1 tokens, the form the experiment packs.

    Every token is predicted once, from BOS and the tokens before it in its own block.

    Args:
        losses: a function from tokens (B, L) to losses (B, L - 1) in nats.
        max_tokens: takes so many tokens, in blocks evenly spaced over the stream.

    Returns:
        (nats, tokens): the sum of the losses, and the ids of the predicted tokens (N,).
    """
    n = len(stream) // (context - 1)
    blocks = np.arange(n)
    if max_tokens is not None and max_tokens < n * (context - 1):
        blocks = np.linspace(0, n - 1, max(1, max_tokens // (context - 1))).astype(int)
    nats, seen = 0.0, []
    for i in range(0, len(blocks), 16):
        tokens = context_batch(stream, blocks[i:i + 16], context)
        nats += losses(tokens.to(device)).double().sum().item()
        seen.append(tokens[:, 1:].flatten().numpy())
    return nats, np.concatenate(seen)


def heldout_figures(model, tokenizer, stream, context: int, max_tokens: int | None = None) -> dict:
    """Held-out loss as nats per token and bits per byte; the latter counts <eos> as no byte."""
    device = model.model.embed_tokens.weight.device
    nats, seen = stream_loss(lambda tokens_BL: token_losses(model, tokens_BL), stream, context,
                             device, max_tokens)
    n_bytes = int(token_bytes(tokenizer)[seen].sum())
    return {"context": context, "tokens": len(seen), "nats_per_token": nats / len(seen),
            "bits_per_byte": nats / math.log(2) / n_bytes, "bytes_per_token": n_bytes / len(seen)}


def unigram_nats(train: np.ndarray, heldout: np.ndarray, vocabulary: int) -> float:
    """Cross-entropy, nats per token, of held-out text under the training tokens' frequencies."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


# ---- training ------------------------------------------------------------------------------------


def lr_factor(progress: float) -> float:
    """Warm-up over the first 2%, constant, linear to 0 over the last 30%; progress in [0, 1]."""
    return max(0.0, min(progress / WARMUP, 1.0, (1.0 - progress) / DECAY))


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in model.named_parameters() if "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.1)
    adam = torch.optim.AdamW([{"params": embedding, "lr": 3e-3, "weight_decay": 0.01},
                              {"params": norms, "lr": 3e-3, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), eps=1e-10)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed blocks: mapping large ones anew at each step halves the speed."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            libc.mallopt(-2, 2**26)  # M_TOP_PAD


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    model, stream, work_dir: Path, tokens: int, minutes: float = math.inf, batch: int = 32,
    micro_batch: int = 16, context: int = CONTEXT, seed: int = 0, compile_it: bool = True,
    checkpoint_minutes: float = 4.0, measure=None, stop_after: int | None = None,
) -> list[dict]:
    """Trains in place on a token stream and returns the log; resumes from work_dir.

    Progress, which sets the learning rate, is the larger of tokens seen / tokens and time spent /
    minutes, so that a slow machine ends in time with a full decay.

    Args:
        stream: token ids, one array.
        work_dir: checkpoints (checkpoint.pt, before_decay.pt) are read and written here.
        measure: called with the model about 20 times; returns a dict for the log line.
        stop_after: stop (with a checkpoint) after this many steps of this call; for tests.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    device = model.model.embed_tokens.weight.device
    opts = optimizers(model)
    step, spent, log, decaying = 0, 0.0, [], False
    path, before_decay = work_dir / "checkpoint.pt", work_dir / "before_decay.pt"
    per_step = batch * context

    def progress() -> float:
        return max(step * per_step / tokens, spent / (60 * minutes))

    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        decayed = max(state["step"] * per_step / state["tokens"],
                      state["spent"] / (60 * state["minutes"])) > 1 - DECAY
        longer = tokens > state["tokens"] or minutes > state["minutes"]
        if decayed and longer and before_decay.is_file():
            state = torch.load(before_decay, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(opts, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent, log = state["step"], state["spent"], state["log"]
        decaying = progress() > 1 - DECAY
        print(f"going on from {path.parent} at step {step}, {step * per_step / 1e6:.2f} M tokens",
              flush=True)

    def state() -> dict:
        return {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                "step": step, "spent": spent, "log": log, "tokens": tokens, "minutes": minutes}

    def mean_loss(tokens_BL):
        with torch.autocast(device.type, torch.bfloat16):
            return token_losses(model, tokens_BL).mean()

    loss_of = torch.compile(mean_loss, dynamic=False) if compile_it else mean_loss
    model.train()
    started = mark = saved = time.monotonic()
    since, first_step, next_log, next_measure = [], step, progress(), progress() + 0.05
    while progress() < 1 and (stop_after is None or step - first_step < stop_after):
        if not decaying and progress() > 1 - DECAY:
            decaying = True
            save_atomically(state(), before_decay)
        factor = lr_factor(max(progress(), per_step / tokens / 2))
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        tokens_BL = training_batch(stream, step, batch, context + 1, seed).to(device)
        total = 0.0
        for part in tokens_BL.split(micro_batch):
            loss = loss_of(part) * (len(part) / batch)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise RuntimeError(f"expected a finite loss, found {total} at step {step}: lower the "
                               "peak learning rates in optimizers() and start again")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        since.append(total)
        now = time.monotonic()
        spent, mark = spent + now - mark, now
        if progress() >= next_log or progress() >= 1:
            # The 0.01 grid keeps the log at about a hundred lines however long the training is.
            next_log = progress() + 0.01
            rate = (step - first_step) * per_step / (now - started)
            left = min((tokens - step * per_step) / rate, 60 * minutes - spent)
            loss = float(np.mean(since))  # a plain number: checkpoints are read with weights_only
            line = {"step": step, "tokens": step * per_step, "loss": round(loss, 4),
                    "lr_factor": round(factor, 4), "tokens_per_second": round(rate),
                    "minutes": round(spent / 60, 2)}
            if measure is not None and (progress() >= next_measure or progress() >= 1):
                next_measure = progress() + 0.05
                line |= measure(model)
            log.append(line)
            since = []
            print(f"{100 * min(progress(), 1):5.1f}%  {json.dumps(line)}  ETA {left / 60:.1f} min",
                  flush=True)
        if now - saved > 60 * checkpoint_minutes:
            saved = now
            save_atomically(state(), path)
    save_atomically(state(), path)
    return log


def save_model(model, folder: Path) -> None:
    """config.json and bfloat16 weights, the tied embedding once."""
    copy.deepcopy(model).to(torch.bfloat16).cpu().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def print_samples(folder: Path, tokenizer, heldout, n_prompt: int = 48, n_new: int = 80) -> None:
    """Three prompts from held-out files and what the model continues them with (T = 0.7)."""
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    for part in (0.2, 0.5, 0.8):
        start = int(part * len(heldout))
        prompt = context_batch(heldout[start:], np.array([0]), n_prompt)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                             temperature=0.7, max_new_tokens=n_new)[0]
        text = tokenizer.decode(out[1:n_prompt].tolist())
        print(f"----\n{text}⟶{tokenizer.decode(out[n_prompt:].tolist())}")

def evaluate(folder: Path, tokenizer, stream, heldout, device, max_tokens: int) -> None:
    """Prints the held-out loss of the stored model and keeps it in heldout.json.

    bfloat16 weights, float32 arithmetic, as the experiment runs it.
    """
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    nats = unigram_nats(stream, heldout, len(tokenizer))
    n_bytes = int(token_bytes(tokenizer)[heldout].sum())
    record = {
        "contexts": [heldout_figures(model, tokenizer, heldout, context, max_tokens)
                     for context in (128, 256)],
        "unigram": {"nats_per_token": nats,
                    "bits_per_byte": nats / math.log(2) * len(heldout) / n_bytes},
        "heldout_tokens": len(heldout), "training_corpus_tokens": len(stream)}
    (folder / "heldout.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tinylm.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--tokens", type=int, default=18_000_000, help="training tokens in all")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="end, fully decayed, after this time even if --tokens are not reached")
    parser.add_argument("--batch", type=int, default=32, help="contexts of 256 tokens a step")
    parser.add_argument("--micro_batch", type=int, default=16, help="contexts a forward pass")
    parser.add_argument("--work_dir", type=Path, default=cache / "tinylm_training",
                        help="checkpoints and token ids")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=corpus.HERE, help="where the model goes")
    parser.add_argument("--no_compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--heldout_tokens", type=int, default=400_000,
                        help="held-out tokens of the final figure, evenly spaced")
    parser.add_argument("--evaluate", action="store_true", help="held-out loss of --out")
    parser.add_argument("--sample", action="store_true", help="three continuations by --out")
    args = parser.parse_args()
    keep_freed_memory()
    try:
        corpus.check_packages()
    except corpus.CorpusError as error:
        sys.exit(str(error))
    for folder in (args.work_dir, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").is_file():
        # A quarter of the files, mixed over the packages, decides the merges as well as all would.
        save_tokenizer(train_tokenizer(islice(corpus.documents("train"), 1500)), args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    heldout = cached_stream(tokenizer, "heldout", args.work_dir)
    if args.sample:
        print_samples(args.out, tokenizer, heldout)
        return
    stream = cached_stream(tokenizer, "train", args.work_dir)
    if not args.evaluate:
        print(f"{len(stream) / 1e6:.1f} M training tokens, {len(heldout) / 1e6:.2f} M held-out",
              flush=True)
        model = new_model(model_config(len(tokenizer)), seed=0).to(args.device)

        def measure(model) -> dict:
            figures = heldout_figures(model, tokenizer, heldout, 128, 24_000)
            return {"heldout_bits_per_byte": round(figures["bits_per_byte"], 4),
                    "heldout_nats_per_token": round(figures["nats_per_token"], 4)}

        log = train(model, stream, args.work_dir, args.tokens, args.minutes, args.batch,
                    args.micro_batch, compile_it=not args.no_compile, measure=measure)
        save_model(model, args.out)
        (args.out / "train_log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
        if args.out.resolve() == corpus.HERE:
            corpus.write_sums()
    evaluate(args.out, tokenizer, stream, heldout, args.device, args.heldout_tokens)


if __name__ == "__main__":
    main()
