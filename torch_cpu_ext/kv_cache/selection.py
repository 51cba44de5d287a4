"""Signatures, and the choice of the tokens to keep: schema, fake and reference of each op, side by side."""
