"""Forward passes of any language model on a GPU, block by block compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.identity import AS_LOADED, changed
from harness.language_model import LanguageModel, on_same_weights


class CompiledLanguageModel:
    """The same passes on a GPU, sooner; see `LanguageModel`, which is the plain reference.

    Between a block's products stand many small operations, norms and rotations and masks, which
    take longer than the products where each is a kernel of its own. A compiler fuses them.
    """

    def __init__(self, plain: LanguageModel, context: int, backend: str = "inductor") -> None:
        """Args: context: the length of the passes that are to be fast. backend: torch.compile's."""
        self.plain, self.hf, self.name, self.d_model = plain, plain.hf, plain.name, plain.d_model
        self.tokenizer, self.special_token_ids = plain.tokenizer, plain.special_token_ids
        self.context, self.edited, self.compiled = context, False, _Compiled(plain, backend)

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """See `LanguageModel.activations`."""
        fast = not self.edited and tokens_BL.shape[1] == self.context
        return (self.compiled.twin if fast else self.plain).activations(tokens_BL, layers)

    def look(self) -> None:
        """Leaves passes to the plain form where the model isn't as it was loaded.

        Hooks that an edit hangs on its blocks are not on those that were compiled.
        """
        self.edited = self in AS_LOADED and bool(changed(self))


class _Compiled:
    """The model again, on the same weights, its blocks compiled."""

    def __init__(self, plain: LanguageModel, backend: str) -> None:
        hf = on_same_weights(plain.hf)
        self.twin = LanguageModel(hf, plain.tokenizer, plain.name)
        for block in self.twin.blocks:
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)

    def key_parts(self) -> Any:
        """Nothing of it is in a key: it computes what the model does. See `harness.identity`."""
