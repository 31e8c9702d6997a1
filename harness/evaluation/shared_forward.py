"""The batches and the language model's passes that SAEs share in SAE-Bench's core evaluation.

SAE-Bench's `run_evals(sae, store, model, ...)` scores one SAE: it asks a store for batches of
tokens and a model for passes over them, and would make every pass anew for each SAE. Here the
SAEs' evaluations take turns, batch by batch, and ask views of one `SharedForward`. Of a batch:

    run_evals -> StoreView.get_batch_tokens     ends this SAE's turn; all others reach this point
                   -> SharedForward.batch       the first to go on draws the batch, for all
    in the reconstruction batches:
    run_evals -> ModelView(tokens)              SharedForward.original: one pass for all SAEs
              -> ModelView.run_with_hooks       its hook replaces what stands at a layer's hook:
                   -> CountingSAE.decode          by the reconstruction: a pass from there on
                   -> SharedForward.ablated       by zeros: one such pass for a layer's SAEs
    in the sparsity batches:
    run_evals -> ModelView.run_with_cache       SharedForward.residuals: one pass for all SAEs
              -> CountingSAE.decode             adds up the squared error, for fvu; gathers what
                                                is shown of features

The code that computes and the tensors it gets are the stock ones, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from harness.errors import ExperimentError
from harness.evaluation.features import FeatureGatherer
from harness.generators import generator_states, set_generator_states
from harness.interfaces import SAELike
from harness.language_model import acts_at, plain_of
from harness.machine import yield_turn
from harness.store import TensorCache
from harness.tokenizer import counted, special_token_ids


class SharedForward:
    """The batches, and the language model's passes over them, that several SAEs share.

    A batch costs one pass of the unchanged model for all of them, and one from each ablated layer
    on. Only one batch is held.

    Args:
        model: the bridge. store: SAELens' ActivationsStore of the evaluation text.
        hooks: what the SAEs read, by name, and the layer of each.
        advance: called with 1 after each batch.
        cache: where the passes are kept for the next run; None: they are not.
        first: how many positions of a context don't count.
    """

    def __init__(
        self,
        model: Any,
        store: Any,
        hooks: dict[str, int],
        advance: Callable[[int], None],
        cache: TensorCache | None = None,
        first: int = 1,
    ) -> None:
        self.first = first
        self.model, self.store, self.advance = model, store, advance
        self.cache = cache or TensorCache("core passes", None)
        self.hooks = {hook: hooks[hook] for hook in sorted(hooks, key=hooks.get)}
        self.plain = plain_of(model)
        self.special = special_token_ids(model.tokenizer)
        self.hooks_at_start = self.n_hooks()
        self.n_batches = self.n_resets = 0
        self.contexts: set[bytes] = set()  # digests of those drawn so far
        self.n_contexts = 0
        self.tokens_BL: Tensor | None = None
        self.shown_BL: Tensor | None = None  # what `run_evals` gets for them
        self.passes: dict[str, dict[str, Tensor]] = {}
        # Sums over the tokens of the sparsity batches, by hook, in float64.
        self.n_tokens = 0
        self.sum_D: dict[str, Any] = dict.fromkeys(self.hooks, 0.0)
        self.squares: dict[str, float] = dict.fromkeys(self.hooks, 0.0)

    def n_hooks(self) -> int:
        """How many hooks are on the language model."""
        kinds = ("_forward_hooks", "_forward_pre_hooks")  # TransformerLens' are among them
        return sum(len(getattr(module, kind)) for module in self.model.modules() for kind in kinds)

    def is_hooked(self) -> bool:
        """Whether hooks have come on the language model: passes that are shared don't have them."""
        return self.n_hooks() != self.hooks_at_start

    def batch(self, number: int, n_prompts: int) -> Tensor:
        """The batch of this number, from 1 on, (B, L): the one that is held, or the next."""
        if number > self.n_batches:
            self.n_batches = number
            self.tokens_BL = self.shown_BL = self.store.get_batch_tokens(n_prompts)
            if self.first > 1 or self.model.tokenizer.bos_token_id is None:
                # It leaves out tokens by their ids, and the first of a context have to be such.
                self.shown_BL = self.tokens_BL.clone()
                self.shown_BL[:, : self.first] = self.model.tokenizer.pad_token_id
            rows = self.tokens_BL.cpu().numpy()
            self.contexts |= {hashlib.sha256(row.tobytes()).digest() for row in rows}
            self.n_contexts += len(rows)
            self.passes = {}
            self.advance(1)
        return self.shown_BL

    def reset(self, number: int) -> None:
        """The store's reset of this number, from 1 on."""
        if number > self.n_resets:
            self.n_resets = number
            self.store.reset_input_dataset()

    def token_mask(self) -> Tensor:
        """(B, L) bool: the tokens that count."""
        return counted(self.tokens_BL, self.special, self.first)

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` returns, computed once for the batch, or by an earlier run."""
        if name not in self.passes:
            tokens = hashlib.sha256(self.tokens_BL.cpu().numpy().tobytes()).hexdigest()[:16]
            found = self.cache.get(f"{self.n_batches:06d}-{tokens}-{name}", compute)
            self.cache.flush()  # logits are large: a copy of the next beside these takes 0.5 GB
            device = self.tokens_BL.device
            self.passes[name] = {part: tensor.to(device) for part, tensor in found.items()}
        return self.passes[name]

    def original(self) -> dict[str, Tensor]:
        """Logits and losses of the unchanged model, and its residual streams by hook."""

        def compute() -> dict[str, Tensor]:
            if self.plain is not None:
                logits_BLV, acts = self.plain.logits(self.tokens_BL, [*self.hooks.values()])
                return dict(zip(self.hooks, acts)) | self.with_losses(logits_BLV)
            (logits_BLV, losses_BL), cache = self.model.run_with_cache(
                self.tokens_BL, return_type="both", loss_per_token=True,
                names_filter=list(self.hooks),
            )  # fmt: skip
            acts = {hook: cache[hook] for hook in self.hooks}
            return acts | {"logits": logits_BLV, "losses": losses_BL}

        return self.once("original", compute)

    def with_losses(self, logits_BLV: Tensor) -> dict[str, Tensor]:
        """Logits, and the losses that the bridge computes of them."""
        losses_BL = self.model.loss_fn(logits_BLV, self.tokens_BL, per_token=True)
        return {"logits": logits_BLV, "losses": losses_BL}

    def continued(self, hook: str, changed_BLD: Tensor) -> dict[str, Tensor]:
        """Logits and losses of the model, what stands at `hook` replaced."""
        if self.plain is not None:
            layer = self.hooks[hook]
            return self.with_losses(self.plain.logits_from(self.tokens_BL, layer, changed_BLD))
        logits_BLV, losses_BL = self.model.run_with_hooks(
            self.tokens_BL, fwd_hooks=[(hook, lambda acts, hook: changed_BLD)],
            return_type="both", loss_per_token=True,
        )  # fmt: skip
        return {"logits": logits_BLV, "losses": losses_BL}

    def ablated(self, hook: str, zeros_BLD: Tensor) -> dict[str, Tensor]:
        """Logits and losses of the model, what stands at `hook` replaced by zeros."""
        name = f"ablated-{self.hooks[hook]}"
        return self.once(name, lambda: self.continued(hook, zeros_BLD))

    def residuals(self) -> dict[str, Tensor]:
        """What stands at the hooks; counts, once for the batch, what `total_variance` needs."""

        def compute() -> dict[str, Tensor]:
            return acts_at(self.model, self.hooks, self.tokens_BL, self.plain)

        counted = "residuals" in self.passes
        acts = self.once("residuals", compute)
        if not counted:
            mask_BL = self.token_mask()
            self.n_tokens += int(mask_BL.sum())
            for hook, acts_BLD in acts.items():
                x_ND = acts_BLD[mask_BL].double()
                self.sum_D[hook] = self.sum_D[hook] + x_ND.sum(0)
                self.squares[hook] += float(x_ND.pow(2).sum())
        return acts

    def total_variance(self, hook: str) -> float:
        """Σ‖x − x̄‖² over the tokens of the sparsity batches."""
        return self.squares[hook] - float(self.sum_D[hook].pow(2).sum()) / self.n_tokens


class StoreView:
    """What `run_evals` takes for a store: the shared batches, in one SAE's count of them."""

    def __init__(self, shared: SharedForward) -> None:
        self.shared, self.n_batches, self.n_resets = shared, 0, 0
        self.context_size = shared.store.context_size

    def get_batch_tokens(self, n_prompts: int) -> Tensor:
        """The next batch, (B, L), after the other SAEs' turns."""
        if self.shared.is_hooked():
            raise ExperimentError(
                "core_metrics leaves hooks on the language model while it goes on to the next "
                "batch, where other SAEs are evaluated beside this one: take them off before, or "
                "give them to run_with_hooks"
            )
        stood = generator_states()  # each SAE's evaluation draws by itself, whoever is beside it
        yield_turn()
        set_generator_states(stood)
        self.n_batches += 1
        return self.shared.batch(self.n_batches, n_prompts)

    def reset_input_dataset(self) -> None:
        """Back to the beginning of the text, once for all SAEs."""
        self.n_resets += 1
        self.shared.reset(self.n_resets)


class CountingSAE:
    """An SAE as it is, but that `decode` adds up how far it is off, which costs no pass of its own.

    Attributes:
        target_BLD: what the next `decode` is to reconstruct; None: that isn't counted.
        squared_error: Σ‖x − x̂‖² over the tokens counted so far.
        gatherer: of what is shown of its features; None: nothing is.
    """

    def __init__(
        self, sae: SAELike, shared: SharedForward, gatherer: FeatureGatherer | None = None
    ) -> None:
        self.sae, self.shared, self.gatherer = sae, shared, gatherer
        self.target_BLD: Tensor | None = None
        self.squared_error = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(…, F) -> (…, D)."""
        out_BLD = self.sae.decode(feature_acts)
        if self.target_BLD is not None:
            counts_BL = self.shared.token_mask()
            error_BLD = (self.target_BLD - out_BLD)[counts_BL].double()
            self.squared_error += float(error_BLD.pow(2).sum())
            self.target_BLD = None
            if self.gatherer is not None:
                self.gatherer.add(feature_acts, self.shared.tokens_BL, counts_BL)
        return out_BLD

    def figures(self) -> dict[str, float]:
        """Figures of our own, over the tokens of the sparsity batches (docs/metrics.md).

        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖². SAE-Bench 0.6.0's `explained_variance` averages x² where it
        should average x (evals/core/main.py, mean_act_per_dimension): a constant doesn't score 0.
        mse_per_token: the mean over tokens of ‖x − x̂‖². SAE-Bench's `mse` divides by the tokens of
        a batch once more.
        """
        variance = self.shared.total_variance(self.sae.cfg.hook_name)
        return {
            "fvu": self.squared_error / variance,
            "mse_per_token": self.squared_error / self.shared.n_tokens,
        }


class ModelView:
    """What `run_evals` takes for a model: the passes over the batch that SAEs share.

    Whatever else is asked of it, as by an edited evaluation, is asked of the model itself.
    """

    STOCK = {"return_type": "both", "loss_per_token": True}  # how run_evals calls the model

    def __init__(self, shared: SharedForward, sae: CountingSAE) -> None:
        self.shared, self.sae = shared, sae

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared.model, name)

    def __call__(self, tokens_BL: Any, **options: Any) -> Any:
        ours = tokens_BL is self.shared.shown_BL and options == self.STOCK
        if not ours or self.shared.is_hooked():
            return self.shared.model(tokens_BL, **options)
        original = self.shared.original()
        return original["logits"], original["losses"]

    def run_with_hooks(self, tokens_BL: Any, fwd_hooks: list, **options: Any) -> Any:
        """Logits and losses of the model with a residual stream changed by a hook."""
        hooks = [hook for hook, _ in fwd_hooks]
        shared = self.shared
        ours = tokens_BL is shared.shown_BL and options == self.STOCK
        if not ours or hooks != [self.sae.cfg.hook_name] or shared.is_hooked():
            return shared.model.run_with_hooks(tokens_BL, fwd_hooks=fwd_hooks, **options)
        ((hook, change),) = fwd_hooks
        changed_BLD = change(shared.original()[hook], hook=None)
        run = shared.continued if changed_BLD.any() else shared.ablated
        changed = run(hook, changed_BLD)
        return changed["logits"], changed["losses"]

    def run_with_cache(self, tokens_BL: Any, **options: Any) -> tuple[Any, Any]:
        """None, and the residual streams by hook; the SAE's next reconstruction is of its own."""
        stock = {
            "prepend_bos": False,
            "names_filter": [self.sae.cfg.hook_name],
            "stop_at_layer": self.sae.cfg.hook_layer + 1,
        }
        ours = tokens_BL is self.shared.shown_BL and options == stock
        if not ours or self.shared.is_hooked():
            return self.shared.model.run_with_cache(tokens_BL, **options)
        acts = self.shared.residuals()
        self.sae.target_BLD = acts[self.sae.cfg.hook_name]
        return None, acts
