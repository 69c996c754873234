"""`python -m sae_fast.train MODEL DATASET`: its help, and refusals in one line."""

import pytest
from train_runs import Run

from sae_fast.train import main


def test_k_beside_an_architecture_without_it_is_refused(run_on_model: Run) -> None:
    code, _, err = run_on_model("--arch", "relu")
    assert code == 2
    assert "k belongs to arch topk or batch_topk or matryoshka" in err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--layers", "3"), "layers: GPT2LMHeadModel has blocks 0 to 2, got 3"),
        (("--hook_points", "mlp_uot.1"), "mlp_out.1"),
        (("--text_column", "txt"), "has no column 'txt' (did you mean text?)"),
        (("--ctx_len", "64"), "ctx_len must be at most 32"),
        (("--max_tokens", "10"), "max_tokens = 10 leaves no full step of 64 tokens"),
        (("--heldout_tokens", "100000"), "heldout_tokens must leave documents to train on"),
        (("--init_seeds", "1", "1"), "init_seeds must be different numbers, got 1 1"),
        (("--layer", "1"), "unknown flag --layer (did you mean --layers?)"),
        (("--transcoder",), "a transcoder trains on shards"),
        (("--loss_fn", "kl", "--arch", "matryoshka"), "loss_fn kl is of one reconstruction"),
        (("--loss_fn", "cee"), "loss_fn must be one of 'mse', 'fvu', 'ce', 'kl', got 'cee'"),
        (("--probe_labels", "labels/x", "--probe_loss_coeff", "1"), "'labels/x' lie in shards"),
        (("--resume_from", "latest"), "resume_from needs checkpoint_dir, or run_name"),
        (("--batch_size", "x"), "--batch_size must be a whole number, got 'x'"),
    ],
)
def test_bad_input_is_one_line(run_on_model: Run, flags: tuple[str, ...], line: str) -> None:
    code, _, err = run_on_model(*flags)
    assert code == 2
    (said,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert line in said
    assert said == err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nowhere/model", "TEXTS"), "model: nowhere/model cannot be loaded"),
        (("MODELS/gpt3", "TEXTS"), "did you mean MODELS/gpt2?"),
        (("MODELS/gpt2", "nowhere.jsonl"), "nowhere.jsonl cannot be read: no such file"),
        (("MODELS/gpt2",), "a model and a dataset are needed"),
        (("MODELS/gpt2", "TEXTS", "more"), "unexpected 'more'"),
    ],
)
def test_a_model_or_dataset_that_is_not_there(
    arguments: tuple[str, ...],
    line: str,
    inputs: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def filled(text: str) -> str:
        return text.replace("MODELS", inputs[0]).replace("TEXTS", inputs[1])

    assert main([*map(filled, arguments)]) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert filled(line) in said


def test_help_has_the_flags_of_this_mode(
    inputs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"{inputs[0]}/gpt2", inputs[1], "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--layers", "--init-seeds", "--log-to-wandb", "--save-every", "--ctx-len"):
        assert flag in shown


def test_a_preset_gives_the_sequences_too_unless_flags_do(
    run: Run, inputs: tuple[str, str]
) -> None:
    flags = (f"{inputs[0]}/gpt2", inputs[1], "--preset", "pythia_1_4b", "--heldout_tokens", "0")
    code, _, err = run(*flags)
    assert code == 2
    assert "ctx_len must be at most 32" in err
    assert "got 2048" in err
    code, _, err = run(*flags, "--ctx_len", "16", "--batch_size", "2", "--max_tokens", "640")
    assert code == 2
    assert "d_in must be 16, the width of the activations, got 2048" in err
