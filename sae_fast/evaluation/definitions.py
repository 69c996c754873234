"""The definition of every metric of a dictionary, by its name in metrics.json.

A metric that SAEBench's core evaluation (`sae_bench.evals.core`, version 0.6) has too has its name
there. y is a row, or of a transcoder its target, ŷ its reconstruction, e = ŷ − y, f a code in
units of the rows. Every sum runs over all rows, in float64, so that no figure depends on the size
of the batches, but for the ones whose text says so. Rows of norm 0 are left out of averages of
ratios to their norm.
"""

from __future__ import annotations

_COSINES = "over latents, averaged: the largest cosine of a latent's {} row with another latent's"
_ABLATED = "the activations replaced by zeros"
_MEAN = "the activations replaced by their mean over the text"

DEFINITIONS: dict[str, dict[str, str]] = {
    "reconstruction_quality": {
        "explained_variance": "1 − Σ |e|² / Σ |y − mean(y)|², with the mean of each dimension",
        "fvu": "1 − explained_variance",
        "explained_variance_overall": "1 − mean(e²) / var(y), with one variance of all numbers",
        "explained_variance_batch_averaged": (
            "explained_variance of each batch about its own mean, averaged; depends on batch_tokens"
        ),
        "explained_variance_legacy": (
            "1 − |e|² / |y − mean of the batch|², averaged over rows, as SAEBench and SAELens "
            "reported up to 2025; depends on batch_tokens"
        ),
        "mse": "|e|², averaged over rows",
        "mse_per_number": "e², averaged over all numbers",
        "relative_error": "√(Σ |e|² / Σ |y|²)",
        "relative_error_mean": "|e| / |y|, averaged over rows",
        "cossim": "cosine of y and ŷ, averaged over rows",
    },
    "shrinkage": {
        "l2_norm_in": "|y|, averaged over rows",
        "l2_norm_out": "|ŷ|, averaged over rows",
        "l2_ratio": "|ŷ| / |y|, averaged over rows; below 1: shrinkage",
        "relative_reconstruction_bias": (
            "Σ |ŷ|² / Σ ŷ·y, equation 10 of arXiv:2404.16014; below 1: shrinkage"
        ),
    },
    "sparsity": {
        "l0": "active latents by the rule of inference, averaged over rows",
        "l0_training_rule": (
            "active latents by the rule of training, averaged over rows: batch_topk and matryoshka "
            "select the N·k largest of a batch there, and compare with a threshold at inference"
        ),
        "l1": "Σ_j |f_j|, averaged over rows",
    },
    "misc_metrics": {
        "freq_over_1_percent": "share of latents that are active on more than 1 % of the rows",
        "freq_over_10_percent": "share of latents that are active on more than 10 % of the rows",
        "normalized_freq_over_1_percent": "share that these latents have of all activations",
        "normalized_freq_over_10_percent": "share that these latents have of all activations",
        "frac_alive": "share of latents that are active on a row at least; grows with the rows",
        "never_active_fraction": "1 − frac_alive",
        "dead_fraction": (
            "share of latents that are active on no row, or on a share below dead_rate"
        ),
        "dead_rate": "what --dead-percentage-threshold says",
        "silent_in_batch_fraction": (
            "share of latents that are active on no row of a batch, averaged over batches; depends "
            "on batch_tokens"
        ),
        "average_max_encoder_cosine_sim": _COSINES.format("encoder"),
        "average_max_decoder_cosine_sim": _COSINES.format("decoder"),
        "decoder_redundancy": (
            "average_max_decoder_cosine_sim by the name that says what it is; some trainers log it "
            'as "feature absorption", which in SAEBench is a measure by probes'
        ),
        "max_decoder_cosine_sim_p99_9": "99.9th percentile over latents of the largest cosine",
        "mean_squared_decoder_cosine": "(ŵ_i·ŵ_j)², averaged over pairs of different decoder rows",
        "average_encoder_decoder_cosine_sim": (
            "cosine of a latent's encoder row and its decoder row, averaged over latents"
        ),
    },
    "model_performance_preservation": {
        "ce_loss_without_sae": "CE: cross-entropy of the text in nats a predicted token",
        "ce_loss_with_sae": "CE with the reconstructions in place of the activations",
        "ce_loss_increase": "ce_loss_with_sae − ce_loss_without_sae",
        "ce_loss_with_ablation": f"CE with {_ABLATED}",
        "ce_loss_score": (
            "(CE ablated − CE with the reconstructions) / (CE ablated − CE without); near 1 for "
            "any residual stream, so look at ce_loss_increase too"
        ),
        "ce_loss_with_mean_ablation": f"CE with {_MEAN}",
        "ce_loss_score_mean_ablation": "ce_loss_score with the mean in place of zeros",
    },
    "model_behavior_preservation": {
        "kl_div_with_sae": (
            "KL(p ‖ q) a token, p the model's prediction, q the one with the reconstructions"
        ),
        "kl_div_with_ablation": f"KL(p ‖ q) with {_ABLATED}",
        "kl_div_score": "(KL ablated − KL with the reconstructions) / KL ablated",
        "kl_div_with_mean_ablation": f"KL(p ‖ q) with {_MEAN}",
        "kl_div_score_mean_ablation": "kl_div_score with the mean in place of zeros",
    },
    "purity": {
        "token_purity": (
            "share of the commonest token among the 32 rows (--top-rows) on which a latent is "
            "strongest, averaged over latents that are active on as many rows"
        ),
        "token_entropy": "entropy of these tokens in nats, averaged over these latents",
        "token_pure_fraction": "share of these latents whose strongest rows all hold one token",
        "token_commonest_share": "share of the commonest token among all rows, active or not",
        "token_latents": "latents that are active on as many rows",
        "label_purity": "token_purity with labels (--labels) in place of tokens",
        "label_entropy": "token_entropy with labels in place of tokens",
        "label_pure_fraction": "token_pure_fraction with labels in place of tokens",
        "label_commonest_share": "share of the commonest label among all rows that have one",
        "label_latents": "latents that are active on as many rows with a label",
    },
    "sparse_probing": {
        "probe_rows_accuracy": (
            "balanced accuracy on test rows of a logistic regression that tells the rows with a "
            "label from the others, on all numbers of a row, averaged over labels; 0.5 is chance"
        ),
        **{
            f"probe_{size}_latents_accuracy": (
                f"probe_rows_accuracy with the codes of {size} latent{'s' * (size > 1)} in place "
                "of the row: the ones whose mean differs most between both kinds of training rows"
            )
            for size in (1, 2, 5)
        },
        "probe_labels": "labels that have rows enough, of the 32 commonest",
        "probe_train_rows": "rows that probes are trained on",
        "probe_test_rows": "rows that they are tested on: a fifth of the documents, or of the rows",
    },
    "token_stats": {
        "total_tokens_eval_sparsity_variance": "rows of all metrics but the model's",
        "rows_of_norm_0": "rows that are zero",
        "total_tokens_eval_reconstruction": "tokens of the model's KL",
        "predicted_tokens": "tokens of the model's CE",
    },
}
# The reconstruction metrics again, of most rows.
DEFINITIONS["without_largest_norms"] = {
    "rows_left_out": "rows with the largest norms, 0.1 % of all, which the others leave out",
    **{
        name: text
        for name, text in DEFINITIONS["reconstruction_quality"].items()
        if "batch" not in text
    },
}

CAUSAL: dict[str, str] = {
    "loss_change": (
        "CE with the latent ablated − CE, in nats a predicted token; an ablation subtracts "
        "f_j · W_dec[j] from the activations and leaves all else"
    ),
    "attribution": (
        "first-order estimate of loss_change, attribution patching: "
        "−Σ f_j · (∂CE/∂activations · W_dec[j]) over tokens"
    ),
    "kl_div": "KL(p ‖ q) a token, p the model's prediction, q the one with the latent ablated",
    "logit_change": "|change of a logit|, averaged over the vocabulary and over tokens",
    "mass": "|f_j| · |W_dec[j]|, averaged over tokens",
    "frequency": "share of the tokens on which the latent is active",
}

LATENTS: dict[str, str] = {
    "feature_density": "share of the rows on which the latent is active",
    "mean_activation": "|f_j|, averaged over the rows on which it is active",
    "max_activation": "largest |f_j|",
    "consistent_activation_heuristic": ("rows on which it is active, by documents in which it is"),
    "encoder_bias": "b_enc as fold_normalization leaves it",
    "encoder_norm": "norm of the encoder row as fold_normalization leaves it",
    "encoder_decoder_cosine_sim": "cosine of its encoder row and its decoder row",
    "max_encoder_cosine_sim": "largest cosine of its encoder row with another latent's",
    "max_decoder_cosine_sim": "largest cosine of its decoder row with another latent's",
    "attribution": CAUSAL["attribution"],
    "top_token": "commonest token of the rows on which it is strongest; of equal ones the smaller",
    "token_purity": "share of that token among them",
    "token_entropy": "entropy of the tokens of these rows in nats",
    "top_label": "commonest label of the rows with a label on which it is strongest",
    "label_purity": "share of that label among them",
    "label_entropy": "entropy of the labels of these rows in nats",
}
