"""Time a step of arch slots beside two forms of its formula in PyTorch.

    python -m benchmarks.slots_step --json benchmarks/results/slots_step.json

A whole step (codes, all six terms, backward, AdamW, unit decoder rows) is timed at several numbers
of slots, on 64 tokens of width 768, with six of the slots bound to relations. PyTorch's step has
two forms: with the F x F matrix of correlations, as in the formula, and with equal sums over N x N
matrices of tokens. All start from the same parameters, and their first losses must be equal. Memory
is the peak of two steps, parameters and optimiser states included.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.memory import available_bytes, peak_since_now
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    milliseconds,
    publish,
    ratio,
)
from benchmarks.support.timing import interleave, measure, median_ratio, quiet_rounds, summarize
from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.training.optimizer.row_optimizer import RowOptimizer

N_TOKENS, D_IN, N_RELATIONS, N_ANSWERS = 64, 768, 6, 100
RATE, DECAY = 1e-3, 0.01
LOSS_TOLERANCE = 2e-3
_MATRICES = 6  # F x F float32 matrices that PyTorch's literal form holds at once, as measured


def make_model(n_slots: int, device: torch.device) -> SparseAutoencoder:
    """Return a copy of the model that all implementations start from."""
    config = SAEConfig(
        arch="slots",
        d_in=D_IN,
        d_sae=n_slots,
        n_relations=N_RELATIONS,
        n_answers=N_ANSWERS,
        correlation_pairs="mean",
    )
    sae = SparseAutoencoder(config)
    sae.initialize_(torch.Generator().manual_seed(0))
    return sae.to(device)


def make_batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [N, D], relations [N] and answers [N]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKENS, D_IN, generator=generator)
    relations = torch.randint(N_RELATIONS, (N_TOKENS,), generator=generator)
    answers = torch.randint(N_ANSWERS, (N_TOKENS,), generator=generator)
    return x.to(device), relations.to(device), answers.to(device)


class Ours:
    """sae_fast's step, made of the calls that its trainer makes."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self.sae = make_model(n_slots, device)
        self.optimizer = RowOptimizer(self.sae, weight_decay=DECAY)
        self.x, *labels = make_batch(device)
        self.labels = dict(zip(("relations", "answers"), labels, strict=True))

    def step(self) -> float:
        """Take one step; return its loss."""
        with self.sae.kept_copies(session=self.optimizer):
            loss = self.sae.training_loss(self.x, dense_grad=False, **self.labels)
            loss.total.backward()  # type: ignore[no-untyped-call]
            self.sae.update_fired_(loss.code, len(self.x))
            self.sae.after_step_(loss.code)
            self.optimizer.step(RATE)
            self.optimizer.zero_grad()
        return float(loss.total.detach())


class PlainStep:
    """The step in PyTorch, with a given form of the correlation terms."""

    def __init__(
        self,
        n_slots: int,
        device: torch.device,
        correlations: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    ) -> None:
        sae = make_model(n_slots, device)
        self.config = sae.config
        self.parameters = {name: p.detach().requires_grad_() for name, p in sae.named_parameters()}
        self.adam = torch.optim.AdamW(
            self.parameters.values(), lr=RATE, weight_decay=DECAY, fused=True
        )
        self.x, self.relations, self.answers = make_batch(device)
        self.correlations = correlations

    def loss(self) -> Tensor:
        """Return the sum of all six terms with their coefficients."""
        own, config, free = self.parameters, self.config, self.config.d_sae - N_RELATIONS
        pre_acts = (self.x - own["b_dec"]) @ own["W_enc"].t() + own["b_enc"]
        acts = pre_acts.relu()
        error = acts @ own["W_dec"] + own["b_dec"] - self.x
        wanted = functional.one_hot(self.relations, N_RELATIONS) * config.slot_target
        slots = acts[:, free:].gather(1, self.relations[:, None]) / config.slot_target
        inner = slots * own["W_value_in"][self.relations] + own["b_value_in"][self.relations]
        out = own["W_value_out"][self.relations]
        logits = torch.bmm(inner.relu()[:, None], out)[:, 0] + own["b_value_out"][self.relations]
        independence, orthogonality = self.correlations(acts, free)
        return (
            error.square().sum(1).mean()
            + config.l1_penalty_coeff * acts[:, :free].sum(1).mean()
            + config.alignment_coeff * (pre_acts[:, free:] - wanted).square().sum(1).mean()
            + config.independence_coeff * independence
            + config.orthogonality_coeff * orthogonality
            + config.value_loss_coeff * functional.cross_entropy(logits, self.answers)
        )

    def step(self) -> float:
        """Take one step; return its loss."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        W_dec = self.parameters["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        self.adam.zero_grad()
        return float(loss.detach())


def _units(acts: Tensor) -> tuple[Tensor, Tensor]:
    """Return centred columns of unit length, and which columns vary; the others are 0."""
    centred = acts - acts.mean(0)
    norms = centred.norm(dim=0)
    return centred / norms.clamp_min(1e-12), norms > 1e-6


def by_latents(acts: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Return mean squared correlations within the free slots and between free and bound slots.

    They are computed from the matrix of all pairs of latents.
    """
    units, varies = _units(acts)
    n_free, n_bound = varies[:free].sum(), varies[free:].sum()
    squares = (units[:, :free].t() @ units[:, :free]).square()
    within = squares.sum() - squares.diagonal().sum()
    between = (units[:, :free].t() @ units[:, free:]).square().sum()
    return within / (n_free * (n_free - 1)), between / (n_free * n_bound)


def by_tokens(acts: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Return the means of `by_latents`, computed from matrices of all pairs of tokens."""
    units, varies = _units(acts)
    n_free, n_bound = varies[:free].sum(), varies[free:].sum()
    first, second = units[:, :free] @ units[:, :free].t(), units[:, free:] @ units[:, free:].t()
    within = first.square().sum() - units[:, :free].square().sum(0).square().sum()
    return within / (n_free * (n_free - 1)), (first * second).sum() / (n_free * n_bound)


def implementations(
    n_slots: int, device: torch.device
) -> dict[str, Callable[[], Ours | PlainStep]]:
    """Return the implementations by name; the F x F form only if its matrices fit in memory."""
    makers: dict[str, Callable[[], Ours | PlainStep]] = {
        "sae_fast": lambda: Ours(n_slots, device),
        "PyTorch, N x N": lambda: PlainStep(n_slots, device, by_tokens),
    }
    if _MATRICES * 4 * n_slots**2 < available_bytes(device) / 2:
        makers["PyTorch, F x F"] = lambda: PlainStep(n_slots, device, by_latents)
    return makers


def run_size(n_slots: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure the memory of each implementation, then their times, interleaved."""
    makers = implementations(n_slots, device)
    memory, first = {}, {}
    for name, make in makers.items():
        gc.collect()
        peak = peak_since_now(device)
        implementation = make()
        first[name] = implementation.step()
        implementation.step()
        memory[name] = peak.above()
        del implementation
    for name, loss in first.items():
        if abs(loss / first["sae_fast"] - 1) > LOSS_TOLERANCE:
            raise RuntimeError(f"{name}: first loss {loss:.6g}, sae_fast's {first['sae_fast']:.6g}")
    gc.collect()
    made = {name: make() for name, make in makers.items()}
    for implementation in made.values():
        implementation.step()
    samplers = {name: lambda c=c: measure(c.step, device) for name, c in made.items()}
    samples = interleave(samplers, rounds)
    quiet = len(quiet_rounds(list(samples.values())))
    found: dict[str, Any] = {}
    for name, series in samples.items():
        summary = summarize(series)
        found[name] = {
            "seconds": summary.median,
            "minimum": summary.minimum,
            "maximum": summary.maximum,
            "over_sae_fast": median_ratio(series, samples["sae_fast"]),
            "peak_bytes": memory[name],
            "first_loss": first[name],
        }
    return {"contestants": found, "rounds": rounds, "quiet_rounds": quiet}


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the table as Markdown."""
    names = ["sae_fast", "PyTorch, N x N", "PyTorch, F x F"]
    body = []
    for n_slots, found in result["sizes"].items():
        for name in names:
            if (row := found["contestants"].get(name)) is None:
                body.append([f"{int(n_slots):,}", name, "does not fit", "", "", ""])
                continue
            spread = f"{milliseconds(row['minimum'])} to {milliseconds(row['maximum'])}"
            times = [milliseconds(row["seconds"]), spread, ratio(row["over_sae_fast"])]
            body.append([f"{int(n_slots):,}", name, *times, f"{row['peak_bytes'] / 2**30:.2f}"])
    headings = ["slots", "step", "ms", "min to max", "relative to sae_fast", "peak GiB"]
    about = (__doc__ or "").split("\n\n")[2].strip()
    parts = ["# Steps of arch slots", "", about, "", markdown_table(headings, body), ""]
    return "\n".join([*parts, machine_line(result["machine"]), "", f"`{result['command']}`"])


def main() -> None:
    """Run, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.slots_step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--slots", default="2006,10006,100006", help="numbers of slots")
    parser.add_argument("--rounds", type=int, default=7)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_or_exit(options.device)
    sizes = {n: run_size(int(n), options.rounds, device) for n in options.slots.split(",")}
    result = {"sizes": sizes, "machine": describe_machine(device)}
    result["command"] = command_line("benchmarks.slots_step")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
