"""Adam as one kernel a step, without the bookkeeping around it."""

from collections.abc import Callable
from typing import Any

import torch as th


class FusedAdam(th.optim.Adam):
    """``torch.optim.Adam(fused=True)``: the same arithmetic, state and files.

    On small networks torch spends more time on announcing a step to profilers and on sorting parameters by device and
    type than on the step. Hooks on steps are not called.

    :param params: parameters, or groups of them.
    :param kwargs: those of :class:`torch.optim.Adam`.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **{"fused": True} | kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @th.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step along the gradients that there are."""
        if closure is not None or any(group["amsgrad"] for group in self.param_groups):
            return super().step(closure)
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(not self.state[parameter] for parameters in trained for parameter in parameters):
            return super().step()  # the first one, which makes the state
        for group, parameters in zip(self.param_groups, trained, strict=True):
            states = [self.state[parameter] for parameter in parameters]
            steps = [state["step"] for state in states]
            th._foreach_add_(steps, 1)
            th._fused_adam_(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )
        return None

    step.hooked = True  # type: ignore[attr-defined] # what torch would wrap around a step takes longer than the step
