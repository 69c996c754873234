"""Callbacks of a training: when they are called, how they stop it, and how their errors end it."""

import pytest
import torch

from sae_fast import Callback, SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.training.trainer import TrainingError


def make(activations, callbacks, tmp_path=None, heldout=None, **settings):
    defaults = {"batch_size": 64, "max_steps": 4, "log_every": 2}
    train = TrainConfig(**{**defaults, **settings}, checkpoint_dir=tmp_path and str(tmp_path))
    sae = SAEConfig(d_sae=32, k=4)
    given = {"heldout": heldout, "callbacks": callbacks, "show_progress": False}
    return Trainer(sae, train, activations, **given)


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, trainer):
        self.calls.append(("start", trainer.step))

    def on_step(self, trainer, row):
        assert not torch.is_grad_enabled()
        self.calls.append(("step", trainer.step, row.get("loss") is not None))

    def on_checkpoint(self, trainer, path):
        assert SparseAutoencoder.from_pretrained(path).d_sae == 32
        self.calls.append(("checkpoint", path.name))

    def on_evaluation(self, trainer, figures):
        assert "gram_mean" in figures
        self.calls.append(("evaluation", trainer.step))

    def on_end(self, trainer, error):
        self.calls.append(("end", trainer.summary.get("steps"), error))


def test_each_event_is_told_in_order(activations, heldout, tmp_path):
    recorder = Recorder()
    make(activations, [recorder], tmp_path, heldout, eval_every=0, checkpoint_every=0).train()
    assert recorder.calls == [
        ("start", 0),
        ("checkpoint", "step-00000000"),
        ("step", 1, False),
        ("step", 2, True),
        ("step", 3, False),
        ("evaluation", 4),
        ("checkpoint", "step-00000004"),
        ("step", 4, True),
        ("end", 4, None),
    ]


def test_callbacks_change_no_result(activations):
    plain, watched = make(activations, []), make(activations, [Recorder()])
    for one, other in zip(plain.train().parameters(), watched.train().parameters(), strict=True):
        assert torch.equal(one, other)


class Stopper(Callback):
    def on_step(self, trainer, row):
        if trainer.step == 2:
            trainer.stop()


def test_a_callback_stops_a_training_that_can_be_resumed(activations, tmp_path):
    stopped = make(activations, [Stopper()], tmp_path)
    stopped.train()
    assert stopped.step == 2
    recorder = Recorder()
    resumed = make(activations, [recorder], tmp_path, resume_from="latest")
    resumed.train()
    assert resumed.step == 4
    assert recorder.calls[0] == ("start", 2)
    straight = make(activations, [])
    assert torch.equal(resumed.model().W_enc, straight.train().W_enc)


def test_a_training_that_is_stopped_at_its_start_makes_no_step(activations):
    class Never(Callback):
        def on_start(self, trainer):
            trainer.stop()

    trainer = make(activations, [Never()])
    trainer.train()
    assert trainer.step == 0


def test_a_loop_by_hand_ends_where_a_callback_stops_it(activations, tmp_path):
    with make(activations, [Stopper()], tmp_path) as trainer:
        while not trainer.is_done:
            trainer.advance()
        assert (trainer.step, trainer.saved_step, trainer.is_stopped) == (2, 2, True)
        with pytest.raises(RuntimeError, match=r"cannot advance: it was stopped at step 2"):
            trainer.advance()
    with make(activations, [], tmp_path, resume_from="latest") as trainer:
        while not trainer.is_done:
            trainer.advance()
        assert (trainer.step, trainer.is_stopped) == (4, False)
        with pytest.raises(RuntimeError, match="all its steps are made"):
            trainer.advance()


def failing(method, error):
    def fail(self, trainer, *given):
        raise error

    return type("Mine", (Callback,), {method: fail})()


@pytest.mark.parametrize("method", ["on_start", "on_step", "on_checkpoint", "on_end"])
def test_an_error_ends_the_training_and_leaves_the_directory_free(method, activations, tmp_path):
    recorder = Recorder()
    trainer = make(activations, [recorder, failing(method, KeyError("mood"))], tmp_path)
    words = rf"^step \d: Mine.{method} failed with KeyError: 'mood'"
    with pytest.raises(TrainingError, match=words):
        trainer.train()
    assert recorder.calls[-1][0] == "end"
    assert (recorder.calls[-1][2] is None) == (method == "on_end")
    has_begun = method != "on_start"
    again = make(activations, [], tmp_path, **({"resume_from": "latest"} if has_begun else {}))
    again.train()
    assert again.step == 4


def test_an_error_of_on_end_does_not_hide_the_one_that_ended_the_training(activations, caplog):
    callbacks = [failing("on_step", ValueError("first")), failing("on_end", ValueError("second"))]
    with pytest.raises(TrainingError, match="first"):
        make(activations, callbacks).train()
    assert "Mine.on_end failed with ValueError: second" in caplog.text


@pytest.mark.parametrize(("given", "found"), [(print, "builtin_function"), (Recorder, "Recorder")])
def test_an_object_that_is_no_callback_is_refused(given, found, activations):
    with pytest.raises(ValueError, match=f"derived from sae_fast.Callback.*got {found}"):
        make(activations, [given])


@pytest.mark.parametrize("given", [Recorder(), None, "abc"])
def test_callbacks_that_are_no_list_are_refused(given, activations):
    with pytest.raises(ValueError, match="callbacks must be a list of callbacks, got "):
        make(activations, given)


WRONG_METHODS = {
    r"Mine.on_steps is never called \(did you mean on_step\?\)": ("on_steps", print),
    r"Mine.on_step must take \(self, trainer, row\), got \(self\)": ("on_step", lambda self: 0),
    "Mine.on_step must be a method, got int": ("on_step", 3),
}


@pytest.mark.parametrize("words", WRONG_METHODS)
def test_a_method_that_cannot_be_called_is_refused_before_the_training(words, activations):
    name, method = WRONG_METHODS[words]
    with pytest.raises(ValueError, match=words):
        make(activations, [type("Mine", (Callback,), {name: method})()])


@pytest.mark.parametrize(
    ("method", "work", "words"),
    [
        ("on_step", Trainer.advance, "cannot advance: one of its callbacks is running"),
        ("on_start", Trainer.train, "cannot be opened: one of its callbacks is running"),
    ],
)
def test_a_callback_cannot_make_steps_itself(method, work, words, activations):
    mine = type("Mine", (Callback,), {method: lambda self, trainer, *given: work(trainer)})()
    with pytest.raises(TrainingError, match=f"Mine.{method} failed with RuntimeError: .*{words}"):
        make(activations, [mine]).train()


def test_an_error_says_which_line_of_the_callback_failed(activations):
    def fail(self, trainer, row):
        return row["no such metric"]

    mine = type("Mine", (Callback,), {"on_step": fail})()
    with pytest.raises(TrainingError, match=r"'no such metric' \(test_callbacks.py, line \d+\)"):
        make(activations, [mine]).train()
