"""The optimisers' steps in plain PyTorch, one after the other, as the oracle of tests."""

import torch
from plain_sae import PARAMETERS, plain_terms


class PlainSignum:
    """Bernstein et al. 2018, algorithm 2, with decoupled weight decay."""

    def __init__(self, parameters, *, momentum=0.9, weight_decay=0.0):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.averages = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self, lr):
        with torch.no_grad():
            for w, m in zip(self.parameters, self.averages, strict=True):
                m.copy_(self.momentum * m + (1 - self.momentum) * w.grad)
                w.copy_((1 - lr * self.weight_decay) * w - lr * torch.sign(m))


class PlainScheduleFreeSignum:
    """Schedule-free sign descent by Defazio et al. 2024, with z and x in separate arrays."""

    def __init__(self, parameters, *, momentum=0.9, weight_decay=0.0):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.walks = [parameter.detach().clone() for parameter in parameters]
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self.weights = 0.0

    def step(self, lr):
        self.weights += lr**2
        share, beta = lr**2 / self.weights, self.momentum
        with torch.no_grad():
            for y, z, x in zip(self.parameters, self.walks, self.averages, strict=True):
                z -= lr * (torch.sign(y.grad) + self.weight_decay * y)
                x.copy_((1 - share) * x + share * z)
                y.copy_((1 - beta) * z + beta * x)

    def divide(self, index, norms):
        """Divide a parameter's z and x by the norms to which its y is scaled."""
        for tensors in (self.walks, self.averages):
            tensors[index] /= norms


class OfTorch:
    """An optimiser of torch whose step takes the learning rate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, lr):
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


def plain_rule(rule, parameters, *, momentum=0.9, eps=1e-8, weight_decay=0.0):
    """Return the optimiser of a rule: torch's own if it has one."""
    if rule == "signum":
        return PlainSignum(parameters, momentum=momentum, weight_decay=weight_decay)
    if rule == "schedule_free_signum":
        return PlainScheduleFreeSignum(parameters, momentum=momentum, weight_decay=weight_decay)
    if rule == "sgd":
        options = {"momentum": momentum, "weight_decay": weight_decay}
        return OfTorch(torch.optim.SGD(parameters, **options))
    return OfTorch(torch.optim.AdamW(parameters, eps=eps, weight_decay=weight_decay))


class PlainSteps:
    """The five separate steps of an update, in plain PyTorch on plain autograd."""

    def __init__(self, sae, rule="adam", *, grad_clip=1.0, **options):
        self.sae, self.grad_clip = sae, grad_clip
        self.parameters = [sae.get_parameter(name) for name in PARAMETERS]
        self.optimizer = plain_rule(rule, self.parameters, **options)

    def step(self, lr, batches):
        self.sae.zero_grad()
        sum(sum(plain_terms(self.sae, x).values()) for x in batches).div(len(batches)).backward()
        W_dec = self.sae.W_dec
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or torch.inf)
        self.optimizer.step(lr)
        with torch.no_grad():
            norms = W_dec.norm(dim=1, keepdim=True)
            W_dec /= norms
            if isinstance(self.optimizer, PlainScheduleFreeSignum):
                self.optimizer.divide(PARAMETERS.index("W_dec"), norms)
        return norm
