"""Backbones: one frozen or tuned model per modality, from its values to feature tokens."""
