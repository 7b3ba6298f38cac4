"""A family's own LM head apart from its trunk, so that logits can be made for some states at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lmdqn.errors import UserError
from lmdqn.model.loading import hidden_size

TRIAL_TOKENS = 3


@contextmanager
def head_reads(model: Any, swap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While inside, the LM head reads `swap(hidden)` in place of the (B, L, H) hidden states it is given."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (swap(inputs[0]),))
    try:
        yield
    finally:
        hook.remove()


class LMHead:
    """From what the LM head reads to logits, (n, H) -> (n, V).

    The model's own `forward` runs with a stub in its decoder's place and the wanted states given to the head, so
    what a family does after its head (soft-cap, scale, bias, an adapter) is done by the family's own code.
    """

    def __init__(self, model: Any):
        """Try it on a few tokens.

        Raises:
            UserError: the logits are not those of the whole model.
        """
        self.model = model
        seen: list[Any] = []  # what the decoder gives, then what the head reads

        def keep(_: nn.Module, inputs: Any, output: Any = None) -> None:
            seen.append(inputs[0] if output is None else output)

        hooks = (
            model.get_decoder().register_forward_hook(keep),
            model.get_output_embeddings().register_forward_pre_hook(keep),
        )
        with torch.no_grad(), torch.random.fork_rng():  # dropout's numbers are as if there had been no trial
            logits = model(**self._any_inputs(TRIAL_TOKENS), use_cache=False).logits.squeeze(0)
            for hook in hooks:
                hook.remove()
            decoder_output, hidden = seen
            self._output_kind = type(decoder_output)
            apart = self(hidden[0])
        tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2
        if not torch.allclose(apart, logits, rtol=tolerance, atol=tolerance * float(logits.float().std())):
            raise UserError(
                f"the LM head of this {model.config.model_type} model cannot be applied apart from it: "
                "set optimisation.vocabulary_chunk_mib=null"
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        stub = self._output_kind(last_hidden_state=hidden[None, :1])
        decoder = self.model.get_decoder()
        with (
            forward_replaced(decoder, lambda *_, **__: stub),
            head_reads(self.model, lambda _: hidden[None]),
            _gradients_add_in_place(self.model.get_output_embeddings()),
        ):
            return self.model(**self._any_inputs(1), use_cache=False).logits.squeeze(0)

    def _any_inputs(self, tokens: int) -> dict[str, Any]:
        weight = self.model.get_output_embeddings().weight
        ids = torch.arange(tokens, device=weight.device)[None]
        if not self.model.config.is_encoder_decoder:
            return {"input_ids": ids}
        encoded = torch.zeros(1, 1, hidden_size(self.model), device=weight.device, dtype=self.model.dtype)
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "decoder_input_ids": ids}


class _Linear(torch.autograd.Function):
    """`F.linear`, but its weight's gradient is a matrix of its own, to which autograd adds the next chunk's in place.

    That of `F.linear` is a view, to which autograd adds by making a third matrix as large as the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return nn.functional.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (hidden, weight) = gradients, ctx.saved_tensors  # (1, n, V); (1, n, H), (V, H)
        wanted = ctx.needs_input_grad
        rows, inputs = gradient.flatten(0, -2), hidden.flatten(0, -2).to(gradient.dtype)  # autocast has its own dtype
        return (
            (gradient @ weight.to(gradient.dtype)).to(hidden.dtype) if wanted[0] else None,
            (rows.T @ inputs).to(weight.dtype) if wanted[1] else None,
            rows.sum(0).to(weight.dtype) if wanted[2] else None,
        )


def _gradients_add_in_place(head: Any) -> AbstractContextManager[None]:
    """While inside, a plain linear head works by `_Linear`; any other (an adapter, an offloaded one) as it does."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return nullcontext()
    return forward_replaced(head, lambda hidden: _Linear.apply(hidden, head.weight, head.bias))


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, the module works by `forward`; its own, or what had been put there before, comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
