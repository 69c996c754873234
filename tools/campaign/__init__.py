"""Campaigns: many random tries to make sae_fast crash, hang or give a wrong result."""
