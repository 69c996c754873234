"""A model is read from a run, from a checkpoint of it, or through a pointer to one."""

import torch

import sae_fast
from sae_fast.autoencoder import SparseAutoencoder


def test_run_directory_is_read_as_its_latest_checkpoint(tmp_path):
    config = sae_fast.SAEConfig(k=3, d_sae=16)
    train = sae_fast.TrainConfig(
        checkpoint_dir=str(tmp_path / "run"), max_steps=4, checkpoint_every=2, batch_size=32
    )
    trained = sae_fast.Trainer(config, train, data=torch.randn(200, 8)).train()
    x = torch.randn(5, 8)
    for place in ("run", "run/checkpoints/latest", "run/checkpoints/step-00000004"):
        sae = SparseAutoencoder.from_pretrained(tmp_path / place)
        assert torch.equal(sae(x), trained(x))
        assert not sae.training
        assert not any(p.requires_grad for p in sae.parameters())
    older = SparseAutoencoder.from_pretrained(tmp_path / "run/checkpoints/step-00000002")
    assert not torch.equal(older.W_enc, trained.W_enc)
    (tmp_path / "run/checkpoints/latest").unlink()
    (tmp_path / "run/checkpoints/latest").write_text("step-00000002\n")
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path / "run").W_enc, older.W_enc)
