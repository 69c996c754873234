"""A small GPT-2 that knows the biographies: prompts, training, and activations in and out.

Layers are counted from 0; the activation of layer L is the residual stream after block L. All is
read and replaced at the last token of a prompt, where the model must say the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.ground_truth.biographies.text import PADDING, START, Biographies, Sentence
from sae_fast.tensor_files import checked_tensors, load_tensors, save_tensors

MODEL_CONFIG, MODEL_TENSORS = "config.json", "model.safetensors"
BATCH = 1024  # prompts, where nothing is trained


@dataclass(frozen=True)
class Prompts:
    """Sentences as tokens.

    Attributes:
        tokens: [N, T] int64, padded on the right, without the answers.
        last: [N] int64, where the last token of each stands.
        answers: [N] int64, the tokens that come next.
    """

    tokens: Tensor
    last: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return self.tokens.size(0)

    def __getitem__(self, rows: Tensor | slice) -> Prompts:
        return Prompts(self.tokens[rows], self.last[rows], self.answers[rows])


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size and training of the language model.

    Attributes:
        layers: blocks.
        d_model: width of the residual stream.
        heads: of attention, in every block.
        steps: of training.
        batch_size: sentences in a step.
        learning_rate: of AdamW, at its peak.
        seed: of the weights and the order of the sentences.
    """

    layers: int
    d_model: int
    heads: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int


class BiographyModel:
    """A GPT-2 and the biographies that it knows.

    Args:
        network: a GPT2LMHeadModel of transformers.
        biographies: what its vocabulary comes from.
    """

    def __init__(self, network: Any, biographies: Biographies) -> None:
        self.network = network.eval()
        self.biographies = biographies
        self._tokens = {word: token for token, word in enumerate(biographies.vocabulary)}

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.network.transformer.h)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.network.config.n_embd)

    def answer_token(self, entity: int, relation: int) -> int:
        """Return the token of an answer."""
        return self._tokens[self.biographies.answer(entity, relation)]

    def answer_tokens(self, relation: int) -> Tensor:
        """Return the tokens [A] of all answers of a relation."""
        words = self.biographies.relations[relation].answers
        return torch.tensor([self._tokens[word] for word in words])

    def prompts(self, sentences: Sequence[Sentence]) -> Prompts:
        """Return sentences as tokens."""
        rows = [[self._tokens[word] for word in self._words(sentence)] for sentence in sentences]
        tokens = torch.full((len(rows), max(map(len, rows))), self._tokens[PADDING])
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        answers = [self.answer_token(item.entity, item.relation) for item in sentences]
        last = torch.tensor([len(row) - 1 for row in rows])
        return Prompts(tokens, last, torch.tensor(answers))

    def logits(self, prompts: Prompts) -> Tensor:
        """Return the scores [N, words] of the next token."""
        hidden = self.network.transformer(prompts.tokens, use_cache=False).last_hidden_state
        scores: Tensor = self.network.lm_head(hidden[torch.arange(len(prompts)), prompts.last])
        return scores

    @torch.no_grad()
    def next_tokens(
        self,
        prompts: Prompts,
        layer: int | None = None,
        activations: Tensor | None = None,  # [N, D]
    ) -> Tensor:
        """Return the most probable next tokens [N], with `activations` in place of the layer's."""
        answers = []
        for begin in range(0, len(prompts), BATCH):
            part = prompts[begin : begin + BATCH]
            with ExitStack() as stack:
                if layer is not None and activations is not None:
                    rows = activations[begin : begin + BATCH]
                    stack.enter_context(self._replacing(layer, part.last, rows))
                answers.append(self.logits(part).argmax(1))
        return torch.cat(answers)

    def accuracy(self, prompts: Prompts) -> float:
        """Return the share of the prompts after which the answer comes."""
        return float((self.next_tokens(prompts) == prompts.answers).double().mean())

    @torch.no_grad()
    def activations(
        self, prompts: Prompts, layers: Sequence[int]
    ) -> Iterator[tuple[slice, dict[int, Tensor]]]:
        """Yield the activations [n, D] of these layers, some prompts at a time."""
        for begin in range(0, len(prompts), BATCH):
            part = prompts[begin : begin + BATCH]
            by_layer: dict[int, Tensor] = {}
            with ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(self._keeping(layer, part.last, by_layer))
                self.network.transformer(part.tokens, use_cache=False)
            yield slice(begin, begin + len(part)), by_layer

    def save(self, directory: Path) -> None:
        """Write the network; transformers' from_pretrained reads it too."""
        directory.mkdir(parents=True, exist_ok=True)
        self.network.config.to_json_file(directory / MODEL_CONFIG)
        tensors = {name: tensor.detach() for name, tensor in self.network.named_parameters()}
        save_tensors(directory / MODEL_TENSORS, tensors, {"format": "pt"})

    @classmethod
    def load(cls, directory: Path, biographies: Biographies) -> BiographyModel:
        """Read the files that `save` wrote; raise OSError or ValueError, naming the file."""
        transformers = _transformers()
        for name in (MODEL_CONFIG, MODEL_TENSORS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory}: no language model, it has no {name}")
        config = transformers.GPT2Config.from_pretrained(directory)
        try:
            network = transformers.GPT2LMHeadModel(config)
        except ValueError as error:
            raise ValueError(f"{directory / MODEL_CONFIG}: {error}") from None
        parameters = dict(network.named_parameters())  # those that are one tensor once
        path = directory / MODEL_TENSORS
        try:
            tensors = checked_tensors(path, load_tensors(path), parameters)
        except ValueError as error:
            raise ValueError(f"{error}: not the tensors of {MODEL_CONFIG}") from None
        network.load_state_dict(tensors, strict=False)
        if config.vocab_size != len(biographies.vocabulary):
            raise ValueError(
                f"{directory}: a model of {config.vocab_size} words, "
                f"the biographies have {len(biographies.vocabulary)}"
            )
        return cls(network, biographies)

    def _words(self, sentence: Sentence) -> list[str]:
        return [START, *self.biographies.prompt(sentence).split()]

    @contextmanager
    def _replacing(self, layer: int, last: Tensor, rows: Tensor) -> Iterator[None]:
        def put(_module: Any, _inputs: Any, hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[torch.arange(len(last)), last] = rows.to(hidden.dtype)
            return hidden

        with self._hooked(layer, put):
            yield

    @contextmanager
    def _keeping(self, layer: int, last: Tensor, by_layer: dict[int, Tensor]) -> Iterator[None]:
        def keep(_module: Any, _inputs: Any, hidden: Tensor) -> None:
            by_layer[layer] = hidden[torch.arange(len(last)), last]

        with self._hooked(layer, keep):
            yield

    @contextmanager
    def _hooked(self, layer: int, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        handle = self.network.transformer.h[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def train_language_model(
    biographies: Biographies,
    config: LanguageModelConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> BiographyModel:
    """Train a GPT-2 on the answers of all sentences; a seed gives the same model every time.

    Args:
        biographies: the facts to learn.
        config: size and training.
        report: called after each step with its number, from 1, and its loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = BiographyModel(_network(biographies, config), biographies)
        prompts = model.prompts(biographies.sentences())
        model.network.train()
        optimizer = torch.optim.AdamW(
            model.network.parameters(),
            config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        warmup = max(1, config.steps // 20)
        for step, rows in enumerate(_batches(len(prompts), config)):
            rate = min((step + 1) / warmup, (config.steps - step) / (config.steps - warmup + 1))
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            batch = prompts[rows]
            loss = torch.nn.functional.cross_entropy(model.logits(batch), batch.answers)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
            report(step + 1, float(loss.detach()))
    model.network.eval()
    return model


def _batches(count: int, config: LanguageModelConfig) -> Iterator[Tensor]:
    """Yield the rows of each step: every sentence once an epoch, in another order each time."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[: config.batch_size]
        order = order[config.batch_size :]


def _network(biographies: Biographies, config: LanguageModelConfig) -> Any:
    transformers = _transformers()
    longest = max(
        len(template.split()) + 2  # the start, and a name of two words
        for relation in biographies.relations
        for template in relation.templates
    )
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(biographies.vocabulary),
            n_positions=longest,
            n_embd=config.d_model,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own in one op, a fifth of the step
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=biographies.vocabulary.index(START),
            eos_token_id=biographies.vocabulary.index(PADDING),
        )
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "biographies need transformers: install it (pip install 'sae_fast[biographies]')"
        ) from error
    return transformers
